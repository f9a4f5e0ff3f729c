"""The cache on a CPU: rows in one dense slab, shared segments each in a tensor of their own. Nothing is ever gathered.

A step of decoding reads the first columns of the first rows; a segment is read once for all rows on it, as one matrix
product, and the two are merged by log-sum-exp (slab_streams.py).
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bylaw.model.engine.prefix import PAGE, Path, Segment, length
from bylaw.model.engine.slab_streams import SlabPrefill, SlabStep, Users, users_of
from bylaw.model.engine.store import Item, kv_heads
from bylaw.model.transformer import Transformer

# A prefix is shared when this many products (of a layer) need not be computed again ...
WORTH_PRODUCTS = 10_000_000
# ... and stays in its place when a step of decoding reads this much less; below, a further part costs more.
IN_PLACE_BYTES = 1 << 20
# A run of this size is a segment even for one text: in its row, it would lengthen what is read of every other row.
LONG_BYTES = 1 << 19


class Slabs:
    """A `Store` on dense memory: keys and values are [rows, N_kv, slots, D] by layer, segments [N_kv, tokens, D]."""

    def __init__(self, model: Transformer, pages: int, rows: int) -> None:
        """At most `pages` pages; as a rule, room for `rows` rows is made at once."""
        config, weight = model.config, model.embed.weight
        self.pages, self.goal = pages, rows
        self.layers, self.heads, self.size = config.num_layers, kv_heads(model), config.head_dim
        self.dtype, self.device = weight.dtype, weight.device
        self.token_bytes = 2 * self.heads * self.size * self.dtype.itemsize  # of a layer
        self.products = sum(p.numel() for p in model.blocks[0].parameters())  # of a layer, for a token
        self.keys = [self._empty(0, 0) for _ in range(self.layers)]
        self.values = [self._empty(0, 0) for _ in range(self.layers)]
        self.segment_pages = 0
        self.bases: list[Path] = []
        self._users: tuple[tuple[int, ...], Users] | None = None

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def room(self, slot: int) -> int:
        return self.slots

    def worth(self, users: int, tokens: int) -> bool:
        return self._long(tokens) or (users - 1) * tokens * self.products >= WORTH_PRODUCTS

    def in_place(self, users: int, tokens: int) -> bool:
        return self._long(tokens) or (users - 1) * tokens * self.token_bytes >= IN_PLACE_BYTES

    def _long(self, tokens: int) -> bool:
        return tokens * self.token_bytes >= LONG_BYTES

    def free_pages(self) -> int:
        return self.pages - self.segment_pages - self.rows * self.slots // PAGE

    def reserve(self, tokens: Sequence[int], spans: Sequence[int], extra: int = 0) -> bool:
        rows, need = len(tokens), _whole_pages(max(tokens, default=0))
        if rows <= self.rows and need <= self.slots and extra <= self.free_pages():
            return True
        # While a layer grows, its old keys are there beside the new ones.
        old = -(-self.rows * self.slots // PAGE // (2 * self.layers)) if self.bases else 0
        left = self.pages - self.segment_pages - extra - old
        span, goal = max(need, _whole_pages(max(spans, default=0))), max(rows, self.goal)
        half = left // 2  # the generous sizes leave room for shared prefixes
        for count, slots, limit in (
            (goal, span, half),
            (goal, min(span, _whole_pages(need + need // 2)), half),
            (rows, span, left),
            (rows, min(span, _whole_pages(need + need // 4)), left),
            (rows, need, left),
        ):
            if count * slots // PAGE <= limit:
                self._resize(count, slots)
                return True
        return False

    def place(self, segment: Segment) -> None:
        assert segment.pages <= self.free_pages()
        self.segment_pages += segment.pages
        shape = (2, self.layers, self.heads, segment.pages * PAGE, self.size)
        segment.kept = torch.empty(shape, dtype=self.dtype, device=self.device)

    def discard(self, segment: Segment) -> None:
        if segment.kept is not None:
            self.segment_pages -= segment.pages
            segment.kept = None

    def open(self, slot: int, path: Path) -> None:
        assert slot == len(self.bases) < self.rows
        self.bases.append(path)
        self._users = None

    def take_over(self, slot: int, path: Path) -> None:
        begin = 0
        for segment, tokens in path[len(self.bases[slot]) :]:
            for layer in range(self.layers):
                for slab, kept in zip((self.keys, self.values), segment.kept, strict=True):
                    slab[layer][slot, :, begin : begin + tokens] = kept[layer, :, :tokens]
            begin += tokens

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        for slab in (*self.keys, *self.values):
            for target in targets:
                slab[target, :, :tokens] = slab[source, :, :tokens]

    def move(self, source: int, target: int, tokens: int) -> None:
        self.copy(source, [target], tokens)
        self.bases[target] = self.bases[source]
        self._users = None

    def close(self, slot: int) -> None:
        assert slot == len(self.bases) - 1
        self.bases.pop()
        self._users = None

    def prefill(self, items: Sequence[Item]) -> SlabPrefill:
        return SlabPrefill(self.keys, self.values, self.bases, items)

    def step(self, tokens: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SlabStep:
        own = [position - length(self.bases[slot]) for slot, position in zip(slots, positions, strict=True)]
        if self._users is None or self._users[0] != tuple(slots):  # the same from step to step, as a rule
            self._users = tuple(slots), users_of([(self.bases[slot], i, i + 1) for i, slot in enumerate(slots)])
        return SlabStep(self.keys, self.values, tokens, slots, positions, own, self._users[1])

    def check(self, rows: int, segments: Collection[Segment]) -> None:
        assert len(self.bases) == rows <= self.rows and self.free_pages() >= 0
        assert self.segment_pages == sum(segment.pages for segment in segments)
        assert all(x.shape == self.keys[0].shape for x in (*self.keys, *self.values))
        assert self.slots % PAGE == 0

    def _resize(self, rows: int, slots: int) -> None:
        if not self.bases:
            self.keys, self.values = ([self._empty(0, 0)] * self.layers for _ in range(2))
        for slabs in (self.keys, self.values):
            for layer, old in enumerate(slabs):
                slabs[layer] = self._empty(rows, slots)
                count, columns = len(self.bases), min(slots, old.shape[2])
                slabs[layer][:count, :, :columns] = old[:count, :, :columns]

    def _empty(self, rows: int, slots: int) -> Tensor:
        # Zeros, as 0 times a masked value that happens to be NaN is NaN; the system gives them lazily.
        return torch.zeros(rows, self.heads, slots, self.size, dtype=self.dtype, device=self.device)


def _whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE
