"""`bylaw judge`: a checkpoint on multiple-choice questions whose answers are known."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bylaw.model.settings import require, require_cache, require_choices


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """FILE is JSONL: {"prompt", "options", "answer"}, where answer counts from 0; {"prompt", "corrects", "incorrects"},
    as the 438 questions of the Constitutional AI release; or BIG-bench's {"input", "target_scores"}.
    """

    by: Literal["letters", "texts"] = "letters"
    """Score the letters of the options, or their whole texts."""
    style: Literal["plain", "chat"] = "plain"
    """The prompt as a text to continue, or as a user's turn to a chat model."""
    prefix: str = ""
    """What comes between prompt and option; for a chat model, how its reply begins."""
    limit: int = 0
    """At most so many questions; 0 for all."""
    out: Path | None = None
    """JSONL file for the log-probs of every question."""
    json: bool = False
    """Print JSON instead of a table."""
    max_rows: int = 64
    """Questions scored together."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.limit >= 0, "limit", self.limit, "0 (all) or more")
        require(self.max_rows >= 1, "max_rows", self.max_rows, "1 or more")
        require_cache(self.cache_gib)


def judge(folder: Path, file: Path, config: JudgeConfig) -> dict:
    """Put the questions of `file` to the checkpoint in `folder`, or the newest one of a run; print and return measures.

    Raises FileNotFoundError and ValueError for a checkpoint or a file that cannot be read.
    """
    import torch  # here, with all that needs it, so that `bylaw judge --help` is quick

    from bylaw.model.checkpoint import load_model
    from bylaw.model.engine import Engine
    from bylaw.model.records import encode_record, write_atomic
    from bylaw.model.tokenizer import Tokenizer
    from bylaw.rlaif.multiple_choice import ask_choices, describe_choices, measure_choices, read_choices
    from bylaw.talk import find_checkpoint

    choices = read_choices(file, config.by, config.limit)
    place = find_checkpoint(folder)
    model = load_model(place, "cuda" if torch.cuda.is_available() else "cpu", None)
    engine = Engine(model, Tokenizer.load(place), config.max_rows, cache_gib=config.cache_gib or None)
    answers = ask_choices(engine, choices, config.style, config.prefix, progress="judge")
    if config.out:
        write_atomic(config.out, "".join(encode_record(one, str(config.out)).decode() for one in answers))
    found = measure_choices(answers) | {"by": config.by, "style": config.style}
    print(json.dumps(found, indent=2) if config.json else describe_choices(found))
    return found
