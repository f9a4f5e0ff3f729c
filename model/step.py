"""The training step that every trainer shares: micro-batches by a token budget, dealt to the ranks, and one update.

A trainer gives an objective: a function of some items that returns their part of the step's loss, which it has divided
by the tokens (or pairs) of the whole step, and sums for its statistics. So neither the budget nor the number of ranks
changes what is learned.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bylaw.kernels.policy_loss import Stats, merge_stats
from bylaw.model.packing import token_batches
from bylaw.model.parallel import ALONE, Parallel, deal

Item = TypeVar("Item")
Objective = Callable[[list[Item]], tuple[Tensor, Stats]]


class MicroBatch(NamedTuple):
    """Which items of the step are packed together, and whether they count."""

    items: list[int]
    counts: bool


def micro_batches(lengths: Sequence[int], budget: int, parallel: Parallel = ALONE) -> list[MicroBatch]:
    """This rank's micro-batches of a step with items of `lengths` tokens, each of at most `budget` where items allow.

    Every rank gets equally many, as collectives need: who has fewer repeats the shortest item, and it does not count.
    """
    dealt = []
    for share in deal(lengths, parallel.data_ranks) if parallel.data_ranks > 1 else [list(range(len(lengths)))]:
        runs = token_batches([lengths[i] for i in share], budget)
        dealt.append([MicroBatch([share[i] for i in run], True) for run in runs])
    mine, shortest = dealt[parallel.data_rank], min(range(len(lengths)), key=lengths.__getitem__)
    return mine + [MicroBatch([shortest], False)] * (max(map(len, dealt)) - len(mine))


def accumulate(
    objective: Objective[Item],
    items: Sequence[Item],
    batches: Sequence[MicroBatch],
    parallel: Parallel = ALONE,
) -> Stats:
    """Add the gradient of the objective over `batches` of `items` to the parameters; returns its statistics, summed
    over micro-batches and ranks, with the loss as `loss`.
    """
    parallel.meet()  # a rank that hangs is named here; within a step nothing could say which
    parts = []
    for batch in batches:
        loss, stats = objective([items[i] for i in batch.items])
        part = stats | {"loss": loss.detach().double()}
        (loss if batch.counts else 0 * loss).backward()
        parts.append(part if batch.counts else {name: torch.zeros_like(value) for name, value in part.items()})
    return parallel.merge(merge_stats(parts))
