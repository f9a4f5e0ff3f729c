"""The packed stream: sequences laid end to end, no padding (design: a batch is tokens, positions and cu_seqlens)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.attention import Layout, attention, plan
from bylaw.kernels.rope import rope


@dataclass(frozen=True)
class Packed:
    """A packed stream of B sequences and T tokens."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 within each sequence
    cu_seqlens: Tensor  # [B + 1] int64, where each sequence starts, and T
    layout: Layout  # of the same sequences, for attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], window: int) -> Tensor:
        """Rotate q and k, and attend causally within each sequence; the layer's number matters only to a cache."""
        return attention(*rope(q, k, *rotary), v, self.layout, window)

    @property
    def wanted(self) -> None:
        """All hidden states."""

    @property
    def last(self) -> Tensor:
        """Places [B] of each sequence's last token in the stream."""
        return self.cu_seqlens[1:] - 1


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Lay `sequences` end to end. Raises ValueError if there is none, or one is empty: it would have no last token."""
    empty = [i for i, ids in enumerate(sequences) if len(ids) == 0]
    if empty or not sequences:
        raise ValueError(f"cannot pack: {f'sequence {empty[0]} has no tokens' if empty else 'no sequences'}")
    lengths = torch.tensor([len(ids) for ids in sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    return Packed(tokens.to(device), positions.to(device), cu_seqlens.to(device), plan(cu_seqlens, device))


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split items 0..n-1, in order, into runs of at most `budget` tokens; an item longer than that stands alone."""
    batches: list[list[int]] = []
    used = 0
    for i, length in enumerate(lengths):
        if not batches or used + length > budget:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += length
    return batches
