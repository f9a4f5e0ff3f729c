"""`bylaw judge RUN FILE`: the run's own judge on questions and on pairs whose answer is known, and what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import write_lines, write_run

from bylaw.check import check
from bylaw.cli import main
from bylaw.ledger import Ledger
from bylaw.lock import only_one
from bylaw.model.records import read_records
from bylaw.report import ReportConfig
from bylaw.report.gather import gather
from bylaw.report.page import render
from bylaw.rlaif.known import describe_known, measure_known
from bylaw.trace import Tracer
from bylaw.trace_text import describe

PAIRS: list[dict[str, Any]] = [
    {"prompt": "how do i mend a gate ?", "chosen": "with care .", "rejected": "break it ."},
    {"prompt": "how do i mend a cart ?", "chosen": "ask them first .", "rejected": "no ."},
    {"prompt": "how do i mend a well ?", "chosen": "no .", "rejected": "no ."},
]
QUESTIONS = [{"prompt": "which is kind ?", "options": ["break it", "mend it"], "answer": 1}]


def told(id: str, p_a: float | None, *readings: tuple[str, float | None]) -> dict[str, Any]:
    labels = [{"principle": {"id": name}, "p_a": p} for name, p in readings]
    return {"id": id, "p_a": p_a, "abstained": "" if p_a is not None else "no letter", "labels": labels}


def test_agreement_against_numbers_worked_by_hand() -> None:
    """Labels 0.8 and 0.3 of pairs whose a is better: sure 0.8 and right, sure 0.7 and wrong. One says nothing."""
    known = [{"id": id, "p_a": 1.0} for id in "xyz"]
    labelled = [
        told("x", 0.8, ("kind", 0.9), ("care", 0.7)),
        told("y", 0.3, ("kind", 0.5), ("care", 0.1)),
        told("z", None, ("kind", None)),
    ]
    found = measure_known(known, labelled)
    assert (found["pairs"], found["read"], found["accuracy"]) == (3, 2, 0.5)
    assert found["interval"] == pytest.approx((0.0945, 0.9055), abs=5e-5)  # Wilson's for 1 of 2
    assert found["abstained"] == {"no letter": 1}
    assert found["ece"] == pytest.approx((0.2 + 0.7) / 2)
    assert found["principles"]["kind"]["accuracy"] == 0.75 and found["principles"]["care"]["accuracy"] == 0.5
    assert (
        "kind" in describe_known(found)
        and "75.0%" in describe_known(found)
        and "9.5% to 90.5%" in describe_known(found)
    )
    soft = measure_known([{"id": "x", "p_a": 0.9}], [told("x", 0.8)])
    assert soft["accuracy"] == 0.9 and soft["ece"] == pytest.approx(0.1)
    none = measure_known([{"id": "z", "p_a": 1.0}], [told("z", None)])
    assert none["accuracy"] is None and "0 labels read" in describe_known(none)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    recipe = write_run(folder)
    recipe.write_text(
        recipe.read_text().replace("min_option_mass = 0.006", 'min_option_mass = 0.0\nprinciples = "all"')
    )
    for stage in ("revise", "finetune", "compare", "label"):
        main([stage, str(recipe)])
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "questions.jsonl", QUESTIONS)
    return folder / "out"


def test_known_pairs_are_labelled_as_the_run_labels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "pairs.jsonl"
    main(["judge", str(run), str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["read"] == 2 and found["left_out"] == {"both answers are the same": 1}
    [place] = (run / "judge").glob("pairs-*")
    labelled = read_records(place / "preferences.jsonl")
    assert [len(one["labels"]) for one in labelled] == [2, 2]
    right = [0.5 if one["p_a"] == 0.5 else float(one["p_a"] > 0.5) for one in labelled]
    assert found["accuracy"] == sum(right) / 2
    whole = (place / "preferences.jsonl").read_bytes()
    (place / "preferences.jsonl").write_bytes(whole[:-9])  # killed in the last line
    main(["judge", str(run), str(file)])
    assert (place / "preferences.jsonl").read_bytes() == whole and not check(run).problems
    capsys.readouterr()
    with only_one(place), pytest.raises(SystemExit):  # as another process at the same would hold it
        main(["judge", str(run), str(file)])
    assert "another bylaw is at work in" in capsys.readouterr().err
    page = render(gather(run), ReportConfig())
    assert "<h3>Judge on pairs.jsonl</h3>" in page and "whose answers are known" in page
    assert [one.name for one in (run / "judge").iterdir()] == [place.name]


def test_of_a_run_the_judge_is_asked_and_not_the_newest_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = run.parent / "questions.jsonl", {}
    for name, folder in (("run", run), ("base", run.parent / "base"), ("tuned", run / "finetune" / "sl-cai")):
        main(["judge", str(folder), str(file), "--out", str(tmp_path / name)])
        answers[name] = read_records(tmp_path / name)
    assert answers["run"] == answers["base"] != answers["tuned"]
    [place] = (run / "judge").glob("questions-*")
    assert read_records(place / "answers.jsonl") == answers["run"] and not check(run).problems
    said = capsys.readouterr().out
    assert "1 question, 1 answered" in said and f"What the judge said: {place}. `bylaw report" in said
    assert "The judge would rather go on otherwise than with a letter" in said  # it was never taught letters
    found = Tracer(Ledger(run)).trace(f"judge/{place.name}/1")
    assert "which is kind ?" in describe(found) and "mend it" in describe(found)
    main(["judge", str(run), str(file), "--limit", "1"])
    page = render(gather(run), ReportConfig())
    assert (
        "<code>questions.jsonl, the first 1</code>, whose answers are known" in page and "(95&nbsp;% interval: " in page
    )
    assert "<h3>Judge on questions.jsonl</h3>" in page and "<h3>Judge on questions.jsonl, the first 1</h3>" in page


def test_what_cannot_be_asked_is_refused_before_anything_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = str(run.parent / "pairs.jsonl")
    for arguments, message in (
        ([str(run.parent / "base"), pairs], "labelled by a constitution: give a run's folder"),
        ([str(run), pairs, "--by", "texts"], "by = 'texts' is not possible; allowed: none for preferences"),
        ([str(run), str(run / "nowhere.jsonl")], "nowhere.jsonl: no such file"),
    ):
        with pytest.raises(SystemExit):
            main(["judge", *arguments])
        assert message in capsys.readouterr().err
