"""The packed stream: sequences laid end to end, no padding (design: a batch is tokens, positions and cu_seqlens)."""

import bisect
import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.attention import Layout, attention, plan
from bylaw.kernels.rope import rope
from bylaw.kernels.upload import upload


@dataclass(frozen=True)
class Packed:
    """A packed stream of B sequences and T tokens."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 within each sequence
    cu_seqlens: Tensor  # [B + 1] int64, where each sequence starts, and T
    layout: Layout  # of the same sequences, for attention
    wanted: Tensor | None = None  # places whose hidden states are asked for; None: all

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], window: int) -> Tensor:
        """Rotate q and k, and attend causally within each sequence; the layer's number matters only to a cache."""
        return attention(*rope(q, k, *rotary), v, self.layout, window)

    @property
    def trains(self) -> bool:
        """Blocks run on it as they are prepared for training (model/prepare.py)."""
        return True

    @property
    def last(self) -> Tensor:
        """Places [B] of each sequence's last token in the stream."""
        return self.cu_seqlens[1:] - 1

    def asking(self, wanted: Tensor) -> "Packed":
        """This stream, of which only the hidden states at the places `wanted` are asked for: in its last block, behind
        attention, a model then works on no others.
        """
        return dataclasses.replace(self, wanted=wanted)


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Lay `sequences` end to end. Raises ValueError if there is none, or one is empty: it would have no last token."""
    empty = [i for i, ids in enumerate(sequences) if len(ids) == 0]
    if empty or not sequences:
        raise ValueError(f"cannot pack: {f'sequence {empty[0]} has no tokens' if empty else 'no sequences'}")
    lengths = torch.tensor([len(ids) for ids in sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    device = torch.device(device)
    bounds = upload(cu_seqlens, device)
    return Packed(upload(tokens, device), upload(positions, device), bounds, plan(cu_seqlens, device))


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share out items 0..n-1 to runs of at most `budget` tokens; an item longer than that stands alone.

    The runs are few (best fit decreasing: at most 11/9 of the fewest, Johnson 1973), and as even as the budget lets
    them be, so that the largest, which decides the memory, is small. Each is in the items' order. It is a function of
    the arguments alone.
    """
    alone = [[i] for i, length in enumerate(lengths) if length > budget]
    falling = sorted((i for i, length in enumerate(lengths) if length <= budget), key=lambda i: -lengths[i])
    fitted = _best_fit(lengths, falling, budget)
    even = _spread(lengths, falling, len(fitted))
    fits = all(sum(lengths[i] for i in run) <= budget for run in even)
    return sorted(sorted(run) for run in [*alone, *(even if fits else fitted)])


def packing_efficiency(lengths: Sequence[int], runs: Sequence[Sequence[int]]) -> float:
    """Tokens of the items over the micro-batches' number times the largest one: 1 where all are equally full.

    What a rank waits for at each micro-batch, or what a batch padded to the largest would waste, is the rest to 1.
    Raises ValueError for no runs.
    """
    if not runs:
        raise ValueError("there are no micro-batches to measure; allowed: at least one")
    loads = [sum(lengths[i] for i in run) for run in runs]
    return sum(loads) / (len(loads) * max(loads))


def _best_fit(lengths: Sequence[int], falling: Sequence[int], budget: int) -> list[list[int]]:
    """Each item to the fullest run that has room for it."""
    runs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, run), rising
    for i in falling:
        place = bisect.bisect_left(room, (lengths[i], 0))
        if place == len(room):
            left, run = budget, len(runs)
            runs.append([])
        else:
            left, run = room.pop(place)
        runs[run].append(i)
        bisect.insort(room, (left - lengths[i], run))
    return runs


def _spread(lengths: Sequence[int], falling: Sequence[int], count: int) -> list[list[int]]:
    """Each item to the emptiest of `count` runs (Graham 1969: the largest is at most 4/3 of the best possible)."""
    runs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, run) for run in range(count)]
    for i in falling:
        load, run = loads[0]
        runs[run].append(i)
        heapq.heapreplace(loads, (load + lengths[i], run))
    return runs
