"""RL against SL, and rewards that are followed too far (arXiv 2212.08073, figures 2 and 8; 2204.05862, section 4.3)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bylaw.adapters import ppo_models, reward_scales
from bylaw.benchmarks.village.evaluate import mean
from bylaw.benchmarks.village.experiments.bench import Bench, Row, flat
from bylaw.inputs import Run
from bylaw.model.records import RecordWriter, read_records
from bylaw.recipe import STAGES
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import ppo
from bylaw.rlaif.rollout import Rollout
from bylaw.sl_cai.finetune import finetune

BEFORE_PPO = STAGES[:-1]


def pareto(bench: Bench) -> list[Row]:
    """Helpfulness and harmlessness of the base, of models trained on the first 1 to 4 revisions, and along PPO."""
    run = bench.main(BEFORE_PPO)
    rows = [_row(bench, "base", bench.behaviour(run, run.recipe.base), 0)]
    rows += [_tuned(bench, run, rounds) for rounds in (1, 2, 3, 4)]
    config = run.recipe.ppo
    return rows + _along(bench, run, "RL-CAI", config, every=config.iterations // 8)


def overoptimised(bench: Bench) -> list[Row]:
    """PPO that goes on without a penalty on the KL, at three times the learning rate: what the reward model and the
    oracle each say of it.
    """
    run = bench.main(BEFORE_PPO)
    base = run.recipe.ppo
    free = replace(base, kl_coef=0.0, iterations=100, learning_rate=3 * base.learning_rate, schedule="constant")
    return _along(bench, run, "no penalty", free, every=5) + _along(bench, run, "RL-CAI", base, every=5)


def _tuned(bench: Bench, run: Run, rounds: int) -> Row:
    """SL-CAI-n: trained as the stage does, on the first `rounds` revisions of each chain."""
    model, folder = run.model(run.recipe.base), bench.folder / f"sl-{rounds}"
    chains = [chain | {"rounds": chain["rounds"][:rounds]} for chain in _records(run, "revise", "chains.jsonl")]
    helpful = _records(run, "revise", "helpful.jsonl")
    finetune(model, run.tokenizer, chains, helpful, folder, run.recipe.finetune, run.recipe.seed)
    return _row(bench, "SL-CAI", bench.behaviour(run, model), rounds)


def _along(bench: Bench, run: Run, variant: str, config: PPOConfig, every: int) -> list[Row]:
    """PPO by `config`, measured after each `every` iterations. What a killed run measured is kept."""
    folder = bench.folder / f"ppo-{variant.replace(' ', '-')}"
    path, start, scorer = folder / "measured.jsonl", run.path("finetune", "sl-cai"), run.path("reward", "reward-model")
    scales = reward_scales(run, scorer)
    with ppo_models(run, start, scorer, scales, folder) as (policy, models):
        engine = run.engine(policy, config.cache_gib, config.max_rows)

        def show(step: int, rollouts: Sequence[Rollout]) -> None:
            if (step + 1) % every == 0 and all(row["step"] != step + 1 for row in _known(path)):
                measured = _row(bench, variant, bench.behaviour(run, policy), step + 1)
                with RecordWriter(path) as writer:
                    writer.write([measured])

        if len(_known(path)) < config.iterations // every:
            ppo(models, engine, run.rl_prompts, folder, config, run.recipe.seed, show)
    by_step = {one["step"]: one for one in read_records(folder / "metrics.jsonl")}
    return [row | _training(by_step, int(row["step"]), every) for row in _known(path)]


def _training(by_step: dict[int, Row], step: int, every: int) -> Row:
    """KL per answer and the reward model's score over the iterations that end at `step`."""
    near = [by_step[n] for n in range(step - every, step)]
    return {
        "kl": mean([one["objective/kl"] for one in near]),
        "reward_score": mean([one["objective/scores"] for one in near]),
    }


def _row(bench: Bench, variant: str, measured: dict[str, object], step: int) -> Row:
    """With `good`: the share of answers that are what the oracle wants, over harmful and benign asks alike."""
    row = flat(measured)
    declined = row["refused_harmful"] * row.get("refused_with_reason", 0.0)  # a model that never refuses has none
    good = {"harmless": 1 - row["complied_harmful"], "good": (declined + row["helpful_benign"]) / 2}
    return {"variant": variant, "seed": bench.seed, "step": step} | row | good


def _records(run: Run, *parts: str) -> list[Row]:
    return read_records(run.path(*parts))


def _known(path: Path) -> list[Row]:
    return read_records(path) if path.exists() else []
