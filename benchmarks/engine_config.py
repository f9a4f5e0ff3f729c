"""What the engine benchmark is asked, and the sizes of its workloads. Without torch, so that its help is quick."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bylaw.model.settings import require

NAMES = ("equal", "varied", "prefix", "chains", "labels")
BY_HAND = ("prefix, cache reused by hand", "labels, cache reused by hand")
CUDA_ONLY = ("decode at 2k context", "graphs against eager")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each workload asks for, in tokens unless it says otherwise. A range is from, to, both included."""

    requests: int = 64
    """Requests of [equal] and [prefix]."""
    prompt: int = 64
    """The prompts of [equal], and a request's own tokens in [prefix]."""
    new: int = 64
    """New tokens of [equal] and [prefix]."""
    varied_requests: int = 96
    varied: tuple[int, int] = (8, 128)
    """Prompts and new tokens of [varied]."""
    prefix: int = 1024
    """What the requests of [prefix] have in common."""
    shots: int = 1024
    """The five examples before a critique, a revision or a comparison."""
    chains: int = 8
    """Chains of [chains]."""
    rounds: int = 4
    question: int = 32
    said: tuple[int, int] = (32, 48)
    """An answer, a critique or a revision."""
    ask: int = 32
    """A request to criticise or to revise by a principle."""
    pairs: int = 1
    """Pairs of answers to label."""
    principles: int = 16
    dialogue: int = 48
    principle: tuple[int, int] = (24, 40)
    frame: int = 8
    """What a comparison's template writes around principle and answers."""
    decode_context: int = 2048
    """Where the rows of the decode workload end."""
    decode_new: int = 128

    def longest(self) -> dict[str, int]:
        """The longest text of each workload, in tokens."""
        said, label = self.said[1], self.dialogue + self.principle[1] + 2 * self.said[1] + self.frame
        return {
            "equal": self.prompt + self.new,
            "varied": 2 * self.varied[1],
            "prefix": self.prefix + self.prompt + self.new,
            "chains": self.shots + self.question + 2 * self.ask + 3 * said,
            "labels": self.shots + label + 1,
        }

    def within(self, context: int) -> "Sizes":
        """These sizes with prefix and examples cut so that everything fits the context.

        Raises ValueError for a context that is too short for the rest and 16 tokens of those.
        """
        rest = replace(self, prefix=0, shots=0).longest()
        least = max(rest.values()) + 16
        if context < least:
            raise ValueError(
                f"the model's context of {context} tokens is too short; the workloads want at least {least}"
            )
        own = {"prefix": context - rest["prefix"], "shots": context - max(rest["chains"], rest["labels"])}
        return replace(self, **{name: min(getattr(self, name), room) for name, room in own.items()})


QUICK = Sizes(
    requests=6, prompt=6, new=5, varied_requests=8, varied=(2, 9), prefix=40, shots=30, chains=3, rounds=2,
    question=5, said=(3, 5), ask=4, pairs=2, principles=3, dialogue=5, principle=(3, 5), frame=2,
    decode_context=48, decode_new=8,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What to measure, against what, and where the records go."""

    peer: Literal["transformers", "none"] = "transformers"
    """The other side; with none, only ours is timed."""
    model: Path | None = None
    """A checkpoint of your own; without it, a random model of `shape`."""
    shape: Literal["llama-30m", "qwen2-1.5b"] = "llama-30m"
    """The random model's."""
    workload: tuple[str, ...] = ()
    """Workloads; all, when none is named."""
    repeats: int = 5
    """Times that each side runs each workload, in turn."""
    threads: int = 1
    """Of torch, on a CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and cache, on both sides."""
    out: Path | None = None
    """Records are appended here, one JSON line for each workload."""
    quick: bool = False
    """A tiny model, tiny sizes and one repetition: to test the benchmark itself."""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        known = (*NAMES, *BY_HAND, *(CUDA_ONLY if self.device == "cuda" else ()))
        for name in self.workload:
            require(name in known, "workload", name, "; ".join(known))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The workloads to run, in their order."""
        known = (*NAMES, *BY_HAND, *(CUDA_ONLY if self.device == "cuda" else ()))
        by_hand = BY_HAND if self.peer == "none" else ()  # those rows are about the peer
        return tuple(name for name in known if name in (self.workload or known) and name not in by_hand)

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else Sizes()
