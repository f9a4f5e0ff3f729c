"""Pairs to train on: helpfulness preferences mixed in at a ratio, and labels made hard for comparison."""

import json
from pathlib import Path

import pytest

from bylaw.model.records import Record
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import RewardConfig
from bylaw.rlaif.pairs import Pair, draw_helpful, hardened, pair_of, read_helpful


def preference(id: str, p_a: float | None = 0.9) -> Record:
    a, b = ({"text": text, "ids": [n, 0], "finish": "stop"} for n, text in ((20, "w4"), (21, "w5")))
    prompt = [{"role": "user", "content": "w1"}]
    return {"id": id, "prompt_id": id, "prompt": prompt, "a": a, "b": b, "p_a": p_a, "abstained": "" if p_a else "x"}


@pytest.mark.parametrize("ratio,taken,missing", [(0.5, 10, 0), (0.2, 2, 0), (0.8, 30, 10)])
def test_a_share_of_the_pairs_is_helpful_ones(tokenizer: Tokenizer, ratio: float, taken: int, missing: int) -> None:
    count = 10 if ratio != 0.2 else 8
    helpful = [preference(f"h{n}", 0.9 + n / 1000) for n in range(30)] + [preference("none", None)]
    drawn, counts = draw_helpful(count, helpful, tokenizer, ratio, seed=1, context=100)
    assert counts == {"helpful_pairs": taken, "helpful_over_context": 0, "helpful_pairs_missing": missing}
    assert len(drawn) == taken and all(one in helpful for one in drawn)
    assert missing or taken == round(ratio * (count + taken))
    again, _ = draw_helpful(count, helpful[::-1], tokenizer, ratio, seed=1, context=100)
    assert again == drawn  # by ids, not by places
    if not missing:
        assert draw_helpful(count, helpful, tokenizer, ratio, seed=2, context=100)[0] != drawn


def test_helpful_pairs_longer_than_the_context_make_room_for_others(tokenizer: Tokenizer) -> None:
    helpful = [preference(f"h{n}") for n in range(30)]
    longer = [one | {"a": one["a"] | {"ids": [20] * 50}} if n % 2 else one for n, one in enumerate(helpful)]
    size = max(pair_of(one, tokenizer).longest for one in draw_helpful(10, helpful, tokenizer, 0.5, 1, 100)[0])
    drawn, counts = draw_helpful(10, longer, tokenizer, 0.5, seed=1, context=size)
    assert len(drawn) == 10 and all(pair_of(one, tokenizer).longest <= size for one in drawn)
    assert counts["helpful_pairs"] == 10 and 0 < counts["helpful_over_context"] <= 15
    every = draw_helpful(10, longer, tokenizer, 0.8, seed=1, context=size)[1]
    assert every == {"helpful_pairs": 15, "helpful_over_context": 15, "helpful_pairs_missing": 25}


def test_helpful_preferences_are_read_in_our_form_and_in_trls(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    ours.write_text(json.dumps(preference("x")) + "\n")
    assert read_helpful(ours) == [preference("x")]
    theirs.write_text(json.dumps({"prompt": "w1", "chosen": "w2", "rejected": "w3"}) + "\n")
    [one] = read_helpful(theirs)
    assert (one["a"]["text"], one["b"]["text"], one["p_a"]) == ("w2", "w3", 1.0)
    with pytest.raises(ValueError, match="helpful_ratio"):
        RewardConfig(helpful_ratio=1.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"p_a": 5.0}, r"ours.jsonl:2: p_a = 5.0; allowed: a number from 0 to 1"),
        ({"p_a": True}, "p_a = True"),
        ({"p_a": None}, "p_a = None"),
        ({"p_a": "0.5"}, "p_a = '0.5'"),
        ({"id": None}, r"ours.jsonl:2: keys \['a', 'abstained'"),
        ({"abstained": None}, "with id and abstained"),
        ({"by": "people"}, r"ours.jsonl:2: by or labels are not those of a preference of ours"),
        ({"labels": [{"p_a": 0.9}]}, r"ours.jsonl:2: by or labels"),
        ({"labels": None}, r"ours.jsonl:2: by or labels"),
        ({"labels": [{"principle": "kind", "p_a": 1, "abstained": "", "weight": 1}]}, r"ours.jsonl:2: by or labels"),
        ({"id": "x"}, r"ours.jsonl:2: id 'x' is taken by line 1"),
        ({"prompt": []}, r"ours.jsonl:2: prompt: messages = \[\]"),
        ({"a": {"text": "w4"}}, r"ours.jsonl:2: a = \{'text': 'w4'\}; allowed: an answer with text and finish"),
        ({"b": {"text": "w4", "finish": "stop"}}, "b = .*with the ids that were sampled"),
        ({"b": {"text": "w4", "finish": "stop", "ids": [1.5]}}, "b = .*with the ids that were sampled"),
    ],
)
def test_records_of_our_own_are_checked_by_file_and_line(changes: Record, told: str, tmp_path: Path) -> None:
    path = tmp_path / "ours.jsonl"
    fine = [preference("x"), preference("none", None), preference("given")]
    fine[2]["a"] = {"text": "w4", "finish": "given"}
    path.write_text("".join(json.dumps(one) + "\n" for one in fine))
    assert read_helpful(path) == fine
    path.write_text("".join(json.dumps(one) + "\n" for one in (preference("x"), preference("y") | changes)))
    with pytest.raises(ValueError, match=told):
        read_helpful(path)


def test_hard_labels_are_0_or_1_and_a_tie_stays_one() -> None:
    assert [pair.p_a for pair in hardened([Pair([1], [2], p) for p in (0.51, 0.2, 0.5, 1.0)])] == [1.0, 0.0, 0.5, 1.0]
