"""What often goes wrong in critiques and revisions: repaired where a rule can, else marked, and always counted.

preamble     "Sure, here is a revised answer:" stood in front, and was cut off
empty        there is no text, or none was left
repetition   a large share of its 4-grams stood in it before
answer       of a critique: it gives the answer again, in place of judging it
unchanged    of a revision: it is the answer that it was to revise, but for case, spaces and stops
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
_WILLING = (
    r"(?:I(?:['\u2019](?:m|d be|ll)| am| would be| will| can) (?:happy|glad|help|rewrite|revise)\b"
    r"[^\n:.!?]{0,60}[.!]\s+)?"
)
_HERE = r"(?:here(?:['\u2019]s| is| are)|below is)"
_NOUN = r"(?:answer|response|reply|revision|version|rewrite|critique|review|assessment)s?"
_NEW = r"(?:revised|rewritten|new|improved|corrected|updated|better)"
_THE, _MY = r"(?:a|an|the|my)", r"(?:the |my )?"
_COLON = r"[*_]{0,2}:[*_]{0,2}(?=\s|\Z)"
_END = r"[ \t]*(?:\n|\Z)"  # of a line
# What a text may open with that is none of the answer. A colon with more behind it on its line is trusted only after
# words that no answer begins with: "New version: 3.2 mends it" is one.
_PREAMBLE = re.compile(
    rf"\s*[*_]{{0,2}}(?:"
    # "Sure, here is a more polite one:", whatever it is called, and "Sure, here is the revised answer: ..."
    rf"{_POLITE}{_WILLING}(?:here['\u2019]s|here is|below is)\b(?! why\b)[^\n:]{{1,200}}{_COLON}{_END}"
    rf"|{_POLITE}{_WILLING}{_HERE} {_THE} (?:{_NEW} )?{_NOUN}{_COLON}"
    # "Here is a revised version that is kinder:", or one that keeps the principle
    rf"|{_HERE} {_THE} {_NEW} {_NOUN}\b[^\n:]{{0,80}}{_COLON}{_END}"
    rf"|{_HERE} {_THE} {_NOUN}\b[^\n:]{{0,80}}\bprinciple\b[^\n:]{{0,80}}{_COLON}{_END}"
    # "Revised answer: ...", "Critique: ...", "Sure. New version:"
    rf"|(?:{_POLITE})?{_MY}(?:(?:revised|rewritten|improved|corrected) (?:answer|response|reply)|critique|revision)"
    rf"{_COLON}"
    rf"|(?:{_POLITE})?{_MY}{_NEW} {_NOUN}{_COLON}{_END}"
    # "## Revised answer", "**Revised answer**"
    rf"|(?:\#{{1,6}} +[*_]{{0,2}}|(?<=\*\*)){_MY}(?:{_NEW} {_NOUN}|critique|revision):?[*_]{{0,2}}{_END}"
    rf")\s*",
    re.IGNORECASE,
)
_EDGES = ".,;:!\"'\u2018\u2019\u201c\u201d"
"""Signs that stand around words; others, such as those of sums, are words of their own or part of one."""


def guard_critique(said: Record, answer: Record, tokenizer: Tokenizer, limit: float) -> Record:
    """The critique of `answer`, without a preamble, with the marks that it deserves. `limit` is the greatest share of
    repeated 4-grams that bears none.
    """
    repaired = without_preamble(said, tokenizer)
    return _marked(repaired, [*_of_any(repaired, limit), *["answer"] * gives_again(repaired["text"], answer["text"])])


def guard_revision(said: Record, answer: Record, tokenizer: Tokenizer, limit: float) -> Record:
    """The same of a revision of `answer`."""
    repaired = without_preamble(said, tokenizer)
    same = bool(repaired["text"]) and _signs(repaired["text"]) == _signs(answer["text"])
    return _marked(repaired, [*_of_any(repaired, limit), *["unchanged"] * same])


def without_preamble(said: Record, tokenizer: Tokenizer) -> Record:
    """A text record whose preamble, or several on end, is cut off, if it has one; then `raw` is the record as drawn.

    The ids are the last of those drawn, where the cut falls between two of them; else the rest of the text as the
    tokenizer reads it, with the stop token that ended it.
    """
    start = 0
    while preamble := _PREAMBLE.match(said["text"], start):
        start = preamble.end()
    if not start:
        return said
    text = said["text"][start:].strip()
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


def _signs(text: str) -> list[str]:
    """All that a text says, in words and in other signs: without case, spaces, and what stands around words."""
    return [sign for part in text.casefold().split() if (sign := part.strip(_EDGES))]
