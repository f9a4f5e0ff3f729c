"""RMSNorm after a residual addition at the widths of Llama and Qwen models, and alone over the heads of Qwen3."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import rms_norm as module
from bylaw.kernels.rms_norm import add_reference, add_rms_norm, reference, rms_norm

EPS = 1e-6


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for tokens, size in [(64, 96)] if small else [(8192, 1024), (8192, 4096), (16384, 8192), (4096, 16384)]:
        yield _case("add_rms_norm", {"T": tokens, "H": size}, passes=4)
        yield _case("rms_norm", {"T": tokens, "H": size}, passes=2)
    for tokens, heads, size in [(8, 3, 16)] if small else [(8192, 32, 128), (8192, 16, 64)]:
        yield _case("rms_norm", {"T": tokens, "N": heads, "D": size}, passes=2)


def _case(operation: str, shape: dict[str, int], passes: int) -> Case:
    cells = 2  # bytes of one x in bfloat16
    for extent in shape.values():
        cells *= extent
    fused = operation == "add_rms_norm"
    plain = add_reference if fused else reference
    peers = {"torch": plain, "torch.compile": torch.compile(plain)}
    return Case(
        operation=operation,
        shape=shape,
        inputs=lambda device, dtype: _inputs(tuple(shape.values()), fused, device, dtype),
        ours=add_rms_norm if fused else rms_norm,
        forward=Floor(bytes=passes * cells),
        # Alone: x, grad_out and the result. After an addition also the gradient that arrives at the sum.
        backward=Floor(bytes=(4 if fused else 3) * cells),
        differentiable=("x", "residual", "weight") if fused else ("x", "weight"),
        peers=peers | ({} if fused else {"F.rms_norm": _torch_rms_norm}) | _liger(fused),
    )


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _liger(fused: bool) -> dict[str, Any]:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # pyright: ignore
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore
    except ImportError:
        return {}
    if fused:
        apply = LigerFusedAddRMSNormFunction.apply
        return {"liger": lambda x, residual, weight, eps: apply(x, residual, weight, eps, 0.0, "llama", False)}
    return {"liger": lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)}


def launches() -> Iterator[Launch]:
    for size in (128, 1024, 2048, 4096, 8192, 16384, 32768):
        yield Launch(f"H={size}", lambda size=size: _launch(size))


def _launch(size: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 8192 * max(1, 4096 // size)
    x, weight, rstd = empty(rows, size), empty(size), empty(rows, dtype=torch.float32)
    module._forward(x, weight, EPS)
    module._add_forward(x, x, weight, EPS)
    module._backward(x, None, x, weight, rstd)
    module._backward(x, x, x, weight, rstd)


def _inputs(shape: tuple[int, ...], fused: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {"x": torch.randn(shape, device=device, dtype=dtype)}
    if fused:
        tensors["residual"] = torch.randn(shape, device=device, dtype=dtype)
    return {**tensors, "weight": torch.randn(shape[-1], device=device, dtype=dtype), "eps": EPS}
