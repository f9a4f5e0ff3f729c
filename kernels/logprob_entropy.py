"""Log-prob of given tokens and entropy from logits that exist: one pass forward, one backward, in place if wished.

With q = softmax(z / t), and the gradients g of the log-prob of token y and h of the entropy H,

    dL/dz_j = [g (delta_jy - q_j) - h q_j (log q_j + H)] / t
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels import softmax
from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, start
from bylaw.kernels.softmax import IGNORED, LEAST, LN_2, add_logits, exponent_scale, finish


def logprob_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, inplace_backward: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-prob [T] of `targets` [T] under softmax(`logits` [T, V] / temperature), and its entropy [T] in nats.

    Both are float32 (float64 for float64 logits) and differentiable by `logits`, whose rows may be strided. A target of
    -100 has the log-prob 0 and no gradient by it; its entropy counts. A logit of -inf bans its token.

    `inplace_backward`: the backward pass writes its gradient over `logits`, and so takes no memory. AFTER IT THE LOGITS
    ARE GONE for everyone who holds them; a second backward pass raises RuntimeError. Only the kernels do so, and only
    where a row's logits lie side by side.

    Raises ValueError for shapes or dtypes that do not fit, a temperature that is not above 0, a backend that cannot run
    there, and a target outside 0 to V - 1; on a GPU, where that would have to wait, such a log-prob is NaN.
    """
    _check(logits, targets, temperature)
    if choose("logprob_entropy", backend, logits) == "reference":
        return reference(logits, targets, temperature)
    logprobs, entropy, _, _ = _forward(logits, targets, temperature, inplace_backward)
    return logprobs, entropy


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`logprob_entropy` in plain torch."""
    log_q = torch.log_softmax(softmax.tempered(logits, temperature), dim=-1)
    q = log_q.exp()
    entropy = -(q * log_q.masked_fill(q == 0, 0.0)).sum(-1)  # 0 * -inf would be NaN, and so would its gradient
    return softmax.picked(log_q, targets), entropy


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_floating_point():
        kind = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits are {kind}; allowed: floating point [T, V], V at least 1")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        kind = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets are {kind}; allowed: torch.int64 ({len(logits)},), one for each row of logits")
    softmax.check_temperature(temperature)
    softmax.check_targets(targets, logits.shape[1])


@triton.jit
def _forward_kernel(
    logits,
    targets,
    logprobs,
    entropies,
    tops,
    totals,
    SIZE,
    row_stride,
    temperature: np.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.full((), temperature, ACC)
    scale = exponent_scale(temperature)
    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0, ACC)
    weighted = tl.full((), 0, ACC)
    for first in range(0, SIZE, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, columns < SIZE, other=float("-inf")).to(ACC)
        top, total, weighted = add_logits(top, total, weighted, z, scale)
    log_total, entropy = finish(total, weighted)
    target = tl.load(targets + row)
    chosen = tl.load(logits + target, (target >= 0) & (target < SIZE), other=float("nan")).to(ACC)
    logprob = tl.where(target == IGNORED, 0.0, (chosen - top) / temperature - log_total)
    tl.store(logprobs + row, logprob)
    tl.store(entropies + row, entropy)
    tl.store(tops + row, top)
    tl.store(totals + row, total)


@triton.jit
def _backward_kernel(
    logits,
    targets,
    entropies,
    tops,
    totals,
    grad_logprobs,
    grad_entropies,
    grad_logits,
    SIZE,
    row_stride,
    grad_row_stride,
    temperature: np.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program reads all of its block before it writes any, and no other reads it: grad_logits may be logits.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    temperature = tl.full((), temperature, ACC)
    target = tl.load(targets + row)
    total = tl.load(totals + row)
    by_logprob = tl.where(target == IGNORED, 0.0, tl.load(grad_logprobs + row)) / temperature
    by_entropy = tl.load(grad_entropies + row) / temperature
    z = tl.load(logits + row * row_stride + columns, inside, other=float("-inf")).to(ACC)
    exponent = (z - tl.load(tops + row)) * exponent_scale(temperature)
    probability = tl.exp2(exponent) / total
    surprise = tl.log(total) - tl.maximum(exponent, LEAST) * LN_2
    grad = by_logprob * (tl.where(columns == target, 1.0, 0.0) - probability)
    grad += by_entropy * probability * (surprise - tl.load(entropies + row))
    tl.store(grad_logits + row * grad_row_stride + columns, grad.to(grad_logits.dtype.element_ty), inside)


@torch.library.custom_op("bylaw::logprob_entropy", mutates_args=())
def _forward(
    logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, and for the backward pass the largest logit and the sum of powers seen from it; all [T]."""
    logits, targets = _side_by_side(logits), targets.contiguous()
    outs = _empty_rows(logits), _empty_rows(logits), _empty_rows(logits), _empty_rows(logits)
    start(
        _forward_kernel,
        (len(logits),),
        logits,
        targets,
        *outs,
        logits.shape[1],
        logits.stride(0),
        softmax.bounded_temperature(temperature),
        ACC=accumulator(logits.dtype),
        **config("logprob_entropy", logits.device),
    )
    return outs


@torch.library.custom_op("bylaw::logprob_entropy_backward", mutates_args=())
def _backward(logits: Tensor, rows: list[Tensor], temperature: float) -> Tensor:
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch_backward(_side_by_side(logits), rows, grad_logits, temperature)
    return grad_logits


@torch.library.custom_op("bylaw::logprob_entropy_backward_inplace", mutates_args=("logits",))
def _backward_inplace(logits: Tensor, rows: list[Tensor], temperature: float) -> None:
    _launch_backward(logits, rows, logits, temperature)


def _launch_backward(logits: Tensor, rows: list[Tensor], grad_logits: Tensor, temperature: float) -> None:
    """`rows`: targets, entropy, top, total, and the gradients of logprobs and entropy; all [T]."""
    settings = config("logprob_entropy", logits.device)
    start(
        _backward_kernel,
        (len(logits), triton.cdiv(logits.shape[1], settings["BLOCK"])),
        logits,
        *(row.contiguous() for row in rows),
        grad_logits,
        logits.shape[1],
        logits.stride(0),
        grad_logits.stride(0),
        softmax.bounded_temperature(temperature),
        ACC=accumulator(logits.dtype),
        **settings,
    )


def _side_by_side(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _empty_rows(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(len(logits), dtype=dtype)


@_forward.register_fake
def _(
    logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_rows(logits), _empty_rows(logits), _empty_rows(logits), _empty_rows(logits)


@_backward.register_fake
def _(logits: Tensor, rows: list[Tensor], temperature: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_backward_inplace.register_fake
def _(logits: Tensor, rows: list[Tensor], temperature: float) -> None:
    return None


def _save(ctx, inputs, output) -> None:
    logits, targets, ctx.temperature, ctx.inplace = inputs
    _, entropy, top, total = output
    ctx.save_for_backward(logits, targets, entropy, top, total)


def _differentiate(
    ctx, grad_logprobs: Tensor, grad_entropy: Tensor, *unused: Tensor
) -> tuple[Tensor, None, None, None]:
    logits, *rows = ctx.saved_tensors
    rows += [grad_logprobs, grad_entropy]
    if ctx.inplace and logits.stride(1) == 1:
        _backward_inplace(logits, rows, ctx.temperature)
        return logits, None, None, None
    return _backward(logits, rows, ctx.temperature), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
