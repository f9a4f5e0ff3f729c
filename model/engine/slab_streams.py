"""Packed streams over dense rows and shared segments: each token attends to its own row and to its path, in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.attention import attention, plan
from bylaw.kernels.dense_attention import dense_attention, hiding, merge_parts
from bylaw.kernels.merge_attention import lse_dtype
from bylaw.kernels.rope import rope
from bylaw.kernels.shared_prefix_attention import suffix_attention
from bylaw.model.engine.prefix import Path, Segment, length
from bylaw.model.engine.store import Item, wanted_places
from bylaw.model.transformer import Rotary

Slab = list[Tensor]
"""Keys or values of the rows, [rows, N_kv, slots, D] by layer."""
Users = list[tuple[Segment, int, slice | Tensor]]
"""Segments, how many of their tokens are seen, and the places in the stream that see them."""


def users_of(ranges: Sequence[tuple[Path, int, int]]) -> Users:
    """The segments on the paths of (path, first place, end), each with all places that stand on it."""
    found: dict[tuple[Segment, int], list[list[int]]] = {}
    for path, begin, end in ranges:
        for part in path:
            spans = found.setdefault(part, [])
            if spans and spans[-1][1] == begin:
                spans[-1][1] = end
            else:
                spans.append([begin, end])
    return [(*part, _places(spans)) for part, spans in found.items()]


def _places(spans: list[list[int]]) -> slice | Tensor:
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(begin, end) for begin, end in spans])


class SlabPrefill:
    """Pieces of prompts, new ones first, then those that go on in their row."""

    def __init__(self, keys: Slab, values: Slab, bases: Sequence[Path], items: Sequence[Item]) -> None:
        lengths = [len(item.tokens) for item in items]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        shift = torch.tensor([item.start for item in items]) - starts[:-1]
        self.keys, self.values = keys, values
        self.tokens = torch.tensor([token for item in items for token in item.tokens])
        self.positions = torch.arange(len(self.tokens)) + shift.repeat_interleave(torch.tensor(lengths))
        ranges = [(item, int(a), int(b)) for item, a, b in zip(items, starts[:-1], starts[1:], strict=True)]
        self.segments = [piece for piece in ranges if piece[0].segment is not None]
        self.going_on = [piece for piece in ranges if piece[0].past]
        fresh = len(items) - len(self.going_on)
        assert all(not item.past for item in items[:fresh])
        self.fresh = int(starts[fresh])
        self.wanted = wanted_places(items)
        self.layout = plan(starts[: fresh + 1])
        self.users = users_of([(item.path, a, b) for item, a, b in ranges])
        self.rows = _Places.of(bases, ranges, self.positions)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        q, k = rope(q, k, *rotary)
        self._keep(layer, k, v)
        new = slice(0, self.fresh)
        if not self.users and not self.going_on:
            return attention(q, k, v, self.layout, window)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype(q))
        out[new], fresh = suffix_attention(q[new], k[new], v[new], self.layout, window)
        lse[new] = fresh.T
        for item, begin, end in self.going_on:
            out[begin:end], lse[begin:end] = self._go_on(layer, item, q[begin:end], window)
        return add_segments(layer, q, out, lse, self.users, self.positions, window)

    def _keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        for item, begin, end in self.segments:
            assert item.segment is not None
            item.segment.kept[0, layer] = k[begin:end].transpose(0, 1)
            item.segment.kept[1, layer] = v[begin:end].transpose(0, 1)
        if self.rows is not None:
            stream, slots, columns = self.rows.stream, self.rows.slots, self.rows.columns
            self.keys[layer][slots, :, columns] = k[stream]
            self.values[layer][slots, :, columns] = v[stream]

    def _go_on(self, layer: int, item: Item, q: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """A piece over its row: what the row had, and the piece itself."""
        end = item.past + len(q)
        keys, values = (x[layer][item.slot, :, :end].unsqueeze(0) for x in (self.keys, self.values))
        places, columns = torch.arange(item.past, end)[:, None], torch.arange(end)
        seen = columns <= places
        if window:
            seen &= columns > places - window
        return over(q, keys, values, seen)


@dataclass(frozen=True)
class _Places:
    """Which tokens of the stream go to rows, and where there."""

    stream: Tensor
    slots: Tensor
    columns: Tensor

    @classmethod
    def of(cls, bases: Sequence[Path], ranges: Sequence[tuple[Item, int, int]], positions: Tensor) -> "_Places | None":
        kept = [(item.slot, begin, end) for item, begin, end in ranges if item.slot is not None]
        if not kept:
            return None
        stream = torch.cat([torch.arange(begin, end) for _, begin, end in kept])
        counts = torch.tensor([end - begin for _, begin, end in kept])
        slots = torch.tensor([slot for slot, _, _ in kept]).repeat_interleave(counts)
        shared = torch.tensor([length(bases[slot]) for slot, _, _ in kept]).repeat_interleave(counts)
        return cls(stream, slots, positions[stream] - shared)


class SlabStep:
    """The newest token of each running row. `own`: its place among the row's own tokens."""

    wanted = None

    def __init__(
        self,
        keys: Slab,
        values: Slab,
        tokens: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        own: list[int],
        users: Users,
    ) -> None:
        self.keys, self.values, self.tokens, self.users = keys, values, tokens, users
        self.positions, self.columns = torch.tensor(positions), torch.tensor(own)
        self.slots = torch.tensor(slots)
        # Of each new head in the slab as a list of heads of tokens: one copy, where indexing would make many.
        _, heads, columns, _ = keys[0].shape
        rows = self.slots[:, None] * heads + torch.arange(heads)
        self.places = (rows * columns + self.columns[:, None]).flatten()
        self.top, self.longest = max(slots) + 1, max(own) + 1
        # Rows that wait for their next turn lie between: their queries are nothing.
        self.gaps = self.top > len(slots)
        newest = torch.zeros(self.top, dtype=torch.int64).index_copy(0, self.slots, self.columns)
        self.newest = newest[:, None]
        self.even = not self.gaps and min(own) == max(own)
        self.biases: dict[int, Tensor | None] = {}  # by window, for all layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        q, k = rope(q, k, *rotary)
        keys, values = self.keys[layer], self.values[layer]
        for slab, new in ((keys, k), (values, v)):
            slab.view(-1, slab.shape[3]).index_copy_(0, self.places, new.flatten(0, 1))
        dense = q.new_zeros(self.top, *q.shape[1:]).index_copy_(0, self.slots, q) if self.gaps else q
        rows = dense.unflatten(1, (k.shape[1], -1))  # [n, N_kv, group, D]
        keys, values = (x[: self.top, :, : self.longest] for x in (keys, values))
        if window not in self.biases:
            self.biases[window] = self._bias(window, q)
        out, lse = dense_attention(rows, keys, values, self.biases[window])
        out, lse = out.flatten(1, 2), lse.flatten(1, 2)
        if self.gaps:
            out, lse = out[self.slots], lse[self.slots]
        return add_segments(layer, q, out, lse, self.users, self.positions, window)

    def _bias(self, window: int, q: Tensor) -> Tensor | None:
        if self.even and (not window or self.longest <= window):
            return None
        columns = torch.arange(self.longest)
        seen = columns <= self.newest
        if window:
            seen &= columns > self.newest - window
        return hiding(seen, q)[:, None, None]


def over(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`q` [t, N_q, D] over `keys` and `values` [1, N_kv, S, D], `seen` [t, S]: out [t, N_q, D], lse [t, N_q]."""
    kv_heads = keys.shape[1]
    rows = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [N_kv, group, t, D]
    group = rows.shape[1]
    bias = None if seen is None else hiding(seen.repeat(group, 1), q)
    out, lse = dense_attention(rows.flatten(1, 2)[None], keys, values, bias)
    out, lse = (x[0].unflatten(1, (group, -1)) for x in (out, lse))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def add_segments(
    layer: int, q: Tensor, out: Tensor, lse: Tensor, users: Users, positions: Tensor, window: int
) -> Tensor:
    """`out` and `lse` of the tokens' own rows, in place, with the segments that each stands on merged in."""
    for segment, tokens, places in users:
        keys, values = segment.kept[:, layer, :, :tokens].unsqueeze(1)  # [1, N_kv, tokens, D] each
        seen = None
        if window:
            columns = torch.arange(segment.start, segment.start + tokens)
            seen = columns > positions[places][:, None] - window
            if not seen.any():
                continue
            seen = None if seen.all() else seen
        part, part_lse = over(q[places], keys, values, seen)
        if seen is not None:  # some see nothing
            part_lse = part_lse.masked_fill(~seen.any(1, keepdim=True), float("-inf"))
        out[places], lse[places] = merge_parts(out[places], lse[places], part, part_lse)
    return out
