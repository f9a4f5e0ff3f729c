"""The whole pipeline under torchrun, as a person starts it, against one process: same records, same curves, and a kill
at two processes that one process picks up. And what is refused there, once and not once a process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from small_run import write_run

from bylaw.pipeline import run_pipeline
from bylaw.recipe import STAGES, load_recipe
from bylaw.together import by_first

RECORDS = ("revise/chains.jsonl", "revise/helpful.jsonl", "compare/pairs.jsonl", "label/preferences.jsonl")
# The first of the ranks dies when PPO has saved its fourth step; the others must not wait for it.
KILLED = """
import os, signal, sys
from bylaw.cli import main
from bylaw.model.train_state import Checkpoints

save = Checkpoints.save

def save_and_die(self, progress):
    save(self, progress)
    if self.parallel.first and "ppo" in str(self.folder) and progress["step"] == 4:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
main(["run", sys.argv[1]])
"""
CURVES = {"finetune": ("loss",), "reward": ("loss",), "ppo": ("loss/policy", "loss/value", "objective/scores")}


def write_small(folder: Path) -> Path:
    """A recipe whose weights move little, so that a difference in the last digit stays one."""
    recipe = write_run(folder)
    text = recipe.read_text().replace("learning_rate = 0.01", "learning_rate = 0.001")
    recipe.write_text(text.replace("seed = 3", "seed = 3\ntimeout_minutes = 1.0"))
    return recipe


def torchrun(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one process."""
    recipe = write_small(tmp_path_factory.mktemp("one"))
    run_pipeline(load_recipe(recipe))
    return recipe.parent / "out"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of two."""
    recipe = write_small(tmp_path_factory.mktemp("two"))
    done = torchrun("-m", "bylaw", "run", recipe)
    assert done.returncode == 0, done.stderr
    heads = [line.split(": ")[0] for line in done.stdout.splitlines()]
    assert [head for head in heads if head in STAGES] == list(STAGES)  # the first rank alone speaks
    return recipe.parent / "out"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / stage / "manifest.json").read_text())["counts"]


def check_curves(one: Path, other: Path, gap: float) -> None:
    for stage, names in CURVES.items():
        curves = [records(out / stage / "metrics.jsonl") for out in (one, other)]
        assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
        for a, b in zip(*curves, strict=True):
            for name in names:
                assert a[name] == pytest.approx(b[name], abs=gap), (stage, a["step"], name)


def texts(record: Any) -> Any:
    """A record without what is computed from the weights' last digits: hashes, log-probs, probabilities."""
    if isinstance(record, dict):
        return {key: texts(value) for key, value in record.items() if key != "by"}
    if isinstance(record, list):
        return [texts(value) for value in record]
    return None if isinstance(record, float) else record


def test_two_processes_make_the_records_of_one(one: Path, two: Path) -> None:
    for name in RECORDS[:2]:
        assert (two / name).read_bytes() == (one / name).read_bytes()
    for name in RECORDS[2:]:  # drawn from trained weights, which differ in their last digits
        assert texts(records(two / name)) == texts(records(one / name))
    assert {path.name for path in two.rglob(".*")} == {".lock", ".SHA256SUMS.lock"}  # no copy that was half made


def test_two_processes_learn_what_one_learns(one: Path, two: Path) -> None:
    check_curves(one, two, 1e-5)
    for stage in STAGES:
        here, there = (counts(out, stage) for out in (one, two))
        engines = [found.pop("engine", {}) for found in (here, there)]
        for name in ("prompt_tokens", "generated_tokens"):
            assert engines[0].get(name) == engines[1].get(name)
        whole = [{key: value for key, value in found.items() if type(value) is int} for found in (here, there)]
        assert whole[0] == whole[1] and whole[0]
    assert counts(two, "reward")["heldout_loss"] == pytest.approx(counts(one, "reward")["heldout_loss"], abs=1e-5)


def test_a_run_killed_at_two_processes_goes_on_in_one(one: Path, tmp_path: Path) -> None:
    recipe = write_small(tmp_path)
    out = tmp_path / "out"
    for stage in ("revise", "finetune"):  # the very weights of the one process
        shutil.copytree(one / stage, out / stage)
    (tmp_path / "killed.py").write_text(KILLED)
    killed = torchrun(tmp_path / "killed.py", recipe)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in killed.stderr
    assert json.loads((out / "ppo" / "state" / "latest.json").read_text()) == {"state": "step-4"}
    for name in RECORDS[2:]:
        assert (out / name).read_bytes() == (one / name).read_bytes()
    run_pipeline(load_recipe(recipe))
    assert json.loads((out / "ppo" / "manifest.json").read_text())["resumed"]
    check_curves(one, out, 1e-4)


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    """The tests' model has one head of keys, which no two processes can share out."""
    done = torchrun("-m", "bylaw", "run", write_small(tmp_path), "--tensor-parallel", "2")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("bylaw run")]
    assert said.startswith("bylaw run: num_kv_heads = 1 cannot be shared out to 2 tensor-parallel ranks")


@dataclass
class Rank:
    """What `by_first` asks of a Parallel; `told` is what the first rank tells."""

    first: bool
    told: Any = None
    met: int = 0
    alone: bool = False

    def tell(self, value: Any) -> Any:
        self.told = value if self.first else self.told
        return self.told

    def meet(self) -> None:
        self.met += 1


def refuse() -> None:
    raise ValueError("no such thing")


def test_what_the_first_rank_refuses_the_others_leave_without_a_word() -> None:
    first, other = Rank(first=True), Rank(first=False)
    with pytest.raises(ValueError, match="no such thing"):
        by_first(first, refuse)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SystemExit, match="2"):
        by_first(other, refuse)  # pyright: ignore[reportArgumentType]
    assert first.told is None and first.met == other.met == 1
    assert by_first(first, lambda: 7) == by_first(Rank(False, first.told), refuse) == 7  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("world", "settings", "said"),
    [
        (3, {"tensor_parallel": 2}, "tensor_parallel = 2 with 3 processes; allowed: a divisor of their number"),
        (2, {"device": "cuda:0"}, "device = 'cuda:0'"),
    ],
)  # fmt: skip
def test_a_program_that_cannot_be_is_refused(
    world: int, settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(load_recipe(write_small(tmp_path)), **settings)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=re.escape(said)):
        run_pipeline(recipe)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_pipeline(recipe)
