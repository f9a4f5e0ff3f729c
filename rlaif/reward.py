"""The reward model learns to score answers as the soft labels order them (arXiv 2212.08073, section 4.1).

loss = -[p log sigma(d) + (1 - p) log sigma(-d)] + centring (r_a + r_b)^2,   d = r_a - r_b - margin (2 p - 1)

with r read at the last token of prompt and answer. Both answers go through one forward pass, and their prompt once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.kernels.policy_loss import Stats
from bylaw.kernels.preference_loss import expected_calibration_error, preference_accuracy, preference_loss
from bylaw.model.fit import fit
from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.step import micro_batches
from bylaw.rlaif.config import RewardConfig
from bylaw.rlaif.pairs import Pair, hardened, pack_pairs

BINS = 10  # of the reliability table


def pair_scores(model: ScalarModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores ([B], [B]) of both answers of each pair, in one packed pass."""
    stream = pack_pairs(pairs, model.trunk.device)
    scores = model(stream.asking(stream.last))
    return scores[::2], scores[1::2]


def train_reward(
    model: ScalarModel,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    folder: Path,
    config: RewardConfig,
    seed: int,
    parallel: Parallel = ALONE,
) -> dict[str, Any]:
    """Train `model` in place; metrics and state go to `folder`. Returns its held-out measures (`measure`) and counts.

    Goes on from the training checkpoint in `folder`/state if there is one, to the same bits.
    """
    counts = fit(
        model,
        hardened(train) if config.hard_labels else train,
        lambda pair: pair.tokens,
        lambda batch: lambda run: _objective(model, run, len(batch), config),
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        folder=folder,
        stage="reward",
        measure=_accuracy,
        parallel=parallel,
    )
    return counts | measure(model, heldout, config.micro_batch_tokens, parallel)


def _objective(model: ScalarModel, run: list[Pair], pairs: int, config: RewardConfig) -> tuple[Tensor, Stats]:
    """The part of `run` in the mean loss of a step's `pairs`; how often the scores agree with a label, of how many."""
    labels = torch.tensor([pair.p_a for pair in run], device=model.trunk.device)
    score_a, score_b = pair_scores(model, run)
    right, decided = preference_accuracy(score_a, score_b, labels)
    margin = config.margin * (2 * labels - 1) if config.margin else 0.0
    loss = preference_loss(score_a, score_b, labels, margin, config.centring).sum() / pairs
    return loss, {"right": right.double(), "decided": decided.double()}


def _accuracy(stats: Stats) -> dict[str, float]:
    decided = float(stats["decided"])
    return {"accuracy": float(stats["right"]) / decided} if decided else {}  # a batch of ties has no right answer


@torch.no_grad()
def measure(model: ScalarModel, pairs: Sequence[Pair], budget: int, parallel: Parallel = ALONE) -> dict[str, Any]:
    """Measures on held-out pairs: loss, accuracy where the label decides (else None), calibration, score scale.

    Where most labels are near a half, accuracy is mostly that on what hardly matters: `heldout_sure_accuracy` weighs
    each pair by |2 p_a - 1|, how sure its label is.

    PPO takes the mean off and divides by the deviation, so that an average answer is worth 0. The loss is without
    margin and centring. Every rank has the same measures, whichever of the pairs it scored.
    """
    found: dict[int, tuple[float, float]] = {}
    for batch in micro_batches([pair.tokens for pair in pairs], budget, parallel):
        columns = (side.tolist() for side in pair_scores(model, [pairs[i] for i in batch.items]))
        if batch.counts:
            found |= zip(batch.items, zip(*columns, strict=True), strict=True)
    scores = {i: both for part in parallel.gather(found) for i, both in part.items()}
    score_a, score_b = torch.tensor([scores[i] for i in range(len(pairs))], dtype=torch.float64).unbind(1)
    labels = torch.tensor([pair.p_a for pair in pairs], dtype=torch.float64)
    right, decided = preference_accuracy(score_a, score_b, labels)
    lean = 2 * labels - 1
    agreed = (torch.sign(score_a - score_b) * lean).sum() / lean.abs().sum()  # 1 where all agree, -1 where none does
    predicted, both = torch.sigmoid(score_a - score_b), torch.cat([score_a, score_b])
    return {
        "heldout_loss": float(preference_loss(score_a, score_b, labels).mean()),
        "heldout_accuracy": float(right / decided) if decided else None,
        "heldout_sure_accuracy": float((1 + agreed) / 2) if decided else None,
        "heldout_ece": float(expected_calibration_error(predicted, labels, BINS)),
        "heldout_reliability": reliability(predicted, labels, BINS),
        "score_mean": float(both.mean()),
        "score_std": float(both.std(correction=0)),
    }


def reliability(predicted: Tensor, labels: Tensor, bins: int) -> list[dict[str, float]]:
    """The table behind the expected calibration error (DeGroot and Fienberg 1983): of the `bins` equal parts of 0 to 1
    into which predictions [N] fall, where each begins, how many fall into it, their mean, and that of their labels [N].
    """
    bin_of = (predicted * bins).long().clamp(max=bins - 1)
    rows = []
    for bin in bin_of.unique().tolist():
        inside = bin_of == bin
        means = {"predicted": float(predicted[inside].mean()), "label": float(labels[inside].mean())}
        rows.append({"from": bin / bins, "pairs": int(inside.sum())} | means)
    return rows
