"""What the readers of other people's files share: checked texts, ids, and principles put together."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bylaw.constitution.schema import Constitution, Principle

UNKNOWN_LICENSE = "NOASSERTION"
"""SPDX's word for a licence that nobody stated."""
_TITLE_WORDS = 7
_ID_WORDS = 5


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A constitution made from a file of another form, the form's name, and what a person should know of the reading:
    what was left out, made up, or changed.
    """

    constitution: Constitution
    form: str
    notes: tuple[str, ...]


def assemble(
    principles: Iterable[Principle], form: str, path: Path, notes: Sequence[str], name: str = "", preamble: str = ""
) -> Imported:
    """The constitution of these principles, with ids made unique. ValueError if there are none."""
    unique, renamed = _unique(list(principles))
    if not unique:
        raise ValueError(f"{path}: no principle found in it, read as {form}")
    constitution = Constitution(
        name=one_line(name) or path.stem,
        version="1",
        license=UNKNOWN_LICENSE,
        preamble=preamble or f"Read from {path.name} ({form}).",
        principles=tuple(unique),
    )
    told = [f"{renamed} ids stood twice, and got a number"] if renamed else []
    told.append(f"the licence is not known: put it in the place of {UNKNOWN_LICENSE}")
    return Imported(constitution=constitution, form=form, notes=(*notes, *told))


def merge(parts: Sequence[Imported], name: str) -> Imported:
    """Several readings as one constitution, in their order; ids that two of them have get a number, but for principles
    that differ in their sources alone, which become one with the sources of all.
    """
    if len(parts) == 1:
        return parts[0]
    found = [p for part in parts for p in part.constitution.principles]
    sources: dict[Principle, dict[str, None]] = {}
    for principle in found:
        sources.setdefault(replace(principle, sources=()), {}).update(dict.fromkeys(principle.sources))
    unique, renamed = _unique([replace(principle, sources=tuple(named)) for principle, named in sources.items()])
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    told = [f"{renamed} ids stood in more than one file, and got a number"] if renamed else []
    if twice := len(found) - len(sources):
        told.append(f"{twice} principles stood before with the same id and words, and were taken once")
    constitution = replace(
        parts[0].constitution,
        name=name,
        preamble="\n\n".join(dict.fromkeys(part.constitution.preamble for part in parts)),
        principles=tuple(unique),
    )
    form = " and ".join(dict.fromkeys(part.form for part in parts))
    return Imported(constitution=constitution, form=form, notes=(*notes, *told))


def check_text(value: object, where: str) -> str:
    """The text, stripped, with \\n for every kind of line end. ValueError naming `where` for anything else, for an
    empty text, and for one with a control character or half a character.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: {type(value).__name__} {value!r:.60}; allowed: text")
    text = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not any(letter.isprintable() and not letter.isspace() for letter in text):
        raise ValueError(f"{where}: an empty text; allowed: a text with words in it")
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t":
            raise ValueError(f"{where}: holds the control character {letter!r}; take it out")
    return text


def one_line(text: str) -> str:
    return " ".join(text.split())


def slug(text: str) -> str:
    """An id from the first words of a text; "principle" where it has no letter that an id may have."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    return "-".join(re.findall(r"[a-z0-9]+", plain)[:_ID_WORDS]) or "principle"


def short_title(text: str) -> str:
    """The first words of a text, for tables."""
    words = text.split()
    return " ".join(words[:_TITLE_WORDS]).rstrip(".,;:") + (" ..." if len(words) > _TITLE_WORDS else "")


def literal(text: str) -> str:
    """The text as a template that shows just it: braces are doubled."""
    return text.replace("{", "{{").replace("}", "}}")


def read_text(path: Path) -> str:
    """A text file, its lines ending in \\n. FileNotFoundError; ValueError naming a file that is not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None


def read_json(text: str, where: str) -> Any:
    """Strict JSON. ValueError naming `where` for anything else, and for a key that stands twice in one object."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=_no_twins, parse_constant=no_constant)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def table(value: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    """`value`, which must be an object with at least these keys. ValueError naming `where`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} {value!r:.60}; allowed: an object with {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{where}: key {key!r} is missing; it has {sorted(value)!r:.120}")
    return value


def only(value: object, where: str) -> Any:
    """The one element of a list of one. ValueError naming `where` for anything else."""
    if not isinstance(value, list) or len(value) != 1:
        shown = f"a list of {len(value)}" if isinstance(value, list) else f"{type(value).__name__} {value!r:.60}"
        raise ValueError(f"{where}: {shown}; allowed: a list of one")
    return value[0]


def rows(value: object, where: str) -> list[Any]:
    """`value`, which must be a list with something in it. ValueError naming `where`."""
    if not isinstance(value, list) or not value:
        shown = "an empty list" if isinstance(value, list) else f"{type(value).__name__} {value!r:.60}"
        raise ValueError(f"{where}: {shown}; allowed: a list with something in it")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice in one object; rename or remove one")
        found[key] = value
    return found


def _unique(principles: list[Principle]) -> tuple[list[Principle], int]:
    """The principles with ids of their own: a repeated one gets the first free number. And how many got one."""
    taken = {p.id for p in principles}
    seen: set[str] = set()
    result, renamed = [], 0
    for principle in principles:
        id = principle.id
        if id in seen:
            number = 2
            while f"{id}-{number}" in taken:
                number += 1
            id, renamed = f"{id}-{number}", renamed + 1
            taken.add(id)
        seen.add(id)
        result.append(replace(principle, id=id))
    return result, renamed
