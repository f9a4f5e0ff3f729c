"""Attention over a common prefix: scoring many short suffixes, and a decode step over a prefix alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import merge_attention as merging
from bylaw.kernels import shared_prefix_attention as module
from bylaw.kernels.attention import attention, plan
from bylaw.kernels.layout import Layout
from bylaw.kernels.paged_attention import SPLIT_TOKENS
from bylaw.kernels.shared_prefix_attention import prefix_attention, reference, reference_prefix, shared_prefix_attention

# Prefix, sequences, tokens of each, query heads, heads of keys, head size.
SMALL = ((40, 3, 9, 4, 2, 16),)
SHAPES = (
    (2048, 64, 128, 32, 8, 128),
    (1024, 128, 64, 16, 8, 128),
    (4096, 16, 256, 32, 8, 128),
    (2048, 64, 128, 14, 2, 64),
)
# Prefix, rows, query heads, heads of keys, head size.
SMALL_STEPS = ((70, 3, 4, 2, 16),)
STEPS = ((2048, 64, 32, 8, 128), (8192, 8, 32, 8, 128), (2048, 256, 16, 8, 128))


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for prefix, rows, length, heads, kv_heads, size in SMALL if small else SHAPES:
        tokens = rows * length
        seen = tokens * prefix + rows * length * (length + 1) // 2  # pairs of a query and a key
        yield Case(
            operation="shared_prefix_attention",
            shape={"P": prefix, "B": rows, "S": length, "Nq": heads, "Nkv": kv_heads, "D": size},
            inputs=partial(_inputs, prefix, rows, length, heads, kv_heads, size),
            ours=shared_prefix_attention,
            forward=Floor(
                bytes=4 * tokens * (heads + kv_heads) * size + 4 * prefix * kv_heads * size,
                flops=4 * heads * size * seen,
            ),
            peers={"torch": reference, "attention, prefix repeated": _repeated},
        )
    for prefix, rows, heads, kv_heads, size in SMALL_STEPS if small else STEPS:
        yield Case(
            operation="prefix_attention",
            shape={"P": prefix, "B": rows, "Nq": heads, "Nkv": kv_heads, "D": size},
            inputs=partial(_step, prefix, rows, heads, kv_heads, size),
            ours=prefix_attention,
            forward=Floor(
                bytes=4 * rows * heads * size + 4 * prefix * kv_heads * size, flops=4 * heads * size * rows * prefix
            ),
            peers={"torch": reference_prefix},
        )


def _repeated(q: Tensor, k: Tensor, v: Tensor, layout: Layout, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """What has to be done without this operation: the prefix stands before every sequence, its queries too."""
    prefix, rows = len(prefix_k), len(layout.lengths)
    length = layout.tokens // rows

    def behind(first: Tensor, x: Tensor) -> Tensor:
        return torch.cat((first.expand(rows, *first.shape), x.unflatten(0, (rows, length))), dim=1).flatten(0, 1)

    whole = plan(torch.arange(rows + 1, dtype=torch.int32) * (prefix + length), q.device)
    queries = behind(q.new_zeros(prefix, *q.shape[1:]), q)
    out = attention(queries, behind(prefix_k, k), behind(prefix_v, v), whole)
    return out.unflatten(0, (rows, prefix + length))[:, prefix:].flatten(0, 1)


def launches() -> Iterator[Launch]:
    for heads, kv_heads, size in ((14, 2, 64), (32, 8, 128), (8, 4, 256)):
        for split in (0, SPLIT_TOKENS):
            name = f"Nq={heads} Nkv={kv_heads} D={size}" + (f" split={split}" if split else "")
            yield Launch(name, partial(_launch, heads, kv_heads, size, split), tensor_cores=True)


def _launch(heads: int, kv_heads: int, size: int, split: int) -> None:
    inputs = _step(2048, 64 if split else 8192, heads, kv_heads, size, torch.device("meta"), torch.bfloat16)
    places = torch.empty(len(inputs["q"]), dtype=torch.int32, device="meta")
    module._prefix(**inputs, places=places, window=4096, split_tokens=split)
    out, lse = module._prefix(**inputs, places=None, window=0, split_tokens=split)
    merging._merge(out, lse, out, lse)


def _inputs(
    prefix: int, rows: int, length: int, heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    k, v = torch.randn(2, rows * length, kv_heads, size, device=device, dtype=dtype)
    layout = plan(torch.arange(rows + 1, dtype=torch.int32) * length, device)
    return {**_step(prefix, rows * length, heads, kv_heads, size, device, dtype), "k": k, "v": v, "layout": layout}


def _step(
    prefix: int, rows: int, heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    prefix_k, prefix_v = torch.randn(2, prefix, kv_heads, size, device=device, dtype=dtype)
    q = torch.randn(rows, heads, size, device=device, dtype=dtype)
    return {"q": q, "prefix_k": prefix_k, "prefix_v": prefix_v}
