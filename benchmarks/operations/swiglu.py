"""SwiGLU at the widths of Llama and Qwen models."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import swiglu as module
from bylaw.kernels.swiglu import reference, swiglu


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for tokens, size in [(64, 96)] if small else [(8192, 4864), (8192, 14336), (16384, 8192)]:
        cell = 2 * tokens * size  # bytes of one [T, I] in bfloat16
        yield Case(
            operation="swiglu",
            shape={"T": tokens, "I": size},
            inputs=lambda device, dtype, t=tokens, i=size: _inputs(t, i, device, dtype),
            ours=swiglu,
            forward=Floor(bytes=3 * cell),
            backward=Floor(bytes=5 * cell),
            differentiable=("gate_up",),
            peers={"torch": reference, "torch.compile": torch.compile(reference)},
        )


def launches() -> Iterator[Launch]:
    def run() -> None:
        gate_up = torch.empty(8192, 2 * 14336, dtype=torch.bfloat16, device="meta")
        module._forward(gate_up)
        module._backward(gate_up, torch.empty(8192, 14336, dtype=torch.bfloat16, device="meta"))

    yield Launch("I=14336", run)


def _inputs(tokens: int, size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    gate_up: Tensor = torch.randn(tokens, 2 * size, device=device, dtype=dtype)
    return {"gate_up": gate_up}
