"""Each trainer killed at random instants in a process of its own (benchmarks/kills.py, in small)."""

from pathlib import Path

from bylaw.benchmarks.kills import CHECKPOINTS, trials


def test_killed_trainers_end_with_the_weights_of_those_left_alone(tmp_path: Path) -> None:
    found = list(trials(tmp_path, count=3, seed=1, steps=6))
    assert [line["trainer"] for line in found] == list(CHECKPOINTS)
    assert all(line["equal"] for line in found), found
    assert all(line["kills"] for line in found)
    assert not list((tmp_path / "killed").rglob("state"))
