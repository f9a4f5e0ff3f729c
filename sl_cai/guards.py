"""What often goes wrong in critiques and revisions: repaired where a rule can, else marked, and always counted.

preamble     "Sure, here is a revised answer:" stood in front, and was cut off
empty        there is no text, or none was left
repetition   a large share of its 4-grams stood in it before
answer       of a critique: it gives the answer again, in place of judging it
unchanged    of a revision: it is the answer that it was to revise
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from bylaw.model.records import Record
from bylaw.model.tokenizer import Tokenizer

MARKS = ("preamble", "empty", "repetition", "answer", "unchanged")
GRAM = 4
"""Tokens in the n-grams whose repetition is measured."""
FEW_GRAMS = 8
"""A text of fewer is too short to say that it repeats itself."""
ALIKE = 0.9
"""Share of words in common from which two texts are nearly equal."""
BEGINNING = 8
"""Words in common from which one text begins as another does."""

_POLITE = r"(?:sure|certainly|of course|absolutely|okay|ok|yes|all right|alright|gladly)(?: thing)?[,.!:;\s]+"
_TEXT = r"(?:answer|response|reply|revision|version|rewrite|critique|review|assessment)"
_NEW = r"(?:revised|rewritten|new|improved|corrected|updated|better)"
_PREAMBLE = re.compile(
    rf"\W{{0,3}}(?:{_POLITE})?"
    rf"(?:here(?:'s|\u2019s| is| are)\b[^\n:]{{0,60}}\b{_TEXT}\b[^\n:]{{0,60}}"
    rf"|(?:(?:my|the) )?{_NEW} {_TEXT}|critique|revision)\W{{0,3}}:[*\s]*",
    re.IGNORECASE,
)


def guard_critique(said: Record, answer: Record, tokenizer: Tokenizer, limit: float) -> Record:
    """The critique of `answer`, without a preamble, with the marks that it deserves. `limit` is the greatest share of
    repeated 4-grams that bears none.
    """
    repaired = without_preamble(said, tokenizer)
    return _marked(repaired, [*_of_any(repaired, limit), *["answer"] * gives_again(repaired["text"], answer["text"])])


def guard_revision(said: Record, answer: Record, tokenizer: Tokenizer, limit: float) -> Record:
    """The same of a revision of `answer`."""
    repaired = without_preamble(said, tokenizer)
    same = bool(repaired["text"]) and _words(repaired["text"]) == _words(answer["text"])
    return _marked(repaired, [*_of_any(repaired, limit), *["unchanged"] * same])


def without_preamble(said: Record, tokenizer: Tokenizer) -> Record:
    """A text record whose preamble, if it has one, is cut off; then `raw` is the record as drawn.

    The ids are the last of those drawn, where the cut falls between two of them; else the rest of the text as the
    tokenizer reads it, with the stop token that ended it.
    """
    preamble = _PREAMBLE.match(said["text"])
    if preamble is None:
        return said
    text = said["text"][preamble.end() :].strip()
    return {"text": text, "ids": _ids_of(text, said["ids"], tokenizer), "finish": said["finish"], "raw": said}


def gives_again(critique: str, answer: str) -> bool:
    """Whether a critique is the answer, nearly, or begins as it does; one that opens a quotation may quote."""
    said, given = _words(critique), _words(answer)
    if not said or not given:
        return False
    common = (Counter(said) & Counter(given)).total()
    if 2 * common >= ALIKE * (len(said) + len(given)):
        return True
    quotes = critique.lstrip()[0] in "\"'\u201c\u2018\u00ab"
    return not quotes and said[:BEGINNING] == given[:BEGINNING] and len(given) >= BEGINNING


def repetition(ids: Sequence[int]) -> float:
    """1 - distinct / all 4-grams; 0 for a text of few."""
    grams = list(zip(*(ids[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if len(grams) >= FEW_GRAMS else 0.0


def count_marks(chains: Iterable[Record]) -> dict[str, dict[str, int]]:
    """How many critiques, and how many revisions, bear each mark."""
    counts: dict[str, Counter[str]] = {"critique": Counter(), "revision": Counter()}
    for chain in chains:
        for round in chain["rounds"]:
            for kind, seen in counts.items():
                seen.update((round[kind] or {}).get("marks", []))
    return {kind: {name: seen[name] for name in MARKS if seen[name]} for kind, seen in counts.items()}


def _of_any(said: Record, limit: float) -> list[str]:
    found = {"preamble": "raw" in said, "empty": not said["text"], "repetition": repetition(said["ids"]) > limit}
    return [name for name, true in found.items() if true]


def _marked(said: Record, marks: list[str]) -> Record:
    """`raw` stays last, so that records read from their text on."""
    if not marks:
        return said
    raw = {"raw": said["raw"]} if "raw" in said else {}
    return {key: said[key] for key in ("text", "ids", "finish")} | {"marks": marks} | raw


def _ids_of(text: str, drawn: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    for start in range(1, len(drawn) + 1):
        rest = tokenizer.decode(drawn[start:]).strip()
        if rest == text:
            return list(drawn[start:])
        if len(rest) < len(text):
            break
    stop = [token for token in drawn[-1:] if token in tokenizer.stop_ids]
    return [*tokenizer.encode(text), *stop]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
