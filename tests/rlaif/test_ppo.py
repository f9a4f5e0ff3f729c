"""PPO: the first ratio, what a score does, and what settings do."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_task import PROMPTS, SEED, TIMES, Likes, MakeTask, copied, same

import bylaw.rlaif.ppo_batch
from bylaw.kernels.linear_loss import linear_loss
from bylaw.model.engine import Engine
from bylaw.model.heads import scalar_model
from bylaw.model.lora import adapter_module, add_adapter, remove_adapters, use_adapter
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.records import read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import Models, ppo, set_advantages
from bylaw.rlaif.ppo_batch import Batch
from bylaw.rlaif.ppo_measures import sampler_gap
from bylaw.rlaif.ppo_scores import Reward
from bylaw.rlaif.rollout import Rollout


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [8192, 20])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_before_the_first_update_all_log_probs_are_the_same(
    make_task: MakeTask, temperature: float, budget: int, value: str, tmp_path: Path
) -> None:
    """Sampler, old policy, new policy and reference: a temperature that one of them forgot would show at once."""
    [line] = make_task(value).run(tmp_path, temperature=temperature, micro_batch_tokens=budget, missing_eos_penalty=1.0)
    assert line["val/first_ratio_gap"] == 0
    assert line["objective/kl"] == 0 and line["objective/non_score_reward"] == 0
    gap = {name: line[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max")}
    assert gap["mean"] <= gap["max"] < 1e-4
    assert line["sampling/importance_sampling_ratio/outside_0.1"] == 0
    assert line["policy/approxkl"] > 0  # later minibatches are those of a policy that moved


def test_a_first_ratio_that_is_not_1_stops_the_run(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one whose old log-probs are taken at another temperature."""

    def cooler(*inputs: Any, temperature: float, **terms: Any) -> Any:
        return linear_loss(*inputs, temperature=0.9 * temperature, **terms)

    monkeypatch.setattr(bylaw.rlaif.ppo_batch, "linear_loss", cooler)
    task = make_task()
    before = copied(task.models.policy)
    with pytest.raises(FloatingPointError, match=r"ratio to itself is off by .*not taken in the same way"):
        task.run(tmp_path)
    assert same(task.models.policy, before)


def test_the_gap_between_sampler_and_trainer_by_hand() -> None:
    sampler, trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.0, -2.09, -2.9, -4.11])
    gap = sampler_gap(sampler, trainer, cap=1.1)
    assert gap["sampling/sampling_logp_difference/mean"] == pytest.approx(0.075, abs=1e-5)
    assert gap["sampling/sampling_logp_difference/max"] == pytest.approx(0.11, abs=1e-5)
    # Ratios 1, 0.914, 1.105, 0.896.
    assert gap["sampling/importance_sampling_ratio/outside_0.1"] == 0.5
    assert gap["sampling/importance_sampling_ratio/cut"] == 0.25
    mean = (1 + math.exp(-0.09) + 1.1 + math.exp(-0.11)) / 4
    assert gap["sampling/importance_sampling_ratio/mean"] == pytest.approx(mean, abs=1e-6)
    assert sampler_gap(sampler, trainer, cap=0).keys() == {name for name in gap if not name.endswith(("cut", "o/mean"))}


def test_the_score_rises(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    still = [copied(model) for model in (task.models.reference, task.reward)]
    lines = task.run(tmp_path, iterations=20, rollouts=32, minibatches=2, learning_rate=1e-2, kl_coef=0.001)
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[:3]) / 3 < 0.4 and sum(scores[-3:]) / 3 > 0.8
    assert lines[-1]["objective/kl"] > 1  # bought with distance
    assert [same(m, b) for m, b in zip((task.models.reference, task.reward), still, strict=True)] == [True] * 2


def test_a_heavy_kl_term_holds_the_policy_at_the_reference(make_task: MakeTask, tmp_path: Path) -> None:
    """In the reward, and in the loss."""
    settings = {"iterations": 8, "rollouts": 32, "minibatches": 2, "learning_rate": 1e-2}
    ways = {"free": {"kl_coef": 0.0}, "reward": {"kl_coef": 1.0}, "loss": {"kl_coef": 1.0, "kl_in": "loss"}}
    free, reward, loss = (make_task().run(tmp_path / name, **settings, **way)[-1] for name, way in ways.items())
    assert max(abs(held["objective/kl"]) for held in (reward, loss)) < free["objective/kl"] / 2
    assert reward["objective/non_score_reward"] == pytest.approx(-reward["objective/kl"])
    assert reward["objective/rlhf_reward"] == pytest.approx(reward["objective/scores"] - reward["objective/kl"])
    assert loss["loss/kl"] > 0 and loss["objective/non_score_reward"] == 0
    assert "loss/kl" not in reward


def test_a_penalty_for_no_end_shortens_answers(make_task: MakeTask, tmp_path: Path) -> None:
    """With nothing else to gain."""
    settings = {"iterations": 15, "rollouts": 32, "minibatches": 2, "learning_rate": 1e-2}
    task = make_task()
    task.reward.token = -1
    rollouts: list[Rollout] = []
    keep = {"show": lambda iteration, batch: rollouts.extend(batch), "missing_eos_penalty": 1.0}
    lines = task.run(tmp_path, **keep, **settings)
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
    rollouts = [
        Rollout("p", [5], [6] * len(sampled), sampled, True, score=score)
        for sampled, score in (([-2.5, -3.25], 2.0), ([-2.0 - math.log(1.5)], -1.0))
    ]
    batch = Batch(rollouts, torch.device("cpu"))
    batch.columns |= {
        "logprobs": torch.tensor([-2.5, -3.25, -2.0]),
        "reference": torch.tensor([-3.0, -3.0, -3.0]),
        "values": torch.tensor([0.1, 0.2, 0.3]),
    }
    set_advantages(batch, PPOConfig(gae_lambda=1.0), kl_coef=0.1)
    expected = [2 - 0.05 + 0.025, 2 + 0.025, -1 - 0.1]
    assert batch.columns["returns"].tolist() == pytest.approx(expected)
    raw = [r - v for r, v in zip(expected, (0.1, 0.2, 0.3), strict=True)]
    mean = sum(raw) / 3
    deviation = math.sqrt(sum((a - mean) ** 2 for a in raw) / 3)
    advantages = batch.columns["advantages"]
    assert advantages.tolist() == pytest.approx([(a - mean) / deviation for a in raw])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)  # torchtune added the mean, where it is taken off
    # The last token was drawn with 1 / 1.5 of the probability that is trained.
    assert (batch.columns["policy_advantages"] / advantages).tolist() == pytest.approx([1, 1, 1.5])


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_micro_batches_change_nothing(make_task: MakeTask, value: str, tmp_path: Path) -> None:
    whole, pieces = make_task(value), make_task(value)
    lines = whole.run(tmp_path / "whole", epochs=2)
    others = pieces.run(tmp_path / "pieces", epochs=2, micro_batch_tokens=15)
    for name in ("policy", "value"):
        for ours, theirs in zip(*(copied(getattr(t.models, name)) for t in (whole, pieces)), strict=True):
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
    assert all(parameter.grad is None for parameter in task.engine.model.parameters())
    task.run(tmp_path / "both", iterations=2, critic_warmup=1)
    assert not same(task.models.policy, policy)


def test_on_a_shared_trunk_the_critic_warms_up_by_its_head_alone(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task("shared")
    policy = copied(task.models.policy)
    lines = task.run(tmp_path / "warm", iterations=3, critic_warmup=3, missing_eos_penalty=1.0)
    assert same(task.models.policy, policy) and task.models.value.score.weight.count_nonzero() > 0
    assert [line["grad_norm"] for line in lines] == [0, 0, 0]
    assert lines[-1]["loss/value"] < lines[0]["loss/value"]
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


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_the_run_with_the_policy_as_it_was(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, broken: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        Likes, "forward", lambda self, packed: torch.full_like(packed.wanted, broken, dtype=torch.float)
    )
    task = make_task()
    before = copied(task.models.policy)
    with pytest.raises(
        FloatingPointError, match=r"scored an answer to prompt .* no parameter of any model was changed"
    ):
        task.run(tmp_path)
    assert same(task.models.policy, before)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_weights_that_are_not_finite_draw_nothing(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    with torch.no_grad():
        task.engine.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        task.run(tmp_path)


def test_what_the_last_iteration_measured_is_returned(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    last = task.run(tmp_path, iterations=2, rollouts=5, max_tokens=4, minibatches=2)[-1]
    counts = {"iterations": 2, "episodes": 10, "kl_coef": PPOConfig().kl_coef, "stopped": None}
    assert task.counts == counts | {name: value for name, value in last.items() if name != "step"}


def test_each_epoch_shuffles_all_episodes_anew() -> None:
    """Those too that did not end by themselves: NeMo-Aligner left them out of the loss."""
    rollouts = [Rollout("p", [5] * (1 + n % 4), [6] * (1 + n % 3), [0.0] * (1 + n % 3), n % 2 == 0) for n in range(20)]
    batch = Batch(rollouts, torch.device("cpu"))
    config = PPOConfig(minibatches=3, epochs=4, micro_batch_tokens=11)
    orders = set()
    for iteration in range(2):
        for epoch in range(4):
            plan = batch.minibatches(config, 1, iteration, epoch)
            assert [len(items) for items, _ in plan] == [7, 7, 6]
            assert sorted(i for items, _ in plan for i in items) == list(range(20))
            for items, runs in plan:
                assert sorted(i for run in runs for i in run.items) == list(range(len(items)))
                assert all(sum(len(rollouts[items[i]].ids) for i in run.items) <= 11 for run in runs)
            orders.add(tuple(i for items, _ in plan for i in items))
    assert len(orders) == 8


def test_nothing_is_decoded_and_tokenised_again(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """trlx: a text's tokens need not be those that were drawn. What is scored and trained on are the engine's ids."""

    def refuse(*inputs: Any, **options: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(Tokenizer, "decode", refuse)
    make_task().run(tmp_path, iterations=2)


def test_the_measures_that_ppo_users_look_for(make_task: MakeTask, tmp_path: Path) -> None:
    [line] = make_task().run(tmp_path, dual_clip=3.0)
    objective = ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward", "kl_coef")
    policy, val = ("approxkl", "clipfrac", "dual_clipfrac"), ("clipfrac", "ratio", "ended", "explained_variance")
    expected = [("objective", objective), ("policy", policy), ("val", val), ("loss", ("policy", "value"))]
    assert {f"{group}/{name}" for group, names in expected for name in names} | set(TIMES) <= line.keys()
    assert sum(line[name] for name in TIMES if name.startswith("time/")) == pytest.approx(1, abs=1e-6)


def test_the_defaults_that_matter() -> None:
    config = PPOConfig()
    assert (config.gamma, config.gae_lambda, config.clips, config.value_clip) == (1.0, 0.95, (0.2, 0.2), 0.2)
    assert (config.adam_epsilon, config.importance_cap, config.kl_in) == (1e-5, 2.0, "reward")
    assert PPOConfig(clip_high=0.28).clips == (0.2, 0.28)


def test_one_trunk_under_adapters_is_policy_value_reference_and_reward(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trunk = make_model()
    before = copied(trunk)
    for name in ("policy", "value"):
        add_adapter(trunk, name, LoraSettings(rank=2), SEED, freeze_base=True)
    value = scalar_model(trunk, SEED, "value")

    class Base:
        """The trunk with its adapters off."""

        device, head_weight = trunk.device, trunk.head_weight

        def __call__(self, stream: Any) -> torch.Tensor:
            with use_adapter(trunk, None):
                return trunk(stream)

    learning = {"policy": adapter_module(trunk, "policy"), "value": adapter_module(value, "value")}
    models = Models(trunk, value, Base(), [Reward(scalar_model(make_model(seed=1), SEED))], learning)
    config = PPOConfig(iterations=2, rollouts=12, max_tokens=6, learning_rate=1e-2, value_learning_rate=1e-2)
    with use_adapter(trunk, "policy"):
        ppo(models, Engine(trunk, tokenizer), PROMPTS, tmp_path, config, SEED)
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert first["objective/kl"] == 0 and first["val/first_ratio_gap"] == 0 and second["objective/kl"] != 0
    remove_adapters(trunk)
    assert same(trunk, before)


def test_what_cannot_be_trained_is_refused(make_task: MakeTask, tmp_path: Path) -> None:
    separate = make_task()
    separate.value = "shared"
    with pytest.raises(ValueError, match='value = "shared", but the value head stands on a trunk of its own'):
        separate.run(tmp_path)
    with pytest.raises(ValueError, match="no prompts"):
        ppo(separate.models, separate.engine, [], tmp_path, PPOConfig(), SEED)
    assert not (tmp_path / "rollouts.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("clip", 0.0),
        ("gamma", 1.5),
        ("minibatches", 65),
        ("kl_coef", -0.1),
        ("rollouts", 0),
        ("dual_clip", 0.9),
        ("score_clip", -1.0),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value!r} is not possible; allowed: "):
        dataclasses.replace(PPOConfig(), **{name: value})
