"""PPO's whole update against the slow float64 oracle, on random episodes, settings and packings."""

from typing import Any

import numpy as np
import ppo_oracle as oracle
import pytest
import torch
from torch import Tensor, nn

from bylaw.model.optim import adamw
from bylaw.model.train_state import Learner
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import set_advantages
from bylaw.rlaif.ppo_batch import Batch, fill_columns
from bylaw.rlaif.ppo_update import Terms, learn
from bylaw.rlaif.rollout import Rollout

VOCAB, HIDDEN, SEED, KL_COEF = 7, 3, 5, 0.3
CASES: dict[str, dict[str, Any]] = {
    "plain": {"importance_cap": 0.0},
    "clip-higher": {"clip": 0.02, "clip_high": 0.3, "weight_decay": 0.1},
    "dual clip": {"dual_clip": 1.02, "importance_cap": 1.1, "learning_rate": 0.1},
    "whitened rewards": {"whiten_rewards": True, "gamma": 0.9, "gae_lambda": 0.8, "max_grad_norm": 0.05},
    "k2 in the loss": {"kl_in": "loss", "kl_estimator": "k2", "temperature": 0.7},
    "k3 in the loss": {"kl_in": "loss", "kl_estimator": "k3", "value_clip": 0.05},
}


def weights(array: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(array, dtype=torch.float32))


class Linear(nn.Module):
    """The oracle's policy, as the trainer asks for it; with a value head too, that of a shared trunk."""

    def __init__(self, table: Any, head: Any, score: Any = None) -> None:
        super().__init__()
        self.table = weights(table)
        self.head_weight = weights(head)
        if score is not None:
            self.score = nn.Linear(HIDDEN, 1, bias=False)
            self.score.weight = weights(score)
        self.device = torch.device("cpu")

    def forward(self, stream: Any) -> Tensor:
        return self.table[stream.tokens[stream.wanted]]

    def read(self, hidden: Tensor) -> Tensor:
        return self.score(hidden).squeeze(-1)


class LinearValue(Linear):
    def forward(self, stream: Any) -> Tensor:
        return super().forward(stream) @ self.head_weight[0]


def random_rollouts(rng: np.random.Generator, count: int, policy: oracle.Model) -> list[Rollout]:
    """Episodes of 1 to 6 tokens with scores, and sampler log-probs that are somewhat off."""
    made = []
    for _ in range(count):
        prompt, response = (rng.integers(VOCAB, size=rng.integers(1, 7)).tolist() for _ in range(2))
        logprobs = oracle.logprobs(policy, episode(prompt, response), 1.0) + 0.3 * rng.standard_normal(len(response))
        score = float(np.float32(rng.standard_normal()))
        made.append(Rollout("p", prompt, response, logprobs.astype(np.float32).tolist(), True, score=score))
    return made


def episode(prompt: list[int], response: list[int]) -> oracle.Episode:
    return {"before": (prompt + response)[len(prompt) - 1 : -1], "y": response}


PACKINGS = [
    (case, budget) for case in CASES for budget in ((1, 25, 8192) if case in ("plain", "k3 in the loss") else (25,))
]


@pytest.mark.parametrize("way", ["separate", "shared"])
@pytest.mark.parametrize(("case", "budget"), PACKINGS)
def test_an_iteration_is_that_of_the_oracle(case: str, way: Any, budget: int) -> None:
    rng = np.random.default_rng([budget, len(case), len(way)])
    rates = {"learning_rate": 0.05, "value_learning_rate": 0.03, "beta2": 0.9, "value_coef": 0.5}
    config = PPOConfig(
        rollouts=9, epochs=2, minibatches=2, micro_batch_tokens=budget, value=way, **{**rates, **CASES[case]}
    )
    table, head, other_table, other_head, value_table = rng.standard_normal((5, VOCAB, HIDDEN))
    score = rng.standard_normal((1, HIDDEN))
    own, start, reference = (table, head), (table.copy(), head.copy()), (other_table, other_head)
    critic = (table if way == "shared" else value_table, score)

    policy = Linear(*start, score if way == "shared" else None)
    value: Any = policy if way == "shared" else LinearValue(value_table, score)
    rollouts = random_rollouts(rng, config.rollouts, own)
    batch = Batch(rollouts, policy.device)
    plan = batch.minibatches(config, SEED, 0, 0)
    fill_columns(batch, plan, policy, Linear(*reference), value, config)
    set_advantages(batch, config, KL_COEF)

    episodes = [episode(r.prompt, r.response) for r in rollouts]
    for e, rollout in zip(episodes, rollouts, strict=True):
        e |= {"reference": oracle.logprobs(reference, e, config.temperature)}
        e |= {"sampler": np.array(rollout.sampler_logprobs), "score": rollout.score}
    oracle.prepare(episodes, own, critic, config, KL_COEF)
    for name, key in (("logprobs", "old"), ("values", "value"), ("advantages", "advantage"), ("returns", "return")):
        np.testing.assert_allclose(batch.columns[name], np.concatenate([e[key] for e in episodes]), atol=1e-5)
    spread = np.concatenate([oracle.entropies(own, e, config.temperature) for e in episodes])
    np.testing.assert_allclose(batch.columns["entropy"], spread, atol=1e-5)

    learners = {"policy": Learner(policy, adamw(policy, config))}
    if way == "separate":
        learners["value"] = Learner(value, adamw(value, config))
    stats = learn(learners, Terms(policy, value, batch, config, KL_COEF, warming=False), plan, SEED, 0)
    found = by_oracle(batch, episodes, own, critic, config)

    assert stats["first_ratio_gap"] == 0
    ours = {"policy": "policy_loss", "value": "value_loss", "clipped": "clip_fraction", "dual": "dual_clip_fraction"}
    for name, key in (ours | ({"kl": "kl_loss"} if config.kl_in == "loss" else {})).items():
        assert stats[key] == pytest.approx(found[name], abs=1e-5), name
    assert stats["clip_fraction"] > 0 and (stats["dual_clip_fraction"] > 0) == (config.dual_clip > 0)
    np.testing.assert_allclose(policy.table.detach(), table, atol=5e-5)
    np.testing.assert_allclose(policy.head_weight.detach(), head, atol=5e-5)
    if way == "separate":
        np.testing.assert_allclose(value.table.detach(), value_table, atol=5e-5)
    np.testing.assert_allclose(
        (value.score.weight if way == "shared" else value.head_weight).detach(), score, atol=2e-6
    )
    assert abs(table - start[0]).max() > 0.05  # there was something to agree on


def by_oracle(
    batch: Batch, episodes: list[oracle.Episode], policy: oracle.Model, value: oracle.Model, config: PPOConfig
) -> dict[str, float]:
    """All epochs of the update, in place; the means of what was lost, over tokens."""
    sums: dict[str, float] = {}
    states: list[dict[str, Any]] = [{}, {}]
    shared = config.value == "shared"
    actor, critic = list(policy), [value[1]] if shared else list(value)
    for epoch in range(config.epochs):
        for items, _ in batch.minibatches(config, SEED, 0, epoch):
            part = [episodes[i] for i in items]
            tokens = sum(len(e["y"]) for e in part)

            def now(part: Any = part, tokens: int = tokens) -> dict[str, float]:
                return oracle.losses(part, policy, value, config, KL_COEF, tokens)

            for name, x in now().items():
                sums[name] = sums.get(name, 0.0) + x * tokens

            def total(now: Any = now) -> float:
                lost = now()
                return lost["policy"] + lost["kl"] + (config.value_coef if shared else 1.0) * lost["value"]

            grads = [[oracle.gradient(total, x) for x in weights] for weights in (actor, critic)]
            if shared:
                oracle.adamw(actor + critic, grads[0] + grads[1], states[0], config.learning_rate, config)
            else:
                oracle.adamw(actor, grads[0], states[0], config.learning_rate, config)
                oracle.adamw(critic, grads[1], states[1], config.value_learning_rate, config)
    return {name: x / (config.epochs * batch.tokens) for name, x in sums.items()}
