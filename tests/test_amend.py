"""`bylaw amend` on a finished small run: what it tells, writes, and makes again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import CONSTITUTION

from bylaw.amend import amend, describe
from bylaw.branch import branch
from bylaw.check import check
from bylaw.constitution.diff import diff
from bylaw.constitution.load import parse_constitution
from bylaw.judging import JudgeConfig, judge
from bylaw.lock import only_one
from bylaw.model.records import read_records
from bylaw.pipeline import run_pipeline
from bylaw.recipe import AmendConfig, load_recipe
from bylaw.rlaif.relabel import flips, moved, movement
from bylaw.sums import write_sums

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


def test_a_run_whose_base_has_moved_is_told_where_it_lies(run: Path, tmp_path: Path) -> None:
    new, base = written(JUDGED, tmp_path), load_recipe(run / "recipe.toml").base
    facts = amend(run, new, AmendConfig())
    shutil.rmtree(run / "amendments")
    recipe, questions = (run / "recipe.toml").read_text(), tmp_path / "questions.jsonl"
    (run / "recipe.toml").write_text(recipe.replace(str(base), str(tmp_path / "gone")))
    questions.write_text('{"prompt": "which ?", "options": ["a", "b"], "answer": 1}\n')
    for work in (lambda: amend(run, new, AmendConfig()), lambda: judge(run, questions, JudgeConfig())):
        with pytest.raises(FileNotFoundError, match=r"gone: this run's base is gone; --base FOLDER"):
            work()
    assert amend(run, new, AmendConfig(base=base)) == facts
    assert judge(run, questions, JudgeConfig(base=base))["read"] == 1
    with pytest.raises(ValueError, match="the labels were made by another model"):
        amend(run, new, AmendConfig(base=run / "finetune" / "sl-cai"))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace('judge = "base"', 'judge = "sl-cai"'))
    assert 'judge = "sl-cai"' in (run / "recipe.toml").read_text()
    assert judge(run, questions, JudgeConfig())["read"] == 1  # which lies in the run, with its tokenizer


def test_a_run_that_is_being_copied_is_not_copied_by_another(run: Path, tmp_path: Path) -> None:
    new = written(JUDGED, tmp_path)
    with only_one(tmp_path / "amended"), pytest.raises(ValueError, match=r"another bylaw is at work in .*amended"):
        amend(run, new, AmendConfig(out=tmp_path / "amended"))
    assert [path.name for path in (tmp_path / "amended").iterdir()] == [".lock"]


def test_what_reaches_no_prompt_changes_nothing(run: Path, tmp_path: Path) -> None:
    new = written(RESOURCED, tmp_path)
    facts = amend(run, new, AmendConfig())
    assert (facts["first_stage"], facts["touched"], facts["asked"], facts["flips"]) == (None, 0, 0, 0)
    with pytest.raises(ValueError, match="reaches no prompt"):
        amend(run, new, AmendConfig(out=tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (('title = "Care"', 'title = "Caring"'), None),
        (('weight = 2.0', 'weight = 6.0'), "revise"),
        (('[templates]', '[templates]\ndirect = "at once : {statement}"'), None),  # it is criticised first
        (('[templates]', '[templates]\nrating = "{dialogue} {answer} {statement}"'), None),
        (('[templates]', '[templates]\nthought_prefix = "yes"'), None),
        (('question = "which keeps', 'question = "which better keeps'), "label"),
    ],
)  # fmt: skip
def test_the_first_stage_is_the_first_that_is_asked_something_else(
    run: Path, tmp_path: Path, change: tuple[str, str], first: str | None
) -> None:
    """As the recipe asks it: without marks, thoughts or direct revisions, their templates reach nothing."""
    facts = amend(run, written(CONSTITUTION.replace(*change), tmp_path), AmendConfig())
    assert facts["first_stage"] == first
    assert bool(facts["chains"]["rounds"]) == (first == "revise") and bool(facts["asked"]) == (first is not None)


def test_what_is_refused_leaves_the_run_as_it_was(run: Path, tmp_path: Path) -> None:
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("seed = 3", "seed = 4"))
    write_sums(run, "recipe.toml")
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match="the labels were made by another seed"):
        amend(run, written(JUDGED, tmp_path), AmendConfig())
    assert sorted(run.rglob("*")) == before and not check(run).problems


def test_an_amendment_that_was_killed_is_a_note_until_it_is_gone_on_with(run: Path, tmp_path: Path) -> None:
    sums = (run / "SHA256SUMS").read_bytes()
    facts = amend(run, written(JUDGED, tmp_path), AmendConfig())
    there = run / "amendments" / facts["to"]
    (run / "SHA256SUMS").write_bytes(sums)  # as a kill midway leaves it all
    (run / "constitutions" / f"{facts['to']}.toml").unlink()
    (there / "amendment.json").unlink()
    (there / "preferences.jsonl").write_bytes((there / "preferences.jsonl").read_bytes()[:-9])
    found = check(run)
    assert not found.problems and found.notes[0].startswith(f"amendments/{facts['to']} has begun and not finished")
    assert amend(run, str(tmp_path / "new.toml"), AmendConfig()) == facts
    assert check(run).notes == check(run).problems == []


def label(id: str, p_a: float | None) -> dict[str, Any]:
    texts = {"prompt_id": id, "prompt": [{"role": "user", "content": "?"}], "a": {"text": "yes"}, "b": {"text": "no"}}
    return {"id": id, "p_a": p_a, "labels": []} | texts


def test_labels_that_moved_are_told_beside_those_that_crossed_a_half_by_a_hair() -> None:
    ids = ("hair", "far", "own side", "still", "fell silent")
    before, after = (
        [label(id, p) for id, p in zip(ids, values, strict=True)]
        for values in ((0.499, 0.1, 0.6, 0.5, 0.7), (0.501, 0.9, 0.7, 0.51, None))
    )
    assert [one["id"] for one in flips(before, after)] == ["hair", "far", "still", "fell silent"]
    assert [one["id"] for one in moved(before, after)] == ["fell silent", "far", "own side"]
    told = movement(before, after)
    assert (told["firm_flips"], told["moved"]) == (2, 3)
    assert told["mean_change"] == pytest.approx((0.002 + 0.8 + 0.1 + 0.01) / 4)
    facts = {"comparisons": 5, "touched": 5, "asked": 5, "questions": 5, "flips": 4, "first_stage": None} | told
    facts["chains"] = {"rounds": 0, "of": 0, "chains": 0}
    change = diff(*[parse_constitution(CONSTITUTION, "small")] * 2)
    text = describe(change, facts, moved(before, after), Path("there"))
    assert text.index("far: b (p(a) 0.1000) -> a (p(a) 0.9000)") < text.index("own side: a (p(a) 0.6000)")
    assert "hair" not in text
    assert "of them 2 from one side to the other by more than a tie (0.005)" in text


def test_a_run_without_labels_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "label" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="stage label is not finished"):
        amend(run, written(JUDGED, tmp_path), AmendConfig())
