"""The engine's keys and values, a row per request: dense slabs for plain torch, pages for the kernels.

Rows 0 to n - 1 are in use, so that a step reads one block. `write` rotates queries and keys by their positions and
keeps the keys and values at their places, looked up once for all layers; `attend` is one step of decoding over what is
kept.
"""

from typing import Protocol

import torch
from torch import Tensor

from bylaw.kernels.attention import decode_attention
from bylaw.kernels.backend import choose
from bylaw.kernels.kv_write import kv_write
from bylaw.kernels.paged_attention import paged_attention
from bylaw.kernels.rope import rope
from bylaw.model.transformer import Rotary, Transformer

PAGE = 32  # tokens


class Cache(Protocol):
    """What the engine needs of a cache."""

    rows: int

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where tokens at `positions` [T] of `rows` [T] are kept, in the cache's own terms."""
        ...

    def write(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate `q` [T, N_q, D] and `k` [T, N_kv, D], keep k and `v` at `places`; returns (q, k)."""
        ...

    def attend(self, layer: int, q: Tensor, lengths: Tensor, longest: int, window: int) -> Tensor:
        """Query n of `q` [n, N_q, D] over the first `lengths[n]` (int32) tokens of row n, at most `longest`."""
        ...

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`, whose own content is not needed any more, nor is that of `source`."""
        ...


def make_cache(model: Transformer, rows: int, slots: int) -> Cache:
    """A cache for `rows` requests of at most `slots` tokens each, on the model's device and in its dtype."""
    kernels = choose("paged_attention", "auto", model.embed.weight) == "triton"
    return Pages(model, rows, slots) if kernels else Slabs(model, rows, slots)


class Slabs:
    """[layers, rows, N_kv, slots, D]: a decode step is a dense product over the first columns of the first rows."""

    def __init__(self, model: Transformer, rows: int, slots: int) -> None:
        config, weight = model.config, model.embed.weight
        shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
        self.rows = rows
        self.keys = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.values = torch.zeros_like(self.keys)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        return torch.stack((rows, positions))

    def write(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k = rope(q, k, *rotary)
        rows, positions = places
        self.keys[layer, rows, :, positions] = k
        self.values[layer, rows, :, positions] = v
        return q, k

    def attend(self, layer: int, q: Tensor, lengths: Tensor, longest: int, window: int) -> Tensor:
        keys, values = (x[layer, : len(q), :, :longest] for x in (self.keys, self.values))
        return decode_attention(q, keys, values, lengths, window)

    def move(self, source: int, target: int) -> None:
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class Pages:
    """[layers, pages, PAGE, N_kv, D]; a row owns the pages in its line of the table [rows, pages of a row]."""

    def __init__(self, model: Transformer, rows: int, slots: int) -> None:
        config, weight = model.config, model.embed.weight
        pages = -(-slots // PAGE)  # of a row
        shape = (config.num_layers, rows * pages, PAGE, config.num_kv_heads, config.head_dim)
        self.rows = rows
        self.keys = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.table = torch.arange(rows * pages, device=weight.device, dtype=torch.int32).view(rows, pages)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        return self.table[rows, positions // PAGE].long() * PAGE + positions % PAGE

    def write(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        kv_write(q, k, v, *rotary, self.keys[layer], self.values[layer], places)
        return q, k

    def attend(self, layer: int, q: Tensor, lengths: Tensor, longest: int, window: int) -> Tensor:
        table = self.table[: len(q), : -(-longest // PAGE)]
        return paged_attention(q, self.keys[layer], self.values[layer], table, lengths, window)

    def move(self, source: int, target: int) -> None:
        freed = self.table[target].clone()
        self.table[target] = self.table[source]
        self.table[source] = freed
