"""PPO against reward models, with a KL penalty to the SL-CAI policy (arXiv 1707.06347; details: arXiv 2403.17031).

for each iteration:
    responses ~ policy(prompts)
    reward_t = [last t] score  -  kl_coef * (log policy - log reference)
    advantages, returns = GAE(reward, value);  advantages whitened over the batch
    for each epoch, for each minibatch:  step on the clipped policy loss and on the clipped value loss
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bylaw.kernels.gae import gae
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.engine.weights import weight_version
from bylaw.model.heads import ScalarModel
from bylaw.model.metrics import Metrics
from bylaw.model.optim import adamw
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.prepare import prepare
from bylaw.model.sampler import tokenizer_of
from bylaw.model.settings import require
from bylaw.model.train_state import Checkpoints, Learner
from bylaw.model.transformer import Transformer
from bylaw.rlaif.advantages import importance_weights, masked_whiten, next_kl_coef, token_rewards
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.monitor import Signs, alarms, baseline_of, signs_of
from bylaw.rlaif.ppo_batch import Batch, Minibatch, Policy, fill_columns
from bylaw.rlaif.ppo_measures import SHOWN, Laps, batch_measures, update_measures
from bylaw.rlaif.ppo_records import RolloutFile
from bylaw.rlaif.ppo_scores import Moments, Reward, check_rewards, score_rollouts, set_scores
from bylaw.rlaif.ppo_update import Terms, learn
from bylaw.rlaif.rollout import Rollout, draw_prompts, sample_rollouts


@dataclass(frozen=True)
class Models:
    """The policy and value model that learn, and the reference and reward models that do not."""

    policy: Policy
    value: ScalarModel  # on a shared trunk: its trunk is the policy
    reference: Policy
    rewards: Sequence[Reward]
    learning: Mapping[str, nn.Module] | None = None  # "policy" and "value", where adapters learn and not whole models

    def learners(self, config: PPOConfig) -> dict[str, Learner]:
        """The modules that optimisers move: on a shared trunk one, of policy and value head together."""
        shared = {"policy": self.value}
        separate = {"policy": self.policy, "value": self.value}
        parts: Mapping[str, Any] = self.learning or (shared if config.value == "shared" else separate)
        return {name: Learner(part, adamw(part, config)) for name, part in parts.items()}


def shared_value(policy: Transformer) -> ScalarModel:
    """A value head on the policy's own trunk, which says 0 to begin with."""
    value = ScalarModel(policy)
    value.score.to(policy.device)
    nn.init.zeros_(value.score.weight)
    return value


@dataclass
class State:
    """What changes from iteration to iteration beside the models, in JSON values."""

    step: int = 0
    kl_coef: float = 0.0
    moments: list[Moments] = field(default_factory=list)
    baseline: list[Signs] = field(default_factory=list)  # of the first iterations
    alarms: dict[str, str] = field(default_factory=dict)  # of the last

    @classmethod
    def of(cls, saved: dict[str, Any] | None, models: Models, config: PPOConfig) -> "State":
        if saved is None:
            return cls(kl_coef=config.kl_coef, moments=[Moments() for _ in models.rewards])
        return cls(**{**saved, "moments": [Moments(**one) for one in saved["moments"]]})


class Setup(NamedTuple):
    """What stays as it is from iteration to iteration."""

    models: Models
    engine: Engine
    prompts: Sequence[Prompt]
    config: PPOConfig
    seed: int
    parallel: Parallel


def ppo(
    models: Models,
    engine: Engine,
    prompts: Sequence[Prompt],
    folder: Path,
    config: PPOConfig,
    seed: int,
    show: Callable[[int, Sequence[Rollout]], None] = lambda iteration, rollouts: None,
    parallel: Parallel = ALONE,
) -> dict[str, Any]:
    """Train `models.policy` and `models.value` in place. `engine` samples from the policy's own parameters.

    Metrics, rollouts and state go to `folder`; goes on from the state there, in one process to the same bits. `show` is
    called with each iteration's rollouts. Returns counts and the last iteration's measures; `stopped` says why a run
    ended before its time, None that it did not. Raises ValueError for settings that do not fit the models, and
    FloatingPointError if the first ratio is not 1: sampler and update would disagree.
    """
    setup = Setup(models, engine, prompts, config, seed, parallel)
    _check(setup)
    for part in (models.policy, models.value):
        if isinstance(part, nn.Module):
            prepare(part, config.activation_checkpointing, config.compile)
    learners = models.learners(config)
    last: dict[str, float] = {}
    stopped = None
    with Checkpoints(folder / "state", learners, parallel, config.keep_checkpoints) as checkpoints:
        state = State.of(checkpoints.load(), models, config)
        saved = state.step
        file = RolloutFile(folder / "rollouts.jsonl", saved, config.rollouts, seed, parallel)
        with file, Metrics(folder / "metrics.jsonl", "ppo", config.iterations, saved, parallel.first) as metrics:
            while state.step < config.iterations and stopped is None:
                laps, before = Laps(), asdict(state)
                batch, plan = _episodes(setup, state, file, laps)
                fill_columns(batch, plan, models.policy, models.reference, models.value, config, parallel)
                set_advantages(batch, config, state.kl_coef)
                last = batch_measures(batch, config, state.kl_coef) | _watch(setup, batch, state)
                laps.end("columns")
                stopped = _reason_to_stop(last, state, config)
                if stopped is None:
                    terms = Terms(
                        models.policy, models.value, batch, config, state.kl_coef, state.step < config.critic_warmup
                    )
                    last |= update_measures(learn(learners, terms, plan, seed, state.step, parallel))
                laps.end("update")
                last |= laps.measures(batch)
                metrics.log(state.step, last, {name: last[name] for name in SHOWN if name in last})
                show(state.step, batch.rollouts)
                if stopped is None:
                    _advance(state, last, config)
                due = state.step % config.save_every == 0 and state.step < config.iterations
                if state.step != saved and (due or stopped):
                    checkpoints.save(before if stopped else asdict(state))
                    saved = state.step
    counts = {"iterations": state.step, "episodes": state.step * config.rollouts, "kl_coef": state.kl_coef}
    return counts | {"stopped": stopped} | last


def set_advantages(batch: Batch, config: PPOConfig, kl_coef: float) -> None:
    """Set the columns advantages (whitened over the batch), returns, and policy_advantages (times importance weights).

    The batch is all ranks'.
    """
    columns, all_of = batch.columns, torch.ones_like(batch.columns["values"], dtype=torch.bool)
    scores = torch.tensor([rollout.score for rollout in batch.rollouts], device=batch.device)
    coef = kl_coef if config.kl_in == "reward" else 0.0
    rewards = token_rewards(scores, columns["logprobs"], columns["reference"], batch.cu_seqlens, coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, all_of, shift_mean=False)
    advantages, returns = gae(rewards, columns["values"], batch.cu_seqlens, config.gamma, config.gae_lambda)
    advantages = masked_whiten(advantages, all_of, shift_mean=True)
    weighted = advantages
    if config.importance_cap:
        weighted = advantages * importance_weights(columns["logprobs"], columns["sampler"], config.importance_cap)
    columns |= {"advantages": advantages, "returns": returns, "policy_advantages": weighted}


def _check(setup: Setup) -> None:
    models, config, ranks = setup.models, setup.config, setup.parallel.data_ranks
    check_rewards(models.rewards, config)
    if config.value == "shared" and getattr(models.policy, "trunk", models.policy) is not models.value.trunk:
        raise ValueError('value = "shared", but the value head stands on a trunk of its own; allowed: the policy\'s')
    if config.value == "separate" and models.learning is None and models.value.trunk is models.policy:
        raise ValueError(
            'value = "separate", but the value model stands on the policy\'s trunk; allowed: a trunk of its own, or '
            'value = "shared"'
        )
    require(config.rollouts >= ranks, "rollouts", config.rollouts, f"at least the number of data ranks, {ranks}")
    if not setup.prompts:
        raise ValueError("there are no prompts to draw responses to")


def _episodes(setup: Setup, state: State, file: RolloutFile, laps: Laps) -> tuple[Batch, list[Minibatch]]:
    """The iteration's episodes, scored and written down, and the first epoch's minibatches."""
    models, engine, prompts, config, seed, parallel = setup
    asked = draw_prompts(prompts, config.rollouts, seed, state.step)
    weights = weight_version(engine.model).hex()
    rollouts = file.take(state.step, asked, tokenizer_of(engine), weights)
    drawn = not rollouts
    if drawn:
        rollouts = sample_rollouts(engine, asked, config, seed, state.step, parallel)
    laps.end("sample")
    batch = Batch(rollouts, models.policy.device)
    plan = batch.minibatches(config, seed, state.step, 0, parallel)
    if drawn:
        score_rollouts(models.rewards, batch, plan, parallel)
    set_scores(models.rewards, rollouts, config, state.moments)
    if drawn:
        file.add(state.step, rollouts, weights)
    laps.end("score")
    return batch, plan


def _watch(setup: Setup, batch: Batch, state: State) -> dict[str, float]:
    """Signs of collapse, as measures; the alarms among them go to the state, and new ones are printed."""
    config = setup.config
    if config.collapse == "ignore":
        return {}
    signs = signs_of(batch.rollouts, float(batch.columns["entropy"].mean()))
    begun = len(state.baseline) >= config.collapse_baseline
    found = alarms(signs, baseline_of(state.baseline) if begun else {}, config)
    if setup.parallel.first and found.keys() - state.alarms.keys():
        print(f"ppo {state.step + 1}: the answers show signs of collapse: {'; '.join(found.values())}", flush=True)
    state.alarms = found
    if not begun:
        state.baseline.append(signs)
    return {f"collapse/{name}": value for name, value in signs.items()} | {"collapse/alarms": float(len(found))}


def _reason_to_stop(measures: Mapping[str, float], state: State, config: PPOConfig) -> str | None:
    kl = measures["objective/kl"]
    if config.kl_budget and kl > config.kl_budget:
        return f"the KL per response is {kl:.4g} nats, above kl_budget = {config.kl_budget:g}"
    if config.collapse == "stop" and state.alarms:
        return f"signs of collapse: {'; '.join(state.alarms.values())}"
    return None


def _advance(state: State, measures: Mapping[str, float], config: PPOConfig) -> None:
    warming = state.step < config.critic_warmup  # the policy stands still, and its KL says nothing
    state.step += 1
    if config.kl_target > 0 and not warming:
        kl = measures["objective/kl"]
        state.kl_coef = next_kl_coef(state.kl_coef, kl, config.kl_target, config.rollouts, config.kl_horizon)
