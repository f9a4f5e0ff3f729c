"""The reward model learns to score answers as the soft labels order them (arXiv 2212.08073, section 4.1).

loss = -[p log sigma(r_a - r_b) + (1 - p) log sigma(r_b - r_a)],   r read at the last token of prompt and answer
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.kernels.philox import permutation, request_id, uniform_scalar
from bylaw.kernels.preference_loss import expected_calibration_error, preference_accuracy, preference_loss
from bylaw.model.heads import ScalarModel
from bylaw.model.metrics import Metrics
from bylaw.model.optim import adamw, scheduled, update
from bylaw.model.packing import pack, token_batches
from bylaw.model.records import Record
from bylaw.model.sampler import answer_ids
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.train_state import load_state, save_state
from bylaw.rlaif.config import RewardConfig


@dataclass(frozen=True)
class Pair:
    """Prompt and answer as token ids, twice, and the probability that the first is better."""

    a: list[int]
    b: list[int]
    p_a: float

    @property
    def tokens(self) -> int:
        return len(self.a) + len(self.b)


def split_pairs(
    preferences: Sequence[Record], tokenizer: Tokenizer, heldout_fraction: float, seed: int
) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """Training pairs, held-out pairs, counts. A prompt's pairs are on one side; abstained labels on neither.

    Raises ValueError when a side is empty.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    abstained = 0
    for preference in preferences:
        if preference["abstained"]:
            abstained += 1
            continue
        prompt = tokenizer.prompt_ids(preference["prompt"])
        a, b = (prompt + answer_ids(preference[side], tokenizer) for side in "ab")
        heldout = is_heldout(preference["prompt_id"], heldout_fraction, seed)
        sides[heldout].append(Pair(a, b, preference["p_a"]))
    counts = {"train_pairs": len(sides[0]), "heldout_pairs": len(sides[1]), "abstained": abstained}
    if not sides[0] or not sides[1]:
        raise ValueError(
            f"the reward model needs labelled pairs on both sides of heldout_fraction = {heldout_fraction}; there are "
            f"{counts}. Give it more prompts, or look at why labels abstained in preferences.jsonl"
        )
    return *sides, counts


def is_heldout(prompt_id: str, fraction: float, seed: int) -> bool:
    """Whether a prompt's pairs are kept for measuring: a function of the seed and the prompt's id."""
    return uniform_scalar(seed, request_id("heldout", prompt_id), 0) < fraction


def pair_scores(model: ScalarModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores ([B], [B]) of both answers of each pair, in one packed pass."""
    packed = pack([ids for pair in pairs for ids in (pair.a, pair.b)], model.trunk.device)
    scores = model(packed)[packed.last]
    return scores[::2], scores[1::2]


def train_reward(
    model: ScalarModel, train: Sequence[Pair], heldout: Sequence[Pair], folder: Path, config: RewardConfig, seed: int
) -> dict[str, Any]:
    """Train `model` in place; metrics and state go to `folder`. Returns its held-out measures (`measure`) and counts.

    Goes on from the training checkpoint in `folder`/state if there is one, to the same bits.
    """
    order = [int(i) for epoch in range(config.epochs) for i in permutation(seed, len(train), epoch)]
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    optimizer = adamw(model, config)
    progress = load_state(folder / "state", {"model": model}, {"model": optimizer}) or {"step": 0}
    with Metrics(folder / "metrics.jsonl", "reward", len(batches), progress["step"]) as metrics:
        for step in range(progress["step"], len(batches)):
            start, batch = time.monotonic(), [train[i] for i in batches[step]]
            values = _accumulate(model, batch, config.micro_batch_tokens)
            values["lr"] = scheduled(config, config.learning_rate, step, len(batches))
            values["grad_norm"] = update(model, optimizer, values["lr"], config.max_grad_norm)
            values["tokens_per_second"] = sum(pair.tokens for pair in batch) / (time.monotonic() - start)
            shown = {name: values[name] for name in ("loss", "accuracy", "tokens_per_second") if name in values}
            metrics.log(step, values, shown)
            if (step + 1) % config.save_every == 0 and step + 1 < len(batches):
                save_state(folder / "state", {"model": model}, {"model": optimizer}, {"step": step + 1})
    return {"steps": len(batches)} | measure(model, heldout, config.micro_batch_tokens)


def _accumulate(model: ScalarModel, batch: Sequence[Pair], budget: int) -> dict[str, float]:
    """Put the gradient of the mean loss per pair into `model`; returns loss and accuracy."""
    loss, right, counted = 0.0, 0.0, 0.0
    for run in token_batches([pair.tokens for pair in batch], budget):
        pairs = [batch[i] for i in run]
        labels = torch.tensor([pair.p_a for pair in pairs], device=model.trunk.device)
        score_a, score_b = pair_scores(model, pairs)
        piece = preference_loss(score_a, score_b, labels).sum() / len(batch)
        piece.backward()
        good, decided = preference_accuracy(score_a, score_b, labels)
        loss, right, counted = loss + float(piece.detach()), right + float(good), counted + float(decided)
    return {"loss": loss} | ({"accuracy": right / counted} if counted else {})  # a batch of ties has no right answer


@torch.no_grad()
def measure(model: ScalarModel, pairs: Sequence[Pair], budget: int) -> dict[str, float | None]:
    """Measures on held-out pairs: loss, accuracy where the label decides (else None), calibration, score scale.

    PPO takes the mean off and divides by the deviation, so that an average answer is worth 0.
    """
    runs = token_batches([pair.tokens for pair in pairs], budget)
    scored = [pair_scores(model, [pairs[i] for i in run]) for run in runs]
    score_a, score_b = (torch.cat(side) for side in zip(*scored, strict=True))
    labels = torch.tensor([pair.p_a for pair in pairs], device=score_a.device)
    right, decided = preference_accuracy(score_a, score_b, labels)
    scores = torch.cat([score_a, score_b]).double()
    return {
        "heldout_loss": float(preference_loss(score_a, score_b, labels).mean()),
        "heldout_accuracy": float(right / decided) if decided else None,
        "heldout_ece": float(expected_calibration_error(torch.sigmoid(score_a - score_b), labels)),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
    }
