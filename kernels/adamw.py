"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a 16-bit parameter with a float32 master copy.

A step of 1e-5 on a weight of 1 is far below the 2**-7 between neighbours in bfloat16 there: it would be rounded away
every time. The master copy takes the steps, and the parameter is that copy, rounded.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.launch import config, start


def adamw(
    parameter: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor,
    backend: str = "auto",
) -> None:
    """One step, in place on all tensors but `grad`, which are of one shape. Has no gradient.

    `parameter` and `grad` may have any floating dtype; `master` and the moments are float32 (or float64), from zeros at
    the first step. `step` counts from 1. The gradient is taken times `grad_scale`, a tensor with one number: a factor
    that clips it need not be known on the host.

    Raises ValueError for shapes, dtypes or strides that do not fit, an input that requires grad, and a backend that
    cannot run there.
    """
    _check(parameter, master, grad, exp_avg, exp_avg_sq)
    if step < 1 or grad_scale.numel() != 1:
        found = f"step = {step} and grad_scale has the shape {tuple(grad_scale.shape)}"
        raise ValueError(f"adamw: {found}; allowed: 1 or more, and one number")
    inference_only("adamw", parameter, master, grad, exp_avg, exp_avg_sq)
    # What no element changes is worked out here in float64, as torch.optim.AdamW does.
    numbers = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps]
    numbers += [lr / (1 - beta1**step), math.sqrt(1 - beta2**step)]
    run = reference if choose("adamw", backend, parameter) == "reference" else _step
    run(parameter, master, grad, exp_avg, exp_avg_sq, grad_scale, numbers)


def reference(
    parameter: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor,
    numbers: list[float],
) -> None:
    """`adamw` in plain torch, in the order and with the roundings of torch.optim.AdamW."""
    kept, gain1, beta2, gain2, eps, step_size, root_correction = numbers
    grad = grad.to(master.dtype) * grad_scale
    master.mul_(kept)
    exp_avg.lerp_(grad, gain1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=gain2)
    master.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root_correction).add_(eps), value=-step_size)
    parameter.copy_(master)


def _check(parameter: Tensor, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    state = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, x in state.items():
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != master.dtype:
            raise ValueError(f"adamw: {name} is {x.dtype}; allowed: torch.float32 (or float64), as master is")
    for name, x in {"parameter": parameter, "grad": grad, **state}.items():
        if x.shape != parameter.shape or not x.is_floating_point():
            found = f"{name} is {x.dtype} {tuple(x.shape)}"
            raise ValueError(f"adamw: {found}; allowed: floating and {tuple(parameter.shape)}, as parameter is")
        if name != "grad" and not x.is_contiguous():
            raise ValueError(f"adamw: {name} has the strides {x.stride()}; allowed: contiguous, it is changed in place")


@triton.jit
def _kernel(
    parameter, master, grad, exp_avg, exp_avg_sq, grad_scale, kept, gain1, beta2, gain2, eps, step_size,
    root_correction, SIZE, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    weight = tl.load(master + place, inside, other=0)
    g = tl.load(grad + place, inside, other=0).to(weight.dtype) * tl.load(grad_scale).to(weight.dtype)
    first = tl.load(exp_avg + place, inside, other=0)
    first += gain1 * (g - first)
    second = beta2 * tl.load(exp_avg_sq + place, inside, other=0) + gain2 * g * g
    weight = kept * weight - step_size * first / (tl.sqrt(second) / root_correction + eps)
    tl.store(exp_avg + place, first, inside)
    tl.store(exp_avg_sq + place, second, inside)
    tl.store(master + place, weight, inside)
    tl.store(parameter + place, weight.to(parameter.dtype.element_ty), inside)


@torch.library.custom_op("bylaw::adamw", mutates_args=("parameter", "master", "exp_avg", "exp_avg_sq"))
def _step(
    parameter: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor,
    numbers: list[float],
) -> None:
    settings = config("adamw", parameter.device)
    grid = (triton.cdiv(parameter.numel(), settings["BLOCK"]),)
    state = (parameter, master, grad.contiguous(), exp_avg, exp_avg_sq, grad_scale)
    start(_kernel, grid, *state, *numbers, parameter.numel(), **settings)


@_step.register_fake
def _(
    parameter: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor,
    numbers: list[float],
) -> None: ...
