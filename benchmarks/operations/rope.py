"""Rotary embedding of queries and keys that are slices of one projection, at the shapes of Llama and Qwen models."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import rope as module
from bylaw.kernels.rope import reference, rope

# (Nq, Nk, D): Llama 3.1 8B and Qwen3 8B, Qwen2.5 0.5B, Llama 3.1 70B, Gemma-sized heads
SHAPES = [(32, 8, 128), (14, 2, 64), (64, 8, 128), (16, 8, 256)]


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for tokens, shape in [(32, (4, 2, 16))] if small else [(8192, shape) for shape in SHAPES]:
        q_heads, k_heads, size = shape
        floor = Floor(bytes=2 * 2 * tokens * (q_heads + k_heads) * size + 2 * 4 * tokens * size // 2)
        yield Case(
            operation="rope",
            shape={"T": tokens, "Nq": q_heads, "Nk": k_heads, "D": size},
            inputs=lambda device, dtype, t=tokens, s=shape: _inputs(t, *s, device, dtype),
            ours=rope,
            forward=floor,
            backward=floor,
            differentiable=("q", "k"),
            peers={"torch": _torch, "torch.compile": torch.compile(_torch)} | _liger(),
        )


def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference(q, cos, sin), reference(k, cos, sin)


def _liger() -> dict[str, Any]:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore
    except ImportError:
        return {}

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        return tuple(x[0].transpose(0, 1) for x in turned)

    return {"liger": run}


def launches() -> Iterator[Launch]:
    for shape in SHAPES[:2] + SHAPES[3:]:
        yield Launch("Nq={}, Nk={}, D={}".format(*shape), lambda shape=shape: _launch(*shape))


def _launch(q_heads: int, k_heads: int, size: int) -> None:
    tensors = _inputs(8192, q_heads, k_heads, size, torch.device("meta"), torch.bfloat16)
    module._rotate(**tensors)
    module._rotated(**tensors, inverse=False)
    q, k = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (tensors["q"], tensors["k"]))
    module._rotated(q, k, tensors["cos"], tensors["sin"], True)


def _inputs(
    tokens: int, q_heads: int, k_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    qkv = torch.randn(tokens, q_heads + 2 * k_heads, size, device=device, dtype=dtype)
    angles = torch.arange(tokens, device=device)[:, None] * 1e4 ** -(
        torch.arange(size // 2, device=device, dtype=torch.float32) * 2 / size
    )
    angles = torch.cat((angles, angles), dim=1)
    return {
        "q": qkv[:, :q_heads],
        "k": qkv[:, q_heads : q_heads + k_heads],
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
