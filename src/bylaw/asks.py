"""Prompts for an evaluation: what ought to be declined or answered, by which principle, and of which type."""

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bylaw.model.data import Prompt, prompt_lines, read_prompts
from bylaw.model.records import Record, decode_record, written_lines

SAFE, UNSAFE = "safe", "unsafe"
CONTRAST = "contrast_"


@dataclass(frozen=True)
class Ask:
    """A prompt, whether it ought to be declined, the id of the principle at stake and the type, "" where unknown."""

    prompt: Prompt
    harmful: bool
    principle: str = ""
    type: str = ""


def read_asks(harmful: Sequence[Path], benign: Sequence[Path], limit: int = 0) -> list[Ask]:
    """The prompts of all files, at most `limit` of each (0 for all).

    A file is in one of the forms of `read_prompts`, with an optional column "principle", or of XSTest (arXiv
    2308.01263): CSV or JSONL with the columns prompt or text, type, label and id. There, a row is safe or unsafe by its
    label, or unsafe if its type begins with "contrast_", whichever list the file is in.

    Raises FileNotFoundError, and ValueError naming the file and the line for a row that cannot be read, a label that
    is neither, and an id that two prompts have.
    """
    if twice := set(harmful) & set(benign):
        raise ValueError(
            f"{min(twice)} is given as harmful and as benign; give it once: the rows of an XSTest-style file say "
            "whether they are safe"
        )
    found: list[Ask] = []
    owners: dict[str, Path] = {}
    for path, is_harmful in [*((path, True) for path in harmful), *((path, False) for path in benign)]:
        asks = _rows_of(path, is_harmful) if _is_table(path) else _prompts_of(path, is_harmful, limit)
        for ask in asks[: limit or None]:
            if ask.prompt.id in owners:
                other = owners[ask.prompt.id]
                raise ValueError(f"{path}: id {ask.prompt.id!r} is taken in {other}; every prompt needs its own")
            owners[ask.prompt.id] = path
            found.append(ask)
    return found


def _is_table(path: Path) -> bool:
    """Whether a file is XSTest-style: a CSV, or JSONL whose first row has a text, a label or a type."""
    if path.suffix == ".csv":
        return True
    if path.suffix == ".gz":
        return False
    first = next(written_lines(path), None)
    return first is not None and bool({"text", "label", "type"} & decode_record(first[1], f"{path}:{first[0]}").keys())


def _prompts_of(path: Path, harmful: bool, limit: int) -> list[Ask]:
    found = read_prompts(path, limit)
    if found.skipped:
        print(f"{path}: {found.summary()}", file=sys.stderr)  # what is printed may have to be JSON
    stakes = _stakes(path)
    return [Ask(prompt, harmful, stakes.get(prompt.id, "")) for prompt in found]


def _stakes(path: Path) -> dict[str, str]:
    """The column "principle" by prompt id, of a file that `read_prompts` has read."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        lines = list(file)
    found: dict[str, str] = {}
    for id, number in prompt_lines(path).items():
        where = f"{path}:{number}"
        found[id] = _text(decode_record(lines[number - 1], where), "principle", where)
    return found


def _rows_of(path: Path, harmful: bool) -> list[Ask]:
    rows = list(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
    if not rows:
        raise ValueError(f"{path}: no rows; allowed: the columns prompt or text, and label or type")
    return [_row(record, where, f"{path.stem}-{number}", harmful) for number, (where, record) in enumerate(rows, 1)]


def _csv_rows(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", {key: value for key, value in row.items() if key is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: not CSV in UTF-8: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in written_lines(path):
        yield f"{path}:{number}", decode_record(line, f"{path}:{number}")


def _row(record: Record, where: str, default_id: str, harmful: bool) -> Ask:
    text = _text(record, "prompt", where) or _text(record, "text", where)
    if not text.strip():
        raise ValueError(f"{where}: no prompt in the columns {sorted(record)}; allowed: text under prompt or text")
    type, label = _text(record, "type", where), _text(record, "label", where)
    if label not in ("", SAFE, UNSAFE):
        raise ValueError(f"{where}: label = {label!r:.40}; allowed: {SAFE}, {UNSAFE}")
    if label or type:
        harmful = label == UNSAFE if label else type.startswith(CONTRAST)
    id = record.get("id") or default_id
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise ValueError(f"{where}: id = {json.dumps(id):.40}; allowed: text or a whole number")
    principle = _text(record, "principle", where)
    return Ask(Prompt(str(id), [{"role": "user", "content": text.strip()}]), harmful, principle, type)


def _text(record: Record, key: str, where: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} = {value!r:.40}; allowed: text")
    return value or ""
