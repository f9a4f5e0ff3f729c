"""The cache on a GPU: pages of PAGE tokens in one piece of memory, and a table that says which pages are a row's.

Rows leave what they share in its place: their lines of the table name the pages of their path, then their own. Pages
are given out when they are needed, so memory grows with use.
"""

from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bylaw.kernels.upload import upload
from bylaw.model.engine.page_streams import PagePrefill, PageStep, sparse_step, steady_step
from bylaw.model.engine.prefix import PAGE, Path, Segment, length
from bylaw.model.engine.store import Item, kv_heads
from bylaw.model.transformer import Transformer

LONG_TOKENS = 256  # a run this long is a segment even for one text: another may come that begins like it


class Pool:
    """Which of `count` pages are free."""

    def __init__(self, count: int) -> None:
        self.map = bytearray(b"\1" * count)  # 1: free. bytes.find scans it faster than a list could be kept sorted
        self.free = count

    def run(self, count: int) -> list[int]:
        """`count` pages that lie one behind the other, if there are such; else any."""
        first = self.map.find(b"\1" * count)
        if first < 0:
            return [self.single() for _ in range(count)]
        self._take(pages := list(range(first, first + count)))
        return pages

    def single(self) -> int:
        """A page from the end, so that runs stay whole at the beginning."""
        page = self.map.rfind(b"\1")
        assert page >= 0, "no page is free"
        self._take([page])
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert not self.map[page], f"page {page} is free already"
            self.map[page] = 1
        self.free += len(pages)

    def _take(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.map[page] = 0
        self.free -= len(pages)


class Pages:
    """A `Store` on pages. `kept`: keys and values [2, layers, P, PAGE, N_kv, D]; a segment keeps its page ids."""

    def __init__(self, model: Transformer, pages: int, rows: int) -> None:
        """`pages` pages, allocated at the first use, for at most `rows` rows."""
        config, weight = model.config, model.embed.weight
        self.pages, self.pool = pages, Pool(pages)
        self.shape = (2, config.num_layers, pages, PAGE, kv_heads(model), config.head_dim)
        self.dtype, self.device = weight.dtype, weight.device
        self.width = min(pages, -(-config.max_position_embeddings // PAGE))  # of a row's line
        self.table = torch.zeros(rows, self.width, dtype=torch.int32, device=self.device)
        self.bases: list[Path] = []
        self.own: list[list[int]] = [[] for _ in range(rows)]
        self.changes: dict[int, int] = {}  # of the table: place in it, page; not on the device yet

    @cached_property
    def kept(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def room(self, slot: int) -> int:
        return len(self.own[slot]) * PAGE

    def worth(self, users: int, tokens: int) -> bool:
        return users > 1 or tokens >= LONG_TOKENS

    def in_place(self, users: int, tokens: int) -> bool:
        return True

    def free_pages(self) -> int:
        return self.pool.free

    def reserve(self, tokens: Sequence[int], spans: Sequence[int], extra: int = 0) -> bool:
        need = [_pages(count) for count in tokens]
        more = [max(0, count - len(own)) for count, own in zip(need, self.own, strict=False)]
        # When rows join, each that can grow keeps a page ahead: else the first page that one asks for would send back
        # a row that has just been computed.
        joining = len(tokens) > len(self.bases)
        ahead = sum(_pages(span) > count for span, count in zip(spans, need, strict=True)) if joining else 0
        if sum(more) + ahead + extra > self.pool.free:
            return False
        for slot, count in enumerate(more):
            first = len(self.own[slot])
            self.own[slot] += [self.pool.single() for _ in range(count)]
            if slot < len(self.bases):
                self._write(slot, first)
        return True

    def place(self, segment: Segment) -> None:
        assert segment.pages <= self.pool.free
        segment.kept = self.pool.run(segment.pages)

    def discard(self, segment: Segment) -> None:
        if segment.kept is not None:
            self.pool.give_back(segment.kept)
            segment.kept = None

    def open(self, slot: int, path: Path) -> None:
        assert slot == len(self.bases)
        self.bases.append(path)
        for column, page in enumerate(_pages_of(path)):
            self.changes[slot * self.width + column] = page
        self._write(slot, 0)

    def take_over(self, slot: int, path: Path) -> None:
        assert path == self.bases[slot], "all that is shared stays in its place"

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        count = _pages(tokens)
        pairs = [pair for t in targets for pair in zip(self.own[source][:count], self.own[t][:count], strict=True)]
        sources, copies = upload(torch.tensor(pairs).T.contiguous(), self.device)
        self.kept[:, :, copies] = self.kept[:, :, sources]

    def move(self, source: int, target: int, tokens: int) -> None:
        self.bases[target] = self.bases[source]
        self.own[target], self.own[source] = self.own[source], self.own[target]
        for column, page in enumerate(self._line(target)):
            self.changes[target * self.width + column] = page

    def close(self, slot: int) -> None:
        assert slot == len(self.bases) - 1
        self.bases.pop()
        self.pool.give_back(self.own[slot])
        self.own[slot] = []

    def prefill(self, items: Sequence[Item]) -> PagePrefill:
        return PagePrefill(self.kept, self.own, items)

    def step(self, tokens: Tensor, slots: Sequence[int], positions: Sequence[int]) -> PageStep:
        self.flush()
        rows, newest = upload(torch.tensor([list(slots), list(positions)]), self.device)
        dense = len(slots) == slots[-1] + 1
        width = max(positions) // PAGE + 1
        table = self.table[: len(slots), :width] if dense else self.table[rows, :width]
        paths = [self.bases[slot] for slot in slots]
        return sparse_step(self.kept, table, tokens, newest, min(positions), paths)

    def steady(self, tokens: Tensor, positions: Tensor, active: Tensor, width: int) -> PageStep:
        """A step of the first rows, of which the `active` ones run; for a graph, after `flush`.

        `tokens`, `positions` and `active` (bool) are of one length; `width` pages hold the longest of them.
        """
        return steady_step(self.kept, self.table[: len(tokens), :width], tokens, positions, active)

    def flush(self) -> None:
        """Bring what changed in the table to the device."""
        if self.changes:
            places, pages = upload(torch.tensor([list(self.changes), list(self.changes.values())]), self.device)
            self.table.view(-1)[places] = pages.int()
            self.changes.clear()

    def check(self, rows: int, segments: Collection[Segment]) -> None:
        assert len(self.bases) == rows and not any(self.own[rows:])
        held = [page for pages in (*self.own, *(s.kept for s in segments)) for page in pages]
        free = [page for page, mark in enumerate(self.pool.map) if mark]
        assert len(free) == self.pool.free and sorted([*held, *free]) == list(range(self.pages))
        table = self.table.flatten().tolist()
        for place, page in self.changes.items():
            table[place] = page
        for slot in range(rows):
            line = self._line(slot)
            assert table[slot * self.width :][: len(line)] == line

    def _line(self, slot: int) -> list[int]:
        return [*_pages_of(self.bases[slot]), *self.own[slot]]

    def _write(self, slot: int, first: int) -> None:
        """The row's own pages from the `first` on into its line."""
        begin = slot * self.width + length(self.bases[slot]) // PAGE
        for column, page in enumerate(self.own[slot][first:], start=begin + first):
            self.changes[column] = page


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _pages_of(path: Path) -> list[int]:
    return [page for segment, tokens in path for page in segment.kept[: tokens // PAGE]]
