"""Signs of collapse by hand-worked numbers, and what a run does about them."""

from pathlib import Path

import pytest
from ppo_task import MakeTask, copied, same

from bylaw.model.records import read_records
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.monitor import alarms, baseline_of, boilerplate, repetition, signs_of
from bylaw.rlaif.rollout import Rollout

HEALTHY = {"repetition": 0.1, "boilerplate": 0.2, "entropy": 2.0, "length": 20.0, "ended": 0.9}


def said(response: list[int], prompt: list[int] | None = None, ended: bool = True) -> Rollout:
    return Rollout("p", prompt or [99], response, [0.0] * len(response), ended)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3]) == 0  # too short for a 4-gram
    # 1 1 1 1 1 1: three 4-grams, one distinct
    assert repetition([1] * 6) == pytest.approx(2 / 3)
    # 12341234: 1234 2341 3412 4123 1234, four of five distinct
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_boilerplate_by_hand() -> None:
    phrase, other = list(range(10, 18)), list(range(30, 38))
    assert boilerplate([said([1, *phrase]), said([*phrase, 2]), said([3, *phrase, 4]), said(other)]) == 0.75
    assert boilerplate([said(phrase), said(other)]) == 0  # nothing in common
    assert boilerplate([said(phrase + phrase), said(other)]) == 0  # twice in one answer is repetition
    assert boilerplate([said(phrase[:7]), said(phrase[:7])]) == 0  # too short
    quoting = [said(phrase, [1, *phrase]), said(phrase, phrase), said(other)]
    assert boilerplate(quoting) == 0  # their prompts say it


def test_signs_of_a_batch() -> None:
    batch = [said([1] * 6), said([1, 2], ended=False)]
    expected = {"repetition": 1 / 3, "boilerplate": 0.0, "entropy": 1.5, "length": 4.0, "ended": 0.5}
    assert signs_of(batch, 1.5) == pytest.approx(expected)


def test_the_baseline_is_a_mean() -> None:
    assert baseline_of([{"entropy": 1.0, "length": 4.0}, {"entropy": 2.0, "length": 8.0}]) == {
        "entropy": 1.5,
        "length": 6,
    }
    assert baseline_of([]) == {}


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("repetition", 0.39, 0.41),
        ("boilerplate", 0.49, 0.51),
        ("entropy", 1.01, 0.99),
        ("length", 10.1, 9.9),
        ("length", 39.9, 40.1),
        ("ended", 0.61, 0.59),
    ],
)
def test_far_from_the_baseline_is_an_alarm(name: str, fine: float, bad: float) -> None:
    config = PPOConfig(collapse_rise=0.3, collapse_fall=0.5)
    assert alarms(HEALTHY | {name: fine}, HEALTHY, config) == {}
    assert list(alarms(HEALTHY | {name: bad}, HEALTHY, config)) == [name]
    assert alarms(HEALTHY | {name: bad}, {}, config) == {}  # no baseline yet


@pytest.mark.parametrize(
    ("limit", "sign", "fine", "bad"),
    [
        ({"max_repetition": 0.5}, "repetition", 0.5, 0.51),
        ({"max_boilerplate": 0.5}, "boilerplate", 0.5, 0.51),
        ({"min_entropy": 0.5}, "entropy", 0.5, 0.49),
    ],
)
def test_past_a_fixed_limit_is_an_alarm(limit: dict[str, float], sign: str, fine: float, bad: float) -> None:
    config = PPOConfig(**limit)  # pyright: ignore[reportArgumentType]
    assert alarms(HEALTHY | {sign: fine}, {}, config) == {}
    assert f"{bad:.3g}" in alarms(HEALTHY | {sign: bad}, {}, config)[sign]


def test_a_warning_is_a_line_and_a_measure(
    make_task: MakeTask, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line when it comes up, and not again while it lasts."""
    lines = make_task().run(tmp_path / "warned", iterations=3, min_entropy=100.0)
    assert [line["collapse/alarms"] for line in lines] == [1, 1, 1]
    assert lines[0]["collapse/entropy"] == pytest.approx(
        lines[0]["objective/entropy"] / lines[0]["val/response_tokens"], rel=1e-5
    )
    printed = capsys.readouterr().out
    assert printed.count("signs of collapse") == 1 and "ppo 1: the answers show signs of collapse: entropy" in printed
    lines = make_task().run(tmp_path / "ignored", min_entropy=100.0, collapse="ignore")
    assert not any(name.startswith("collapse/") for name in lines[0])
    assert "signs of collapse" not in capsys.readouterr().out


def test_a_collapse_can_stop_the_run(make_task: MakeTask, tmp_path: Path) -> None:
    """Before it learns from what it said."""
    task = make_task()
    before = copied(task.models.policy)
    lines = task.run(tmp_path, iterations=3, min_entropy=100.0, collapse="stop")
    assert len(lines) == 1 and "loss/policy" not in lines[0]
    assert task.counts["iterations"] == 0 and task.counts["stopped"].startswith("signs of collapse: entropy ")
    assert same(task.models.policy, before)


def test_a_policy_that_learns_to_babble_is_caught(make_task: MakeTask, tmp_path: Path) -> None:
    """The reward is for one word, so that in the end it says little else."""
    task = make_task()
    task.run(
        tmp_path,
        iterations=25,
        rollouts=16,
        minibatches=2,
        max_tokens=6,
        learning_rate=3e-2,
        kl_coef=0.0,
        collapse="stop",
        collapse_fall=0.5,
        collapse_rise=0.3,
    )
    assert 3 <= task.counts["iterations"] < 25 and "at first" in task.counts["stopped"]
    signs = [line["collapse/alarms"] for line in read_records(tmp_path / "metrics.jsonl")]
    assert signs[-1] > 0 and not any(signs[:-1])
