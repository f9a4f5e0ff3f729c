"""Decoding by CUDA graphs: a step is one launch, and all that it reads and changes stays on the GPU.

A graph is captured for a number of rows and a width of the table, both rounded up, over buffers that keep their
addresses. It moves the rows' state on by itself: newest tokens, positions, draws. The host writes only what changed
from step to step: which rows run, and new pages. What a kernel is given as a number is fixed by the capture, so
nothing in a step is a number but its sizes.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from bylaw.kernels.paged_attention import SPLIT_TOKENS
from bylaw.kernels.upload import upload
from bylaw.model.engine.draws import Drawn, Draws
from bylaw.model.engine.pages import Pages
from bylaw.model.engine.prefix import PAGE
from bylaw.model.lora import active_stamp
from bylaw.model.transformer import Transformer

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Makes of some work, without doing it, a call that does it."""
LEAST_WIDTH = SPLIT_TOKENS // PAGE  # of the table: less is no less work for paged_attention


class CudaGraphs:
    """Captures on a stream of its own; its graphs share one pool of memory, as only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the GPU meanwhile, as a loader that pins memory, is no business of the capture.
        settings = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), _uncollected(), torch.cuda.graph(graph, **settings):
            work()
        return graph.replay


@contextmanager
def _uncollected() -> Iterator[None]:
    """The garbage collector waits: a graph that it found and destroyed meanwhile would break the capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class GraphDecoder:
    """Steps the rows of `store`. `capturing` is called for a new way to capture whenever old graphs are dropped."""

    def __init__(self, model: Transformer, store: Pages, rows: int, capturing: Callable[[], Capture]) -> None:
        self.model, self.store, self.rows, self.capturing = model, store, rows, capturing
        self.draws = Draws(rows, model.device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.logprobs = torch.zeros(rows, device=model.device)
        self.buckets, self.widths = row_buckets(rows), table_widths(store.width)
        self._running: tuple[int, ...] = ()
        self._enabled, self._addresses = True, ()
        self._drop()

    def begin(self, graphs: bool) -> None:
        self._enabled = graphs
        addresses = tuple(x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers()))
        if not graphs or addresses != self._addresses:
            self._drop()
            self._addresses = addresses

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> Drawn:
        self.store.flush()
        self._activate(tuple(slots))
        rows = self.buckets[bisect_left(self.buckets, slots[-1] + 1)]
        width = self.widths[bisect_left(self.widths, max(positions) // PAGE + 1)]
        self._advance(rows, width)
        return Drawn.of(self.tokens[:rows], self.logprobs[:rows], slots)

    def _activate(self, slots: tuple[int, ...]) -> None:
        if slots != self._running:
            active = torch.zeros(self.rows, dtype=torch.bool)
            active[list(slots)] = True
            self.active.copy_(upload(active, self.model.device))
            self._running = slots

    def _advance(self, rows: int, width: int) -> None:
        size = active_stamp(self.model), rows, width  # what runs, and how it is scaled, is fixed at the capture
        if not self._enabled or size not in self._replays:
            # The first time compiles kernels and allocates workspaces, which a capture must not.
            self._replays[size] = None
            self._work(rows, width)
            return
        replay = self._replays[size]
        if replay is None:
            replay = self._replays[size] = self._capture(lambda: self._work(rows, width))
        replay()

    def _work(self, rows: int, width: int) -> None:
        active, newest = self.active[:rows], self.draws.tokens[:rows]
        stream = self.store.steady(newest, self.draws.positions(rows), active, width)
        tokens, logprobs = self.draws.advance(self.model.logits(self.model(stream)), active)
        self.tokens[:rows].copy_(tokens)
        self.logprobs[:rows].copy_(logprobs)

    def _drop(self) -> None:
        # A pool all of whose graphs are gone cannot be captured into again.
        self._replays: dict[tuple[str, int, int], Work | None] = {}
        self._capture = self.capturing()


def row_buckets(rows: int) -> list[int]:
    """Batch sizes that graphs are captured for: 1, 2, 4, then multiples of 8, up to `rows`."""
    return [*(size for size in (1, 2, 4, *range(8, rows, 8)) if size < rows), rows]


def table_widths(pages: int) -> list[int]:
    """Widths of the table that graphs are captured for: powers of 2, up to `pages`."""
    widths, width = [], LEAST_WIDTH
    while width < pages:
        widths.append(width)
        width *= 2
    return [*widths, pages]
