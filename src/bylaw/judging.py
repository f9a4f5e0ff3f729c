"""`bylaw judge`: a judge on questions, or on pairs of answers, whose right answer is known.

Of a run it is the judge that its recipe names, and what is found stays in RUN/judge, where the report looks for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bylaw.layout import JUDGED, MEASURES, folder_for, is_run
from bylaw.lock import only_one
from bylaw.model.records import Record, decode_record, encode_record, sha256_file, write_atomic, written_lines
from bylaw.model.settings import require, require_cache, require_choices
from bylaw.rlaif.config import is_server
from bylaw.sums import write_sums_within

if TYPE_CHECKING:  # torch stands behind these, and help is to be quick
    from bylaw.inputs import Run
    from bylaw.model.engine import Engine
    from bylaw.rlaif.reader import Reader

LETTER_NEXT = "The answer is: ("
"""How the reply of a server's judge begins to a question that is put by letters."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """FILE is JSONL of questions, in one of these forms:

    {"prompt": "Two and two?", "options": ["3", "4"], "answer": 1}                    answer counts from 0
    {"prompt": "... (A) no (B) yes The answer is", "corrects": " (B)", "incorrects": " (A)"}     as in the paper's 438
    {"input": "Two and two?", "target_scores": {"3": 0, "4": 1}}                      BIG-bench

    Of a run it may also be preferences, which its judge labels by its constitution:

    {"prompt": "Hello?", "chosen": "Hello!", "rejected": "Go away."}
    """

    by: Literal["letters", "texts"] = "letters"
    """Score the letters of the options, or their whole texts."""
    style: Literal["plain", "chat"] = "plain"
    """The prompt as a text to continue, or as a user's turn to a chat model; a server's is judge_server.style."""
    prefix: str = ""
    """What comes between prompt and option; for a chat model, how its reply begins."""
    limit: int = 0
    """At most so many questions or pairs; 0 for all."""
    out: Path | None = None
    """JSONL file for the log-probs of every question."""
    base: Path | None = None
    """Where a run's base lies now, if its folder has moved."""
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


def judge(folder: Path, file: Path, config: JudgeConfig) -> dict[str, Any]:
    """Put what is in `file` to the checkpoint in `folder`, or to the judge of the run there; print and return measures.

    Raises FileNotFoundError and ValueError, before anything is asked, for a checkpoint or a file that cannot be read,
    and for preferences without a run to label them by.
    """
    from bylaw.inputs import Run
    from bylaw.ledger import Ledger
    from bylaw.rlaif.known import describe_known
    from bylaw.rlaif.multiple_choice import describe_choices

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    run = Run(Ledger(folder).as_made_on(config.base)) if is_run(folder) else None
    about = _about(run, file, config) if run else {}
    if _are_preferences(file):
        found, answers = _label(run, file, config, about)
        told = describe_known(found)
    else:
        found, answers = _choose(run, folder, file, config)
        told = describe_choices(found)
    text = _lines(answers, file)
    if config.out:
        write_atomic(config.out, text)
    if run:
        _keep(run.recipe.out, about, found, text)
        told += f"\nWhat the judge said: {_place(run.recipe.out, about)}. `bylaw report {run.recipe.out}` shows it."
    print(json.dumps(found, indent=2) if config.json else told)
    return found


def _about(run: "Run", file: Path, config: JudgeConfig) -> Record:
    """All that decides a judgement of a run's judge."""
    from bylaw.judges import judge_hash
    from bylaw.recipe import as_table

    return {
        "file": file.name,
        "sha256": sha256_file(file),
        "judge": judge_hash(run),
        "constitution": run.constitution.hash,
        "examples": run.examples.hash,
        "label": as_table(run.recipe.label),
        "seed": run.recipe.seed,
        "limit": config.limit,
        "asked": {"by": config.by, "style": config.style, "prefix": config.prefix},
    }


def _place(run: Path, about: Record) -> Path:
    """The folder of a judgement, which no other one has."""
    return folder_for(run / JUDGED, about["file"], about)


def _keep(run: Path, about: Record, found: dict[str, Any], answers: str) -> None:
    """The measures, and the answers to questions, in the run. Labels are there already."""
    place = _place(run, about)
    write_atomic(place / MEASURES, json.dumps(about | found, indent=2) + "\n")
    if "questions" in found:
        write_atomic(place / "answers.jsonl", answers)
    write_sums_within(run, place)


def _lines(records: Sequence[Record], file: Path) -> str:
    return "".join(encode_record(one, str(file)).decode() for one in records)


def _are_preferences(file: Path) -> bool:
    """Whether the first line of a file is a preference and no question."""
    if file.suffix == ".json":
        return False
    first = next((decode_record(line, f"{file}:{n}") for n, line in written_lines(file)), {})
    return "chosen" in first or {"completion", "label"} <= first.keys()


def _choose(run: "Run | None", folder: Path, file: Path, config: JudgeConfig) -> tuple[dict[str, Any], list[Record]]:
    """Measures of multiple-choice questions, and every answer."""
    from bylaw.judges import judge_folder, server_reader
    from bylaw.rlaif.multiple_choice import ask_choices, ask_letters, measure_choices, read_choices
    from bylaw.talk import find_checkpoint

    choices = read_choices(file, config.by, config.limit)
    style: str = config.style
    if run and is_server(run.recipe.judge):
        require(config.by == "letters", "by", config.by, "letters: a server tells log-probs of letters alone")
        require(config.style == "plain", "style", config.style, "none: judge_server.style is how a server is asked")
        reader, style = server_reader(run), run.recipe.judge_server.style
        reader.check()
        answers = ask_letters(reader, choices, config.prefix or LETTER_NEXT)
    else:
        engine = _engine(judge_folder(run) if run else find_checkpoint(folder), config)
        answers = ask_choices(engine, choices, config.style, config.prefix, progress="judge")
    return measure_choices(answers) | {"by": config.by, "style": style}, answers


def _label(run: "Run | None", file: Path, config: JudgeConfig, about: Record) -> tuple[dict[str, Any], list[Record]]:
    """Measures of the labels of known pairs, and every label."""
    from bylaw.rlaif.formats import read_preferences
    from bylaw.rlaif.judge import Judge
    from bylaw.rlaif.known import ask_known, measure_known

    if run is None:
        raise ValueError(f"{file} holds preferences, which are labelled by a constitution: give a run's folder")
    of_questions = {"by": config.by == "letters", "style": config.style == "plain", "prefix": not config.prefix}
    for name, unset in of_questions.items():
        require(unset, name, getattr(config, name), f"none for preferences, which [label] of {run.recipe.out} asks for")
    read = read_preferences(file)
    known, recipe, place = read.records[: config.limit or None], run.recipe, _place(run.recipe.out, about)
    judge = Judge(
        reader=_reader(run, config, about["judge"]),
        constitution=run.constitution,
        config=recipe.label,
        seed=recipe.seed,
        examples=run.examples,
    )
    with only_one(place):
        write_atomic(place / "pairs.jsonl", _lines(known, file))
        labelled = ask_known(judge, known, place / "preferences.jsonl")
    return measure_known(known, labelled) | {"left_out": dict(read.left_out)}, labelled


def _reader(run: "Run", config: JudgeConfig, hash: str) -> "Reader":
    from bylaw.judges import judge_folder, server_reader

    return server_reader(run) if is_server(run.recipe.judge) else run.reader(_engine(judge_folder(run), config), hash)


def _engine(place: Path, config: JudgeConfig) -> "Engine":
    import torch

    from bylaw.model.checkpoint import load_model
    from bylaw.model.engine import Engine
    from bylaw.model.tokenizer import Tokenizer

    model = load_model(place, "cuda" if torch.cuda.is_available() else "cpu", None)
    return Engine(model, Tokenizer.load(place), config.max_rows, cache_gib=config.cache_gib or None)
