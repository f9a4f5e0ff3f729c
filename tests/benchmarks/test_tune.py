"""The tuner's choices, with a timer that the test holds: what is tried, what is dropped, what is taken and written."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bylaw.benchmarks import fake_gpu, tune
from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.benchmarks.tune import Place
from bylaw.kernels import launch
from bylaw.kernels.launch import config

CPU = torch.device("cpu")
Row = dict[str, Any]
# In a process of its own, as the interpreter compiles nothing: a row that is good, one that spills, one that is wrong.
FAULTS = """
import json
from bylaw.benchmarks import tune
place = tune.Place("swiglu", 0)
trial = tune.Trial("swiglu", "sm_90", place, frozenset(["I=14336"]))
rows = [{"BLOCK": 512, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 1}, {"BLOCK": 500, "num_warps": 4}]
assert tune.places_in_use(tune.modules(["swiglu"])["swiglu"], "sm_90") == {place: {"I=14336"}}
print(json.dumps([tune.fault_of(trial, row) for row in rows]))
tune.fault_of = lambda trial, row: "bad" if row["num_warps"] == 2 else ""
tune.main(tune.Config(op="swiglu", dry_run=True, jobs=1))
"""


def test_neighbours_differ_in_one_number() -> None:
    row = {"BLOCK": 64, "TMA": True, "num_warps": 16, "num_stages": 1, "STAGES": 5, "rows": {"PIVOTS": 1}}
    found = list(tune.neighbours(row))
    expected = [
        {"BLOCK": 32},
        {"BLOCK": 128},
        {"TMA": False},
        {"num_warps": 8},
        {"num_stages": 2},
        {"STAGES": 4},
        {"rows": {"PIVOTS": 2}},
    ]
    assert all(isinstance(one["TMA"], bool) for one in found)
    assert len(found) == len(expected) and all({**row, **one} in found for one in expected)


def test_an_operation_may_list_its_own_candidates() -> None:
    module = ModuleType("own")
    assert {"BLOCK": 32} in tune.candidates(module, "swiglu", {"when": {"H": 8}, "BLOCK": 64})
    vars(module)["candidates"] = lambda table, row: [{"BLOCK": 7}] if table == "swiglu" else []
    assert tune.candidates(module, "swiglu", {"BLOCK": 64}) == [{"BLOCK": 7}]


def test_a_row_is_tried_in_its_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"when": {"H": 64}, "BLOCK": 1}, {"when": {"H": 128}, "BLOCK": 2}, {"BLOCK": 3}]
    monkeypatch.setattr(launch, "_table", lambda operation: {"interpreter": rows, "small": rows})
    monkeypatch.setattr(launch, "architecture", lambda device: "interpreter")
    with tune.trying(Place("one", 1), {"BLOCK": 9}) as used:
        assert [config("one", CPU, H=h) for h in (64, 65, 999)] == [{"BLOCK": 1}, {"BLOCK": 9}, {"BLOCK": 3}]
        assert config("other", CPU, H=65) == {"BLOCK": 2}
    assert used == {Place("one", 0), Place("one", 1), Place("one", 2), Place("other", 1)}
    assert config("one", CPU, H=65) == {"BLOCK": 2}


def descend(times: dict[int, float], usable: Sequence[int] = (16, 32, 64, 128, 256), rounds: int = 8) -> int:
    """Where `climb` ends, over blocks, from 64."""
    timed: list[int] = []

    def timer(row: Row) -> float:
        assert row["BLOCK"] not in timed, "timed twice"
        timed.append(row["BLOCK"])
        return times[row["BLOCK"]]

    def near(row: Row) -> list[Row]:
        return [{"BLOCK": row["BLOCK"] // 2}, {"BLOCK": row["BLOCK"] * 2}]

    start = {"when": {"H": 8}, "BLOCK": 64}
    best = tune.climb(start, near, lambda rows: [row for row in rows if row["BLOCK"] in usable], timer, rounds)
    assert "when" not in best and set(timed) <= set(usable)
    return best["BLOCK"]


def test_the_fastest_neighbour_is_taken_until_none_is_faster() -> None:
    assert descend({16: 1.0, 32: 2.0, 64: 4.0, 128: 3.0, 256: 0.1}) == 16
    assert descend({32: 2.0, 64: 1.0, 128: 1.5}) == 64
    assert descend({32: 0.995, 64: 1.0, 128: 1.5}) == 64  # noise
    assert descend({16: 1.0, 32: 2.0, 64: 4.0, 128: 3.0}, rounds=1) == 32
    assert descend({32: math.inf, 64: 4.0, 128: 3.0, 256: 3.5}) == 128  # a wrong result has no time
    assert descend({64: 4.0, 128: 5.0}, usable=(64, 128)) == 64
    assert descend({64: 4.0}, usable=(64,)) == 64


def test_those_with_a_fault_are_dropped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "fault_of", lambda trial, row: "spills" if row["BLOCK"] > 64 else "")
    trial = tune.Trial("swiglu", "sm_90", Place("swiglu", 0), frozenset())
    assert tune.drop_bad(map, trial, [{"BLOCK": 128}, {"BLOCK": 32}]) == [{"BLOCK": 32}]
    assert 'left out {"BLOCK": 128}: spills' in capsys.readouterr().out


def test_a_row_is_written_under_its_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "CONFIGS", tmp_path)
    text = """{
  "interpreter": [{"BLOCK": 8}],
  "sm_90": [
    {"when": {"H": 64}, "BLOCK": 16, "num_warps": 4},
    {"BLOCK": 32, "num_warps": 4}
  ]
}
"""
    (tmp_path / "one.json").write_text(text)
    tune.write_row(Place("one", 0), "sm_90", {"BLOCK": 64, "num_warps": 8})
    tune.write_row(Place("one", 0), "interpreter", {"BLOCK": 4})
    changed = text.replace('"BLOCK": 16, "num_warps": 4', '"BLOCK": 64, "num_warps": 8').replace("8}]", "4}]")
    assert (tmp_path / "one.json").read_text() == changed


def block(device: torch.device) -> int:
    return config("one", device)["BLOCK"]


def a_module() -> ModuleType:
    """An operation on one row: 32 is fast, 16 is slow, 128 is wrong, 256 fails. One of its cases goes without it."""

    def ours(x: torch.Tensor, backend: str) -> torch.Tensor:
        if backend == "reference":
            return x + 1
        size = block(x.device) if len(x) == 2 else 32
        if size == 256:
            raise RuntimeError("too many resources")
        time.sleep({32: 0, 16: 0.02}.get(size, 0.005))
        return x + (2 if size == 128 else 1)

    def cases(small: bool) -> Iterator[Case]:
        for n in (2, 3):
            yield Case(
                "one", {"N": n}, lambda device, dtype, n=n: {"x": torch.ones(n, dtype=dtype)}, ours, Floor(bytes=1)
            )

    module = ModuleType("one")
    vars(module).update(cases=cases, launches=lambda: [Launch("N=2", lambda: block(torch.device("meta")))])
    return module


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the one table "one", whose rows say 64."""
    rows = {name: [{"BLOCK": 64}] for name in ("interpreter", "sm_90")}
    (tmp_path / "one.json").write_text(json.dumps(rows))
    monkeypatch.setattr(launch, "_table", lambda operation: rows)
    monkeypatch.setattr(tune, "CONFIGS", tmp_path)
    monkeypatch.setattr(tune, "require_compiler", lambda: None)
    monkeypatch.setattr(tune, "modules", lambda names: {"one": a_module()})
    monkeypatch.setattr(tune, "fault_of", lambda trial, row: "")
    return tmp_path


def test_the_timer_checks_and_times_the_cases_that_use_the_row(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune.Bench, "ours", "triton")
    timer = tune.Timer(a_module(), Place("one", 0), 0.01, "cpu")
    assert [case.shape["N"] for case in timer.cases] == [2]
    assert timer({"BLOCK": 32}) < 5 < timer({"BLOCK": 64}) < 20 < timer({"BLOCK": 16}) < math.inf
    assert timer({"BLOCK": 128}) == timer({"BLOCK": 256}) == math.inf
    said = capsys.readouterr().out
    assert 'left out {"BLOCK": 128}: error' in said and 'left out {"BLOCK": 256}: too many resources' in said
    assert tune.Timer(a_module(), Place("one", 1), 0.01, "cpu").cases == []


def test_the_table_gets_the_fastest_row(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        def __init__(self, module: ModuleType, place: Place, seconds: float) -> None:
            self.cases = ["one"]

        def __call__(self, row: Row) -> float:
            return abs(math.log2(row["BLOCK"]) - 9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "Timer", Known)
    assert tune.main(tune.Config(op="one", jobs=1)) == 0
    assert json.loads((tables / "one.json").read_text()) == {"interpreter": [{"BLOCK": 64}], "sm_90": [{"BLOCK": 512}]}
    with pytest.raises(ValueError, match=r"'sm_90' and --arch 'sm_100'"):
        tune.main(tune.Config(op="one", arch="sm_100"))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        tune.main(tune.Config(op="swiglu"))
    monkeypatch.setattr(fake_gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds none; --dry-run prints"):
        tune.main(tune.Config(op="swiglu"))
    with pytest.raises(ValueError, match=r"'sm_89'.*allowed: sm_80, "):
        tune.main(tune.Config(op="swiglu", arch="sm_89", dry_run=True))
    with pytest.raises(ValueError, match="no such operation: 'nothing'"):
        tune.main(tune.Config(op="nothing"))


def test_ahead_of_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, title, left_out, *printed = done.stdout.splitlines()
    good, spilling, uneven = json.loads(first)
    assert good == "" and "bytes spilled" in spilling and "does not compile" in uneven
    assert title.startswith("swiglu, sm_90, row 0: ") and left_out.endswith('"num_warps": 2}: bad')
    assert [json.loads(line)["BLOCK"] for line in printed] == [512, 2048, 1024]
