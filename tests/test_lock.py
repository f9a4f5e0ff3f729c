"""One process at a time in a run folder, and what a finished stage says."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import write_run

from bylaw.check import check, check_sums
from bylaw.lock import only_one
from bylaw.pipeline import run_pipeline
from bylaw.recipe import load_recipe
from bylaw.sums import read_sums
from bylaw.told import stage_line

HOLD = """
import sys
from pathlib import Path
from bylaw.check import check, check_sums
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
        assert [path.name for path in recipe.out.iterdir()] == [".lock"]
        first.kill()  # and with it goes the lock
    run_pipeline(recipe, ("revise",))
    said = capsys.readouterr().out
    assert "revise: 5 chains of 2 rounds, 5 helpful answers, " in said
    assert not check(recipe.out).problems  # the lock's file is none of the run's
    run_pipeline(recipe, ("revise",))
    said = capsys.readouterr().out
    assert "revise: done before" in said and "chains" not in said


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        told = f"{name} is a file, or a link .*; allowed: a folder"
        with pytest.raises(ValueError, match=told), only_one(tmp_path / name):
            pass


def test_a_child_does_not_hold_on_to_what_its_parent_has_let_go(tmp_path: Path) -> None:
    with only_one(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with only_one(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_where_there_are_no_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(held: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_one(tmp_path):
        assert "its file system has no locks; let no other bylaw work there" in capsys.readouterr().err


WRITE = """
import sys
from pathlib import Path
from bylaw.model.records import write_atomic
from bylaw.sums import write_sums
run, name = Path(sys.argv[1]), sys.argv[2]
for n in range(30):
    write_atomic(run / name / f"{n}.json", "{}")
    write_sums(run, f"{name}/{n}.json")
"""


def test_processes_that_write_to_one_run_lose_no_line_of_its_sums(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    both = [subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path), name]) for name in "ab"]
    assert [one.wait() for one in both] == [0, 0]
    assert len(read_sums(tmp_path)) == 60 and list(check_sums(tmp_path)) == []


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
