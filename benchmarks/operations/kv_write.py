"""Rotary embedding and the write into pages: a decode step, and a prefill."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import kv_write as module
from bylaw.kernels.kv_write import kv_write, reference

PAGE = 16
# Tokens, query heads, heads of keys, head size: Qwen3-0.6B, and Llama 3.1 8B.
SMALL = ((8, 4, 2, 16),)
SHAPES = ((64, 16, 8, 128), (8192, 16, 8, 128), (64, 32, 8, 128), (8192, 32, 8, 128))


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for tokens, heads, kv_heads, size in SMALL if small else SHAPES:
        read, keys = 2 * tokens * (heads + 2 * kv_heads) * size, 2 * tokens * kv_heads * size  # bytes in bfloat16
        yield Case(
            operation="kv_write",
            shape={"T": tokens, "Nq": heads, "Nkv": kv_heads, "D": size},
            inputs=lambda device, dtype, s=(tokens, heads, kv_heads, size): _inputs(*s, device, dtype),
            ours=_ours,
            # Read all; write the queries and keys in place, and keys and values to the cache; cos and sin.
            forward=Floor(bytes=2 * read + keys + 8 * tokens * size),
            peers={"torch": _torch},
        )


def launches() -> Iterator[Launch]:
    for size in (64, 128, 256):
        yield Launch(f"D={size}", lambda size=size: _launch(size))


def _launch(size: int) -> None:
    inputs = _inputs(8192, 32, 8, size, torch.device("meta"), torch.bfloat16)
    module._write(**inputs)


def _ours(keys: Tensor, values: Tensor, backend: str = "auto", **rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv_write(keys=keys, values=values, backend=backend, **rest)
    return rest["q"], keys, values


def _torch(keys: Tensor, values: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    reference(keys=keys, values=values, **rest)
    return rest["q"], keys, values


def _inputs(
    tokens: int, heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    pages = tokens // PAGE + 8
    angles = torch.randn(tokens, size // 2, device=device).repeat(1, 2)
    keys, values = torch.zeros(2, pages, PAGE, kv_heads, size, device=device, dtype=dtype)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size, device=device, dtype=dtype)
    return {
        **dict(zip("qkv", qkv.split((heads, kv_heads, kv_heads), dim=1), strict=True)),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "keys": keys,
        "values": values,
        "slots": torch.randperm(pages * PAGE, device=device)[:tokens],
    }
