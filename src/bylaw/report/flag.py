"""A thing to look at, as the page says it."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["worry", "note"]
ENOUGH = 20
"""Of fewer a share is noise, and no flag."""


@dataclass(frozen=True)
class Flag:
    """A `worry` asks for a look before the model is used; a `note` is good to know."""

    level: Level
    title: str
    text: str
    principle: str = ""


def level(worry: bool) -> Level:
    """A flag's level."""
    return "worry" if worry else "note"
