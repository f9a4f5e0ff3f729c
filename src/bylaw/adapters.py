"""Stages that train adapters (the recipe's [lora]) in place of whole models: one trunk in memory, whatever learns.

Each writes its adapter as a PEFT folder, beside the merged checkpoint that any program loads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bylaw.inputs import Run
from bylaw.model.checkpoint import load_scalar, reward_extras
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.lora import (
    View,
    adapter_module,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    merge,
    use_adapter,
)
from bylaw.model.peft_format import load_adapter, save_adapter
from bylaw.model.transformer import Transformer
from bylaw.rlaif.direct import Rater
from bylaw.rlaif.ppo import Models, shared_value
from bylaw.rlaif.ppo_scores import Reward

POLICY, VALUE, REWARD, FOLDER = "policy", "value", "reward", "adapter"


@contextmanager
def adapted(run: Run, model: Transformer | ScalarModel, start: Path, folder: Path) -> Iterator[None]:
    """In it, an adapter learns on `model` and its weights stay as they are; then it is written to `folder`/adapter and
    merged. Without [lora] the model itself learns, and nothing is done here.

    `start` is the checkpoint that `model` came from.
    """
    if not run.recipe.lora.rank:
        yield
        return
    trunk = model.trunk if isinstance(model, ScalarModel) else model
    add_adapter(trunk, POLICY, run.recipe.lora, run.recipe.seed, freeze_base=True)
    if isinstance(model, ScalarModel):
        model.adapter = POLICY
    with use_adapter(trunk, POLICY):
        yield
    _write(run, model, start, folder)


def _write(run: Run, model: Transformer | ScalarModel, start: Path, folder: Path) -> None:
    trunk = model.trunk if isinstance(model, ScalarModel) else model
    save_adapter(model, POLICY, folder / FOLDER, str(start), parallel=run.parallel)
    merge(trunk, POLICY)
    if isinstance(model, ScalarModel):
        model.adapter = None


Scales = list[tuple[float, float]]
"""Mean and deviation of each reward model's scores."""


def reward_scales(run: Run, scorer: Path | None) -> Scales:
    """Of the run's own reward model, or of the judge in its place, whose scores stay as they are; and of those that the
    recipe adds.

    Raises ValueError for one whose scores cannot be divided by their deviation, where the recipe wants that.
    """
    config = run.recipe.ppo
    folders = [scorer, *(folder for folder, _ in config.further_rewards)]
    return [_scale(folder) if folder and config.score_stats == "heldout" else (0.0, 1.0) for folder in folders]


def _scale(folder: Path) -> tuple[float, float]:
    extras = reward_extras(folder)
    if not {"score_mean", "score_std"} <= extras.keys() or not extras["score_std"] > 0:
        raise ValueError(
            f"{folder}: score_std = {extras.get('score_std')}, where the scores of held-out answers must differ; set "
            'ppo.score_stats = "running" or "none", or train the reward model on more'
        )
    return extras["score_mean"], extras["score_std"]


@contextmanager
def ppo_models(
    run: Run, start: Path, scorer: Path | Rater, scales: Scales, folder: Path
) -> Iterator[tuple[Transformer, Models]]:
    """The policy of PPO, which in the end is a plain model, and all its models.

    Each is a model of its own or, with [lora], policy, value, reference and reward are all the trunk of `start`, and
    the policy's adapter is written to `folder`/adapter. `scorer` is the reward model's folder, or a judge; then a value
    model of its own begins at `start` and says 0.
    """
    if not run.recipe.lora.rank:
        policy = run.model(start)
        yield policy, _on_their_own(run, policy, start, scorer, scales)
        return
    trunk = run.model(start)
    models = _on_one_trunk(run, trunk, scorer, scales)
    with use_adapter(trunk, POLICY):
        yield trunk, models
    _write(run, trunk, start, folder)


def _on_their_own(run: Run, policy: Transformer, start: Path, scorer: Path | Rater, scales: Scales) -> Models:
    reference = run.model(start)
    if run.recipe.ppo.value == "shared":
        value = shared_value(policy)
    elif isinstance(scorer, Path):
        value = _in_units(run.reward_model(scorer), scales)
    else:
        value = _silent(load_scalar(start, run.recipe.seed, run.device, run.dtype, run.parallel))
    reward = run.reward_model(scorer) if isinstance(scorer, Path) else scorer
    return Models(policy, value, reference, _rewards(run, reward, scales))


def _on_one_trunk(run: Run, trunk: Transformer, scorer: Path | Rater, scales: Scales) -> Models:
    """The reference is the trunk with its adapters off."""
    add_adapter(trunk, POLICY, run.recipe.lora, run.recipe.seed, freeze_base=True)
    reward = _adapted_reward(run, trunk, scorer) if isinstance(scorer, Path) else scorer
    if run.recipe.ppo.value == "shared":
        value = shared_value(trunk)
        value.adapter, learning = POLICY, {POLICY: adapter_module(value, POLICY)}
    else:
        value = _adapted_value(run, trunk, reward, scales)
        learning = {POLICY: adapter_module(trunk, POLICY), VALUE: adapter_module(value, VALUE)}
    return Models(trunk, value, View(trunk), _rewards(run, reward, scales), learning)


def _adapted_reward(run: Run, trunk: Transformer, scorer: Path) -> ScalarModel:
    reward = scalar_model(trunk, run.recipe.seed, REWARD)
    load_adapter(reward, scorer.with_name(FOLDER), REWARD, parallel=run.parallel)
    for parameter in adapter_parameters(reward, REWARD).values():
        parameter.requires_grad_(False)
    return reward


def _adapted_value(run: Run, trunk: Transformer, reward: ScalarModel | Rater, scales: Scales) -> ScalarModel:
    """It begins as the reward model; where a judge scores, as the trunk, and says 0."""
    if not isinstance(reward, ScalarModel):
        add_adapter(trunk, VALUE, run.recipe.lora, run.recipe.seed)
        return _silent(ScalarModel(trunk, VALUE).to(trunk.device))
    copy_adapter(trunk, REWARD, VALUE)
    value = ScalarModel(trunk, VALUE).to(trunk.device)
    with torch.no_grad():
        value.score.weight.copy_(reward.score.weight)
    return _in_units(value, scales)


def _rewards(run: Run, reward: ScalarModel | Rater, scales: Scales) -> list[Reward]:
    further = [(run.reward_model(folder), weight) for folder, weight in run.recipe.ppo.further_rewards]
    weighed: list[tuple[ScalarModel | Rater, float]] = [(reward, 1.0), *further]
    return [Reward(model, *scale, weight) for (model, weight), scale in zip(weighed, scales, strict=True)]


@torch.no_grad()
def _in_units(value: ScalarModel, scales: Scales) -> ScalarModel:
    """A value model that begins as the reward model says scores as PPO has them: divided by their deviation."""
    value.score.weight.div_(scales[0][1])
    return value


@torch.no_grad()
def _silent(value: ScalarModel) -> ScalarModel:
    value.score.weight.zero_()
    return value
