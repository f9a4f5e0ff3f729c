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
from bylaw.constitution.load import decode
from bylaw.constitution.write import dump_constitution
from bylaw.inputs import Run, device_of
from bylaw.judges import judge_hash, judge_reader, server_figures
from bylaw.layout import MIXED_IN
from bylaw.lock import only_one
from bylaw.model.checkpoint import check_model, load_scalar, save_model, save_reward
from bylaw.model.engine import Engine
from bylaw.model.engine.stats import Stats
from bylaw.model.parallel import parallel_program
from bylaw.model.records import Record, RecordWriter, encode_record, read_records, sha256_file, write_atomic
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
from bylaw.preflight import check_device, check_run
from bylaw.recipe import STAGES, Recipe, dump_recipe
from bylaw.rlaif.compare import compare
from bylaw.rlaif.config import DPOConfig, RewardConfig
from bylaw.rlaif.direct import Rater
from bylaw.rlaif.dpo import train_dpo
from bylaw.rlaif.label import label
from bylaw.rlaif.pairs import Pair, draw_helpful, pair_of, read_helpful, split_pairs
from bylaw.rlaif.ppo import ppo
from bylaw.rlaif.reader import LocalReader
from bylaw.rlaif.reward import train_reward
from bylaw.rlaif.rollout import Rollout
from bylaw.runs import folder_hash
from bylaw.sl_cai.finetune import finetune
from bylaw.sl_cai.revise import revise, sample_helpful
from bylaw.sums import write_sums
from bylaw.together import by_first, once_a_machine
from bylaw.words import printable

SHOWN_SAMPLES = 5


def run_pipeline(recipe: Recipe, stages: Sequence[str] = STAGES) -> dict[str, dict[str, Any]]:
    """Run `stages` in order; returns their manifests. Inputs are checked before any long work; finished stages are
    skipped. The processes of a torchrun program work together, each calling this.

    Raises ValueError and FileNotFoundError as the inputs demand, and ValueError where another process works in the
    folder; of many processes the first does, and the others leave with exit code 2.
    """
    with ExitStack() as program:
        with once_a_machine():
            check_device(recipe.device)
            patience = timedelta(minutes=recipe.timeout_minutes)
            place = parallel_program(device_of(recipe), recipe.tensor_parallel, patience)
            run = Run(recipe, program.enter_context(place))
        by_first(run.parallel, lambda: _begin(run, stages, program))
        if torch.device(run.device).index is not None:  # kernels start on the current device, whatever their tensors
            torch.cuda.set_device(run.device)
        return {name: _RUNNERS[name](run) for name in stages}


def _begin(run: Run, stages: Sequence[str], program: ExitStack) -> None:
    check_run(run, stages)
    program.enter_context(only_one(run.recipe.out))
    out, used = run.recipe.out, f"constitutions/{run.constitution.hash}.toml"
    if not (out / used).exists():  # else an equal one: one that differs where no prompt shows it may stand there
        write_atomic(out / used, dump_constitution(run.constitution))
    shown = out / "examples" / f"{run.examples.hash}.toml"
    if (run.recipe.revise.shots or run.recipe.label.shots) and not shown.exists():
        write_atomic(shown, decode(run.examples_path.read_bytes(), str(run.examples_path)))
    write_atomic(out / "recipe.toml", dump_recipe(run.recipe))
    write_sums(out, "recipe.toml", lacking=(used, shown.relative_to(out).as_posix()))


def run_revise(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    inputs = {"base": run.hash(recipe.base), "constitution": run.asked("revise")}
    inputs |= run.prompt_inputs | ({"examples": run.examples.hash} if recipe.revise.shots else {})

    def work(folder: Path) -> dict[str, Any]:
        sampler = run.sampler(run.sampled_model(recipe.base), recipe.base, recipe.revise)
        reviser = run.reviser(sampler)
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
    inputs = {"judge": judge_hash(run), "constitution": run.asked("label"), "pairs": sha256_file(pairs)}
    inputs |= {"examples": run.examples.hash} if recipe.label.shots else {}
    if recipe.label.helpful_principle:  # which pairs it judges
        inputs["helpful"] = run.prompt_inputs.get("helpful", "")

    def work(folder: Path) -> dict[str, Any]:
        reader = judge_reader(run)
        counts = label(run.judge(reader), read_records(pairs), folder / "preferences.jsonl", run.parallel)
        here = isinstance(reader, LocalReader)
        return counts | (_figures(run, reader.engine) if here else server_figures(run, reader))

    return run.stage("label", inputs, work)


def run_reward(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    preferences, start = run.path("label", "preferences.jsonl"), run.path("finetune", "sl-cai")
    inputs = _pair_inputs(run, preferences, start, recipe.reward.helpful_ratio)

    def work(folder: Path) -> dict[str, Any]:
        context = check_model(start)[0].max_position_embeddings
        train, heldout, given, counts = _pairs(run, recipe.reward, preferences, context)
        model = load_scalar(start, recipe.seed, run.device, run.dtype, run.parallel)
        with adapted(run, model, start, folder):
            measures = train_reward(model, train, heldout, folder, recipe.reward, recipe.seed, run.parallel)
        _keep_given(run, "reward", given)
        extras = {name: measures[name] for name in ("score_mean", "score_std")}
        card = _card(run, "Reward model: scores an answer at its last token; take off score_mean, divide by score_std")
        save_reward(model, folder / "reward-model", run.tokenizer, extras, card, parallel=run.parallel)
        return counts | measures

    return run.stage("reward", inputs, work)


def _pair_inputs(run: Run, preferences: Path, start: Path, ratio: float) -> dict[str, str]:
    """What decides the pairs that a stage trains on, and the model that it starts from."""
    inputs = {"preferences": sha256_file(preferences), "sl-cai": run.hash(start)}
    return inputs | ({"helpful_preferences": sha256_file(run.recipe.helpful_preferences)} if ratio else {})


def _pairs(
    run: Run, config: RewardConfig | DPOConfig, preferences: Path, context: int
) -> tuple[list[Pair], list[Pair], list[Record], dict[str, int]]:
    """Training pairs, the run's own and behind them those that a file gave; held-out ones; the records of those that
    were given; counts.
    """
    tokenizer, seed, ratio = run.tokenizer, run.recipe.seed, config.helpful_ratio
    train, heldout, counts = split_pairs(read_records(preferences), tokenizer, config.heldout_fraction, seed, context)
    if not ratio:
        return train, heldout, [], counts
    helpful = read_helpful(Path(run.recipe.helpful_preferences))
    given, mixed = draw_helpful(len(train), helpful, tokenizer, ratio, seed, context)
    train += [pair_of(one, tokenizer) for one in given]
    return train, heldout, given, counts | {"train_pairs": len(train)} | mixed


def _keep_given(run: Run, stage: str, given: Sequence[Record]) -> None:
    """The run keeps what a file gave it to train on, so that a trace finds it when the file has gone."""
    path = run.recipe.out / MIXED_IN[stage] / "preferences.jsonl"
    if given and run.parallel.first:
        whole = [{"prompt_id": one["id"], "labels": [], "by": {}} | one for one in given]
        write_atomic(path, "".join(encode_record(one, str(path)).decode() for one in whole))


def run_ppo(run: Run) -> dict[str, Any]:
    config = run.recipe.ppo
    start = run.path("finetune", "sl-cai")
    scorer = run.path("reward", "reward-model") if config.reward == "model" else None
    inputs = {"sl-cai": run.hash(start), **_scorer_inputs(run, scorer), **run.prompt_inputs}
    inputs |= {f"reward {folder}": run.hash(folder) for folder, _ in config.further_rewards}
    scales = reward_scales(run, scorer)

    def work(folder: Path) -> dict[str, Any]:
        with ppo_models(run, start, scorer or _rater(run), scales, folder) as (policy, models):
            engine = run.engine(policy, config.cache_gib, config.max_rows)
            show = _rollout_shower(run, folder / "samples.jsonl", config.iterations)
            counts = ppo(models, engine, run.rl_prompts, folder, config, run.recipe.seed, show, run.parallel)
        card = _card(run, "RL-CAI: trained by PPO on AI preferences")
        save_model(policy, folder / "rl-cai", run.tokenizer, card, parallel=run.parallel)
        return counts | _figures(run, engine)

    return run.stage("ppo", inputs, work)


def _scorer_inputs(run: Run, scorer: Path | None) -> dict[str, str]:
    """What decides the scores of PPO: the reward model, or the judge and how it is asked."""
    if scorer is None:
        config, asked = run.recipe.label, run.asked("ppo")
        judging = f"{config.principles} {config.some} {config.min_option_mass} {config.helpful_principle}".strip()
        return {"judge": judge_hash(run), "constitution": asked, "judging": judging}
    adapter = {"adapter": folder_hash(scorer.with_name(FOLDER))} if run.recipe.lora.rank else {}
    return {"reward-model": run.hash(scorer)} | adapter


def _rater(run: Run) -> Rater:
    reader = judge_reader(run)
    assert isinstance(reader, LocalReader)
    dialogues = {prompt.id: prompt.messages for prompt in run.rl_prompts}
    return Rater(judge=run.judge(reader), engine=reader.engine, dialogues=dialogues, policy=run.tokenizer)


def run_dpo(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    preferences, start = run.path("label", "preferences.jsonl"), run.path("finetune", "sl-cai")
    inputs = _pair_inputs(run, preferences, start, recipe.dpo.helpful_ratio)

    def work(folder: Path) -> dict[str, Any]:
        policy = run.model(start)
        train, heldout, given, counts = _pairs(run, recipe.dpo, preferences, policy.config.max_position_embeddings)
        with adapted(run, policy, start, folder):
            measures = train_dpo(policy, train, heldout, folder, recipe.dpo, recipe.seed, run.parallel)
        _keep_given(run, "dpo", given)
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
    print(printable(f"  | {sample['prompt'].strip()[-200:]}\n  > {sample['answer'][:300]}"), flush=True)
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
