"""The recipe: everything a run needs to know, in one schema. A TOML file sets it, and flags go over the file."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from bylaw.constitution.schema import Stage
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.settings import require
from bylaw.rlaif.config import (
    CompareConfig,
    DPOConfig,
    LabelConfig,
    PPOConfig,
    RemoteConfig,
    RewardConfig,
    check_server,
    is_server,
)
from bylaw.sl_cai.config import FinetuneConfig, ReviseConfig

Schema = TypeVar("Schema")
STAGES = ("revise", "finetune", "compare", "label", "reward", "ppo")
"""In the order in which each needs what those before it made."""
TRAINING = ("finetune", "reward", "ppo", "dpo")
EVERY_STAGE = (*STAGES, "dpo")
"""With the other last stage, which needs no reward model."""
OWN_JUDGES = ("base", "sl-cai")
"""Checkpoints of the run itself, by the names that `judge` has for them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run from a base checkpoint, a constitution and prompts to a model trained by the constitution."""

    out: Path
    """Folder of the run. Every stage writes a folder of its own in it."""
    base: Path
    """Base checkpoint: a Hugging Face folder."""
    prompts: Path
    """Prompts that call for harm (JSONL with `prompt` or `messages`, or hh-rlhf): they are answered, criticised,
    revised.
    """
    helpful: str = ""
    """File of harmless prompts, whose answers are mixed in as they are; empty for none."""
    constitution: str = "default"
    """`default`, `village`, or a TOML file."""
    examples: str = ""
    """File of examples for revise.shots and label.shots; empty takes the one beside the constitution,
    NAME.examples.toml.
    """
    helpful_preferences: str = ""
    """File of preferences for helpful answers, TRL's or our own records, mixed into the training pairs at
    reward.helpful_ratio and dpo.helpful_ratio. The run keeps those that it takes.
    """
    seed: int = 0
    """Draws everything."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one. Of torchrun's processes each takes a GPU of its own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights: float32 on a CPU; on a GPU bfloat16, trained with float32 masters. bfloat16 is slow on a CPU."""
    tensor_parallel: int = 1
    """Of torchrun's processes, how many share out each matrix; the others share out the data."""
    timeout_minutes: float = 30.0
    """How long torchrun's processes wait for one that is late."""
    resume: bool = True
    """Go on where a run stopped in this folder; false refuses a folder in which a stage was begun."""
    last: Literal["ppo", "dpo"] = "ppo"
    """How `bylaw run` ends: PPO against a reward model, or DPO on the labels, without one."""
    judge: str = "base"
    """The model that labels pairs: `base`, `sl-cai`, a checkpoint's folder, or the URL of an OpenAI-compatible server,
    such as `https://HOST/v1`, whose settings are in [judge_server].
    """
    prompt_limit: int = 0
    """Use only the first so many prompts of each file; 0 uses all."""
    max_prompt_tokens: int = 0
    """Leave out prompts of more tokens, and count them; 0 takes all, and one that is too long stops the run."""
    judge_server: RemoteConfig = field(default_factory=RemoteConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    revise: ReviseConfig = field(default_factory=ReviseConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those of `bylaw run`."""
        if self.last == "ppo" and self.ppo.reward == "judge":
            return ("revise", "finetune", "ppo")
        return STAGES if self.last == "ppo" else (*(name for name in STAGES if name not in ("reward", "ppo")), "dpo")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63 - 1, "seed", self.seed, "0 to 2^63 - 2")
        require(self.tensor_parallel >= 1, "tensor_parallel", self.tensor_parallel, "1 or more")
        require(0 < self.timeout_minutes <= 1e6, "timeout_minutes", self.timeout_minutes, "above 0, up to 1e6")
        whole = self.tensor_parallel == 1 or not self.lora.rank
        require(whole, "tensor_parallel", self.tensor_parallel, "1 with lora.rank above 0: adapters are not cut")
        require(bool(self.judge), "judge", self.judge, "base, sl-cai, a folder or a URL")
        if is_server(self.judge):
            check_server(self.judge)
            model = self.judge_server.model
            require(bool(model), "judge_server.model", model, "the model's name at the server that judges")
        require(self.prompt_limit >= 0, "prompt_limit", self.prompt_limit, "0 (all) or more")
        require(self.max_prompt_tokens >= 0, "max_prompt_tokens", self.max_prompt_tokens, "0 (no limit) or more")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on the village."""

    out: Path
    """Folder of the run."""
    seed: int = 0
    """Draws everything: texts, labels, orders."""


@dataclass(frozen=True, kw_only=True)
class AmendConfig:
    """What an amended constitution would change in a finished run; with `--out`, the run made by it."""

    out: Path | None = None
    """Folder of a new run, made from the first stage that the change reaches; what comes before it is copied."""
    examples: str = ""
    """File of examples to show by the amended constitution, of use when one goes by a principle that is taken out;
    empty: the run's own.
    """
    base: Path | None = None
    """Where the run's base lies now, if its folder has moved."""
    json: bool = False
    """Print JSON instead of text."""


def asked_at(recipe: Recipe, stage: str) -> tuple[Stage, tuple[str, ...]]:
    """What of a constitution reaches the prompts of a pipeline stage: principles for which use, and which templates."""
    if stage == "revise":
        return "critique", ("critique", "revision") if recipe.revise.critiques else ("direct",)
    if stage == "ppo":  # where the judge gives marks
        return "comparison", ("rating", "rating_prefix")
    thinks = ("thought_prefix",) if recipe.label.thoughts else ()
    return "comparison", ("question", "comparison", "answer_prefix", *thinks)


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Paths in it are taken from the folder that it lies in.

    Raises FileNotFoundError, or ValueError naming the file and the key: for TOML that cannot be read, an unknown key
    (with a suggestion), a value of the wrong type or out of range, and a required key that is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte-order mark first
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    return _read(Recipe, _anchored(table, path.parent.absolute()), str(path))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every setting spelled out and every path absolute: `load_recipe` reads the same recipe back,
    wherever the file lies.
    """
    plain = _anchored(as_table(recipe), Path.cwd())
    tables = {key: value for key, value in plain.items() if isinstance(value, dict)}
    lines = [_line(key, value) for key, value in plain.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(_line(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def as_table(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values; paths made absolute, so that they mean the same from anywhere."""
    return {key: _plain(value) for key, value in dataclasses.asdict(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value.absolute()) if isinstance(value, Path) else value


def _anchored(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's table with its paths taken from `folder`. What is empty is no path, nor is a constitution's
    name, a judge's or its URL.
    """
    named = [key for key in ("out", "base", "prompts", "helpful", "examples", "helpful_preferences") if table.get(key)]
    if str(table.get("constitution", "")).endswith(".toml"):
        named.append("constitution")
    judge = table.get("judge")
    if isinstance(judge, str) and judge and judge not in OWN_JUDGES and not is_server(judge):
        named.append("judge")
    table = table | {key: str(folder / table[key]) for key in named if isinstance(table[key], str)}
    ppo = table.get("ppo")
    if isinstance(ppo, dict) and isinstance(ppo.get("rewards"), list | tuple):
        rewards = [str(folder / one) if isinstance(one, str) else one for one in ppo["rewards"]]
        table["ppo"] = ppo | {"rewards": rewards}
    return table


def _line(key: str, value: Any) -> str:
    # TOML writes these as JSON does, but for infinity, which it calls inf, and the character DEL, which it wants
    # escaped.
    written = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return f"{key} = {written}".replace("\x7f", "\\u007f")


def _read(schema: type[Schema], table: Mapping[str, Any], where: str) -> Schema:
    hints = get_type_hints(schema)
    for key in table:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{where}: unknown key {key!r}{hint} Allowed: {', '.join(hints)}")
    required = [f.name for f in dataclasses.fields(schema) if _is_required(f) and f.name not in table]  # type: ignore[arg-type]
    if required:
        raise ValueError(f"{where}: missing {', '.join(required)}")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return schema(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_required(item: "dataclasses.Field[Any]") -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} = {value!r}: a table [{where.rsplit(' ')[-1]}] is wanted")
        return _read(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        require(value in get_args(hint), where, value, " or ".join(map(repr, get_args(hint))))
        return value
    if get_origin(hint) is tuple:  # of text
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        require(texts, where, value, "a list of texts")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    expected = str if hint is Path else hint
    require(type(value) is expected, where, value, f"a value of type {expected.__name__}")
    return Path(value) if hint is Path else value
