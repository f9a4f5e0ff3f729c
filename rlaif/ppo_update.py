"""PPO's updates on one batch: clipped policy loss and clipped value loss, epoch by epoch, minibatch by minibatch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bylaw.kernels.kl import KL_ESTIMATORS
from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.policy_loss import Stats, mean_stats, merge_stats, policy_loss, value_loss
from bylaw.model.heads import ScalarModel
from bylaw.model.optim import scheduled, update
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.step import Objective, accumulate
from bylaw.model.train_state import Learner
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo_batch import Batch, Minibatch, Policy, Run

# What packing and batch size may do to a ratio in float32. Old log-probs come from the update's own micro-batches.
RATIO_TOLERANCE = 1e-4
VALUE_HEAD = "score."


class Terms:
    """The terms of the losses on the episodes of `batch`, divided by the response tokens of a whole minibatch."""

    def __init__(
        self, policy: Policy, value: ScalarModel, batch: Batch, config: PPOConfig, kl_coef: float, warming: bool
    ) -> None:
        """`warming`: on a shared trunk the value's gradient stops at its head."""
        self.policy, self.value, self.batch, self.config = policy, value, batch, config
        self.kl_coef, self.warming = kl_coef if config.kl_in == "loss" else 0.0, warming

    def of_policy(self, tokens: int) -> Objective[int]:
        def objective(items: list[int]) -> tuple[Tensor, Stats]:
            run = self.batch.run(items)
            return self._policy_loss(run, self.policy(run.before), tokens)

        return objective

    def of_value(self, tokens: int) -> Objective[int]:
        def objective(items: list[int]) -> tuple[Tensor, Stats]:
            run = self.batch.run(items)
            return self._value_loss(run, self.value(run.before), tokens)

        return objective

    def of_both(self, tokens: int) -> Objective[int]:
        """One pass of the trunk for both."""

        def objective(items: list[int]) -> tuple[Tensor, Stats]:
            run = self.batch.run(items)
            hidden = self.policy(run.before)
            loss, stats = self._policy_loss(run, hidden, tokens)
            values = self.value.read(hidden.detach() if self.warming else hidden)
            error, value_stats = self._value_loss(run, values, tokens)
            return loss + self.config.value_coef * error, value_stats | stats

        return objective

    def _policy_loss(self, run: Run, hidden: Tensor, tokens: int) -> tuple[Tensor, Stats]:
        batch, config = self.batch, self.config
        old, advantages = batch.at(run, "logprobs"), batch.at(run, "policy_advantages")
        dual = config.dual_clip or None
        reference = batch.at(run, "reference") if self.kl_coef else None
        loss, logprobs, _ = linear_loss(
            hidden,
            self.policy.head_weight,
            run.targets,
            old_logprobs=old,
            advantages=advantages,
            clip=config.clips,
            dual_clip=dual,
            reference_logprobs=reference,
            kl=None if reference is None else torch.full_like(reference, self.kl_coef),
            kl_estimator=config.kl_estimator,
            temperature=config.temperature,
            ignore_index=None,
        )
        part, stats = policy_loss(logprobs, old, advantages, config.clips, 1.0, dual)
        stats["policy_loss"] = part.double()
        if reference is not None:
            stats["kl_loss"] = self.kl_coef * KL_ESTIMATORS[config.kl_estimator](logprobs, reference).sum().double()
        return loss / tokens, stats

    def _value_loss(self, run: Run, values: Tensor, tokens: int) -> tuple[Tensor, Stats]:
        old, returns = self.batch.at(run, "values"), self.batch.at(run, "returns")
        error, stats = value_loss(values, old, returns, self.config.value_clip, tokens)
        return error, stats | {"value_loss": error.detach().double() * tokens}


def learn(
    learners: Mapping[str, Learner],
    terms: Terms,
    plan: Sequence[Minibatch],
    seed: int,
    iteration: int,
    parallel: Parallel = ALONE,
) -> dict[str, float]:
    """All epochs of updates on one batch, the first of them by `plan`; returns the statistics over them.

    Raises FloatingPointError if the first ratio is not 1, before any parameter moves.
    """
    config, batch = terms.config, terms.batch
    parts: list[Stats] = []
    norms: list[float] = []
    rates = _rates(config, iteration)
    for epoch in range(config.epochs):
        for items, runs in batch.minibatches(config, seed, iteration, epoch, parallel) if epoch else plan:
            tokens = sum(batch.lengths[i] for i in items)
            wanted = [terms.of_both] if config.value == "shared" else [terms.of_policy, terms.of_value]
            found = [accumulate(objective(tokens), items, runs, parallel) for objective in wanted]
            parts.append({name: value for stats in reversed(found) for name, value in stats.items()})
            if len(parts) == 1:
                _check_first_ratio(parts[0])
            if terms.warming:
                _hold_policy(learners["policy"].model)
            moved = {
                name: update(*learner, rates[name], config.max_grad_norm, parallel)
                for name, learner in learners.items()
                if not (terms.warming and name == "policy" and config.value == "separate")
            }
            norms.append(0.0 if terms.warming else moved["policy"])
    first = {"first_ratio_gap": float(parts[0]["ratio_gap_max"])}
    return mean_stats(merge_stats(parts)) | first | {"lr": rates["policy"], "grad_norm": sum(norms) / len(norms)}


def _rates(config: PPOConfig, iteration: int) -> dict[str, float]:
    """A policy that waits for its critic begins its schedule when it begins to learn."""
    held = config.critic_warmup if config.value == "separate" else 0
    policy = scheduled(config, config.learning_rate, max(0, iteration - held), max(1, config.iterations - held))
    return {"policy": policy, "value": scheduled(config, config.value_learning_rate, iteration, config.iterations)}


def _hold_policy(model: nn.Module) -> None:
    """Forget the gradients of all but a value head."""
    for name, parameter in model.named_parameters():
        if not name.startswith(VALUE_HEAD):
            parameter.grad = None


def _check_first_ratio(stats: Stats) -> None:
    gap = float(stats["ratio_gap_max"])
    if not gap <= RATIO_TOLERANCE:
        raise FloatingPointError(
            f"before the first update the policy's ratio to itself is off by {gap:.3g} (allowed: {RATIO_TOLERANCE}); "
            "old and new log-probs are not taken in the same way"
        )
