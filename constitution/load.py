"""Reading a constitution from TOML: everything is checked, and a mistake is named by file, line and key."""

import re
import reprlib
import tomllib
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bylaw.constitution.render import (
    COMPARISON_PLACEHOLDERS,
    PRINCIPLE_PLACEHOLDERS,
    RATING_PLACEHOLDERS,
    placeholders,
)
from bylaw.constitution.schema import STAGES, Constitution, Principle, Stage, Templates, suggestion

MAX_WEIGHT = 1e6
"""Weights are shares of a draw; one beyond this is a slip of the pen."""

_TOP_KEYS = ("name", "version", "license", "preamble", "principle", "templates")
_PRINCIPLE_KEYS = tuple(f.name for f in fields(Principle))
_TEMPLATE_KEYS = tuple(f.name for f in fields(Templates))
# What each template must hold, at least one of each group: without it a model would judge what it was never shown.
_NEEDED = {
    "critique": (("statement", "title"),),
    "direct": (("statement", "title"),),
    "question": (("statement", "title"),),
    "rating": (("dialogue",), ("answer",), ("statement", "title")),
    "comparison": (("dialogue",), ("question",), ("answer_a",), ("answer_b",)),
}
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}

ID = re.compile(r"[a-z0-9-]+")
_HEADER = re.compile(r"\s*\[+\s*([\w-]+)\s*\]+\s*")
_KEY = re.compile(r"\s*([\w-]+)\s*=")
# Strings and comments of valid TOML. A multi-line string may end in up to two quotes of its own before the three.
_QUOTED = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*''',
    re.DOTALL,
)


def load_constitution(path_or_name: str | Path) -> Constitution:
    """Read and check a constitution: a TOML file, or one that comes with bylaw, by its name (such as 'default').

    FileNotFoundError when there is no such file or name; ValueError, with file, line and key, for whatever else is
    wrong with it.
    """
    files = Path(__file__).parent.glob("*.toml")
    shipped = {file.stem: file for file in files if not file.stem.endswith(".examples")}
    path = shipped.get(str(path_or_name), Path(path_or_name))
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"constitution {str(path_or_name)!r} {problem}{suggestion(str(path_or_name), shipped)}. "
            f"Give the path of a TOML file, or a name that comes with bylaw: {', '.join(sorted(shipped))}"
        )
    return parse_constitution(decode(path.read_bytes(), str(path)), str(path))


def parse_constitution(text: str, source: str) -> Constitution:
    """Check a constitution given as TOML text; `source` is the file name for messages. ValueError as above."""
    values = parse_toml(text, source)
    sections = sections_of(text)
    top = Table(values, source, sections[0])
    top.refuse_unknown(_TOP_KEYS)
    tables = _principle_tables(top, sections)
    principles = tuple(_read_principle(table) for table in tables)
    _refuse_duplicates(tables, principles)
    return Constitution(
        name=top.line_of_text("name"),
        version=top.line_of_text("version"),
        license=top.line_of_text("license"),
        preamble=top.text("preamble"),
        principles=principles,
        templates=_read_templates(top, sections),
    )


@dataclass
class Section:
    """Where a table and its keys stand in the file; line 0 is unknown."""

    name: str = ""
    line: int = 0
    key_lines: dict[str, int] = field(default_factory=dict)


_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@dataclass(frozen=True)
class Table:
    """A TOML table that knows its place, so that every complaint can name file, line and key."""

    values: dict[str, Any]
    source: str
    place: Section
    label: str = ""

    def error(self, key: str, problem: str) -> ValueError:
        line = self.place.key_lines.get(key, self.place.line)
        return ValueError(f"{self.source}{f':{line}' if line else ''}: {self.label}key {key!r} {problem}")

    def refuse_unknown(self, allowed: Collection[str]) -> None:
        for key in self.values:
            if key not in allowed:
                misplaced = " here; it belongs at the top of the file, above every [[principle]] and [templates]"
                hint = misplaced if key in _TOP_KEYS else suggestion(key, allowed)
                raise self.error(key, f"is not known{hint}. Allowed: {', '.join(allowed)}")

    def text(self, key: str) -> str:
        """The text under `key`, without white space around it; required."""
        if key not in self.values:
            raise self.error(key, f'is missing; write {key} = "..."')
        return self.check_text(key, self.values[key])

    def line_of_text(self, key: str) -> str:
        """As `text`, with line breaks and runs of spaces made single spaces."""
        return " ".join(self.text(key).split())

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of texts under `key`."""
        value = self.values[key]
        if not isinstance(value, list):
            raise self.error(key, f'is {_show(value)}; it must be a list of texts: {key} = ["..."]')
        return tuple(" ".join(self.check_text(key, item).split()) for item in value)

    def check_text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(key, f'holds {_show(value)}; it must be text in quotes: "..."')
        if not any(letter.isprintable() and not letter.isspace() for letter in value):
            raise self.error(key, "holds an empty text; write something, or leave the key out if it is optional")
        for letter in value:
            # A control character would let a file steer the terminal that shows it.
            if unicodedata.category(letter) == "Cc" and letter not in "\n\t":
                raise self.error(key, f"holds the control character {letter!r}; take it out")
            # One that turns what follows it around shows people another text than models read (Unicode UAX 9).
            if unicodedata.bidirectional(letter) in _TURNING:
                raise self.error(key, f"holds U+{ord(letter):04X}, which turns the text around it; take it out")
        return value.strip()

    def template(self, key: str, allowed: Collection[str]) -> str:
        """The text under `key`, whose {placeholders} must all be allowed."""
        text = self.text(key)
        try:
            placeholders(text, allowed)
        except ValueError as error:
            raise self.error(key, f"cannot be filled in: {error}") from None
        return text


def _principle_tables(top: Table, sections: list[Section]) -> list[Table]:
    items = top.values.get("principle", [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise top.error("principle", "must be tables, each under its own [[principle]] in double brackets")
    if not items:
        raise top.error("principle", "is missing or empty; add [[principle]] with id, title, statement and sources")
    places = [section for section in sections if section.name == "principle"]
    if len(places) != len(items):  # written as inline tables, which have no header to point at
        places = [Section(line=top.place.key_lines.get("principle", 0)) for _ in items]
    return [
        Table(item, top.source, place, f"principle {number}{_named(item)}: ")
        for number, (item, place) in enumerate(zip(items, places, strict=True), 1)
    ]


def _named(item: dict[str, Any]) -> str:
    id = item.get("id")
    return f" ({reprlib.repr(id)})" if isinstance(id, str) else ""


def _read_principle(table: Table) -> Principle:
    table.refuse_unknown(_PRINCIPLE_KEYS)
    id = table.text("id")
    if not ID.fullmatch(id):
        raise table.error("id", f"is {reprlib.repr(id)}; allowed: lower-case letters a-z, digits and hyphens")
    if not table.values.get("sources"):
        raise table.error("sources", 'names no source; say where the rule comes from: sources = ["..."]')
    return Principle(
        id=id,
        title=table.line_of_text("title"),
        statement=table.line_of_text("statement"),
        sources=table.texts("sources"),
        tags=table.texts("tags") if "tags" in table.values else (),
        weight=_read_weight(table),
        stages=_read_stages(table),
        **{
            key: table.template(key, PRINCIPLE_PLACEHOLDERS)
            for key in ("critique", "revision", "comparison")
            if key in table.values
        },
    )


def _read_weight(table: Table) -> float:
    weight = table.values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise table.error("weight", f"is {_show(weight)}; it must be a number above 0, at most {MAX_WEIGHT:,.0f}")
    return float(weight)


def _read_stages(table: Table) -> tuple[Stage, ...]:
    if "stages" not in table.values:
        return STAGES
    given = table.texts("stages")
    for stage in given:
        if stage not in STAGES:
            hint = f"{suggestion(stage, STAGES)}. Allowed: {', '.join(STAGES)}"
            raise table.error("stages", f"holds {stage!r}, which is not a stage{hint}")
    if not given:
        raise table.error("stages", "is an empty list; name a stage, or leave the key out to use the principle in both")
    return tuple(stage for stage in STAGES if stage in given)


def _read_templates(top: Table, sections: list[Section]) -> Templates:
    values = top.values.get("templates", {})
    if not isinstance(values, dict):
        raise top.error("templates", f"is {_show(values)}; it must be one table under [templates]")
    place = next((section for section in sections if section.name == "templates"), Section())
    table = Table(values, top.source, place, "templates: ")
    table.refuse_unknown(_TEMPLATE_KEYS)
    return Templates(**{key: _read_template(table, key) for key in values})


def _read_template(table: Table, key: str) -> str:
    if key.endswith("_prefix"):
        return table.text(key)
    allowed = {"comparison": COMPARISON_PLACEHOLDERS, "rating": RATING_PLACEHOLDERS}.get(key, PRINCIPLE_PLACEHOLDERS)
    text = table.template(key, allowed)
    used = placeholders(text, allowed)
    for group in _NEEDED.get(key, ()):
        if not used.intersection(group):
            needed = " or ".join(f"{{{name}}}" for name in group)
            raise table.error(key, f"has no {needed}, so the model would not be shown it; add it to the text")
    return text


def _refuse_duplicates(tables: list[Table], principles: tuple[Principle, ...]) -> None:
    seen: dict[str, str] = {}
    for number, (table, principle) in enumerate(zip(tables, principles, strict=True), 1):
        line = table.place.key_lines.get("id", table.place.line)
        here = f"principle {number}{f' at line {line}' if line else ''}"
        if principle.id in seen:
            raise table.error("id", f"is also that of {seen[principle.id]}; give {here} another")
        seen[principle.id] = here


def decode(data: bytes, source: str) -> str:
    """Bytes of a file as text. ValueError, with file and line, where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")  # some editors put a byte-order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        ) from None


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """ValueError, with file and line, for what is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{source}: lists or tables are nested too deeply; a constitution needs no nesting") from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))  # else "(at end of document)"
        line = int(found[1]) if found else text.rstrip().count("\n") + 1
        raise ValueError(f"{source}:{line}: this is not valid TOML: {error}") from None
    except ValueError as error:  # int() refuses a number of thousands of digits and does not say where it stands
        raise ValueError(f"{source}: a number cannot be read: {error}") from None


def sections_of(text: str) -> list[Section]:
    """The lines of tables and keys: first the top of the file, then one section per header."""
    bare = _QUOTED.sub(lambda quoted: "\n" * quoted[0].count("\n"), text)
    top = Section()
    sections = [top]
    for number, line in enumerate(bare.split("\n"), 1):
        if header := _HEADER.fullmatch(line):
            sections.append(Section(header[1], number))
            top.key_lines.setdefault(header[1], number)
        elif key := _KEY.match(line):
            sections[-1].key_lines.setdefault(key[1], number)
    return sections


def _show(value: object) -> str:
    """A wrong value with its kind. Long ones are cut, and a number too long for Python to write is only named."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an immense number"
    kind = _KINDS.get(type(value), "a date or time")
    return f"{reprlib.repr(value)} ({kind})" if isinstance(value, str | float | int) else kind
