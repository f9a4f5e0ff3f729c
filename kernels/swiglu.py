"""SwiGLU (Shazeer 2020, arXiv 2002.05202) over the fused projection: silu(gate) * up.

The backward pass computes silu again from the input instead of keeping it.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, start


def swiglu(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """`gate_up` [..., 2I] holds the gate in its first half and the up projection in its second; returns [..., I].

    Raises ValueError for an odd last dimension, and for a backend that cannot run there.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has the shape {tuple(gate_up.shape)}; allowed: [..., 2I]")
    if choose("swiglu", backend, gate_up) == "reference":
        return reference(gate_up)
    return _forward(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate_up, out, UNITS, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    SIZE = UNITS * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, inside).to(ACC)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, inside).to(ACC)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, value.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(gate_up, grad_out, grad_in, UNITS, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    SIZE = UNITS * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, inside).to(ACC)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, inside).to(ACC)
    grad = tl.load(grad_out + row * SIZE + columns, inside).to(ACC)
    sigmoid = 1 / (1 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * gate * sigmoid
    tl.store(grad_in + row * 2 * SIZE + columns, grad_gate.to(grad_in.dtype.element_ty), inside)
    tl.store(grad_in + row * 2 * SIZE + SIZE + columns, grad_up.to(grad_in.dtype.element_ty), inside)


@torch.library.custom_op("bylaw::swiglu", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    _launch(_forward_kernel, gate_up, out)
    return out


@torch.library.custom_op("bylaw::swiglu_backward", mutates_args=())
def _backward(gate_up: Tensor, grad_out: Tensor) -> Tensor:
    gate_up, grad_out = gate_up.contiguous(), grad_out.contiguous()
    grad_in = torch.empty_like(gate_up)
    _launch(_backward_kernel, gate_up, grad_out, grad_in)
    return grad_in


def _launch(kernel: triton.JITFunction, gate_up: Tensor, *others: Tensor) -> None:
    size = gate_up.shape[-1] // 2
    if gate_up.numel():
        settings = config("swiglu", gate_up.device)
        grid = (gate_up.numel() // (2 * size), triton.cdiv(size, settings["BLOCK"]))
        # Triton itself sees only whether a number divides by 16, and would load a multiple of 8 two bytes at a time.
        unit = math.gcd(size, 16)
        start(kernel, grid, gate_up, *others, size // unit, UNIT=unit, ACC=accumulator(gate_up.dtype), **settings)


@_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_backward.register_fake
def _(gate_up: Tensor, grad_out: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx, grad_out: Tensor) -> Tensor:
    return _backward(ctx.saved_tensors[0], grad_out)


_forward.register_autograd(_differentiate, setup_context=_save)
