"""What an iteration of PPO measures, under the names that its users know."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from bylaw.kernels.kl import kl_k1
from bylaw.rlaif.advantages import explained_variance
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo_batch import Batch

SHOWN = ("loss/policy", "objective/scores", "objective/kl", "val/ended", "tok/s")


class Laps:
    """Seconds of the parts of an iteration."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """What went on since the last part ended was `name`."""
        now = time.monotonic()
        self.seconds[name], self.last = now - self.last, now

    def measures(self, batch: Batch) -> dict[str, float]:
        """Rates over the iteration, and each part's fraction of its time."""
        total = self.last - self.start
        rates = {"eps/s": len(batch.lengths) / total, "tok/s": batch.tokens / total}
        return rates | {f"time/{name}_fraction": seconds / total for name, seconds in self.seconds.items()}


@torch.no_grad()
def batch_measures(batch: Batch, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """Of the episodes, before the update. Sums over a response's tokens, then means over responses."""
    count, columns = len(batch.rollouts), batch.columns
    kl = float(kl_k1(columns["logprobs"], columns["reference"]).sum()) / count
    scores = sum(rollout.score for rollout in batch.rollouts) / count
    non_score = -kl_coef * kl if config.kl_in == "reward" else 0.0
    measures = {
        "objective/kl": kl,
        "objective/entropy": float(columns["entropy"].sum()) / count,
        "objective/scores": scores,
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": scores + non_score,
        "objective/kl_coef": kl_coef,
        "val/ended": sum(rollout.ended for rollout in batch.rollouts) / count,
        "val/response_tokens": batch.tokens / count,
    } | sampler_gap(columns["sampler"], columns["logprobs"], config.importance_cap)
    ratings = [rollout.rating for rollout in batch.rollouts if rollout.rating is not None]
    if ratings:
        masses = [one["mass"] for rating in ratings for one in rating["readings"] if "mass" in one]
        measures["judge/unrated"] = float(sum(bool(rating["abstained"]) for rating in ratings))
        measures["judge/mark_mass"] = sum(masses) / max(1, len(masses))
    explained = explained_variance(columns["values"], columns["returns"])
    return measures | ({"val/explained_variance": explained} if explained == explained else {})


def update_measures(stats: Mapping[str, float]) -> dict[str, float]:
    """Of the update, means over all minibatches."""
    measures = {
        "policy/approxkl": stats["approx_kl_k3"],
        "policy/clipfrac": stats["clip_fraction"],
        "policy/dual_clipfrac": stats["dual_clip_fraction"],
        "loss/policy": stats["policy_loss"],
        "loss/value": stats["value_loss"],
        "val/clipfrac": stats["value_clip_fraction"],
        "val/ratio": stats["ratio"],
        "val/first_ratio_gap": stats["first_ratio_gap"],
        "grad_norm": stats["grad_norm"],
        "lr": stats["lr"],
    }
    return measures | ({"loss/kl": stats["kl_loss"]} if "kl_loss" in stats else {})


def sampler_gap(sampler: Tensor, trainer: Tensor, cap: float) -> dict[str, float]:
    """How far the log-probs [N] that the tokens were drawn by lie from those that the update takes, in TRL's names; and
    the mean of the importance weights, and the share that `cap`, if above 0, cuts.
    """
    gap = trainer - sampler
    ratio = gap.exp()
    measures = {
        "sampling/sampling_logp_difference/mean": float(gap.abs().mean()),
        "sampling/sampling_logp_difference/max": float(gap.abs().max()),
        "sampling/importance_sampling_ratio/outside_0.1": float(((ratio < 0.9) | (ratio > 1.1)).float().mean()),
    }
    if cap:
        measures["sampling/importance_sampling_ratio/mean"] = float(ratio.clamp(max=cap).mean())
        measures["sampling/importance_sampling_ratio/cut"] = float((ratio > cap).float().mean())
    return measures
