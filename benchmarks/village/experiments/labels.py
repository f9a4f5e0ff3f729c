"""What kind of label makes the better reward model, by the oracle (arXiv 2212.08073, sections 4.1 and 4.3)."""

from dataclasses import replace
from typing import Any

import torch

from bylaw.benchmarks.village.evaluate import mean, oracle_side, prompts
from bylaw.benchmarks.village.experiments.bench import Bench, Row
from bylaw.inputs import Run
from bylaw.kernels.preference_loss import expected_calibration_error
from bylaw.model.records import Record, read_records
from bylaw.model.sampler import answer_ids
from bylaw.rlaif.compare import compare
from bylaw.rlaif.pairs import Pair
from bylaw.rlaif.reward import pair_scores

PAIRED = ("revise", "finetune", "compare")
LABELLED = (*PAIRED, "label")


def soft_or_hard(bench: Bench) -> list[Row]:
    """The probability as the label, or only its side."""
    config = bench.recipe.reward
    return [
        _reward(bench, name, LABELLED, ("reward",), reward=replace(config, hard_labels=hard))
        for name, hard in (("soft", False), ("hard", True))
    ]


def one_or_all(bench: Bench) -> list[Row]:
    """One principle drawn for each pair, four, or the average over all."""
    config = bench.recipe.label
    return [
        _reward(bench, name, PAIRED, ("label", "reward"), label=replace(config, principles=name))
        for name in ("one", "some", "all")
    ]


def clamped(bench: Bench) -> list[Row]:
    """Labels after a chain of thought, by one principle each: as they come, and clamped to 20-80 % and 40-60 %."""
    config = replace(bench.recipe.label, principles="one", max_thought_tokens=48)
    variants = (("letter", 0, 0.0), ("thought", 1, 0.0), ("thought 20-80", 1, 0.2), ("thought 40-60", 1, 0.4))
    return [
        _reward(bench, name, PAIRED, ("label", "reward"), label=replace(config, thoughts=thoughts, clamp=clamp))
        for name, thoughts, clamp in variants
    ]


def _reward(bench: Bench, name: str, kept: tuple[str, ...], stages: tuple[str, ...], **changes: Any) -> Row:
    """A reward model from labels so made, and how it and they agree with the oracle."""
    run = bench.variant(f"reward-{name.replace(' ', '-')}", kept, stages, **changes)
    labels = read_records(run.path("label", "preferences.jsonl"))
    return {"variant": name, "seed": bench.seed} | _label_facts(run, labels) | _reward_facts(bench, run)


def _label_facts(run: Run, labels: list[Record]) -> dict[str, float]:
    """Of the training labels: their side against the oracle's, and how sure they are."""
    read = [(one["p_a"], oracle_side(one, run.constitution)) for one in labels if not one["abstained"]]
    return {
        "label_accuracy": mean([(p > 0.5) == (side > 0) for p, side in read if side]),
        "label_sureness": mean([abs(p - 0.5) for p, _ in read]),
    }


def _reward_facts(bench: Bench, run: Run) -> dict[str, float]:
    """Of the reward model on answers to held-out asks: its side against the oracle's, and its calibration."""
    pairs = [(one, oracle_side(one, run.constitution)) for one in heldout_pairs(bench)]
    decided = [(one, side) for one, side in pairs if side]
    p_a = torch.sigmoid(scores(run, [one for one, _ in decided]))
    truth = torch.tensor([float(side > 0) for _, side in decided], dtype=torch.float64)
    return {
        "reward_accuracy": float(((p_a > 0.5) == (truth > 0.5)).double().mean()),
        "reward_ece": float(expected_calibration_error(p_a, truth)),
        "pairs": float(len(decided)),
    }


def heldout_pairs(bench: Bench) -> list[Record]:
    """Pairs of the SL-CAI model's answers to held-out asks, harmful and benign; the same for every variant."""
    run, path = bench.main(PAIRED), bench.folder / "heldout-pairs.jsonl"
    policy, config = run.path("finetune", "sl-cai"), run.recipe.compare
    asked = prompts(heldout=True, harmful=True) + prompts(heldout=True, harmful=False, forms=1)
    compare(run.sampler(run.model(policy), policy, config), asked, path, config)
    return read_records(path)


@torch.no_grad()
def scores(run: Run, pairs: list[Record]) -> torch.Tensor:
    """By how much the run's reward model likes answer a more, [N]."""
    tokenizer, model = run.tokenizer, run.reward_model(run.path("reward", "reward-model"))
    texts = [
        [tokenizer.prompt_ids(pair["prompt"]) + answer_ids(pair[side], tokenizer) for side in "ab"] for pair in pairs
    ]
    a, b = pair_scores(model, [Pair(a, b, 0.5) for a, b in texts])
    return (a - b).double()
