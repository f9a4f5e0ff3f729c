"""One process at a time in a run folder, and what a finished stage says."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_run

from bylaw.lock import only_one
from bylaw.pipeline import run_pipeline
from bylaw.recipe import load_recipe
from bylaw.told import stage_line

HOLD = """
import sys
from pathlib import Path
from bylaw.lock import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(write_run(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(recipe.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another bylaw is at work in .*out; wait for its end"):
            run_pipeline(recipe, ("revise",))
        assert list(recipe.out.iterdir()) == []
        first.kill()  # and with it goes the lock
    run_pipeline(recipe, ("revise",))
    said = capsys.readouterr().out
    assert "revise: 5 chains of 2 rounds, 5 helpful answers, " in said
    assert list((recipe.out / "revise").glob("*.lock")) == []
    run_pipeline(recipe, ("revise",))
    said = capsys.readouterr().out
    assert "revise: done before" in said and "chains" not in said


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file; allowed: a folder"), only_one(tmp_path / "out"):
        pass


def test_a_stage_in_one_line() -> None:
    def line(stage: str, **counts: object) -> str:
        return stage_line({"stage": stage, "counts": counts, "seconds": 75.0})

    reasons = {"question too long": 2, "unsure": 1}
    assert line("label", labels=1, abstained=reasons, same_text=0) == (
        "label: 1 label, 3 abstained (question too long: 2; unsure: 1; `bylaw trust` tells more), in 1 min 15 s"
    )
    made = {"iterations": 4, "episodes": 128, "stopped": "kl_budget", "objective/kl": 0.5, "objective/scores": None}
    assert line("ppo", **made) == (
        "ppo: 128 episodes in 4 iterations, KL per answer 0.5 at the end, stopped: kl_budget, in 1 min 15 s"
    )
    learnt = {"train_pairs": 9, "steps": 3, "heldout_pairs": 2, "heldout_accuracy": 0.5, "over_context": 1}
    told = "9 pairs in 3 steps, 2 held out: it agrees with 50 % of their labels, over context: 1"
    assert told in line("dpo", **learnt)
