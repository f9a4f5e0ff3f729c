"""Training attention over packed sequences: one long text, a batch of unequal dialogues, sliding windows."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import flash
from bylaw.kernels.attention import attention, plan, reference
from bylaw.kernels.attention_library import LIBRARIES, call, load
from bylaw.kernels.flash_backward import backward
from bylaw.kernels.layout import Layout

# Lengths of the sequences, query heads, heads of keys, head size, window.
Shape = tuple[Sequence[int], int, int, int, int]
DIALOGUES = (61, 1930, 402, 777, 128, 1290, 93, 511, 2048, 350, 602)
SMALL: tuple[Shape, ...] = (((40, 24), 4, 2, 16, 0), ((20, 20, 20), 4, 2, 16, 0), ((5, 70, 1), 2, 2, 16, 8))
CHECKED = (1030, 1, 63, 65)  # instead of lengths whose scores in float64 would not fit
SHAPES: tuple[Shape, ...] = (
    ((2048,) * 8, 32, 8, 128, 0),
    ((16384,), 32, 8, 128, 0),
    (DIALOGUES, 32, 8, 128, 0),
    (DIALOGUES, 14, 2, 64, 0),
    ((8192, 8192), 32, 8, 128, 1024),
    ((4096,) * 4, 8, 4, 256, 0),
)


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    if small:
        yield from (_case(shape, _torch_peers(shape)) for shape in SMALL)
        return
    for shape in SHAPES:
        libraries = _libraries(shape[3])
        yield _case(shape, _torch_peers(shape) | libraries, check=_case((CHECKED, *shape[1:]), libraries))


def _case(shape: Shape, peers: dict[str, Callable[..., Tensor]], check: Case | None = None) -> Case:
    lengths, heads, kv_heads, size, window = shape
    tokens, pairs = sum(lengths), sum(_pairs(length, window) for length in lengths)
    cells = tokens * (2 * heads + 2 * kv_heads) * size  # of q, k, v and the output
    return Case(
        operation="attention",
        shape={"T": tokens, "B": len(lengths), "Nq": heads, "Nkv": kv_heads, "D": size, "W": window},
        inputs=partial(_inputs, shape),
        ours=attention,
        forward=Floor(bytes=2 * cells + 4 * tokens * heads, flops=4 * heads * size * pairs),
        backward=Floor(bytes=4 * cells + 4 * tokens * heads, flops=10 * heads * size * pairs),
        differentiable=("q", "k", "v"),
        peers=peers,
        check=check,
    )


def launches() -> Iterator[Launch]:
    for size in (64, 128, 256):
        yield Launch(f"D={size}", partial(_launch, size), tensor_cores=True)


def _launch(size: int) -> None:
    tokens, heads, kv_heads = 8192, 32, 8

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    layout = plan(torch.arange(0, tokens + 1, 2048), "meta")
    q, k = meta(tokens, heads, size), meta(tokens, kv_heads, size)
    v = meta(tokens, heads + 2 * kv_heads, size)[:, -kv_heads:]  # as the model has it: heads of the fused projection
    out, lse = meta(tokens, heads, size), meta(heads, tokens, dtype=torch.float32)
    flash._forward(q, k, v, layout.cu_seqlens, layout.tiles, 0)
    backward(q, k, v, out, lse, out, None, layout.cu_seqlens, layout.tiles, 0)


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    lengths, heads, kv_heads, size, window = shape
    q, k, v = (torch.randn(sum(lengths), n, size, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return {"q": q, "k": k, "v": v, "layout": plan(torch.tensor([0, *lengths]).cumsum(0), device), "window": window}


def _pairs(length: int, window: int) -> int:
    """How many keys the queries of a sequence see, all together."""
    full = length * (length + 1) // 2
    unseen = length - window if window else 0
    return full - max(unseen, 0) * (max(unseen, 0) + 1) // 2


def _torch_peers(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {"torch": reference}
    if len(set(shape[0])) == 1 and not shape[4]:
        peers["scaled_dot_product_attention"] = partial(_equal_lengths, len(shape[0]))
    return peers


def _equal_lengths(rows: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> Tensor:
    """A dense batch in no need of padding: the best case of torch's own attention."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def _libraries(size: int) -> dict[str, Callable[..., Tensor]]:
    """Every library that is installed and serves both passes here."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return {}
    major, _ = torch.cuda.get_device_capability()
    there = (library for library in LIBRARIES if library.serves(major, size) and not isinstance(load(library), str))
    return {library.name: partial(_library, library.name) for library in there}


def _library(name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> Tensor:
    return call(name, q, k, v, layout.cu_seqlens, layout.max_seqlen, window)
