"""Guards on critiques and revisions, on texts written by hand."""

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


@pytest.mark.parametrize(
    "text,left",
    [
        ("Sure, here is a revised answer: I will not.", "I will not."),
        ("Here\u2019s a version that keeps the principle:\n\nNo.", "No."),
        ("Certainly! Here is my critique of the answer:\nIt helps.", "It helps."),
        ("**Revised answer:** No.", "No."),
        ("Critique: it helps", "it helps"),
        ("Sure!\n\nHere is the rewritten answer:", ""),
    ],
)
def test_a_preamble_is_cut_off_and_kept_in_raw(text: str, left: str) -> None:
    tokenizer: Any = Letters()
    found = without_preamble(said(text), tokenizer)
    assert found["text"] == left and found["raw"] == said(text)
    assert tokenizer.decode(found["ids"]).strip() == left and found["ids"][-1:] == [0]
    marks = guard_revision(said(text), said("x"), tokenizer, 0.5)["marks"]
    assert marks == (["preamble"] if left else ["preamble", "empty"])


@pytest.mark.parametrize(
    "text",
    ["Sure, I can help: rest.", "Here is how to mend it: take glue.", "The answer: 4", "No, here is why: it hurts."],
)
def test_what_is_no_preamble_stays(text: str) -> None:
    assert without_preamble(said(text), Letters()) == said(text)  # type: ignore[arg-type]


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
