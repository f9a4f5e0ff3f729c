"""`bylaw amend` on a finished small run: what it tells, writes, and makes again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import CONSTITUTION

from bylaw.amend import amend, describe
from bylaw.branch import branch
from bylaw.check import check
from bylaw.constitution.diff import diff
from bylaw.constitution.load import parse_constitution
from bylaw.model.records import read_records
from bylaw.pipeline import run_pipeline
from bylaw.recipe import AmendConfig, load_recipe

JUDGED = CONSTITUTION.replace('id = "kind"', 'id = "kind"\ncomparison = "which is better ?"')
REWORDED = CONSTITUTION.replace("it never hurts", "it hurts no neighbour")
RESOURCED = CONSTITUTION.replace('sources = ["none"]', 'sources = ["elsewhere"]')


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def written(text: str, folder: Path) -> str:
    (folder / "new.toml").write_text(text)
    return str(folder / "new.toml")


def test_a_change_of_comparisons_is_made_from_the_labels_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The labels are those of a full labelling by the new constitution; what comes before is copied."""
    new = written(JUDGED, tmp_path)
    facts = amend(run, new, AmendConfig(out=tmp_path / "amended"))
    assert facts["first_stage"] == "label" and facts["chains"]["rounds"] == 0
    told = capsys.readouterr().out
    assert "which is better ?" in told and "first stage to be made again: label" in told
    branch(run, tmp_path / "anew", ("revise", "finetune", "compare"))
    run_pipeline(replace(load_recipe(run / "recipe.toml"), out=tmp_path / "anew", constitution=new), ("label",))
    amended, anew = (read_records(tmp_path / out / "label" / "preferences.jsonl") for out in ("amended", "anew"))
    assert [one["abstained"] for one in amended] == [one["abstained"] for one in anew]
    # Asked in other company, so up to the rounding of sums.
    sides = [[one["p_a"] for one in some if not one["abstained"]] for some in (amended, anew)]
    assert sides[0] == pytest.approx(sides[1], abs=1e-6)
    assert (tmp_path / "amended" / "ppo" / "rl-cai" / "model.safetensors").exists()
    flipped = read_records(run / "amendments" / facts["to"] / "flips.jsonl")
    old, full = (read_records(place / "label" / "preferences.jsonl") for place in (run, tmp_path / "anew"))
    signs = [[None if one["p_a"] is None else one["p_a"] > 0.5 for one in some] for some in (old, full)]
    crossed = [one["id"] for one, was, now in zip(old, *signs, strict=True) if was is not now]
    assert [one["id"] for one in flipped] == crossed and facts["flips"] == len(crossed)
    assert not check(run).problems and not check(tmp_path / "amended").problems


def test_a_reworded_principle_is_asked_only_where_it_is_drawn(run: Path, tmp_path: Path) -> None:
    labels = read_records(run / "label" / "preferences.jsonl")
    chains = read_records(run / "revise" / "chains.jsonl")
    facts = amend(run, written(REWORDED, tmp_path), AmendConfig(json=True))
    by = [one["principle"]["id"] for p in labels for one in p["labels"]]
    assert facts["asked"] == facts["touched"] == facts["questions"] == by.count("care") < facts["comparisons"]
    rounds = [round["principle"]["id"] for chain in chains for round in chain["rounds"]]
    assert facts["first_stage"] == "revise" and facts["chains"]["of"] == len(rounds)
    assert facts["chains"]["rounds"] == rounds.count("care")
    assert json.loads((run / "amendments" / facts["to"] / "amendment.json").read_text()) == facts


def test_what_reaches_no_prompt_changes_nothing(run: Path, tmp_path: Path) -> None:
    new = written(RESOURCED, tmp_path)
    facts = amend(run, new, AmendConfig())
    assert (facts["first_stage"], facts["touched"], facts["asked"], facts["flips"]) == (None, 0, 0, 0)
    with pytest.raises(ValueError, match="reaches no prompt"):
        amend(run, new, AmendConfig(out=tmp_path / "again"))


def test_the_labels_that_moved_most_are_shown_first() -> None:
    sides = [{"p_a": p, "side": "a" if p > 0.5 else "b"} for p in (0.4999, 0.5001, 0.1, 0.9)]
    asked = {"prompt": [{"role": "user", "content": "?"}], "a": "yes", "b": "no"}
    small, large = ({"id": id, "before": sides[n], "after": sides[n + 1]} | asked for id, n in (("s", 0), ("l", 2)))
    change = diff(*[parse_constitution(CONSTITUTION, "small")] * 2)
    facts = {"comparisons": 2, "touched": 2, "asked": 2, "questions": 2, "flips": 2, "first_stage": None}
    facts["chains"] = {"rounds": 0, "of": 0, "chains": 0}
    text = describe(change, facts, [small, large], Path("there"))
    assert text.index("l: b (p(a) 0.1000) -> a (p(a) 0.9000)") < text.index("s: b (p(a) 0.4999)")


def test_a_run_without_labels_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "label" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="stage label is not finished"):
        amend(run, written(JUDGED, tmp_path), AmendConfig())
