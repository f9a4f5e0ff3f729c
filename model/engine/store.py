"""What the scheduler needs of a cache of keys and values: rows, shared segments, and streams that read and write them.

A row is a sequence that is being continued, at slot 0 to n - 1. It stands on a path of shared segments; the tokens
behind them are its own. Memory is counted in pages of PAGE tokens, of all layers' keys and values.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from bylaw.model.engine.prefix import PAGE, Path, Segment, length
from bylaw.model.settings import require
from bylaw.model.transformer import Block, Stream, Transformer

GIB = 1 << 30
DEFAULT_CPU_GIB = 2.0


@dataclass(frozen=True)
class Item:
    """A piece of a packed stream: `tokens` behind `path` and `past` tokens that the row at `slot` keeps already.

    What is computed is kept in the row at `slot`, or in `segment`; nowhere for a piece that is only scored.
    """

    tokens: Sequence[int]
    path: Path
    past: int = 0
    slot: int | None = None
    segment: Segment | None = None
    wanted: int = 0  # of how many of its last tokens the hidden states are asked for
    start: int = field(init=False)  # position of the first token

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", length(self.path) + self.past)


def wanted_places(items: Sequence[Item]) -> Tensor:
    """The places in their stream of the tokens whose hidden states are asked for."""
    ends = accumulate(len(item.tokens) for item in items)
    return torch.tensor([at for item, end in zip(items, ends, strict=True) for at in range(end - item.wanted, end)])


class Store(Protocol):
    """Keys and values on one device."""

    pages: int  # that the budget allows

    def room(self, slot: int) -> int:
        """Own tokens that the row at `slot` can have without another `reserve`."""
        ...

    def worth(self, users: int, tokens: int) -> bool:
        """Whether a run of `tokens` tokens that `users` texts have is to be a segment."""
        ...

    def in_place(self, users: int, tokens: int) -> bool:
        """Whether rows leave such a run in its place; if not, `take_over` copies it to each."""
        ...

    def free_pages(self) -> int: ...

    def reserve(self, tokens: Sequence[int], spans: Sequence[int], extra: int = 0) -> bool:
        """Make room for tokens[i] own tokens in slot i, for all slots in use, and leave `extra` pages; whether it went.

        `spans` are the most that the rows can come to have.
        """
        ...

    def place(self, segment: Segment) -> None:
        """Give the segment its memory, which is free."""
        ...

    def discard(self, segment: Segment) -> None: ...

    def open(self, slot: int, path: Path) -> None:
        """The row at `slot` is a new one, on `path`; what it shares behind that it will take over."""
        ...

    def take_over(self, slot: int, path: Path) -> None:
        """Copy what `path` has behind the row's own path to the row: its first own tokens."""
        ...

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        """Copy the first own tokens of a row to others on the same base."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """The row at `source`, with so many own tokens, becomes the one at `target`."""
        ...

    def close(self, slot: int) -> None:
        """The row at the last slot in use is gone."""
        ...

    def prefill(self, items: Sequence[Item]) -> Stream:
        """A stream of the items, one behind the other."""
        ...

    def step(self, tokens: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Stream:
        """A stream of one token for each row at `slots`, the newest of the row, at `positions` of its text."""
        ...

    def check(self, rows: int, segments: Collection[Segment]) -> None:
        """Raise AssertionError if memory is not what so many rows and these segments take. For tests."""
        ...


def kv_heads(model: Transformer) -> int:
    """Of this rank: tensor ranks share out the heads (model/sharding.py)."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block.kv_heads


def page_bytes(model: Transformer) -> int:
    """Bytes of one page: keys and values of PAGE tokens in all layers."""
    config = model.config
    return 2 * config.num_layers * kv_heads(model) * config.head_dim * PAGE * model.embed.weight.element_size()


def budget(model: Transformer, cache_gib: float | None) -> int:
    """Pages that `cache_gib` GiB hold; None: 2 GiB on a CPU, half of the memory that is free on a GPU.

    Raises ValueError for less than a page, and for what is not a number.
    """
    least = page_bytes(model) / GIB
    allowed = f"{least:.3g} (one page of {PAGE} tokens) or more, and finite; None: as the device has it"
    require(cache_gib is None or least <= cache_gib < math.inf, "cache_gib", cache_gib, allowed)
    if cache_gib is not None:
        size = cache_gib * GIB
    elif model.device.type == "cuda":
        size = torch.cuda.mem_get_info(model.device)[0] / 2
    else:
        size = DEFAULT_CPU_GIB * GIB
    return int(size // page_bytes(model))
