"""What the report asks a reader to look at: each flag at its bound, and not below it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_report import CARE, KIND, SUMMARY, Reader, chain, finish, preference, reading, text, whole_run, write

from bylaw.report import ReportConfig
from bylaw.report.gather import gather
from bylaw.report.page import render


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "run")


def words_of(folder: Path) -> str:
    return " ".join(Reader(render(gather(folder), ReportConfig())).words.split()).replace("\u202f", " ")


def label(folder: Path, *preferences: dict[str, Any]) -> str:
    """What the page says of a run with these labels."""
    write(folder / "label" / "preferences.jsonl", *preferences)
    return words_of(folder)


def pairs(count: int, *readings: dict[str, Any], b: str = "no .", start: int = 0) -> list[dict[str, Any]]:
    return [preference(f"p-{n}", "yes .", b, *readings) for n in range(start, start + count)]


def test_flags_say_what_is_wrong(folder: Path) -> None:
    sound = words_of(folder)
    marked = chain("p-9", (KIND, "x", "y")) | {"answer": text("Sure , here is", "length", marks=["preamble"])}
    write(
        folder / "revise" / "chains.jsonl", *[chain(f"p-{n}", (KIND, "x", "y"), answer="y") for n in range(30)], marked
    )
    none = preference("q", "a", "a", abstained="too little probability")
    write(folder / "label" / "preferences.jsonl", *pairs(30, reading(KIND, 0.9, 0.8, mass=0.4)), none)
    steps = [
        {"step": n, "objective/kl": 30.0 * n, "collapse/alarms": float(n == 1), "val/ended": 0.5} for n in range(2)
    ]
    write(folder / "ppo" / "metrics.jsonl", *steps)
    finish(folder, "reward", {"heldout_accuracy": 0.9, "heldout_sure_accuracy": 0.52, "heldout_ece": 0.2})
    worse = SUMMARY | {"rl_cai": {"complied_harmful": 0.0, "helpful_benign": 0.5, "evaded": 0.4}}
    (folder / "summary.json").write_text(json.dumps(worse))
    words = words_of(folder)
    for flag in (
        "leans to the answer shown first. By 35 points on average (bound 5 points)", "Guards marked 3.2 % of the",
        "The order often decides. 100 % of 30 judgements that are decided in both orders",
        "does not answer with a letter. On average 40 %", "3.2 % of the labels abstain. They teach nothing (bound",
        "Labels lean to answer A. The mean label is 55.0 %", "3.2 % of the answers are cut off", "preamble: 1 text",
        "“Kindness” almost never changes an answer. 1 of 31 critiques", "answer, it agrees with 52 %, by how sure",
        "badly calibrated. Its probabilities are off by 20 points", "Signs of collapse", "first at step 1",
        "High KL. 30 nats", "policy are cut off", "evades more often",
        "less helpful. It helps with 50.0 % of harmless requests, the base with 92.8 %: 42.8 points fewer",
    ):  # fmt: skip
        assert flag in words, flag
    assert "High KL" not in sound and "Signs of collapse." not in sound and "almost never" not in sound


def test_the_order_is_judged_by_what_is_decided_in_both(folder: Path) -> None:
    """Most judgements are near one half in an order, where nothing turns: they say nothing of the others."""
    faint, turned, kept = reading(KIND, 0.52, 0.52), reading(KIND, 0.9, 0.8), reading(KIND, 0.9, 0.1)
    few = [*pairs(15, turned), *pairs(15, kept, start=15), *pairs(970, faint, start=30)]
    assert "The order often decides. 50 % of 30 judgements that are decided in both orders" in label(folder, *few)
    assert "order often" not in label(folder, *pairs(4, turned), *pairs(16, kept, start=4), *pairs(80, faint, start=20))
    same = [*pairs(20, turned, b="yes ."), *pairs(30, kept, start=20)]
    assert "order often" not in label(folder, *same)  # of equal answers there is nothing else to pick by


def test_ties_are_those_of_different_answers(folder: Path) -> None:
    tie, kept = reading(KIND, 0.5, 0.5), reading(KIND, 0.9, 0.1)
    words = label(folder, *pairs(10, tie), *pairs(20, kept, start=10), *pairs(5, tie, b="yes .", start=30))
    assert "33 % of the labels are ties. Of 30 labels of two different answers, 10 lie within 0.5 points" in words
    assert "(bound 30 %)" in words
    assert "are ties" not in label(
        folder, *pairs(5, tie), *pairs(20, kept, start=5), *pairs(30, tie, b="yes .", start=25)
    )


def test_a_lean_by_principle_that_cancels_over_all(folder: Path) -> None:
    words = label(folder, *pairs(20, reading(KIND, 0.9, 0.3), reading(CARE, 0.5, 0.3)))
    assert "The judge leans" not in words
    assert "kind: 10 points to the first; care: 10 points to the second" in words and "(bound 5 points)" in words
    assert "By some principles" not in label(folder, *pairs(20, reading(KIND, 0.9, 0.1), reading(CARE, 0.9, 0.15)))


def test_judgements_whose_answer_is_known(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"label_ece": 0.12, "labels_decided": 480.0}))
    found = {"file": "pairs.jsonl", "pairs": 40, "read": 40, "accuracy": 0.6, "ece": 0.3, "reliability": []}
    asked = {"file": "quiz.jsonl", "questions": 40, "read": 40, "accuracy": 0.6, "chance": 0.25, "ece": 0.05}
    for one in (found, asked, found | {"file": "few.jsonl", "read": 19}):
        write(folder / "judge" / one["file"] / "measures.json", one)
    words = words_of(folder)
    told = "off by 12.1 points on average over 480 judgements (expected calibration error, bound 10 points)"
    assert told.replace("12.1", "12") in words
    assert "Of 40 known answers of pairs.jsonl it has 60.0 % right; a coin would have 50 % (bound 65 %)" in words
    assert "badly calibrated on pairs.jsonl. They are off by 30 points on average over 40 known answers" in words
    assert "known answers of quiz.jsonl" not in words and "known answers of few.jsonl" not in words
    shutil.rmtree(folder / "judge")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"label_ece": 0.1}))
    assert "badly calibrated" not in words_of(folder)


def test_too_few_held_out_pairs_are_no_worry(folder: Path) -> None:
    finish(folder, "reward", {"heldout_accuracy": 0.0, "heldout_ece": 0.4, "heldout_pairs": 1})
    words = words_of(folder)
    assert "Held out: 1 pair (bound 20)" in words and "hardly learnt" not in words


def test_worries_stand_on_the_first_screen(folder: Path) -> None:
    html = render(gather(folder), ReportConfig())
    assert "No check of this page found a worry" in html.split("<nav")[0]
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"label_ece": 0.2}))
    first = render(gather(folder), ReportConfig()).split("<nav")[0]
    assert "One thing to look at before this model is used" in first
    assert '<a href="#flag-1">The judge&#39;s probabilities are badly calibrated</a>' in first
