"""The pipeline over a recipe: stages in order, each a function from files to files.

revise -> finetune -> compare -> label -> reward -> ppo
                                      `-> dpo
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bylaw.adapters import FOLDER, adapted, ppo_models, reward_scales
from bylaw.inputs import Run, device_of
from bylaw.model.checkpoint import load_scalar, save_model, save_reward
from bylaw.model.engine import Engine
from bylaw.model.engine.stats import Stats
from bylaw.model.parallel import parallel_program
from bylaw.model.records import RecordWriter, read_records, sha256_file, write_atomic
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
from bylaw.preflight import check_device, check_run
from bylaw.recipe import STAGES, Recipe, dump_recipe
from bylaw.rlaif.compare import compare
from bylaw.rlaif.dpo import train_dpo
from bylaw.rlaif.label import Judge, label
from bylaw.rlaif.pairs import split_pairs
from bylaw.rlaif.ppo import ppo
from bylaw.rlaif.reward import train_reward
from bylaw.rlaif.rollout import Rollout
from bylaw.runs import folder_hash
from bylaw.sl_cai.finetune import finetune
from bylaw.sl_cai.revise import Reviser, revise, sample_helpful
from bylaw.together import by_first, once_a_machine

SHOWN_SAMPLES = 5


def run_pipeline(recipe: Recipe, stages: Sequence[str] = STAGES) -> dict[str, dict[str, Any]]:
    """Run `stages` in order; returns their manifests. Inputs are checked before any long work; finished stages are
    skipped. The processes of a torchrun program work together, each calling this.

    Raises ValueError and FileNotFoundError as the inputs demand; of many processes the first does, and the others leave
    with exit code 2.
    """
    with ExitStack() as program:
        with once_a_machine():
            check_device(recipe.device)
            patience = timedelta(minutes=recipe.timeout_minutes)
            place = parallel_program(device_of(recipe), recipe.tensor_parallel, patience)
            run = Run(recipe, program.enter_context(place))
        by_first(run.parallel, lambda: _begin(run, stages))
        if torch.device(run.device).index is not None:  # kernels start on the current device, whatever their tensors
            torch.cuda.set_device(run.device)
        return {name: _RUNNERS[name](run) for name in stages}


def _begin(run: Run, stages: Sequence[str]) -> None:
    check_run(run, stages)
    write_atomic(run.recipe.out / "recipe.toml", dump_recipe(run.recipe))


def run_revise(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    inputs = {"base": run.hash(recipe.base), "constitution": run.constitution.hash, **run.prompt_inputs}

    def work(folder: Path) -> dict[str, Any]:
        sampler = run.sampler(run.sampled_model(recipe.base), recipe.base, recipe.revise)
        reviser = Reviser(sampler=sampler, constitution=run.constitution, config=recipe.revise)
        counts: dict[str, Any] = revise(reviser, run.prompts, folder / "chains.jsonl", run.parallel)
        counts |= sample_helpful(reviser, run.helpful, folder / "helpful.jsonl", run.parallel)
        return counts | _figures(run, sampler.engine)

    return run.stage("revise", inputs, work)


def run_finetune(run: Run) -> dict[str, Any]:
    chains, helpful = run.path("revise", "chains.jsonl"), run.path("revise", "helpful.jsonl")
    inputs = {"base": run.hash(run.recipe.base), "chains": sha256_file(chains), "helpful": sha256_file(helpful)}

    def work(folder: Path) -> dict[str, Any]:
        model = run.model(run.recipe.base)
        sampler = run.sampler(model, run.recipe.base, SamplingSettings())
        with adapted(run, model, run.recipe.base, folder):
            counts = finetune(
                model,
                run.tokenizer,
                read_records(chains),
                read_records(helpful),
                folder,
                run.recipe.finetune,
                run.recipe.seed,
                show=_sample_shower(run, sampler, folder / "samples.jsonl"),
                parallel=run.parallel,
            )
        card = _card(run, "SL-CAI: trained on revisions by a constitution")
        save_model(model, folder / "sl-cai", run.tokenizer, card, parallel=run.parallel)
        return counts

    return run.stage("finetune", inputs, work)


def run_compare(run: Run) -> dict[str, Any]:
    model_folder = run.path("finetune", "sl-cai")
    inputs = {"sl-cai": run.hash(model_folder), **run.prompt_inputs}

    def work(folder: Path) -> dict[str, Any]:
        config = run.recipe.compare
        sampler = run.sampler(run.sampled_model(model_folder), model_folder, config)
        counts: dict[str, Any] = compare(sampler, run.rl_prompts, folder / "pairs.jsonl", config, run.parallel)
        return counts | _figures(run, sampler.engine)

    return run.stage("compare", inputs, work)


def run_label(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    pairs = run.path("compare", "pairs.jsonl")
    judge_folder = recipe.base if recipe.judge == "base" else run.path("finetune", "sl-cai")
    judge_hash = run.hash(judge_folder)
    inputs = {"judge": judge_hash, "constitution": run.constitution.hash, "pairs": sha256_file(pairs)}

    def work(folder: Path) -> dict[str, Any]:
        engine = run.engine(run.sampled_model(judge_folder), recipe.label.cache_gib)
        judge = Judge(
            engine=engine, constitution=run.constitution, config=recipe.label, seed=recipe.seed, model_hash=judge_hash
        )
        counts = label(judge, read_records(pairs), folder / "preferences.jsonl", run.parallel)
        return counts | _figures(run, engine)

    return run.stage("label", inputs, work)


def run_reward(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    preferences, start = run.path("label", "preferences.jsonl"), run.path("finetune", "sl-cai")
    inputs = {"preferences": sha256_file(preferences), "sl-cai": run.hash(start)}

    def work(folder: Path) -> dict[str, Any]:
        fraction = recipe.reward.heldout_fraction
        train, heldout, counts = split_pairs(read_records(preferences), run.tokenizer, fraction, recipe.seed)
        model = load_scalar(start, recipe.seed, run.device, run.dtype, run.parallel)
        with adapted(run, model, start, folder):
            measures = train_reward(model, train, heldout, folder, recipe.reward, recipe.seed, run.parallel)
        extras = {name: measures[name] for name in ("score_mean", "score_std")}
        card = _card(run, "Reward model: scores an answer at its last token; take off score_mean, divide by score_std")
        save_reward(model, folder / "reward-model", run.tokenizer, extras, card, parallel=run.parallel)
        return counts | measures

    return run.stage("reward", inputs, work)


def run_ppo(run: Run) -> dict[str, Any]:
    config = run.recipe.ppo
    start, scorer = run.path("finetune", "sl-cai"), run.path("reward", "reward-model")
    inputs = {"sl-cai": run.hash(start), "reward-model": run.hash(scorer), **run.prompt_inputs}
    inputs |= {f"reward {folder}": run.hash(folder) for folder, _ in config.further_rewards}
    if run.recipe.lora.rank:
        inputs["adapter"] = folder_hash(run.path("reward", FOLDER))
    scales = reward_scales(run, scorer)

    def work(folder: Path) -> dict[str, Any]:
        with ppo_models(run, start, scorer, scales, folder) as (policy, models):
            engine = run.engine(policy, config.cache_gib, config.max_rows)
            show = _rollout_shower(run, folder / "samples.jsonl", config.iterations)
            counts = ppo(models, engine, run.rl_prompts, folder, config, run.recipe.seed, show, run.parallel)
        card = _card(run, "RL-CAI: trained by PPO on AI preferences")
        save_model(policy, folder / "rl-cai", run.tokenizer, card, parallel=run.parallel)
        return counts | _figures(run, engine)

    return run.stage("ppo", inputs, work)


def run_dpo(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    preferences, start = run.path("label", "preferences.jsonl"), run.path("finetune", "sl-cai")
    inputs = {"preferences": sha256_file(preferences), "sl-cai": run.hash(start)}

    def work(folder: Path) -> dict[str, Any]:
        fraction = recipe.dpo.heldout_fraction
        train, heldout, counts = split_pairs(read_records(preferences), run.tokenizer, fraction, recipe.seed)
        policy = run.model(start)
        with adapted(run, policy, start, folder):
            measures = train_dpo(policy, train, heldout, folder, recipe.dpo, recipe.seed, run.parallel)
        card = _card(run, "DPO: trained on AI preferences without a reward model")
        save_model(policy, folder / "dpo-cai", run.tokenizer, card, parallel=run.parallel)
        return counts | measures

    return run.stage("dpo", inputs, work)


_RUNNERS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "revise": run_revise,
    "finetune": run_finetune,
    "compare": run_compare,
    "label": run_label,
    "reward": run_reward,
    "ppo": run_ppo,
    "dpo": run_dpo,
}


def _figures(run: Run, engine: Engine) -> dict[str, Any]:
    """What the engines of all data ranks did, for the manifest: a stage that was killed says it of its last run only.

    Rates are per second that a rank worked.
    """
    parts = [asdict(stats) for stats in run.parallel.gather(engine.stats)]
    stats = Stats(**{name: sum(part[name] for part in parts) for name in parts[0]})
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
    """After now and then a step: answer the first prompt, print it, and append it to `path`.

    All ranks sample, since they share out the model; the first shows.
    """
    prompt = run.prompts[0]

    def show(step: int, steps: int) -> None:
        if (step + 1) % max(1, steps // SHOWN_SAMPLES) == 0:
            sampled = sampler.turns([prompt.messages], [("show", prompt.id, step)], run.recipe.revise.max_answer_tokens)
            _show(run, path, {"step": step, "prompt": prompt.messages[-1]["content"], "answer": sampled[0]["text"]})

    return show


def _rollout_shower(run: Run, path: Path, steps: int) -> Callable[[int, Sequence[Rollout]], None]:
    def show(step: int, rollouts: Sequence[Rollout]) -> None:
        if (step + 1) % max(1, steps // SHOWN_SAMPLES) == 0:
            first = rollouts[0]
            decode = run.tokenizer.decode
            texts = {"prompt": decode(first.prompt), "answer": decode(first.response)}
            _show(run, path, {"step": step, "score": first.score, **texts})

    return show


def _show(run: Run, path: Path, sample: dict[str, Any]) -> None:
    """Print a sample and append it to `path`; one that a killed run already wrote is not written twice."""
    if not run.parallel.first:
        return
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
