"""What can be wrong with a run, found before its first stage works: a mistake should not cost the hours before it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bylaw.inputs import Run
from bylaw.model.checkpoint import check_model, check_tokenizer, reward_extras
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.sampler import Sampler, turn
from bylaw.model.settings import SamplingSettings, require
from bylaw.model.sharding import check_divides
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.recipe import EVERY_STAGE
from bylaw.rlaif.label import OPTIONS
from bylaw.rlaif.pairs import is_heldout
from bylaw.runs import check_terms, is_begun
from bylaw.sl_cai.revise import Reviser


@dataclass(frozen=True)
class _Inputs:
    """A run, the sampler of its base checkpoint's shape (no weights), and the longest of its prompts of each kind."""

    run: Run
    sampler: Sampler
    asked: Prompt
    any: Prompt


def check_run(run: Run, stages: Sequence[str]) -> None:
    """Check output folder and inputs, then what each of `stages` will ask of them. No weights are read.

    Raises ValueError and FileNotFoundError, which name the file and line, the key, or the stage and the prompt.
    """
    if not run.recipe.resume:
        _check_fresh(run, stages)
    for name in EVERY_STAGE:  # the recipe that is saved in the folder must be true of whatever stands there
        check_terms(run.terms(name, {}), ("config", "seed"))
    config, _ = check_model(run.recipe.base)
    _ = run.constitution, run.tokenizer, run.rl_prompts  # read, and so checked
    with _named(str(run.recipe.base)):
        check_tokenizer(config, run.tokenizer)
    with torch.device("meta"):
        engine = Engine(Transformer(config), run.tokenizer)
    check_divides(engine.model, run.parallel)
    sampler = Sampler(engine=engine, settings=SamplingSettings(), seed=run.recipe.seed, model_hash="")
    inputs = _Inputs(run, sampler, _longest(run, run.prompts), _longest(run, run.rl_prompts))
    for name in stages:
        with _named(f"stage {name}"):
            _CHECKS[name](inputs)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put `where` in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_fresh(run: Run, stages: Sequence[str]) -> None:
    for name in stages:
        folder = run.terms(name, {}).folder
        if is_begun(folder):
            raise ValueError(
                f"resume = false, but {folder} was begun; give another output folder, delete {folder}, or go on there "
                "with resume = true"
            )


def check_device(name: str) -> None:
    """Raise ValueError for a device that is unknown or not there, or too few for torchrun's processes."""
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(
            f"device = {name!r} is not known; allowed: 'auto', 'cpu', 'cuda' or 'cuda:0' and on"
        ) from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ValueError(f"device = {name!r}, but torch sees {count} CUDA devices; allowed here: 'auto' or 'cpu'")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine
    if here > 1 and device.index is not None:
        raise ValueError(
            f"device = {name!r} for {here} processes; allowed: {device.type!r}, of which each takes its own"
        )
    if here > count and (device.type == "cuda" or (name == "auto" and count)):
        raise ValueError(f"{here} processes on this machine, but torch sees {count} CUDA devices; launch one for each")


def _longest(run: Run, prompts: Sequence[Prompt]) -> Prompt:
    return max(prompts, key=lambda prompt: len(run.tokenizer.prompt_ids(prompt.messages)))


def _check_revise(inputs: _Inputs) -> None:
    config = inputs.run.recipe.revise
    reviser = Reviser(sampler=inputs.sampler, constitution=inputs.run.constitution, config=config)
    inputs.sampler.check_lengths([inputs.asked], reviser.reserve())
    unanswered = [prompt for prompt in inputs.run.helpful if not prompt.answer]
    inputs.sampler.check_lengths(unanswered, config.max_answer_tokens)


def _check_finetune(inputs: _Inputs) -> None:
    for prompt in inputs.run.helpful:
        if prompt.answer:
            turns = [*prompt.messages, turn("assistant", prompt.answer)]
            inputs.run.tokenizer.training_ids(turns, last_only=True)


def _check_compare(inputs: _Inputs) -> None:
    inputs.sampler.check_lengths([inputs.any], inputs.run.recipe.compare.max_tokens)


def _check_label(inputs: _Inputs) -> None:
    constitution, tokenizer = inputs.run.constitution, inputs.run.tokenizer
    constitution.for_stage("comparison")
    prefix = constitution.templates.answer_prefix
    tokenizer.prompt_ids([turn("user", "x")], prefix=prefix)
    tokenizer.option_ids(OPTIONS, after=prefix)


def _check_reward(inputs: _Inputs) -> None:
    _check_heldout(inputs, "reward", inputs.run.recipe.reward.heldout_fraction)


def _check_dpo(inputs: _Inputs) -> None:
    _check_heldout(inputs, "dpo", inputs.run.recipe.dpo.heldout_fraction)


def _check_heldout(inputs: _Inputs, stage: str, fraction: float) -> None:
    prompts = inputs.run.rl_prompts
    heldout = sum(is_heldout(prompt.id, fraction, inputs.run.recipe.seed) for prompt in prompts)
    if not 0 < heldout < len(prompts):
        raise ValueError(
            f"{stage}.heldout_fraction = {fraction} keeps {heldout} of {len(prompts)} prompts for "
            "measuring; allowed: at least one, and at least one left to train on. Give more prompts, or change it"
        )


def _check_ppo(inputs: _Inputs) -> None:
    run, config = inputs.run, inputs.run.recipe.ppo
    inputs.sampler.check_lengths([inputs.any], config.max_tokens)
    ranks = run.parallel.data_ranks
    require(config.rollouts >= ranks, "ppo.rollouts", config.rollouts, f"at least the data ranks, {ranks}")
    warmup, steps = config.critic_warmup, config.iterations
    require(warmup < steps, "ppo.critic_warmup", warmup, f"below ppo.iterations = {steps}, or no policy is trained")
    for folder, _ in config.further_rewards:
        reward_extras(folder)
        if Tokenizer.load(folder).backend.to_str() != run.tokenizer.backend.to_str():
            raise ValueError(
                f"ppo.rewards: {folder} has another tokenizer than {run.recipe.base}, whose ids it would score"
            )


_CHECKS: dict[str, Callable[[_Inputs], None]] = {
    "revise": _check_revise,
    "finetune": _check_finetune,
    "compare": _check_compare,
    "label": _check_label,
    "reward": _check_reward,
    "ppo": _check_ppo,
    "dpo": _check_dpo,
}
