"""Whether the records of a run hold together: every line reads, every principle, pair and prompt is there."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bylaw.layout import MIXED_IN
from bylaw.ledger import Ledger
from bylaw.model.data import Prompt, read_prompts
from bylaw.model.records import Record, decode_record, numbered_lines, sha256_file
from bylaw.sums import files_of

TOLD = 5  # of the problems of a file; the others are counted


def check_records(ledger: Ledger) -> tuple[list[str], int]:
    """What is wrong with the records of finished stages, and how many there are."""
    problems: list[str] = []
    count = 0
    prompts = _prompts(ledger)
    for name in files_of(ledger.run):
        if name.endswith(".jsonl"):
            found: list[str] = []
            records = _parsed(ledger.run, name, found)
            count += len(records)
            pairs = _pairs_beside(ledger, name)
            for number, record in records:
                found += [f"{name}:{number}: {what}" for what in _wrong(ledger, name, record, pairs, prompts)]
            found += _doubled(name, records)
            problems += found[:TOLD] + ([f"{name}: and {len(found) - TOLD} more such"] if len(found) > TOLD else [])
    return problems, count


def _parsed(run: Path, name: str, found: list[str]) -> list[tuple[int, Record]]:
    records = []
    for number, line in numbered_lines(run / name):
        try:
            records.append((number, decode_record(line, f"{name}:{number}")))
        except ValueError as error:
            found.append(str(error))
        if not line.endswith(b"\n"):
            found.append(f"{name}:{number}: the last line has no end")
    return records


def _doubled(name: str, records: list[tuple[int, Record]]) -> Iterator[str]:
    """Records of one thing that stand there twice, as two processes leave them that append to one file."""
    first: dict[tuple[Any, ...], int] = {}
    for number, record in records:
        key = tuple(record.get(part) for part in ("id", "sample", "iteration", "place"))
        if PurePosixPath(name).stem in _NAMED and first.setdefault(key, number) != number:
            named = ", ".join(str(part) for part in key if part is not None)
            yield f"{name}:{number}: the same record as line {first[key]} ({named})"


_NAMED = ("chains", "helpful", "pairs", "preferences", "rollouts", "answers")


def _wrong(
    ledger: Ledger, name: str, record: Record, pairs: dict[str, Record], prompts: dict[str, Prompt] | None
) -> Iterator[str]:
    if PurePosixPath(name).parent.as_posix() in MIXED_IN.values():
        return  # what a file gave may go by another run's principles and pairs
    try:
        yield from _principles(ledger, record)
        if "labels" in record and "pairs_by" not in record["by"]:
            return  # it was brought from outside, with no pair or prompt of this run
        if "labels" in record:
            yield from _pair(record, pairs)
        if prompts is not None and name.split("/")[0] in ("revise", "compare", "label"):
            yield from _prompt(record, prompts)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"a record without its form ({type(error).__name__} {error})"


def _principles(ledger: Ledger, record: Record) -> Iterator[str]:
    """Of every round and reading that went by a principle of a constitution."""
    constitution = record.get("by", {}).get("constitution") if isinstance(record.get("by"), dict) else None
    marked = record.get("rating", {}).get("readings", [])  # of an episode that a judge gave marks
    constitution = ledger.rated_by if marked else constitution
    if constitution is None:
        return
    for part in (*record.get("rounds", []), *record.get("labels", []), *marked):
        if "principle" in part:
            told = ledger.principle(part["principle"], constitution)
            if "problem" in told:
                yield f"principle {told['id']!r} ({told['hash']}): {told['problem']}"


def _pairs_beside(ledger: Ledger, name: str) -> dict[str, Record]:
    """The pairs that a file of preferences labels: of the nearest folder above it that has some, or of the stage."""
    if PurePosixPath(name).name != "preferences.jsonl":
        return {}
    for folder in PurePosixPath(name).parents:
        if (ledger.run / folder / "pairs.jsonl").exists():
            return Ledger(ledger.run, folder.as_posix()).pairs
    return ledger.pairs


def _pair(preference: Record, pairs: dict[str, Record]) -> Iterator[str]:
    pair = pairs.get(preference["id"])
    if pair is None:
        yield f"preference {preference['id']!r} is of no pair in pairs.jsonl"
    elif any(preference[part] != pair[part] for part in ("prompt", "a", "b")):
        yield f"preference {preference['id']!r} has other texts than its pair in pairs.jsonl"


def _prompts(ledger: Ledger) -> dict[str, Prompt] | None:
    """The prompts that the run drew from, by id; None when their files are not those of then."""
    recipe = ledger.recipe
    inputs: dict[str, Any] = next(
        (one["inputs"] for one in ledger.manifests.values() if "prompts" in one["inputs"]), {}
    )
    named = {"prompts": recipe.prompts} | ({"helpful": Path(recipe.helpful)} if recipe.helpful else {})
    files = {kind: ledger.outside(path) for kind, path in named.items()}
    if not all(path.is_file() and sha256_file(path) == inputs.get(kind) for kind, path in files.items()):
        return None
    return {prompt.id: prompt for path in files.values() for prompt in read_prompts(path)}


def _prompt(record: Record, prompts: dict[str, Prompt]) -> Iterator[str]:
    id = record.get("prompt_id", record["id"])
    prompt = prompts.get(id)
    if prompt is None:
        yield f"prompt {id!r} is not in the prompt files"
    elif record["prompt"] != prompt.messages or record.get("given", prompt.answer) != prompt.answer:
        yield f"prompt {id!r} reads otherwise in the prompt files"
