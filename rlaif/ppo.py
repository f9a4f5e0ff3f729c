"""PPO against a reward model, with a KL penalty to the SL-CAI policy (arXiv 1707.06347; details: arXiv 2403.17031).

for each iteration:
    responses ~ policy(prompts)
    reward_t = [last t] (score - mean) / std  -  kl_coef * (log policy - log reference)
    advantages, returns = GAE(reward, value);  advantages whitened over the batch
    for each epoch, for each minibatch:  step on the clipped policy loss and on the clipped value loss
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.kernels.gae import gae
from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.philox import permutation
from bylaw.kernels.policy_loss import Stats, kl_k1, mean_stats, merge_stats, policy_loss, value_loss
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.heads import ScalarModel
from bylaw.model.metrics import Metrics
from bylaw.model.optim import adamw, scheduled, update
from bylaw.model.packing import token_batches
from bylaw.model.supervised import token_states
from bylaw.model.train_state import load_state, save_state
from bylaw.model.transformer import Transformer
from bylaw.rlaif.advantages import explained_variance, masked_whiten, next_kl_coef, token_rewards
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.rollout import (
    Rollout,
    ScoreScale,
    column,
    fill_columns,
    pack_rollouts,
    response_values,
    sample_rollouts,
    score_rollouts,
)

# What packing and batch size may do to a ratio in float32. Old log-probs come from the update's own micro-batches.
RATIO_TOLERANCE = 1e-4
SHOWN = ("loss/policy", "objective/scores", "objective/kl", "val/ended", "tok/s")


@dataclass(frozen=True)
class Models:
    """The policy and value model that learn, and the reference and reward model that do not."""

    policy: Transformer
    value: ScalarModel
    reference: Transformer
    reward: ScalarModel


def ppo(
    models: Models,
    engine: Engine,
    prompts: Sequence[Prompt],
    folder: Path,
    config: PPOConfig,
    scale: ScoreScale,
    seed: int,
    show: Callable[[int, Sequence[Rollout]], None] = lambda iteration, rollouts: None,
) -> dict[str, Any]:
    """Train `models.policy` and `models.value` in place. `engine` samples from the policy's own parameters.

    Metrics and state go to `folder`; goes on from the state there, to the same bits. `show` is called with each
    iteration's rollouts. Raises FloatingPointError if the first ratio is not 1: sampler and update would disagree.
    """
    learning = {"policy": models.policy, "value": models.value}
    optimizers = {name: adamw(model, config) for name, model in learning.items()}
    progress = load_state(folder / "state", learning, optimizers) or {"step": 0, "kl_coef": config.kl_coef}
    kl_coef = progress["kl_coef"]
    last: dict[str, float] = {}
    with Metrics(folder / "metrics.jsonl", "ppo", config.iterations, progress["step"]) as metrics:
        for iteration in range(progress["step"], config.iterations):
            start = time.monotonic()
            asked = _draw_prompts(prompts, config.rollouts, seed, iteration)
            rollouts = sample_rollouts(engine, asked, config, seed, iteration)
            sampled = time.monotonic()
            score_rollouts(models.reward, rollouts, scale, config.micro_batch_tokens)
            plan = _minibatches(rollouts, config, seed, iteration, epoch=0)
            for minibatch in plan:
                for run in minibatch:
                    fill_columns(run, models.policy, models.reference, models.value, config.temperature)
            set_advantages(rollouts, config, kl_coef)
            stats = _learn(models, optimizers, rollouts, plan, config, seed, iteration)
            seconds = time.monotonic() - start
            last = _measures(rollouts, stats, kl_coef) | {
                "eps/s": len(rollouts) / seconds,
                "tok/s": sum(len(rollout.ids) for rollout in rollouts) / seconds,
                "time/sample_fraction": (sampled - start) / seconds,
            }
            metrics.log(iteration, last, {name: last[name] for name in SHOWN})
            show(iteration, rollouts)
            if config.kl_target > 0:
                kl_coef = next_kl_coef(
                    kl_coef, last["objective/kl"], config.kl_target, len(rollouts), config.kl_horizon
                )
            if (iteration + 1) % config.save_every == 0 and iteration + 1 < config.iterations:
                save_state(folder / "state", learning, optimizers, {"step": iteration + 1, "kl_coef": kl_coef})
    return {
        "iterations": config.iterations,
        "episodes": config.iterations * config.rollouts,
        "kl_coef": kl_coef,
        **last,
    }


def set_advantages(rollouts: Sequence[Rollout], config: PPOConfig, kl_coef: float) -> None:
    """Set the columns advantages (whitened over the batch) and returns."""
    lengths = [len(rollout.response) for rollout in rollouts]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    scores = torch.tensor([rollout.score for rollout in rollouts])
    names = ("logprobs", "reference", "values")
    logprobs, reference, values = (column(rollouts, name).cpu() for name in names)
    rewards = token_rewards(scores, logprobs, reference, cu_seqlens, kl_coef)
    advantages, returns = gae(rewards, values, cu_seqlens, config.gamma, config.gae_lambda)
    whitened = masked_whiten(advantages, torch.ones_like(advantages, dtype=torch.bool), shift_mean=True)
    device = rollouts[0].columns["values"].device
    for name, whole in (("advantages", whitened), ("returns", returns)):
        for rollout, piece in zip(rollouts, whole.to(device).split(lengths), strict=True):
            rollout.columns[name] = piece


def _draw_prompts(prompts: Sequence[Prompt], count: int, seed: int, iteration: int) -> list[Prompt]:
    """The iteration's prompts, from an endless series of shuffled passes over all of them."""
    places = range(iteration * count, (iteration + 1) * count)
    orders = {epoch: permutation(seed, len(prompts), epoch) for epoch in {place // len(prompts) for place in places}}
    return [prompts[int(orders[place // len(prompts)][place % len(prompts)])] for place in places]


def _minibatches(
    rollouts: Sequence[Rollout], config: PPOConfig, seed: int, iteration: int, epoch: int
) -> list[list[list[Rollout]]]:
    """The rollouts in a new order: minibatches of near-equal size, each cut into micro-batches by tokens."""
    order = permutation(seed + 1, len(rollouts), iteration * config.epochs + epoch).tensor_split(config.minibatches)
    shuffled = [[rollouts[int(i)] for i in part] for part in order]
    return [
        [[part[i] for i in run] for run in token_batches([len(r.ids) for r in part], config.micro_batch_tokens)]
        for part in shuffled
    ]


def _learn(
    models: Models,
    optimizers: dict[str, torch.optim.AdamW],
    rollouts: Sequence[Rollout],
    plan: list[list[list[Rollout]]],
    config: PPOConfig,
    seed: int,
    iteration: int,
) -> dict[str, float]:
    """All epochs of updates on one batch; returns the statistics over them."""
    parts: list[Stats] = []
    norms: list[float] = []
    actor_moves = iteration >= config.critic_warmup
    for epoch in range(config.epochs):
        for minibatch in plan if epoch == 0 else _minibatches(rollouts, config, seed, iteration, epoch):
            parts.append(_gradients(models, minibatch, config))
            if len(parts) == 1:
                _check_first_ratio(parts[0])
            rate = scheduled(config, config.learning_rate, iteration, config.iterations)
            value_rate = scheduled(config, config.value_learning_rate, iteration, config.iterations)
            if actor_moves:
                norms.append(update(models.policy, optimizers["policy"], rate, config.max_grad_norm))
            models.policy.zero_grad(set_to_none=True)
            update(models.value, optimizers["value"], value_rate, config.max_grad_norm)
    grad_norm = sum(norms) / len(norms) if norms else 0.0
    first_gap = float(parts[0]["ratio_gap_max"])
    return mean_stats(merge_stats(parts)) | {"lr": rate, "grad_norm": grad_norm, "first_ratio_gap": first_gap}


def _gradients(models: Models, minibatch: list[list[Rollout]], config: PPOConfig) -> Stats:
    """Put the gradients of one minibatch into policy and value model, micro-batch by micro-batch."""
    tokens = sum(len(rollout.response) for run in minibatch for rollout in run)
    parts = []
    for run in minibatch:
        packed, places = pack_rollouts(run, models.policy.device)
        hidden, targets = token_states(models.policy, packed, places)
        old, advantages = column(run, "logprobs"), column(run, "advantages")
        loss, logprobs, _ = linear_loss(
            hidden,
            models.policy.head_weight,
            targets,
            old_logprobs=old,
            advantages=advantages,
            clip=config.clip,
            temperature=config.temperature,
            ignore_index=None,
        )
        (loss / tokens).backward()
        loss, stats = policy_loss(logprobs, old, advantages, config.clip, tokens)
        values = response_values(models.value, packed, places)
        error, value_stats = value_loss(
            values, column(run, "values"), column(run, "returns"), config.value_clip, tokens
        )
        error.backward()
        losses = {"policy_loss": loss.detach().double() * tokens, "value_loss": error.detach().double() * tokens}
        parts.append(value_stats | stats | losses)
    return merge_stats(parts)


def _check_first_ratio(stats: Stats) -> None:
    gap = float(stats["ratio_gap_max"])
    if not gap <= RATIO_TOLERANCE:
        raise FloatingPointError(
            f"before the first update the policy's ratio to itself is off by {gap:.3g} (allowed: {RATIO_TOLERANCE}); "
            "old and new log-probs are not taken in the same way"
        )


@torch.no_grad()
def _measures(rollouts: Sequence[Rollout], stats: dict[str, float], kl_coef: float) -> dict[str, float]:
    """Statistics under the names that PPO users know. Sums over a response's tokens, then means over responses."""
    count = len(rollouts)
    logprobs, reference = column(rollouts, "logprobs"), column(rollouts, "reference")
    kl = float(kl_k1(logprobs, reference).sum()) / count
    scores = sum(rollout.score for rollout in rollouts) / count
    sampler = torch.cat([rollout.sampler_logprobs for rollout in rollouts]).to(logprobs.device)
    measures = {
        "objective/kl": kl,
        "objective/entropy": float(column(rollouts, "entropy").sum()) / count,
        "objective/scores": scores,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/kl_coef": kl_coef,
        "policy/approxkl": stats["approx_kl_k3"],
        "policy/clipfrac": stats["clip_fraction"],
        "loss/policy": stats["policy_loss"],
        "loss/value": stats["value_loss"],
        "val/clipfrac": stats["value_clip_fraction"],
        "val/ratio": stats["ratio"],
        "val/first_ratio_gap": stats["first_ratio_gap"],
        "val/ended": sum(rollout.ended for rollout in rollouts) / count,
        "val/response_tokens": len(logprobs) / count,
        "grad_norm": stats["grad_norm"],
        "lr": stats["lr"],
    } | _sampler_gap(sampler, logprobs)
    explained = explained_variance(column(rollouts, "values"), column(rollouts, "returns"))
    return measures | ({"val/explained_variance": explained} if explained == explained else {})


def _sampler_gap(sampler: Tensor, trainer: Tensor) -> dict[str, float]:
    """How far the log-probs [n] that the tokens were drawn by lie from those that the update takes, in TRL's names."""
    gap = trainer - sampler
    ratio = gap.exp()
    return {
        "sampling/sampling_logp_difference/mean": float(gap.abs().mean()),
        "sampling/sampling_logp_difference/max": float(gap.abs().max()),
        "sampling/importance_sampling_ratio/outside_0.1": float(((ratio < 0.9) | (ratio > 1.1)).float().mean()),
    }
