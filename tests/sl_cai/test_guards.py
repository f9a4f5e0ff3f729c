"""Guards on critiques and revisions, on texts written by hand."""

import time
from typing import Any

import pytest

from bylaw.model.tokenizer import Tokenizer
from bylaw.sl_cai.guards import count_marks, gives_again, guard_critique, guard_revision, repetition, without_preamble


class Letters:
    """A tokenizer of letters, and of one token for the last two of a preamble."""

    stop_ids = (0,)

    def decode(self, ids: list[int]) -> str:
        return "".join(": I" if id == 1 else chr(id) for id in ids if id)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def said(text: str) -> dict[str, Any]:
    return {"text": text, "ids": [*map(ord, text), 0], "finish": "stop"}


CUT = [
    ("Sure, here is a revised answer: I will not.", "I will not."),
    ("Sure, here's the revised answer:\n\n**Revised answer:** I will not.", "I will not."),
    ("Sure, here\u2019s a more polite one:\nI will not.", "I will not."),
    ("Okay! Here is how I would put it, so that nobody is hurt by what it says:\n\nI will not.", "I will not."),
    ("Certainly! Below is a revised version:\n\nNo.", "No."),
    ("Sure, I can help with that. Here is the revised answer: No.", "No."),
    ("Certainly! Here is my critique of the answer:\nIt helps.", "It helps."),
    ("Sure, here is the critique: it is rude.", "it is rude."),
    ("Here is a revised answer:\nNo.", "No."),
    ("Here\u2019s a new version that is kinder:\n\nNo.", "No."),
    ("Here\u2019s a version that keeps the principle:\n\nNo.", "No."),
    ("Revised answer: No.", "No."),
    ("Of course. Revised answer: No.", "No."),
    ("Revised answer: My revised answer: No.", "No."),
    ("**Revised answer:** No.", "No."),
    ("**Revised Answer**\nNo.", "No."),
    ("## Revised Answer\n\nNo.", "No."),
    ("### **Revised version:**\nNo.", "No."),
    ("New version:\n\nNo.", "No."),
    ("Critique: it helps", "it helps"),
    ("Revision: No.", "No."),
    ("Here is the rewritten answer:\n* No.\n* Never.", "* No.\n* Never."),
    ("Revised answer: **No.**", "**No.**"),
    ("Sure!\n\nHere is the rewritten answer:", ""),
]
KEPT = [
    "Sure, I can help: rest.",
    "Here is how to mend it: take glue.",
    "The answer: 4",
    "No, here is why: it hurts.",
    "No, here is why:\nIt hurts.",
    "Of course I can't help with that. Here is why:\nIt hurts.",
    "Sure, here is why not:\nIt hurts.",
    "Here are some tips for writing a good review of the hotel: be honest, be kind.",
    "Here are some tips for writing a good review of the hotel:\nBe honest.",
    "Sure, here are three steps to a better answer:\n1. Read.",
    "Here is a summary of the answer you got from your bank: they refuse.",
    "Here is why your response matters to them: people care.",
    "Yes. Here is the King James version of the verse: Jesus wept.",
    "Here is an answer: 4",
    "Here's the thing about their response: it hurts.",
    "Here is a revised answer: No.",  # nothing says that this is not its own first words
    "Here is a version that runs on Windows:\ndir",
    "New version: 3.2 fixes it",
    "The new version: of Python",
    "The revised answer:is 4",
    "My response: no",
    "## Answer\nNo.",
    "**Better answer** me at once.",
    "The answer was revised:\nNo.",
    "Surely, here is one:\nNo.",
]


@pytest.mark.parametrize("text,left", CUT)
def test_a_preamble_is_cut_off_and_kept_in_raw(text: str, left: str) -> None:
    tokenizer: Any = Letters()
    found = without_preamble(said(text), tokenizer)
    assert found["text"] == left and found["raw"] == said(text)
    assert tokenizer.decode(found["ids"]).strip() == left and found["ids"][-1:] == [0]
    marks = guard_revision(said(text), said("x"), tokenizer, 0.5)["marks"]
    assert marks == (["preamble"] if left else ["preamble", "empty"])


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_preamble_stays(text: str) -> None:
    assert without_preamble(said(text), Letters()) == said(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "opening", ["here is " + "answer " * 50_000, " " * 100_000, "ok" + "." * 100_000, "*" * 99_999]
)
def test_hostile_openings_take_no_time(opening: str) -> None:
    since = time.monotonic()
    without_preamble(said(opening), Letters())  # type: ignore[arg-type]
    assert time.monotonic() - since < 1


@pytest.mark.parametrize(
    ("answer", "revision", "same"),
    [
        ("x = a + b", "x = a - b", False),
        ("x = a * b", "x = a b", False),
        ("I am 5-6", "I am 5.6", False),
        ("\U0001f642", "\U0001f641", False),
        ("!!!", "\U0001f642", False),
        ("No.", "No?", False),
        ("No.", "no", True),
        ("Take  the rope,\nthen go.", "take the rope then \u201cgo\u201d!", True),
        ("x = a + b", "X = A + B", True),
    ],
)
def test_a_revision_is_unchanged_where_it_says_the_same_in_words_and_signs(
    answer: str, revision: str, same: bool
) -> None:
    marked = guard_revision(said(revision), said(answer), Letters(), 0.5)  # type: ignore[arg-type]
    assert (marked.get("marks") == ["unchanged"]) == same


def test_ids_are_cut_between_tokens_or_else_read_anew() -> None:
    tokenizer: Any = Letters()
    text, answer = "Revised answer: I go", "I go"
    cut = without_preamble(said(text), tokenizer)
    assert cut["ids"] == said(text)["ids"][-6:]  # with the space before
    joined = {"text": text, "ids": [*map(ord, "Revised answer"), 1, *map(ord, " go"), 0], "finish": "stop"}
    assert without_preamble(joined, tokenizer)["ids"] == [*map(ord, answer), 0]


def test_marks(tokenizer: Tokenizer) -> None:
    answer = said("first take the rope and then tie the door of the house")
    same = guard_revision(said("First take the rope, and then tie the door of the house."), answer, tokenizer, 0.5)
    assert same["marks"] == ["unchanged"] and "raw" not in same
    loop = {"text": "x", "ids": [5, 6, 7] * 9, "finish": "length"}
    assert guard_critique(loop, answer, tokenizer, 0.5)["marks"] == ["repetition"]
    assert guard_critique(loop, answer, tokenizer, 1.0) == loop
    assert guard_critique(said(""), answer, tokenizer, 0.5)["marks"] == ["empty"]
    assert guard_revision(said(""), said(""), tokenizer, 0.5)["marks"] == ["empty"]  # and nothing was given again
    assert guard_critique(answer, answer, tokenizer, 0.5)["marks"] == ["answer"]
    fine = said("this helps with theft against the rule, so it must change.")
    assert guard_critique(fine, answer, tokenizer, 0.5) is fine


def test_an_answer_in_place_of_a_critique() -> None:
    answer = "No, I will not help with that, as it could hurt somebody."
    assert gives_again("No, I will not help with that, as it could hurt. Here is more.", answer)
    assert gives_again("no i will not help with that as it could hurt somebody", answer)
    assert not gives_again('"No, I will not help with that, as it could hurt" is a clear refusal.', answer)
    assert not gives_again("No, nothing goes against the principle.", "No.")
    assert not gives_again("", answer) and not gives_again("It helps.", "")


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4] * 5) == 1 - 4 / 17  # 17 4-grams, of which 4 are distinct
    assert repetition([1] * 10) == 0.0  # too short to say


def test_marks_are_counted_and_a_round_may_have_no_critique() -> None:
    rounds = [
        {"critique": None, "revision": {"marks": ["unchanged"]}},
        {"critique": {"marks": ["answer", "repetition"]}, "revision": {"marks": ["unchanged"]}},
        {"critique": {}, "revision": {}},
    ]
    assert count_marks([{"rounds": rounds}]) == {
        "critique": {"repetition": 1, "answer": 1},
        "revision": {"unchanged": 2},
    }
