"""What the training benchmark is asked, and the sizes of its workloads. Without torch, so that its help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bylaw.model.settings import require

Kind = Literal["sft", "reward", "ppo"]
COMPARED: dict[str, Kind] = {
    "sft_padded": "sft",
    "sft_best": "sft",
    "reward": "reward",
    "ppo_separate": "ppo",
    "ppo_shared": "ppo",
}
# Of both sides.
OPTIM: dict[str, Any] = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
PPO: dict[str, Any] = {
    "learning_rate": 1e-5, "adam_epsilon": 1e-8, "clip": 0.2, "value_clip": 0.2, "gamma": 1.0, "gae_lambda": 0.95,
    "kl_coef": 0.05, "missing_eos_penalty": 1.0,
}  # fmt: skip
ALONE = ("sft_step", "ppo_iteration")


@dataclass(frozen=True)
class Way:
    """One way to run the Trainer on texts of many lengths."""

    flat: bool
    """Without padding: one long row, whose positions tell the texts apart; else padded to the longest of a batch."""
    micro: int
    """In how many pieces a step's batch goes through the model."""
    sort: bool
    """Texts of a like length together, the longest first, as Trainer's group_by_length has it within 50 batches."""

    def __str__(self) -> str:
        words = ["DataCollatorWithFlattening" if self.flat else "padded", f"in {self.micro}" if self.micro > 1 else ""]
        return ", ".join(filter(None, [*words, "sorted by length" if self.sort else ""]))


KINDS = ((False, False), (True, False), (False, True))  # flat, sort
WAYS = {str(way): way for flat, sort in KINDS for way in (Way(flat, 1, sort), Way(flat, 4, sort))}


def ways(workload: str) -> list[str]:
    """The peer's ways that may be the fastest for a workload; "" where it has but one."""
    if workload == "sft_best":
        return list(WAYS)
    return [name for name, way in WAYS.items() if not way.flat and not way.sort] if workload == "sft_padded" else [""]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much one run of each workload holds. Lengths are in tokens, long-tailed: a mean, and the longest."""

    examples: int = 128
    """Of supervised training."""
    batch: int = 32
    """Examples per optimiser step."""
    example: tuple[float, int] = (100.0, 256)
    pairs: int = 64
    """Of the reward model."""
    pair_batch: int = 16
    """Pairs per optimiser step."""
    prompt: tuple[float, int] = (60.0, 128)
    """What the two answers of a pair have in common."""
    answer: tuple[float, int] = (50.0, 128)
    episodes: int = 32
    """Of PPO, in one iteration."""
    question: tuple[float, int] = (48.0, 144)
    """The prompt of an episode."""
    response: tuple[float, int] = (38.4, 96)
    """40 % of the longest, as the policy happens to end."""
    epochs: int = 4
    minibatches: int = 4
    length: int = 2048
    """Of each sequence where ours is measured alone."""
    sequences: int = 16
    """Of one such step."""


QUICK = Sizes(
    examples=12, batch=4, example=(10.0, 24), pairs=8, pair_batch=4, prompt=(5.0, 9), answer=(4.0, 9), episodes=8,
    question=(5.0, 12), response=(4.8, 12), epochs=2, minibatches=2, length=48, sequences=2,
)  # fmt: skip
LARGE = Sizes(
    episodes=64, question=(256.0, 512), response=(256.0, 256), epochs=1, length=2048, sequences=16,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to measure, against what, and where the records go."""

    peer: Literal["trl", "none"] = "none"
    """The other side: Transformers and TRL, on this CPU; with none, ours alone and its share of the device's peak."""
    trl_ppo: Path | None = None
    """A folder with trl==1.12.0, the last of those with PPO: pip install --no-deps --target FOLDER trl==1.12.0. Not
    wanted where that version is the one installed."""
    workload: tuple[str, ...] = ()
    """Workloads; all, when none is named."""
    shape: Literal["llama-5m", "tiny", "qwen2-1.5b"] = "llama-5m"
    """The random model's."""
    repeats: int = 3
    """Times that each side runs each workload, in turn."""
    threads: int = 1
    """Of torch, on a CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    out: Path | None = None
    """Records are appended here, one JSON line for each workload."""
    quick: bool = False
    """A tiny model, tiny sizes and one repetition: to test the benchmark itself."""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        for name in self.workload:
            require(name in self._known, "workload", name, "; ".join(self._known))
        small = self.shape != "qwen2-1.5b"
        require(self.peer == "none" or small, "shape", self.shape, "llama-5m, tiny (with --peer trl)")
        require(self.peer == "none" or self.device == "cpu", "device", self.device, "cpu (with --peer trl)")

    @property
    def _known(self) -> tuple[str, ...]:
        return tuple(COMPARED) if self.peer == "trl" else ALONE

    @property
    def chosen(self) -> tuple[str, ...]:
        """The workloads to run, in their order."""
        return tuple(name for name in self._known if name in (self.workload or self._known))

    @property
    def sizes(self) -> Sizes:
        if self.quick or self.shape == "tiny":
            return QUICK
        return LARGE if self.shape == "qwen2-1.5b" else Sizes()

    @property
    def model(self) -> str:
        return "tiny" if self.quick else self.shape
