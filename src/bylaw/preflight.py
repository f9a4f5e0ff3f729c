"""What can be wrong with a run, found before its first stage works: a mistake should not cost the hours before it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bylaw.inputs import Run, require_file
from bylaw.judges import other_judge, server_reader
from bylaw.layout import MANIFEST
from bylaw.model.checkpoint import check_model, check_tokenizer, reward_extras
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.sampler import Sampler, turn
from bylaw.model.settings import SamplingSettings, require
from bylaw.model.sharding import check_divides
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.recipe import EVERY_STAGE
from bylaw.rlaif.config import DPOConfig, RewardConfig, is_server
from bylaw.rlaif.direct import mark_ids
from bylaw.rlaif.judge import check_judging, judging_reserve
from bylaw.rlaif.pairs import is_heldout, read_helpful
from bylaw.rlaif.reader import OPTIONS
from bylaw.runs import check_terms, is_begun


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
    _check_given(run, stages)
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


def _check_given(run: Run, stages: Sequence[str]) -> None:
    """Preferences that a file gives are there to be trained on."""
    ratios = {name: getattr(run.recipe, name).helpful_ratio for name in stages if name in ("reward", "dpo")}
    if run.recipe.helpful_preferences and ratios and not any(ratios.values()):
        wanted = " or ".join(f"{name}.helpful_ratio" for name in ratios)
        raise ValueError(
            f"helpful_preferences = {run.recipe.helpful_preferences!r}, and no share of the pairs is to be taken from "
            f"it; give {wanted}, above 0, or leave it out"
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
    reviser = inputs.run.reviser(inputs.sampler)
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
    run, config = inputs.run, inputs.run.recipe.label
    constitution = run.constitution
    check_judging(constitution, config, run.examples)
    if config.helpful_principle and not run.recipe.helpful:
        raise ValueError(
            "label.helpful_principle is set, but the recipe has no `helpful` prompts; give some, or leave it empty"
        )
    if is_server(run.recipe.judge):
        if not (run.recipe.out / "label" / MANIFEST).exists():
            server_reader(run).check()
        return
    tokenizer, context = _judge_here(inputs)
    prefix = constitution.templates.answer_prefix
    tokenizer.prompt_ids([turn("user", "x")], prefix=prefix)
    tokenizer.option_ids(OPTIONS, after=prefix)
    reserve = judging_reserve(constitution, config, run.examples, tokenizer)
    if reserve >= context:
        raise ValueError(
            f"a question takes up to {reserve} tokens without its dialogue and answers, and the judge's context has "
            f"{context}; lower label.shots or label.max_thought_tokens, or shorten the examples"
        )


def _judge_here(inputs: _Inputs) -> tuple[Tokenizer, int]:
    """Tokenizer and context of the judge's checkpoint: the base's, as the SL-CAI model has it, or a folder's own."""
    run, other = inputs.run, other_judge(inputs.run.recipe)
    if other is None:
        return run.tokenizer, inputs.sampler.engine.model.config.max_position_embeddings
    if not other.is_dir():
        raise FileNotFoundError(
            f"judge = {run.recipe.judge!r}: no such folder; allowed: 'base', 'sl-cai', a checkpoint's folder, or a URL "
            "that begins with http:// or https://"
        )
    config, tokenizer = check_model(other)[0], Tokenizer.load(other)
    with _named(str(other)):
        check_tokenizer(config, tokenizer)
        with torch.device("meta"):
            check_divides(Transformer(config), run.parallel)
    return tokenizer, config.max_position_embeddings


def _check_reward(inputs: _Inputs) -> None:
    _check_pairs(inputs, "reward", inputs.run.recipe.reward)


def _check_dpo(inputs: _Inputs) -> None:
    _check_pairs(inputs, "dpo", inputs.run.recipe.dpo)


def _check_pairs(inputs: _Inputs, stage: str, config: RewardConfig | DPOConfig) -> None:
    ratio, named = config.helpful_ratio, inputs.run.recipe.helpful_preferences
    if ratio:
        require(bool(named), f"{stage}.helpful_ratio", ratio, "0 without helpful_preferences")
        require_file("helpful_preferences", Path(named))
        read_helpful(Path(named))
    fraction, prompts = config.heldout_fraction, inputs.run.rl_prompts
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
    if config.reward == "judge":
        _check_rating(inputs)
    for folder, _ in config.further_rewards:
        reward_extras(folder)
        if Tokenizer.load(folder).backend.to_str() != run.tokenizer.backend.to_str():
            raise ValueError(
                f"ppo.rewards: {folder} has another tokenizer than {run.recipe.base}, whose ids it would score"
            )


def _check_rating(inputs: _Inputs) -> None:
    run = inputs.run
    if is_server(run.recipe.judge):
        raise ValueError(
            'ppo.reward = "judge" needs all log-probs of the marks, which a server does not give; allowed: a judge on '
            'this machine, or ppo.reward = "model"'
        )
    check_judging(run.constitution, run.recipe.label, run.examples)
    tokenizer, _ = _judge_here(inputs)
    prefix = run.constitution.templates.rating_prefix
    tokenizer.prompt_ids([turn("user", "x")], prefix=prefix)
    mark_ids(tokenizer, prefix)


_CHECKS: dict[str, Callable[[_Inputs], None]] = {
    "revise": _check_revise,
    "finetune": _check_finetune,
    "compare": _check_compare,
    "label": _check_label,
    "reward": _check_reward,
    "ppo": _check_ppo,
    "dpo": _check_dpo,
}
