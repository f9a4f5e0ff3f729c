"""Where the sequences of a packed stream lie, worked out once per batch for all layers and every attention backend."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.upload import upload

# A tile is this many consecutive tokens of one sequence. The kernels' blocks divide it, so that one table serves all.
TILE = 128
# Sequences share a dense call while the longest is at most this much longer than the shortest ...
LENGTH_RATIO = 1.34
# ... or while all are this short, where a further call costs more than the padding.
SHORT = 32


@dataclass(frozen=True)
class Bucket:
    """Sequences of like length: their tokens' places in the packed stream, and in a dense [rows * length]."""

    rows: int
    length: int
    stream: Tensor  # [n]
    dense: Tensor  # [n]


@dataclass(frozen=True)
class Layout:
    """The B sequences of a packed stream of `tokens` tokens, as `plan` makes it."""

    lengths: tuple[int, ...]
    tokens: int
    max_seqlen: int
    cu_seqlens: Tensor  # [B + 1] int32, where each sequence starts, and the end
    tiles: Tensor  # [n, 2] int32, (sequence, tile in it): the tiles with the longest past first
    buckets: tuple[Bucket, ...]  # for the reference; none on a GPU


def plan(cu_seqlens: Tensor, device: torch.device | str | None = None) -> Layout:
    """The layout of sequences that start at `cu_seqlens` [B + 1] (the last entry is the end), for tensors on `device`.

    Give `cu_seqlens` on the CPU: the lengths are read on the host, and a GPU would have to be waited for. `device` None
    is that of `cu_seqlens`. Raises ValueError if it does not rise from 0, or ends past what int32 counts.
    """
    device = cu_seqlens.device if device is None else torch.device(device)
    starts = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or min(lengths, default=0) < 0 or starts[-1] >= 2**31:
        raise ValueError(f"cu_seqlens = {starts}; allowed: [B + 1], from 0, never falling, below 2**31")
    return Layout(
        lengths=lengths,
        tokens=starts[-1],
        max_seqlen=max(lengths, default=0),
        cu_seqlens=upload(torch.tensor(starts, dtype=torch.int32), device),
        tiles=upload(_tiles(torch.tensor(lengths, dtype=torch.int64)), device),
        buckets=() if device.type in ("cuda", "meta") else make_buckets(lengths, device),
    )


def _tiles(lengths: Tensor) -> Tensor:
    """Every tile that holds a token. A causal query tile works the longer the later it stands; a key tile, the earlier:
    kernels over keys count a sequence's tiles from its end, so that the one order is longest-first for both.
    """
    counts = (lengths + TILE - 1) // TILE
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    tile = torch.arange(len(sequence)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    order = torch.argsort(tile, descending=True, stable=True)
    return torch.stack((sequence, tile), dim=1)[order].int()


def make_buckets(lengths: tuple[int, ...], device: torch.device) -> tuple[Bucket, ...]:
    """Group sequences by length."""
    starts = [0, *itertools.accumulate(lengths)]
    order = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: -lengths[b])
    groups: list[list[int]] = []
    for b in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest <= max(SHORT, LENGTH_RATIO * lengths[b]):
            groups[-1].append(b)
        else:
            groups.append([b])
    return tuple(_bucket([starts[b] for b in group], [lengths[b] for b in group], device) for group in groups)


def _bucket(starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    longest = lengths[0]
    stream = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    dense = torch.cat([torch.arange(row * longest, row * longest + n) for row, n in enumerate(lengths)])
    return Bucket(len(starts), longest, stream.to(device), dense.to(device))
