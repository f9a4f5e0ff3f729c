"""Packed streams over pages: prompts attend to themselves and to their path in parts, a step reads whole rows.

`kept` is what Pages keeps: keys and values [2, layers, P, PAGE, N_kv, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.attention import attention, plan
from bylaw.kernels.kv_write import kv_write
from bylaw.kernels.merge_attention import merge_attention
from bylaw.kernels.paged_attention import SPLIT_TOKENS, paged_attention, paged_attention_lse
from bylaw.kernels.shared_prefix_attention import prefix_attention, suffix_attention
from bylaw.kernels.upload import upload
from bylaw.model.engine.prefix import PAGE, Path
from bylaw.model.engine.slab_streams import users_of
from bylaw.model.engine.store import Item, wanted_places
from bylaw.model.transformer import Rotary

# Rows that decode read a common first segment once for all of them if it has this many tokens; below, two launches
# more a layer cost more than the second reading, which comes from the L2 cache.
COMMON_TOKENS = 512
Parts = tuple[Tensor, Tensor]
"""out [T, N_q, D] and lse [N_q, T]."""


@dataclass(frozen=True)
class SharedPart:
    """The first `tokens` tokens on `pages`, seen by the stream's tokens at `places`."""

    pages: slice | Tensor
    tokens: int
    places: slice | Tensor
    behind: Tensor  # [n] int32: how far behind it each of them stands, 0 for the next token
    nearest: int  # the least of them

    def merge(self, q: Tensor, keys: Tensor, values: Tensor, own: Parts, window: int, split: int) -> Parts:
        """`own`, perhaps in place, with this part of the same queries' keys."""
        if window and self.nearest >= window - 1:
            return own
        k, v = (x[self.pages].flatten(0, 1)[: self.tokens] for x in (keys, values))
        part = prefix_attention(q[self.places], k, v, window, self.behind, split)
        out, lse = own
        merged, merged_lse = merge_attention(out[self.places], lse[:, self.places], *part)
        if len(merged) == len(q):
            return merged, merged_lse
        out[self.places], lse[:, self.places] = merged, merged_lse
        return out, lse


@dataclass(frozen=True)
class OwnRows:
    """Tokens of pieces that go on, each over what its row has up to it."""

    table: Tensor  # [n, pages] int32, the row's own pages
    lengths: Tensor  # [n] int32


class PagePrefill:
    """Pieces of prompts, new ones first, then those that go on in their row. `own` are the rows' own pages, by slot."""

    def __init__(self, kept: Tensor, own: Sequence[list[int]], items: Sequence[Item]) -> None:
        lengths = [len(item.tokens) for item in items]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        bounds = starts.tolist()
        positions = torch.cat([torch.arange(i.start, i.start + n) for i, n in zip(items, lengths, strict=True)])
        places = torch.cat([_places(item, own) for item in items])
        tokens = torch.tensor([token for item in items for token in item.tokens])
        self.kept = kept
        self.wanted = upload(wanted_places(items), kept.device)
        self.tokens, self.positions, self.places = upload(torch.stack((tokens, positions, places)), kept.device)
        fresh = sum(not item.past for item in items)
        assert all(not item.past for item in items[:fresh])
        self.fresh = bounds[fresh]
        self.layout = plan(starts[: fresh + 1], kept.device)
        self.going_on = _own_rows(items[fresh:], own, kept.device) if fresh < len(items) else None
        users = users_of([(item.path, a, b) for item, a, b in zip(items, bounds[:-1], bounds[1:], strict=True)])
        self.shared = [
            _part(segment.kept, tokens, segment.start + tokens, stream, positions, kept.device)
            for segment, tokens, stream in users
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        keys, values = self.kept[:, layer]
        kv_write(q, k, v, *rotary, keys, values, self.places)
        if not self.shared and self.going_on is None:
            return attention(q, k, v, self.layout, window)
        parts = self._own(q, k, v, keys, values, window)
        for part in self.shared:
            # Unsplit: as a rule thousands of queries. Always, so that a query's bits do not depend on the others.
            parts = part.merge(q, keys, values, parts, window, split=0)
        return parts[0]

    def _own(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int) -> Parts:
        """Each token over its own piece, or over its own row."""
        new, parts = self.fresh, []
        if new:
            parts.append(suffix_attention(q[:new], k[:new], v[:new], self.layout, window))
        if self.going_on is not None:
            rows = self.going_on
            out, lse = paged_attention_lse(q[new:], keys, values, rows.table, rows.lengths, window)
            parts.append((out, lse.T))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


@dataclass(frozen=True)
class PageStep:
    """The newest token of each row. With a `common` part, `table` and `lengths` are of what is behind it."""

    kept: Tensor
    tokens: Tensor  # [n]
    positions: Tensor  # [n]
    places: Tensor  # [n] where the new keys go; -1 for a row that does not run
    table: Tensor  # [n, pages] int32
    lengths: Tensor  # [n] int32, the newest token counted; 0 for a row that does not run
    common: SharedPart | None = None
    wanted: None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        keys, values = self.kept[:, layer]
        kv_write(q, k, v, *rotary, keys, values, self.places)
        if self.common is None:
            return paged_attention(q, keys, values, self.table, self.lengths, window)
        out, lse = paged_attention_lse(q, keys, values, self.table, self.lengths, window)
        return self.common.merge(q, keys, values, (out, lse.T), window, SPLIT_TOKENS)[0]


def steady_step(kept: Tensor, table: Tensor, tokens: Tensor, positions: Tensor, active: Tensor) -> PageStep:
    """A step of all rows of `table`, of which only the `active` ones (bool) run.

    Nothing here depends on what the tensors hold, so it can be captured in a graph.
    """
    positions = positions * active  # a row that never ran may stand at -1
    places = _slots(table, positions).masked_fill(~active, -1)
    return PageStep(kept, tokens, positions, places, table, ((positions + 1) * active).int())


def sparse_step(
    kept: Tensor, table: Tensor, tokens: Tensor, positions: Tensor, nearest: int, paths: Sequence[Path]
) -> PageStep:
    """A step of rows that all run, on `paths`; `nearest` is the least of their positions."""
    places, lengths = _slots(table, positions), (positions + 1).int()
    first = common_segment(paths)
    if first is None:
        return PageStep(kept, tokens, positions, places, table, lengths)
    pages, shared = first
    behind = (positions - shared).int()
    part = SharedPart(pages, shared, slice(None), behind, nearest - shared)
    return PageStep(kept, tokens, positions, places, table[:, shared // PAGE :], lengths - shared, part)


def common_segment(paths: Sequence[Path]) -> tuple[slice, int] | None:
    """Pages and tokens of the segment that all paths begin with, if reading it once for all rows pays."""
    first = paths[0][:1]
    if len(paths) < 2 or not first or any(path[:1] != first for path in paths):
        return None
    segment, tokens = first[0]
    pages = _as_run(segment.kept)
    return (pages, tokens) if tokens >= COMMON_TOKENS and pages is not None else None


def _slots(table: Tensor, positions: Tensor) -> Tensor:
    """Where in the cache the tokens at `positions` [n] of the table's n rows are."""
    pages = table.gather(1, (positions // PAGE)[:, None])[:, 0]
    return pages.long() * PAGE + positions % PAGE


def _places(item: Item, own: Sequence[list[int]]) -> Tensor:
    """Where in the cache the item's tokens are kept; -1 where they are not."""
    count = len(item.tokens)
    if item.segment is None and item.slot is None:
        return torch.full((count,), -1)
    pages = torch.tensor(_pages_of(item, own))
    at = torch.arange(item.past, item.past + count)
    return pages[at // PAGE] * PAGE + at % PAGE


def _pages_of(item: Item, own: Sequence[list[int]]) -> list[int]:
    if item.segment is not None:
        return item.segment.kept
    assert item.slot is not None
    return own[item.slot]


def _own_rows(items: Sequence[Item], own: Sequence[list[int]], device: torch.device) -> OwnRows:
    counts = [len(item.tokens) for item in items]
    ends = [item.past + count for item, count in zip(items, counts, strict=True)]
    table = torch.zeros(len(items), -(-max(ends) // PAGE), dtype=torch.int32)
    for line, item in zip(table, items, strict=True):
        pages = _pages_of(item, own)[: line.numel()]
        line[: len(pages)] = torch.tensor(pages)
    lengths = torch.cat([torch.arange(end - count, end) + 1 for end, count in zip(ends, counts, strict=True)])
    row = torch.arange(len(items)).repeat_interleave(torch.tensor(counts))
    row, lengths = upload(torch.stack((row, lengths)), device)
    return OwnRows(upload(table, device)[row], lengths.int())


def _part(
    kept: list[int], tokens: int, end: int, stream: slice | Tensor, positions: Tensor, device: torch.device
) -> SharedPart:
    """The first `tokens` tokens of a segment on the pages `kept`, up to position `end` of the text."""
    pages = kept[: -(-tokens // PAGE)]
    run = _as_run(pages)
    behind = positions[stream] - end
    return SharedPart(
        upload(torch.tensor(pages), device) if run is None else run,
        tokens,
        stream if isinstance(stream, slice) else upload(stream, device),
        upload(behind.int(), device),
        int(behind.min()),
    )


def _as_run(pages: list[int]) -> slice | None:
    """Neighbouring pages as a slice: they need no gathering."""
    first, count = pages[0], len(pages)
    return slice(first, first + count) if pages == list(range(first, first + count)) else None
