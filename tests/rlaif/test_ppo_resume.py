"""A run that is killed and goes on: the same weights, from rollouts that are not drawn again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_task import SEED, TIMES, MakeTask, copied, same, untimed

import bylaw.rlaif.ppo
import bylaw.rlaif.ppo_update
from bylaw.model.records import read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.rollout import Rollout

COUNT = 12
SETTINGS: dict[str, Any] = {
    "iterations": 5,
    "save_every": 2,
    "epochs": 2,
    "minibatches": 2,
    "critic_warmup": 2,
    "kl_target": 0.02,
    "kl_horizon": 100,
    "kl_coef": 0.1,
    "schedule": "linear",
    "score_stats": "running",
    "missing_eos_penalty": 0.5,
    "collapse_baseline": 3,
}


def killed_in(module: Any, name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies in the `call`-th call of a function, from 0, after its work."""
    real, calls = getattr(module, name), []

    def dying(*inputs: Any) -> Any:
        result = real(*inputs)
        calls.append(name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, name, dying)


KILLS: dict[str, tuple[Any, str, int]] = {
    "before the first state, its rollouts drawn but not written": (bylaw.rlaif.ppo, "sample_rollouts", 1),
    "in the critic's warm-up, its rollouts written": (bylaw.rlaif.ppo, "fill_columns", 1),
    "between two updates": (bylaw.rlaif.ppo_update, "accumulate", 21),  # of 8 an iteration
    "behind the last update": (bylaw.rlaif.ppo, "learn", 4),
}


@pytest.mark.parametrize(
    ("kill", "value"), [*((kill, "separate") for kill in KILLS), ("between two updates", "shared")]
)
def test_killed_and_resumed_it_is_the_same_to_the_bit(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, kill: str, value: str, tmp_path: Path
) -> None:
    """Weights, metrics, and every record of a rollout; with the KL weight and running statistics on their way."""
    whole, cut, resumed = make_task(value), make_task(value), make_task(value)
    whole.run(tmp_path / "whole", **SETTINGS)
    with monkeypatch.context() as patch:
        module, name, call = KILLS[kill]
        killed_in(module, name, call if value == "separate" else call // 2, patch)
        with pytest.raises(KeyboardInterrupt):
            cut.run(tmp_path / "cut", **SETTINGS)
    resumed.run(tmp_path / "cut", **SETTINGS)
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert [line["step"] for line in untimed(tmp_path / "cut")] == list(range(5))
    rollouts = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("cut", "whole")]
    assert rollouts[0] == rollouts[1] and rollouts[0].count(b"\n") == 5 * COUNT
    for name in ("policy", "value"):
        assert same(getattr(resumed.models, name), copied(getattr(whole.models, name))), name


def test_rollouts_in_the_file_are_not_drawn_again(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even where the file is 2 iterations ahead of the state, nor where it lacks what is behind it."""
    make_task().run(tmp_path, **SETTINGS)
    asked = counted_draws(monkeypatch)
    resumed = make_task()
    resumed.run(tmp_path, **SETTINGS)  # the state is that of iteration 4, and the file has 5
    assert asked == [] and resumed.counts["iterations"] == 5
    lines = (tmp_path / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rollouts.jsonl").write_bytes(b"".join(lines[-COUNT:]))
    make_task().run(tmp_path, **SETTINGS)
    assert asked == [] and (tmp_path / "rollouts.jsonl").read_bytes() == b"".join(lines[-COUNT:])


def counted_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iterations that are drawn from now on."""
    real, asked = bylaw.rlaif.ppo.sample_rollouts, []

    def counting(engine: Any, prompts: Any, config: Any, seed: int, iteration: int, parallel: Any) -> list[Rollout]:
        asked.append(iteration)
        return real(engine, prompts, config, seed, iteration, parallel)

    monkeypatch.setattr(bylaw.rlaif.ppo, "sample_rollouts", counting)
    return asked


@pytest.mark.parametrize(
    ("damage", "drawn"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:20]], [2]),  # torn
        (lambda lines: lines[: COUNT + 3], [1, 2]),  # not whole
        (lambda lines: lines[:COUNT] + lines[2 * COUNT :], [1, 2]),  # out of order
        (lambda lines: [], [0, 1, 2]),
        (lambda lines: lines, []),
    ],
)
def test_iterations_that_are_not_whole_are_drawn_again(
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[list[bytes]], list[bytes]],
    drawn: list[int],
    tmp_path: Path,
) -> None:
    settings = {"iterations": 3, "save_every": 10, "minibatches": 1, "max_tokens": 4}
    make_task().run(tmp_path, **settings)
    path = tmp_path / "rollouts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(damage(whole.splitlines(keepends=True))))
    asked = counted_draws(monkeypatch)
    make_task().run(tmp_path, **settings)
    assert asked == drawn and path.read_bytes() == whole


def test_a_record_holds_what_was_drawn_to_the_bit(make_task: MakeTask, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[Sequence[Rollout]] = []
    make_task().run(tmp_path, lambda iteration, rollouts: seen.append(rollouts), iterations=2, missing_eos_penalty=1.0)
    records = read_records(tmp_path / "rollouts.jsonl")
    flat = [rollout for rollouts in seen for rollout in rollouts]
    for n, (record, rollout) in enumerate(zip(records, flat, strict=True)):
        assert (record["iteration"], record["place"], record["seed"]) == (n // COUNT, n % COUNT, SEED)
        assert record["logprobs"] == rollout.sampler_logprobs and record["ids"] == rollout.response
        names = ("prompt_id", "request", "ended", "raw", "score")
        assert [record[name] for name in names] == [getattr(rollout, name) for name in names]
    assert len({record["weights"] for record in records}) == 2  # those of each iteration


def test_rollouts_of_another_run_are_refused(make_task: MakeTask, tmp_path: Path) -> None:
    make_task().run(tmp_path)
    path = tmp_path / "rollouts.jsonl"
    records = [record | {"seed": 77} for record in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"rollouts.jsonl: iteration 0, place 0 .* file of another run"):
        make_task().run(tmp_path)


def test_a_run_that_stopped_stops_again_in_the_same_place(make_task: MakeTask, tmp_path: Path) -> None:
    settings = SETTINGS | {"critic_warmup": 0, "kl_budget": 0.001, "learning_rate": 1e-2, "save_every": 10}
    task, again = make_task(), make_task()
    lines = task.run(tmp_path, **settings)
    assert task.counts["iterations"] == len(lines) - 1 > 0 and "above kl_budget" in task.counts["stopped"]
    assert (tmp_path / "state" / "latest.json").exists()
    again.run(tmp_path, **settings)
    timeless = [{k: v for k, v in one.counts.items() if k not in TIMES} for one in (task, again)]
    assert timeless[0] == timeless[1]
    assert same(again.models.policy, copied(task.models.policy))


def test_settings_of_the_loop_do_what_they_say(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    lines = task.run(
        tmp_path, iterations=3, schedule="linear", learning_rate=3e-3, save_every=1, keep_checkpoints=2,
        activation_checkpointing="full", critic_warmup=0,
    )  # fmt: skip
    assert [line["lr"] for line in lines] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert len(list((tmp_path / "state").glob("step-*"))) == 2
    policy: Any = task.models.policy
    assert policy.blocks[0].prepared is not None


def test_a_policy_that_waits_for_its_critic_begins_its_schedule_then(make_task: MakeTask, tmp_path: Path) -> None:
    lines = make_task().run(
        tmp_path, iterations=4, schedule="linear", learning_rate=4e-3, critic_warmup=2, warmup_steps=0, kl_target=0.1,
        kl_horizon=1000,
    )  # fmt: skip
    assert [line["lr"] for line in lines][2:] == pytest.approx([4e-3, 2e-3])
    weights = [line["objective/kl_coef"] for line in lines]
    assert weights[0] == weights[1] == weights[2], "a KL of 0 by waiting moves no weight"


def test_rollouts_of_other_weights_are_taken_and_said(
    make_task: MakeTask, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_task().run(tmp_path, save_every=1)
    make_task().run(tmp_path)
    assert "differ" not in capsys.readouterr().out
    other = make_task()
    with torch.no_grad():
        other.engine.model.norm.weight.add_(1e-4)
    other.run(tmp_path)
    assert "ppo 1: rollouts are taken from" in capsys.readouterr().out
