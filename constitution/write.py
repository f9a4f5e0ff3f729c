"""A constitution as TOML text that reads back the same."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields

from bylaw.constitution.load import parse_constitution
from bylaw.constitution.schema import STAGES, Constitution, Principle, Templates

_HEAD = ("name", "version", "license", "preamble")
_COLUMNS = 100


def dump_constitution(constitution: Constitution) -> str:
    """The constitution as TOML, which `parse_constitution` reads back equal and so with the same hash.

    Every template is written out, those that bylaw supplies too: the file keeps its meaning when a later bylaw words
    its own templates otherwise. ValueError when the constitution, built in code, could not have come from a file.
    """
    head = toml_lines({name: getattr(constitution, name) for name in _HEAD})
    templates = {f.name: value for f in fields(Templates) if (value := getattr(constitution.templates, f.name))}
    blocks = [head, *map(_principle, constitution.principles), "[templates]\n" + toml_lines(templates)]
    text = "\n".join(blocks)
    back = parse_constitution(text, f"constitution {constitution.name!r}, written out")
    if back != constitution:
        raise ValueError(
            f"constitution {constitution.name!r} cannot be written as a file: {_difference(constitution, back)} would "
            "not read back the same (texts are read without white space around them, statements as one line, "
            "stages in their order); read it from a file, or bring it into that form"
        )
    return text


def toml_lines(values: Mapping[str, str | float | tuple[str, ...]]) -> str:
    """Keys and values, a line each; texts of several lines and long lists over more."""
    return "".join(_line(key, value) for key, value in values.items())


def _principle(principle: Principle) -> str:
    values = {key: getattr(principle, key) for key in ("id", "title", "statement", "sources")}
    if principle.weight != 1:
        values["weight"] = principle.weight
    if principle.stages != STAGES:
        values["stages"] = principle.stages
    values |= {key: own for key in ("tags", "critique", "revision", "comparison") if (own := getattr(principle, key))}
    return "[[principle]]\n" + toml_lines(values)


def _line(key: str, value: str | float | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return _list(key, value)
    if isinstance(value, int | float):
        return f"{key} = {float(value)!r}\n"
    return f"{key} = {_block(value) if chr(10) in value else _quoted(value)}\n"


def _list(key: str, texts: tuple[str, ...]) -> str:
    line = f"{key} = [{', '.join(map(_quoted, texts))}]\n"
    if len(line) <= _COLUMNS or len(texts) == 1:
        return line
    return f"{key} = [\n" + "".join(f"    {_quoted(text)},\n" for text in texts) + "]\n"


def _quoted(text: str) -> str:
    return '"' + _escaped(text).replace('"', '\\"').replace("\n", "\\n") + '"'


def _block(text: str) -> str:
    """A multi-line string: lines stay lines; of three quotes in a row, and of quotes at the end, one is escaped."""
    safe = re.sub(r'""(?=")|"\Z', lambda quotes: quotes[0][:-1] + '\\"', _escaped(text))
    return f'"""\n{safe}"""'


def _escaped(text: str) -> str:
    """Backslashes, and whatever a person could not see in an editor, as TOML escapes."""
    return "".join(_escape(letter) for letter in text)


def _escape(letter: str) -> str:
    if letter == "\\":
        return "\\\\"
    if letter.isprintable() or letter == "\n":
        return letter
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _difference(one: Constitution, two: Constitution) -> str:
    """The first thing that differs, for a message."""
    for name in _HEAD:
        if getattr(one, name) != getattr(two, name):
            return f"its {name}"
    for first, second in zip(one.principles, two.principles, strict=True):
        unlike = [key for key, value in asdict(first).items() if asdict(second)[key] != value]
        if unlike:
            return f"{unlike[0]} of principle {first.id!r}"
    other = asdict(two.templates)
    return next(f"template {key}" for key, value in asdict(one.templates).items() if other[key] != value)
