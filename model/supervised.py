"""Packed supervised training: loss on chosen tokens, divided by their number in the whole optimiser step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.philox import permutation
from bylaw.model.metrics import Metrics
from bylaw.model.optim import adamw, scheduled, update
from bylaw.model.packing import Packed, pack, token_batches
from bylaw.model.settings import OptimSettings
from bylaw.model.train_state import load_state, save_state
from bylaw.model.transformer import Transformer


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are learned. The first token cannot be: nothing comes before it."""

    ids: list[int]
    learned: list[bool]

    @property
    def targets(self) -> int:
        return sum(self.learned[1:])


def token_states(model: Transformer, packed: Packed, places: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states [n, H] that the tokens at `places` [n] of the stream are chosen from, and those tokens [n].

    The head then runs on those alone.
    """
    return model(packed).index_select(0, places - 1), packed.tokens[places]


def supervised_loss(model: Transformer, examples: Sequence[Example]) -> Tensor:
    """Negative log-likelihood summed over the learned tokens of `examples`, in nats."""
    packed = pack([example.ids for example in examples], model.device)
    learned = torch.tensor([flag for e in examples for flag in (False, *e.learned[1:])])
    hidden, targets = token_states(model, packed, learned.nonzero().squeeze(-1).to(model.device))
    ones = torch.ones(len(targets), device=model.device)
    return linear_loss(hidden, model.head_weight, targets, nll=ones, ignore_index=None).loss


def train_supervised(
    model: Transformer,
    examples: Sequence[Example],
    settings: OptimSettings,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
    stage: str,
    show: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, float]:
    """Train `model` in place, `batch_size` examples per step, shuffled anew each epoch from `seed`.

    Goes on from the training checkpoint in `folder`/state if there is one, to the same bits. Metrics go to
    `folder`/metrics.jsonl; `show` is called after each step with its number and theirs. Returns counts and the last
    loss.

    Raises ValueError, before any work, without examples and for one that has no token to learn.
    """
    _check(examples)
    order = [int(i) for epoch in range(epochs) for i in permutation(seed, len(examples), epoch)]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer = adamw(model, settings)
    progress = load_state(folder / "state", {"model": model}, {"model": optimizer}) or {"step": 0, "loss": 0.0}
    first = int(progress["step"])
    loss = float(progress["loss"])
    with Metrics(folder / "metrics.jsonl", stage, len(batches), first) as metrics:
        for step in range(first, len(batches)):
            start, batch = time.monotonic(), [examples[i] for i in batches[step]]
            loss = _accumulate(model, batch, settings.micro_batch_tokens)
            rate = scheduled(settings, settings.learning_rate, step, len(batches))
            norm = update(model, optimizer, rate, settings.max_grad_norm)
            speed = sum(len(example.ids) for example in batch) / (time.monotonic() - start)
            values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": speed}
            metrics.log(step, values, {"loss": loss, "lr": rate, "tok/s": speed})
            show(step, len(batches))
            if (step + 1) % settings.save_every == 0 and step + 1 < len(batches):
                progress = {"step": step + 1, "loss": loss}
                save_state(folder / "state", {"model": model}, {"model": optimizer}, progress)
    return {"steps": len(batches), "tokens": sum(len(examples[i].ids) for i in order), "last_loss": loss}


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("there are no examples to train on")
    for i, example in enumerate(examples):
        tokens, flags = len(example.ids), len(example.learned)
        if tokens != flags or not example.targets:
            raise ValueError(
                f"example {i} has {tokens} tokens, {flags} flags, and learns {example.targets}; allowed: a flag for "
                "each token, and at least one that is learned after the first"
            )


def _accumulate(model: Transformer, batch: Sequence[Example], budget: int) -> float:
    """Put the gradient of the batch's mean loss per learned token into `model`; returns that loss."""
    total = sum(example.targets for example in batch)
    loss = 0.0
    for run in token_batches([len(example.ids) for example in batch], budget):
        piece = supervised_loss(model, [batch[i] for i in run]) / total
        piece.backward()
        loss += float(piece.detach())
    return loss
