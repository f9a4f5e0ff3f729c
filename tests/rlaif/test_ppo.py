"""PPO: the first ratio, what a score does, what settings do, and a run that is killed and goes on."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bylaw.rlaif.ppo
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.packing import Packed
from bylaw.model.records import Record, read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import Models, ppo, set_advantages
from bylaw.rlaif.rollout import Rollout, ScoreScale

SEED = 4
PLAIN = ScoreScale(mean=0.0, std=1.0, missing_eos_penalty=0.0)
TIMES = ("eps/s", "tok/s", "time/sample_fraction")
PROMPTS = [Prompt(f"p-{n}", [{"role": "user", "content": f"w{n} " * (1 + n % 3)}]) for n in range(10)]


class Likes(ScalarModel):
    """A reward model that gives 1 to a text in which `token` stands, else 0."""

    token: int

    def forward(self, packed: Packed) -> Tensor:
        pieces = packed.tokens.tensor_split(packed.cu_seqlens[1:-1])
        found = [float((piece == self.token).any()) for piece in pieces]
        return torch.cat([torch.full((len(piece),), one) for piece, one in zip(pieces, found, strict=True)])


class Task:
    """A tiny policy on tiny prompts, and a reward for saying "good"."""

    def __init__(self, make_model: Callable[..., Transformer], tokenizer: Tokenizer) -> None:
        policy = make_model()
        self.reward = Likes(make_model())
        [self.reward.token] = tokenizer.encode("good")
        self.models = Models(policy, scalar_model(policy, SEED), make_model(), self.reward)
        self.engine = Engine(policy, tokenizer)

    def run(self, folder: Path, scale: ScoreScale = PLAIN, show: Any = None, **settings: Any) -> list[Record]:
        """Run PPO; returns the lines of metrics.jsonl."""
        small: dict[str, Any] = {"iterations": 1, "rollouts": 12, "max_tokens": 6, "minibatches": 3, "save_every": 2}
        rates: dict[str, Any] = {"learning_rate": 3e-3, "value_learning_rate": 3e-3}
        config = PPOConfig(**small | rates | settings)
        extra = {} if show is None else {"show": show}
        ppo(self.models, self.engine, PROMPTS, folder, config, scale, SEED, **extra)
        return read_records(folder / "metrics.jsonl")


@pytest.fixture
def make_task(make_model: Callable[..., Transformer], tokenizer: Tokenizer) -> Callable[[], Task]:
    return lambda: Task(make_model, tokenizer)


MakeTask = Callable[[], Task]


def copied(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, before: Sequence[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [8192, 20])
def test_before_the_first_update_all_log_probs_are_the_same(
    make_task: MakeTask, temperature: float, budget: int, tmp_path: Path
) -> None:
    """Sampler, old policy, new policy and reference: a temperature that one of them forgot would show at once."""
    [line] = make_task().run(tmp_path, temperature=temperature, micro_batch_tokens=budget)
    assert line["val/first_ratio_gap"] == 0
    assert line["objective/kl"] == 0 and line["objective/non_score_reward"] == 0
    gap = {name: line[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max")}
    assert gap["mean"] <= gap["max"] < 1e-4
    assert line["sampling/importance_sampling_ratio/outside_0.1"] == 0
    assert line["policy/approxkl"] > 0  # later minibatches are those of a policy that moved


def test_a_first_ratio_that_is_not_1_stops_the_run(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = bylaw.rlaif.ppo.fill_columns

    def cooler(rollouts: Any, policy: Any, reference: Any, value: Any, temperature: float) -> None:
        real(rollouts, policy, reference, value, 0.9 * temperature)

    monkeypatch.setattr(bylaw.rlaif.ppo, "fill_columns", cooler)
    task = make_task()
    before = copied(task.models.policy)
    with pytest.raises(FloatingPointError, match=r"ratio to itself is off by .*not taken in the same way"):
        task.run(tmp_path)
    assert same(task.models.policy, before)


def test_the_gap_between_sampler_and_trainer_by_hand() -> None:
    sampler, trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.0, -2.09, -2.9, -4.11])
    gap = bylaw.rlaif.ppo._sampler_gap(sampler, trainer)
    assert gap["sampling/sampling_logp_difference/mean"] == pytest.approx(0.075, abs=1e-5)
    assert gap["sampling/sampling_logp_difference/max"] == pytest.approx(0.11, abs=1e-5)
    # Ratios 1, 0.914, 1.105, 0.896.
    assert gap["sampling/importance_sampling_ratio/outside_0.1"] == 0.5


def test_the_score_rises(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    still = [copied(model) for model in (task.models.reference, task.models.reward)]
    lines = task.run(tmp_path, iterations=20, rollouts=32, minibatches=2, learning_rate=1e-2, kl_coef=0.001)
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[:3]) / 3 < 0.4 and sum(scores[-3:]) / 3 > 0.8
    assert lines[-1]["objective/kl"] > 1  # bought with distance
    assert [same(m, b) for m, b in zip((task.models.reference, task.models.reward), still, strict=True)] == [True] * 2


def test_a_heavy_kl_penalty_holds_the_policy_at_the_reference(make_task: MakeTask, tmp_path: Path) -> None:
    settings = {"iterations": 9, "rollouts": 32, "minibatches": 2, "learning_rate": 1e-2}
    free, held = (make_task().run(tmp_path / str(c), kl_coef=c, **settings)[-1] for c in (0.0, 1.0))
    assert held["objective/kl"] < free["objective/kl"] / 3
    assert held["objective/non_score_reward"] == pytest.approx(-held["objective/kl"])
    assert held["objective/rlhf_reward"] == pytest.approx(held["objective/scores"] - held["objective/kl"])


def test_a_penalty_for_no_end_shortens_answers(make_task: MakeTask, tmp_path: Path) -> None:
    """With nothing else to gain."""
    settings = {"iterations": 15, "rollouts": 32, "minibatches": 2, "learning_rate": 1e-2}
    task = make_task()
    task.reward.token = -1
    rollouts: list[Rollout] = []
    lines = task.run(tmp_path, ScoreScale(0.0, 1.0, 1.0), lambda iteration, batch: rollouts.extend(batch), **settings)
    assert all(rollout.score == (0.0 if rollout.ended else -1.0) for rollout in rollouts)
    assert lines[0]["objective/scores"] == pytest.approx(lines[0]["val/ended"] - 1)
    assert lines[-1]["val/ended"] > lines[0]["val/ended"] + 0.2


def test_each_pass_over_the_prompts_takes_every_prompt_once(make_task: MakeTask, tmp_path: Path) -> None:
    asked: list[str] = []
    make_task().run(
        tmp_path,
        show=lambda iteration, rollouts: asked.extend(rollout.prompt_id for rollout in rollouts),
        iterations=5,
        rollouts=8,
    )
    passes = [asked[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(one) == sorted(prompt.id for prompt in PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) == 4  # in another order each time


def test_returns_and_advantages_by_hand() -> None:
    """Two episodes, gamma and lambda 1: a return is the score, less what KL is still to pay."""
    kl = [[0.5, -0.25], [1.0]]
    values = [[0.1, 0.2], [0.3]]
    rollouts = [
        Rollout("p", [5], [6] * len(one), torch.zeros(len(one)), True, score)
        for one, score in zip(kl, (2.0, -1.0), strict=True)
    ]
    for rollout, differences, value in zip(rollouts, kl, values, strict=True):
        rollout.columns = {
            "logprobs": torch.tensor(differences) - 3,
            "reference": torch.full((len(value),), -3.0),
            "values": torch.tensor(value),
        }
    set_advantages(rollouts, PPOConfig(gae_lambda=1.0), kl_coef=0.1)
    expected = [2 - 0.05 + 0.025, 2 + 0.025, -1 - 0.1]
    returns = torch.cat([rollout.columns["returns"] for rollout in rollouts])
    assert returns.tolist() == pytest.approx(expected)
    raw = [r - v for r, v in zip(expected, (0.1, 0.2, 0.3), strict=True)]
    mean = sum(raw) / 3
    deviation = math.sqrt(sum((a - mean) ** 2 for a in raw) / 3)
    advantages = torch.cat([rollout.columns["advantages"] for rollout in rollouts])
    assert advantages.tolist() == pytest.approx([(a - mean) / deviation for a in raw])
    assert float(advantages.mean()) == pytest.approx(
        0, abs=1e-6
    )  # torchtune added the mean where it is to be taken off


def test_micro_batches_change_nothing(make_task: MakeTask, tmp_path: Path) -> None:
    whole, pieces = make_task(), make_task()
    lines = whole.run(tmp_path / "whole", epochs=2)
    others = pieces.run(tmp_path / "pieces", epochs=2, micro_batch_tokens=15)
    for name in ("policy", "value"):
        for ours, theirs in zip(*(getattr(t.models, name).parameters() for t in (whole, pieces)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for name in lines[0].keys() - set(TIMES) - {f"sampling/sampling_logp_difference/{x}" for x in ("mean", "max")}:
        assert others[0][name] == pytest.approx(lines[0][name], abs=1e-4), name


def test_the_critic_warms_up_alone(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    policy, value = copied(task.models.policy), copied(task.models.value)
    lines = task.run(tmp_path / "warm", iterations=3, critic_warmup=3)
    assert same(task.models.policy, policy) and not same(task.models.value, value)
    assert [line["grad_norm"] for line in lines] == [0, 0, 0]
    assert all(line["objective/kl"] == 0 and line["policy/approxkl"] == 0 for line in lines)
    assert all(parameter.grad is None for parameter in task.models.policy.parameters())
    task.run(tmp_path / "both", iterations=2, critic_warmup=1)
    assert not same(task.models.policy, policy)


def test_the_kl_weight_moves_towards_its_target(make_task: MakeTask, tmp_path: Path) -> None:
    """Ziegler et al. 2019, section 2.2, by hand from the logged KL."""
    settings = {"iterations": 4, "kl_coef": 0.5, "kl_horizon": 60, "learning_rate": 1e-2, "minibatches": 1}
    lines = make_task().run(tmp_path / "adaptive", kl_target=0.05, **settings)
    coef = 0.5
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(coef)
        coef *= 1 + min(max(line["objective/kl"] / 0.05 - 1, -0.2), 0.2) * 12 / 60
    assert lines[1]["objective/kl_coef"] == pytest.approx(0.5 * (1 - 0.2 * 12 / 60))  # no KL yet: less of it
    assert lines[-1]["objective/kl_coef"] > lines[1]["objective/kl_coef"]
    fixed = make_task().run(tmp_path / "fixed", **settings)
    assert {line["objective/kl_coef"] for line in fixed} == {0.5}


def untimed(folder: Path) -> list[Record]:
    lines = read_records(folder / "metrics.jsonl")
    assert all(line.pop(name) > 0 for line in lines for name in TIMES)
    return lines


@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_killed_and_resumed_it_is_the_same_to_the_bit(make_task: MakeTask, killed_at: int, tmp_path: Path) -> None:
    """At any iteration: before the first state, in the critic's warm-up (the policy has no moments yet), and after."""
    settings = {"iterations": 6, "epochs": 2, "critic_warmup": 2, "kl_target": 0.02, "kl_horizon": 100, "kl_coef": 0.1}
    whole, cut, resumed = make_task(), make_task(), make_task()
    whole.run(tmp_path / "whole", schedule="linear", **settings)

    def die(iteration: int, rollouts: Sequence[Rollout]) -> None:
        if iteration == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(tmp_path / "cut", show=die, schedule="linear", **settings)
    resumed.run(tmp_path / "cut", schedule="linear", **settings)
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert [line["step"] for line in untimed(tmp_path / "cut")] == list(range(6))
    for name in ("policy", "value"):
        assert same(getattr(resumed.models, name), copied(getattr(whole.models, name))), name


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_the_run_with_the_policy_as_it_was(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, broken: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(Likes, "forward", lambda self, packed: torch.full((len(packed.tokens),), broken))
    task = make_task()
    before = copied(task.models.policy)
    with pytest.raises(FloatingPointError, match="no parameter of this model was changed"):
        task.run(tmp_path)
    assert same(task.models.policy, before)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_weights_that_are_not_finite_draw_nothing(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    with torch.no_grad():
        task.models.policy.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        task.run(tmp_path)


def test_what_the_last_iteration_measured_is_returned(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    config = PPOConfig(iterations=2, rollouts=5, max_tokens=4, minibatches=2)
    counts = ppo(task.models, task.engine, PROMPTS, tmp_path, config, PLAIN, SEED)
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert counts == {"iterations": 2, "episodes": 10, "kl_coef": config.kl_coef} | {
        name: value for name, value in last.items() if name != "step"
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("clip", 0.0), ("gamma", 1.5), ("minibatches", 65), ("kl_coef", -0.1), ("rollouts", 0)],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value!r} is not possible; allowed: "):
        dataclasses.replace(PPOConfig(), **{name: value})
