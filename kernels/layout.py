"""Where the sequences of a packed stream lie, worked out once per batch for all layers and every attention backend."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.upload import upload

# A tile is this many consecutive tokens of one sequence. The kernels' blocks divide it, so that one table serves all.
TILE = 128


@dataclass(frozen=True)
class Layout:
    """The B sequences of a packed stream of `tokens` tokens, as `plan` makes it."""

    lengths: tuple[int, ...]
    tokens: int
    max_seqlen: int
    cu_seqlens: Tensor  # [B + 1] int32, where each sequence starts, and the end
    tiles: Tensor  # [n, 2] int32, (sequence, tile in it): the tiles with the longest past first


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
