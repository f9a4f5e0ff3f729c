"""The pipeline over a recipe: six stages in order, each a function from files to files.

revise -> finetune -> compare -> label -> reward -> ppo
"""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bylaw.inputs import Run
from bylaw.model.checkpoint import checkpoint_hash, load_reward, save_model, save_reward
from bylaw.model.engine import Engine
from bylaw.model.heads import scalar_model
from bylaw.model.records import RecordWriter, read_records, sha256_file, write_atomic
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
from bylaw.model.tokenizer import Tokenizer
from bylaw.preflight import check_run
from bylaw.recipe import STAGES, Recipe, dump_recipe
from bylaw.rlaif.compare import compare
from bylaw.rlaif.label import Judge, label
from bylaw.rlaif.ppo import Models, ppo
from bylaw.rlaif.reward import split_pairs, train_reward
from bylaw.rlaif.rollout import Rollout, ScoreScale
from bylaw.sl_cai.finetune import finetune
from bylaw.sl_cai.revise import Reviser, revise, sample_helpful

SHOWN_SAMPLES = 5


def run_pipeline(recipe: Recipe, stages: Sequence[str] = STAGES) -> dict[str, dict[str, Any]]:
    """Run `stages` in order; returns their manifests. Inputs are checked before any long work; finished stages are
    skipped.

    Raises ValueError and FileNotFoundError as the inputs demand.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: this version trains in one process; launch one")
    run = Run(recipe)
    check_run(run, stages)
    write_atomic(recipe.out / "recipe.toml", dump_recipe(recipe))
    if torch.device(run.device).index is not None:  # kernels are launched on the current device, whatever their tensors
        torch.cuda.set_device(run.device)
    return {name: _RUNNERS[name](run) for name in stages}


def run_revise(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    inputs = {"base": checkpoint_hash(recipe.base), "constitution": run.constitution.hash, **run.prompt_inputs}

    def work(folder: Path) -> dict[str, Any]:
        sampler = run.sampler(run.model(recipe.base), recipe.base, recipe.revise)
        reviser = Reviser(sampler=sampler, constitution=run.constitution, config=recipe.revise)
        counts: dict[str, Any] = revise(reviser, run.prompts, folder / "chains.jsonl")
        counts |= sample_helpful(reviser, run.helpful, folder / "helpful.jsonl")
        return counts | _figures(sampler.engine)

    return run.stage("revise", inputs, work)


def run_finetune(run: Run) -> dict[str, Any]:
    chains, helpful = run.path("revise", "chains.jsonl"), run.path("revise", "helpful.jsonl")
    inputs = {"base": checkpoint_hash(run.recipe.base), "chains": sha256_file(chains), "helpful": sha256_file(helpful)}

    def work(folder: Path) -> dict[str, Any]:
        model = run.model(run.recipe.base)
        sampler = run.sampler(model, run.recipe.base, SamplingSettings())
        counts = finetune(
            model,
            run.tokenizer,
            read_records(chains),
            read_records(helpful),
            folder,
            run.recipe.finetune,
            run.recipe.seed,
            show=_sample_shower(run, sampler, folder / "samples.jsonl"),
        )
        save_model(
            model, folder / "sl-cai", run.tokenizer, _card(run, "SL-CAI: trained on revisions by a constitution")
        )
        return counts

    return run.stage("finetune", inputs, work)


def run_compare(run: Run) -> dict[str, Any]:
    model_folder = run.path("finetune", "sl-cai")
    inputs = {"sl-cai": checkpoint_hash(model_folder), **run.prompt_inputs}

    def work(folder: Path) -> dict[str, Any]:
        sampler = run.sampler(run.model(model_folder), model_folder, run.recipe.compare)
        counts: dict[str, Any] = compare(sampler, run.rl_prompts, folder / "pairs.jsonl", run.recipe.compare)
        return counts | _figures(sampler.engine)

    return run.stage("compare", inputs, work)


def run_label(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    pairs = run.path("compare", "pairs.jsonl")
    judge_folder = recipe.base if recipe.judge == "base" else run.path("finetune", "sl-cai")
    judge_hash = checkpoint_hash(judge_folder)
    inputs = {"judge": judge_hash, "constitution": run.constitution.hash, "pairs": sha256_file(pairs)}

    def work(folder: Path) -> dict[str, Any]:
        engine = run.engine(run.model(judge_folder), recipe.label.cache_gib)
        judge = Judge(
            engine=engine, constitution=run.constitution, config=recipe.label, seed=recipe.seed, model_hash=judge_hash
        )
        return label(judge, read_records(pairs), folder / "preferences.jsonl") | _figures(engine)

    return run.stage("label", inputs, work)


def run_reward(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    preferences, start = run.path("label", "preferences.jsonl"), run.path("finetune", "sl-cai")
    inputs = {"preferences": sha256_file(preferences), "sl-cai": checkpoint_hash(start)}

    def work(folder: Path) -> dict[str, Any]:
        fraction = recipe.reward.heldout_fraction
        train, heldout, counts = split_pairs(read_records(preferences), run.tokenizer, fraction, recipe.seed)
        model = scalar_model(run.model(start), recipe.seed)
        measures = train_reward(model, train, heldout, folder, recipe.reward, recipe.seed)
        extras = {name: measures[name] for name in ("score_mean", "score_std")}
        card = _card(run, "Reward model: scores an answer at its last token; take off score_mean, divide by score_std")
        save_reward(model, folder / "reward-model", run.tokenizer, extras, card)
        return counts | measures

    return run.stage("reward", inputs, work)


def run_ppo(run: Run) -> dict[str, Any]:
    config = run.recipe.ppo
    start, scorer = run.path("finetune", "sl-cai"), run.path("reward", "reward-model")
    inputs = {"sl-cai": checkpoint_hash(start), "reward-model": checkpoint_hash(scorer), **run.prompt_inputs}

    def work(folder: Path) -> dict[str, Any]:
        policy, reference = run.model(start), run.model(start)
        reward, extras = load_reward(scorer, run.device, torch.float32)
        if config.normalize_scores and not extras["score_std"] > 0:
            raise ValueError(
                f"{scorer}: score_std = {extras['score_std']}, as all held-out answers have the same score; set "
                "ppo.normalize_scores = false, or train the reward model on more"
            )
        std = extras["score_std"] if config.normalize_scores else 1.0
        scale = ScoreScale(extras["score_mean"], std, config.missing_eos_penalty)
        models = Models(policy, copy.deepcopy(reward), reference, reward)
        engine = run.engine(policy, config.cache_gib, config.max_rows)
        show = _rollout_shower(run.tokenizer, folder / "samples.jsonl", config.iterations)
        counts = ppo(models, engine, run.rl_prompts, folder, config, scale, run.recipe.seed, show)
        save_model(policy, folder / "rl-cai", run.tokenizer, _card(run, "RL-CAI: trained by PPO on AI preferences"))
        return counts | _figures(engine)

    return run.stage("ppo", inputs, work)


_RUNNERS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "revise": run_revise,
    "finetune": run_finetune,
    "compare": run_compare,
    "label": run_label,
    "reward": run_reward,
    "ppo": run_ppo,
}


def _figures(engine: Engine) -> dict[str, Any]:
    """What the engine did in this process, for the manifest: a stage that was killed says it of its last run only."""
    stats = engine.stats
    figures = {
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "prefill_tokens_per_second": stats.prefill_rate,
        "decode_tokens_per_second": stats.decode_rate,
        "cache_hit_rate": stats.hit_rate,
        "useful_fraction": stats.useful_fraction,
        "preemptions": stats.preemptions,
    }
    return {"engine": figures}


def _sample_shower(run: Run, sampler: Sampler, path: Path) -> Callable[[int, int], None]:
    """After now and then a step: answer the first prompt, print it, and append it to `path`."""
    prompt = run.prompts[0]

    def show(step: int, steps: int) -> None:
        if (step + 1) % max(1, steps // SHOWN_SAMPLES) == 0:
            sampled = sampler.turns([prompt.messages], [("show", prompt.id, step)], run.recipe.revise.max_answer_tokens)
            _show(path, {"step": step, "prompt": prompt.messages[-1]["content"], "answer": sampled[0]["text"]})

    return show


def _rollout_shower(tokenizer: Tokenizer, path: Path, steps: int) -> Callable[[int, Sequence[Rollout]], None]:
    def show(step: int, rollouts: Sequence[Rollout]) -> None:
        if (step + 1) % max(1, steps // SHOWN_SAMPLES) == 0:
            first = rollouts[0]
            texts = {"prompt": tokenizer.decode(first.prompt), "answer": tokenizer.decode(first.response)}
            _show(path, {"step": step, "score": first.score, **texts})

    return show


def _show(path: Path, sample: dict[str, Any]) -> None:
    """Print a sample and append it to `path`; one that a killed run already wrote is not written twice."""
    print(f"  | {sample['prompt'].strip()[-200:]}\n  > {sample['answer'][:300]}", flush=True)
    with RecordWriter(path) as writer:  # which mends a torn line, so that the file can be read
        if all(one["step"] != sample["step"] for one in read_records(path)):
            writer.write([sample])


def _card(run: Run, summary: str) -> str:
    """The checkpoint's README."""
    constitution = run.constitution
    principles = "\n".join(f"- **{p.title}** (`{p.id}`, {p.hash}): {p.statement}" for p in constitution.principles)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- constitutional-ai\n---\n\n# {summary}\n\n"
        f'Made by bylaw from `{run.recipe.base.name}` with the constitution "{constitution.name}", version '
        f"{constitution.version} (hash {constitution.hash}).\n\n## Principles\n\n{principles}\n\n## Recipe\n\n"
        f"```toml\n{dump_recipe(run.recipe)}```\n"
    )
