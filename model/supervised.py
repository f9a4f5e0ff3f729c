"""Packed supervised training: loss on chosen tokens, divided by their number in the whole optimiser step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.upload import upload
from bylaw.model.fit import fit
from bylaw.model.packing import Packed, pack
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.settings import OptimSettings
from bylaw.model.step import Objective
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

    The head then runs on those alone, and so does the last block behind attention.
    """
    return model(packed.asking(places - 1)), packed.tokens[places]


def supervised_loss(model: Transformer, examples: Sequence[Example]) -> Tensor:
    """Negative log-likelihood summed over the learned tokens of `examples`, in nats."""
    packed = pack([example.ids for example in examples], model.device)
    learned = torch.tensor([flag for e in examples for flag in (False, *e.learned[1:])])
    places = upload(learned.nonzero().squeeze(-1), model.device)
    hidden, targets = token_states(model, packed, places)
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
    parallel: Parallel = ALONE,
) -> dict[str, float]:
    """`fit` on the mean loss per learned token.

    Raises ValueError, before any work, without examples and for one that has no token to learn.
    """
    _check(examples)

    def objective(batch: list[Example]) -> Objective[Example]:
        total = sum(example.targets for example in batch)
        return lambda run: (supervised_loss(model, run) / total, {})

    return fit(
        model,
        examples,
        lambda example: len(example.ids),
        objective,
        settings,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        stage=stage,
        show=show,
        parallel=parallel,
    )


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
