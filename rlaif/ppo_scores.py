"""An episode's score: what reward models say of prompt and response, made comparable, weighed and added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.settings import require
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.direct import Rater
from bylaw.rlaif.ppo_batch import Batch, Minibatch
from bylaw.rlaif.rollout import Rollout


@dataclass(frozen=True)
class Reward:
    """A reward model, the mean and deviation of its scores on held-out answers, and its weight beside others;
    or a judge that rates each answer itself.
    """

    model: ScalarModel | Rater
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
    """Set each episode's raw scores: each reward model at the response's last token, on prompt and response; a judge's
    by its rating.

    Raises FloatingPointError for a score that is not finite.
    """
    models = [reward.model for reward in rewards if not isinstance(reward.model, Rater)]
    found: list[tuple[int, list[float]]] = []
    for items, runs in plan if models else ():
        for micro_batch in runs:
            places = [items[i] for i in micro_batch.items]
            last = batch.run(places).last
            raw = torch.stack([model(last) for model in models], dim=1).tolist()
            found += zip(places, raw, strict=True) if micro_batch.counts else []
    for part in parallel.gather(found):
        for i, raw in part:
            batch.rollouts[i].raw = list(raw)
    for place, reward in enumerate(rewards):
        if isinstance(reward.model, Rater):
            _rate(reward.model, place, batch.rollouts, parallel)
    for rollout in batch.rollouts:
        if not all(raw is None or math.isfinite(raw) for raw in rollout.raw):
            raise FloatingPointError(
                f"a reward model scored an answer to prompt {rollout.prompt_id!r} with {rollout.raw}; no parameter of "
                "any model was changed"
            )


def _rate(rater: Rater, place: int, rollouts: Sequence[Rollout], parallel: Parallel) -> None:
    """Put the judge's scores in their `place` among the raw ones; each data rank rates its share."""
    mine = range(parallel.data_rank, len(rollouts), parallel.data_ranks)
    rated = list(zip(mine, rater.rate([rollouts[i] for i in mine]), strict=True))
    for part in parallel.gather(rated):
        for i, rating in part:
            rollouts[i].raw.insert(place, rating["score"])
            rollouts[i].rating = rating


def set_scores(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], config: PPOConfig, moments: Sequence[Moments]
) -> None:
    """From raw scores to scores: sum over models of weight * (raw - mean) / std, clipped, less a penalty for no end.

    Running `moments`, one for each model, first take in these rollouts. They are of what the models said: neither clip
    nor penalty has a part in them.

    An answer that a judge could not rate counts as the mean of those of the batch that it did rate: it is neither
    rewarded nor punished, and the batch keeps its size. Raises ValueError where there is none that it rated.
    """
    raws = [_filled([rollout.raw[k] for rollout in rollouts], rollouts) for k in range(len(rewards))]
    scales = [(0.0, 1.0)] * len(rewards)
    if config.score_stats == "heldout":
        scales = [(reward.mean, reward.std) for reward in rewards]
    elif config.score_stats == "running":
        for k, one in enumerate(moments):
            one.add([raw for rollout in rollouts if (raw := rollout.raw[k]) is not None])
        scales = [(one.mean, one.std or 1.0) for one in moments]  # of equal scores each is the mean: 0 / 1
    limit = config.score_clip or math.inf
    for rollout, raw_scores in zip(rollouts, zip(*raws, strict=True), strict=True):
        parts = zip(rewards, raw_scores, scales, strict=True)
        mixed = sum(reward.weight * (raw - mean) / std for reward, raw, (mean, std) in parts)
        rollout.score = min(max(mixed, -limit), limit) - (0.0 if rollout.ended else config.missing_eos_penalty)


def _filled(raws: Sequence[float | None], rollouts: Sequence[Rollout]) -> list[float]:
    """Scores of one model, with the mean of the others for those that are missing."""
    known = [raw for raw in raws if raw is not None]
    if not known:
        why = {str((rollout.rating or {}).get("abstained")) for rollout in rollouts}
        raise ValueError(
            f"the judge could rate none of the {len(raws)} answers of this batch: {'; '.join(sorted(why))}"
        )
    mean = math.fsum(known) / len(known)
    return [mean if raw is None else raw for raw in raws]
