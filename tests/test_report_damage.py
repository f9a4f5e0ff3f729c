"""A run whose files are damaged: the report names the file and the place in it, and makes no page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_report import CHAINS, PREFERENCES, SUMMARY, whole_run, write

from bylaw.report import ReportConfig
from bylaw.report.gather import gather
from bylaw.report.page import render
from bylaw.sums import write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "run")


def page_of(folder: Path) -> str:
    return render(gather(folder), ReportConfig())


DAMAGE = {
    "revise/chains.jsonl": [
        ({"id": "p"}, "chains.jsonl:1: prompt is missing"),
        (CHAINS[0] | {"rounds": 3}, "chains.jsonl:1: rounds = 3 is not possible; allowed: a list"),
        (CHAINS[0] | {"rounds": [{"round": 1}]}, "chains.jsonl:1: rounds[0].principle is missing"),
        (CHAINS[0] | {"answer": {"text": None}}, "chains.jsonl:1: answer.text = None"),
    ],
    "label/preferences.jsonl": [
        (PREFERENCES[0] | {"p_a": None}, "preferences.jsonl:1: p_a = None"),
        (PREFERENCES[0] | {"labels": [{}]}, "preferences.jsonl:1: labels[0].principle is missing"),
        (PREFERENCES[0] | {"by": "me"}, "preferences.jsonl:1: by = 'me'"),
    ],
    "summary.json": [
        (SUMMARY | {"base": {"complied_harmful": "most"}}, "summary.json: base.complied_harmful = 'most'"),
        (SUMMARY | {"base": [1]}, "summary.json: base = [1]"),
        (SUMMARY | {"base": {"intervals": {"evaded": [0.1]}}}, "summary.json: base.intervals.evaded = [0.1] is not"),
        (SUMMARY | {"revision_curve": [0.5, None]}, "summary.json: revision_curve[1] = None"),
        (SUMMARY | {"label_ece": float("nan")}, "summary.json: label_ece = nan"),
        (SUMMARY | {"label_accuracy": 96}, "summary.json: label_accuracy = 96"),
    ],
    "ppo/manifest.json": [({"stage": "ppo"}, "manifest.json: seconds is missing")],
    "reward/metrics.jsonl": [({"step": 1, "loss": "low"}, "metrics.jsonl:1: loss = 'low'")],
    "behaviour/x/evaluation.json": [({"base": {"counts": {"answers": 1}}}, "json: base.by_principle is missing")],
    "judge/x/measures.json": [({"file": "x"}, "measures.json: read is missing")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "record", "told"), [(name, *one) for name, some in DAMAGE.items() for one in some])
def test_a_damaged_file_is_named(folder: Path, name: str, record: Any, told: str) -> None:
    write(folder / name, record)
    with pytest.raises(ValueError) as error:
        page_of(folder)
    assert told in str(error.value) and f"`bylaw check {folder}` tells more" in str(error.value)


@pytest.mark.parametrize("line", ["ppo = 3", "base = 3", "last = []", "label = 'x'"])
def test_a_damaged_recipe_is_named(folder: Path, line: str) -> None:
    (folder / "recipe.toml").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"recipe.toml: \w+ = .* is not possible; allowed: .*bylaw check"):
        page_of(folder)


def test_a_file_that_is_not_what_its_hash_says_is_flagged(folder: Path) -> None:
    write_sums(folder)
    told = "Files of this run were changed after they were written"
    assert told not in page_of(folder)
    path = folder / "summary.json"
    text = path.read_text()
    path.write_text(text.replace("0.", "0.0", 1))
    assert told in page_of(folder) and "summary.json: this page shows them as they are now" in page_of(folder)
    path.write_text(text)
    shutil.rmtree(folder / "ppo")  # to be made again
    assert told not in page_of(folder)
    (folder / "SHA256SUMS").write_text("spoiled")
    assert told in page_of(folder) and "SHA256SUMS: this page" in page_of(folder)


def test_texts_left_out_of_training_and_cut_ones_that_are_in_it_are_told_apart(folder: Path) -> None:
    path = folder / "finetune" / "manifest.json"
    manifest = json.loads(path.read_text())
    write(path, manifest | {"counts": {"marked_revisions": 3, "cut_revisions": 2}})
    page = page_of(folder)
    assert "Some texts were left out of training.</b> marked revisions: 3 (bound" in page
    assert "Texts that stop in the middle were trained on.</b> revisions: 2 (bound" in page


def test_null_where_nothing_is_known_is_no_damage(folder: Path) -> None:
    told = SUMMARY | {"label_ece": None, "silent_refusal": None, "dpo_cai": None, "labels_decided": None}
    (folder / "summary.json").write_text(json.dumps(told))
    write(folder / "judge" / "x" / "measures.json", {"file": "x", "questions": 3, "read": 0, "accuracy": None})
    assert "89.0\u202f%" in page_of(folder)
