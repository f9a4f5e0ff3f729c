"""A step of decoding: one token more for each running row."""

from collections.abc import Sequence
from typing import Protocol

import torch

from bylaw.kernels.backend import choose
from bylaw.model.engine.draws import Drawn, Draws
from bylaw.model.engine.graphs import CudaGraphs, GraphDecoder
from bylaw.model.engine.pages import Pages
from bylaw.model.engine.slabs import Slabs
from bylaw.model.engine.store import Store
from bylaw.model.transformer import Transformer


class Decoder(Protocol):
    """What draws for the rows of a store, and steps them on."""

    draws: Draws

    def begin(self, graphs: bool) -> None:
        """A call begins, perhaps over other parameters; `graphs`: they stay where they are in memory after it."""
        ...

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> Drawn:
        """The next token of each row at `slots`, which rise; its newest stands at `positions` of its text."""
        ...


class PlainDecoder:
    """Launches each operation by itself."""

    def __init__(self, model: Transformer, store: Store, rows: int) -> None:
        self.model, self.store, self.draws = model, store, Draws(rows, model.device)

    def begin(self, graphs: bool) -> None:
        pass

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> Drawn:
        stream = self.store.step(self.draws.newest(slots), slots, positions)
        return self.draws.draw(slots, self.model.logits(self.model(stream)))


def make_store(model: Transformer, pages: int, rows: int) -> Store:
    """Where keys and values of `rows` rows are kept, in at most `pages` pages: Pages for the kernels, else Slabs."""
    kernels = choose("paged_attention", "auto", model.embed.weight) == "triton"
    return Pages(model, pages, rows) if kernels else Slabs(model, pages, rows)


def make_decoder(model: Transformer, store: Store, rows: int, graphs: bool) -> Decoder:
    """CUDA graphs where there are any, and they are wanted."""
    if graphs and isinstance(store, Pages) and model.device.type == "cuda" and torch.version.hip is None:
        return GraphDecoder(model, store, rows, lambda: CudaGraphs(model.device))
    return PlainDecoder(model, store, rows)
