"""An episode's score: what reward models say of prompt and response, made comparable, weighed and added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.settings import require
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo_batch import Batch, Minibatch
from bylaw.rlaif.rollout import Rollout


@dataclass(frozen=True)
class Reward:
    """A reward model, the mean and deviation of its scores on held-out answers, and its weight beside others."""

    model: ScalarModel
    mean: float = 0.0
    std: float = 1.0
    weight: float = 1.0


@dataclass
class Moments:
    """Number, mean, and sum of squared distances from the mean, of numbers seen so far (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Sequence[float]) -> None:
        count, mean = len(values), math.fsum(values) / len(values)
        gap, both = mean - self.mean, self.count + count
        self.squares += math.fsum((x - mean) ** 2 for x in values) + gap * gap * self.count * count / both
        self.mean, self.count = self.mean + gap * count / both, both

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count)


def check_rewards(rewards: Sequence[Reward], config: PPOConfig) -> None:
    """Raise ValueError without reward models, and for one whose scores cannot be divided by their deviation."""
    if not rewards:
        raise ValueError("there is no reward model; PPO needs at least one")
    for reward in rewards:
        if config.score_stats == "heldout":
            allowed = 'a finite number above 0 (or score_stats = "running" or "none")'
            require(0 < reward.std < math.inf, "score_std", reward.std, allowed)


@torch.no_grad()
def score_rollouts(
    rewards: Sequence[Reward], batch: Batch, plan: Sequence[Minibatch], parallel: Parallel = ALONE
) -> None:
    """Set each episode's raw scores: each reward model at the response's last token, on prompt and response.

    Raises FloatingPointError for a score that is not finite.
    """
    found: list[tuple[int, list[float]]] = []
    for items, runs in plan:
        for micro_batch in runs:
            places = [items[i] for i in micro_batch.items]
            last = batch.run(places).last
            raw = torch.stack([reward.model(last) for reward in rewards], dim=1).tolist()
            found += zip(places, raw, strict=True) if micro_batch.counts else []
    for part in parallel.gather(found):
        for i, raw in part:
            batch.rollouts[i].raw = raw
    for rollout in batch.rollouts:
        if not all(map(math.isfinite, rollout.raw)):
            raise FloatingPointError(
                f"a reward model scored an answer to prompt {rollout.prompt_id!r} with {rollout.raw}; no parameter of "
                "any model was changed"
            )


def set_scores(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], config: PPOConfig, moments: Sequence[Moments]
) -> None:
    """From raw scores to scores: sum over models of weight * (raw - mean) / std, clipped, less a penalty for no end.

    Running `moments`, one for each model, first take in these rollouts. They are of what the models said: neither clip
    nor penalty has a part in them.
    """
    scales = [(0.0, 1.0)] * len(rewards)
    if config.score_stats == "heldout":
        scales = [(reward.mean, reward.std) for reward in rewards]
    elif config.score_stats == "running":
        for k, one in enumerate(moments):
            one.add([rollout.raw[k] for rollout in rollouts])
        scales = [(one.mean, one.std or 1.0) for one in moments]  # of equal scores each is the mean: 0 / 1
    limit = config.score_clip or math.inf
    for rollout in rollouts:
        parts = zip(rewards, rollout.raw, scales, strict=True)
        mixed = sum(reward.weight * (raw - mean) / std for reward, raw, (mean, std) in parts)
        rollout.score = min(max(mixed, -limit), limit) - (0.0 if rollout.ended else config.missing_eos_penalty)
