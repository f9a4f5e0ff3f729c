"""What the page says of a chain or a label in a word: which principles it is about, how it came out, where it goes."""

from collections.abc import Sequence
from itertools import pairwise

from bylaw.attribution import DECIDED
from bylaw.model.records import Record

VERDICTS = {
    "a": "A is better",
    "b": "B is better",
    "tie": "undecided",
    "same": "the same text twice",
    "abstained": "abstained",
}
"""How a label came out, in words."""


def side(p: float) -> str:
    """Which answer a probability has decided for, "a" or "b"; "" for neither. As `bylaw.attribution` decides it."""
    return "a" if p >= 0.5 + DECIDED else "b" if p <= 0.5 - DECIDED else ""


def deciders(preference: Record) -> list[tuple[str, float, str]]:
    """The principles that decided: id, probability of answer a, and the answer that each decided for."""
    read = [one for one in preference.get("labels") or [] if not one["abstained"]]
    return [(one["principle"]["id"], one["p_a"], side(one["p_a"])) for one in read if side(one["p_a"])]


def same(preference: Record) -> bool:
    """Whether its two answers are the same text."""
    return preference["a"]["text"] == preference["b"]["text"]


def verdict(preference: Record) -> str:
    """One of `VERDICTS`."""
    if preference["abstained"]:
        return "abstained"
    return "same" if same(preference) else side(preference["p_a"]) or "tie"


def strata(preference: Record) -> list[str]:
    """What a sample of labels draws from alike: each verdict, and each principle that decided."""
    return [verdict(preference), *(id for id, _, _ in deciders(preference))]


def place(preference: Record) -> int:
    """Where a label stands among others, the lower the earlier: those that decide, for whichever answer, first."""
    return ("tie", "same", "abstained").index(found) + 1 if (found := verdict(preference)) not in "ab" else 0


def drawn(chain: Record) -> list[str]:
    """The ids of the principles of its rounds, each once."""
    return list(dict.fromkeys(one["principle"]["id"] for one in chain["rounds"]))


def changed(chain: Record) -> bool:
    """Whether any revision of the chain differs from the answer before it."""
    texts = [chain["answer"]["text"], *(one["revision"]["text"] for one in chain["rounds"])]
    return any(old != new for old, new in pairwise(texts))


def marks(text: Record, *without: str) -> Sequence[str]:
    """What a guard said of a text, and whether it was cut off."""
    cut = ["cut off at the token limit"] if text.get("finish") == "length" else []
    return [one for one in text.get("marks") or [] if one not in without] + cut
