"""`bylaw chat`: talk to a checkpoint."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bylaw.model.settings import SamplingSettings, require
from bylaw.words import printable

LAST_FIRST = ("ppo/rl-cai", "dpo/dpo-cai", "finetune/sl-cai", "base")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A talk with a checkpoint, or with the last one of a run: RL-CAI, else DPO-CAI, else SL-CAI. An empty line
    begins a new talk.
    """

    max_tokens: int = 256
    """Longest answer."""
    seed: int = 0
    """Draws the answers."""
    system: str = ""
    """System message."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        require(0 <= self.seed < 2**63 - 1, "seed", self.seed, "0 to 2^63 - 2")


def find_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the last one of the run in it. Raises FileNotFoundError for
    neither.
    """
    if (folder / "config.json").exists():
        return folder
    for name in LAST_FIRST:
        if (folder / name / "config.json").exists():
            return folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    raise FileNotFoundError(
        f"{folder}: neither a checkpoint (no config.json) nor a run with one in {', '.join(LAST_FIRST)}"
    )


def chat(folder: Path, config: ChatConfig, lines: Iterable[str] | None = None) -> None:
    """Answer `lines` (by default: what is typed, or piped in) until they end, each answer shown as it comes.

    A talk that outgrows the model's context is begun anew, and says so. Raises FileNotFoundError and ValueError for a
    folder without a checkpoint that can be read, and ValueError for a line that is longer than the context.
    """
    import torch  # here, with all that needs it, so that `bylaw chat --help` is quick

    from bylaw.model.checkpoint import checkpoint_hash, load_model
    from bylaw.model.engine import Engine
    from bylaw.model.sampler import Sampler, turn
    from bylaw.model.tokenizer import Tokenizer
    from bylaw.stream import Stream

    place = find_checkpoint(folder)
    tokenizer = Tokenizer.load(place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(load_model(place, device, torch.float32), tokenizer, max_rows=1)
    sampler = Sampler(engine=engine, settings=config.sampling, seed=config.seed, model_hash=checkpoint_hash(place))
    print(f"Talking to {place}. An empty line begins a new talk; end with Ctrl-D.")
    opening = [turn("system", config.system)] if config.system else []
    talk = list(opening)
    for number, line in enumerate(_typed() if lines is None else lines):
        if not line.strip():
            talk = list(opening)
            continue
        talk.append(turn("user", line.strip()))
        if unknown := tokenizer.unknown(line.strip()):
            print(f"(Its vocabulary lacks: {printable(', '.join(unknown))}. It is shown a gap there.)")
        context = engine.model.config.max_position_embeddings
        if len(tokenizer.prompt_ids(talk)) >= context and len(talk) > len(opening) + 1:
            print(f"(This talk has outgrown the model's context of {context} tokens; a new one begins.)")
            talk = [*opening, talk[-1]]
        stream = Stream(tokenizer, _show)
        answer = sampler.turns([talk], [("chat", number)], config.max_tokens, on_token=stream.hear)[0]["text"]
        stream.end(answer)
        talk.append(turn("assistant", answer))


def _show(piece: str) -> None:
    print(printable(piece), end="", flush=True)


def _typed() -> Iterable[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
