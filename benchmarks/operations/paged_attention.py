"""Paged decode attention: full batches of one length, ragged batches, and few rows with a long past."""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import paged_attention as module
from bylaw.kernels.paged_attention import SPLIT_TOKENS, paged_attention, reference

PAGE = 16
RAGGED = tuple(64 * (1 + 37 * row % 61) for row in range(128))  # 64 to 3,904 tokens
# Lengths, query heads, heads of keys, head size.
SMALL = (((40, 7), 4, 2, 16),)
SHAPES = (
    ((2048,) * 64, 32, 8, 128),
    ((512,) * 256, 32, 8, 128),
    (RAGGED, 16, 8, 128),
    ((2048,) * 64, 14, 2, 64),
    ((2048,) * 64, 32, 32, 128),
    ((32768,) * 4, 32, 8, 128),
    ((2048,) * 64, 8, 4, 256),
)


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for lengths, heads, kv_heads, size in SMALL if small else SHAPES:
        rows = len(lengths)
        # Keys and values, the query and the result in bfloat16; the parts that splitting makes are our own affair.
        traffic = 4 * kv_heads * size * sum(lengths) + 4 * rows * heads * size
        make = partial(_inputs, lengths, heads, kv_heads, size)
        shape = {"B": rows, "S": max(lengths), "tokens": sum(lengths), "Nq": heads, "Nkv": kv_heads, "D": size}
        peers = {"torch": lambda **inputs: reference(**inputs)[0], **_varlen(lengths)}
        for name, split in (("paged_attention", SPLIT_TOKENS), ("paged_attention (filling)", 0)):
            yield Case(
                operation=name,
                shape=shape,
                inputs=make,
                ours=partial(paged_attention, split_tokens=split),
                forward=Floor(bytes=traffic, flops=4 * heads * size * sum(lengths)),
                peers=peers if split else {},
            )


def _varlen(lengths: Sequence[int]) -> dict[str, Any]:
    """torch's flash attention over pages, from torch 2.13 on; with one split a row does not depend on its batch."""
    if not torch.cuda.is_available():
        return {}
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    if not {"block_table", "seqused_k", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys():
        return {}

    def run(
        q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, splits: int | None
    ) -> Tensor:
        ones = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        return varlen_attn(
            q, keys, values, ones, None, 1, longest, enable_gqa=True, seqused_k=lengths, block_table=block_table,
            num_splits=splits,
        )  # fmt: skip  # pyright: ignore

    longest = max(lengths)
    return {"varlen_attn, 1 split": partial(run, splits=1), "varlen_attn": partial(run, splits=None)}


def launches() -> Iterator[Launch]:
    for heads, kv_heads, size in ((14, 2, 64), (32, 8, 128), (32, 32, 128), (8, 4, 256)):
        yield Launch(f"Nq={heads} Nkv={kv_heads} D={size}", partial(_launch, heads, kv_heads, size), tensor_cores=True)


def _launch(heads: int, kv_heads: int, size: int) -> None:
    inputs = _inputs((2048,) * 64, heads, kv_heads, size, torch.device("meta"), torch.bfloat16)
    module._forward(**inputs, window=0, split_tokens=SPLIT_TOKENS)


def _inputs(
    lengths: Sequence[int], heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    width = -(-max(lengths) // PAGE)
    pages = len(lengths) * width
    keys, values = torch.randn(2, pages, PAGE, kv_heads, size, device=device, dtype=dtype)
    return {
        "q": torch.randn(len(lengths), heads, size, device=device, dtype=dtype),
        "keys": keys,
        "values": values,
        "block_table": torch.randperm(pages, device=device).view(len(lengths), width).int(),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
    }
