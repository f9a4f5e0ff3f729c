"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, alone or of a sum.

In a transformer a residual addition stands before almost every norm; `add_rms_norm` is both in one pass over memory.
The mean is taken in float32 (float64 for float64 input), and the normalised value is rounded to x's dtype before the
scale: the order in which Llama checkpoints were trained. Only 1 / sqrt(mean + eps) of each row is kept for the backward
pass. There a few programs stay on the device, each with the weight's gradient over its rows in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, multiprocessors, start


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Normalise the last dimension of `x` [..., H] by its root mean square and scale it by `weight` [H].

    Raises ValueError for a weight of another size, and for a backend that cannot run there.
    """
    _check("rms_norm", x, x, weight)
    if choose("rms_norm", backend, x) == "reference":
        return reference(x, weight, eps)
    return _forward(x, weight, float(eps))[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`summed` = x + residual, in x's dtype, and its `rms_norm`; returns (normed, summed). All are [..., H].

    Raises ValueError for shapes or dtypes that do not fit, and for a backend that cannot run there.
    """
    _check("add_rms_norm", x, residual, weight)
    if choose("add_rms_norm", backend, x) == "reference":
        return add_reference(x, residual, weight, eps)
    return _add_forward(x, residual, weight, float(eps))[:2]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    summed = x + residual
    return reference(summed, weight, eps), summed


def _check(operation: str, x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{operation}: x has the shape {tuple(x.shape)} and weight {tuple(weight.shape)}; allowed: [..., H] and [H]"
        )
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"{operation}: residual is {residual.dtype} {tuple(residual.shape)}; allowed: what x is, "
            f"{x.dtype} {tuple(x.shape)}"
        )


@triton.jit
def _tile(first, COUNT, SIZE, INNER, OUTER, STEP, ROWS: tl.constexpr):
    """The numbers of ROWS rows, which of them exist, and where they begin: in x, and in a contiguous tensor.

    x is [n, INNER, SIZE] with the strides (OUTER, STEP, 1), as a slice of heads is.
    """
    rows = tl.cast(first, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows, rows < COUNT, rows // INNER * OUTER + rows % INNER * STEP, rows * SIZE


@triton.jit
def _load(pointer, flat, columns, inside, ACC: tl.constexpr):
    return tl.load(pointer + flat + columns, inside, other=0).to(ACC)


@triton.jit
def _store(pointer, flat, columns, inside, value):
    tl.store(pointer + flat + columns, value.to(pointer.dtype.element_ty), inside)


@triton.jit
def _value(x, residual, begin, flat, columns, inside, ADD: tl.constexpr, ACC: tl.constexpr):
    value = _load(x, begin, columns, inside, ACC)
    if ADD:
        value = (value + _load(residual, flat, columns, inside, ACC)).to(x.dtype.element_ty).to(ACC)
    return value


@triton.jit(do_not_specialize=["COUNT"])
def _forward_kernel(
    x, residual, weight, out, summed, rstd, eps, COUNT, SIZE, INNER, OUTER, STEP,
    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers."""
    rows, here, begin, flat = _tile(tl.program_id(0), COUNT, SIZE, INNER, OUTER, STEP, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = here & (columns < SIZE)
    value = _value(x, residual, begin, flat, columns, inside, ADD, ACC)
    if ADD:
        _store(summed, flat, columns, inside, value)
    root = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / SIZE + tl.cast(eps, tl.float32))
    tl.store(rstd + rows, root, here)
    normed = (value * root).to(x.dtype.element_ty).to(ACC)
    _store(out, flat, columns, inside, _load(weight, 0, columns, columns < SIZE, ACC) * normed)


@triton.jit(do_not_specialize=["COUNT"])
def _wide_forward_kernel(
    x, residual, weight, out, summed, rstd, eps, COUNT, SIZE, INNER, OUTER, STEP,
    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit are read twice."""
    rows, here, begin, flat = _tile(tl.program_id(0), COUNT, SIZE, INNER, OUTER, STEP, ROWS)
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for left in range(0, SIZE, BLOCK):
        columns = left + tl.arange(0, BLOCK)[None, :]
        value = _value(x, residual, begin, flat, columns, here & (columns < SIZE), ADD, ACC)
        squares += value * value
    root = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / SIZE + tl.cast(eps, tl.float32))
    tl.store(rstd + rows, root, here)
    for left in range(0, SIZE, BLOCK):
        columns = left + tl.arange(0, BLOCK)[None, :]
        inside = here & (columns < SIZE)
        value = _value(x, residual, begin, flat, columns, inside, ADD, ACC)
        if ADD:
            _store(summed, flat, columns, inside, value)
        normed = (value * root).to(x.dtype.element_ty).to(ACC)
        _store(out, flat, columns, inside, _load(weight, 0, columns, columns < SIZE, ACC) * normed)


@triton.jit
def _terms(grad_out, x, scale, root, begin, flat, columns, inside, ACC: tl.constexpr):
    """The normalised value, the gradient at it, and that at the weight, for each element."""
    normed = _load(x, begin, columns, inside, ACC) * root
    grad = _load(grad_out, flat, columns, inside, ACC)
    return normed, grad * scale, grad * normed.to(x.dtype.element_ty).to(ACC)


@triton.jit
def _store_grad(
    grad_x, grad_summed, normed, grad, along, root, flat, columns, inside, ADD: tl.constexpr, ACC: tl.constexpr
):
    """`along`: the mean of grad * normed over the row, the part of the gradient that the root takes away."""
    value = (grad - normed * along) * root
    if ADD:
        value += _load(grad_summed, flat, columns, inside, ACC)
    _store(grad_x, flat, columns, inside, value)


@triton.jit(do_not_specialize=["COUNT"])
def _backward_kernel(
    grad_out, grad_summed, x, weight, rstd, grad_x, partial, COUNT, SIZE, INNER, OUTER, STEP,
    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers, tile after tile; the next tile is on its way while one is worked on."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    scale = _load(weight, 0, columns, columns < SIZE, ACC)
    total = tl.zeros([ROWS, BLOCK], ACC)
    tiles = tl.cdiv(COUNT, ROWS)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows, here, begin, flat = _tile(tile, COUNT, SIZE, INNER, OUTER, STEP, ROWS)
        inside = here & (columns < SIZE)
        root = tl.load(rstd + rows, here, other=0)
        if BLOCK > 8192:  # registers are short: better again from the cache than kept
            scale = _load(weight, 0, columns, columns < SIZE, ACC)
        normed, grad, at_weight = _terms(grad_out, x, scale, root, begin, flat, columns, inside, ACC)
        total += at_weight
        along = tl.sum(grad * normed, axis=1, keep_dims=True) / SIZE
        _store_grad(grad_x, grad_summed, normed, grad, along, root, flat, columns, inside, ADD, ACC)
    _store(partial, program.to(tl.int64) * SIZE, columns, columns < SIZE, tl.sum(total, axis=0, keep_dims=True))


@triton.jit(do_not_specialize=["COUNT"])
def _wide_backward_kernel(
    grad_out, grad_summed, x, weight, rstd, grad_x, COUNT, SIZE, INNER, OUTER, STEP,
    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient at x of rows that do not fit, which are read twice."""
    rows, here, begin, flat = _tile(tl.program_id(0), COUNT, SIZE, INNER, OUTER, STEP, ROWS)
    root = tl.load(rstd + rows, here, other=0)
    products = tl.zeros([ROWS, BLOCK], ACC)
    for left in range(0, SIZE, BLOCK):
        columns = left + tl.arange(0, BLOCK)[None, :]
        inside = here & (columns < SIZE)
        scale = _load(weight, 0, columns, columns < SIZE, ACC)
        normed, grad, _ = _terms(grad_out, x, scale, root, begin, flat, columns, inside, ACC)
        products += grad * normed
    along = tl.sum(products, axis=1, keep_dims=True) / SIZE
    for left in range(0, SIZE, BLOCK):
        columns = left + tl.arange(0, BLOCK)[None, :]
        inside = here & (columns < SIZE)
        scale = _load(weight, 0, columns, columns < SIZE, ACC)
        normed, grad, _ = _terms(grad_out, x, scale, root, begin, flat, columns, inside, ACC)
        _store_grad(grad_x, grad_summed, normed, grad, along, root, flat, columns, inside, ADD, ACC)


@triton.jit(do_not_specialize=["COUNT"])
def _wide_weight_kernel(
    grad_out, x, rstd, partial, COUNT, SIZE, INNER, OUTER, STEP,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient at one block of the weight, over every num_programs(0)-th tile of rows that do not fit."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], ACC)
    for tile in range(program, tl.cdiv(COUNT, ROWS), tl.num_programs(0)):
        rows, here, begin, flat = _tile(tile, COUNT, SIZE, INNER, OUTER, STEP, ROWS)
        root = tl.load(rstd + rows, here, other=0)
        _, _, at_weight = _terms(grad_out, x, 1, root, begin, flat, columns, here & (columns < SIZE), ACC)
        total += at_weight
    _store(partial, program.to(tl.int64) * SIZE, columns, columns < SIZE, tl.sum(total, axis=0, keep_dims=True))


@torch.library.custom_op("bylaw::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, rstd = _empty_outputs(x, weight)
    _launch_forward(x, None, weight, out, None, rstd, eps)
    return out, rstd


@torch.library.custom_op("bylaw::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    (out, rstd), summed = _empty_outputs(x, weight), _empty_like(x)
    _launch_forward(x, residual.contiguous(), weight, out, summed, rstd, eps)
    return out, summed, rstd


@torch.library.custom_op("bylaw::rms_norm_backward", mutates_args=())
def _backward(
    grad_out: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients at x and at weight; `grad_summed` is added to the first."""
    grad_x = _empty_like(x)
    if not x.numel():
        return grad_x, weight.new_zeros(weight.shape)
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    partial = _launch_backward(grad_out.contiguous(), grad_summed, x, weight.contiguous(), rstd, grad_x)
    return grad_x, partial.sum(0).to(weight.dtype)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the roots, to be filled."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return out, torch.empty(x.shape[:-1], dtype=wide, device=x.device)


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """`x` [..., H], copied if a kernel cannot walk it; and COUNT, SIZE, INNER, OUTER and STEP (see `_tile`)."""
    count, size = x.numel() // x.shape[-1], x.shape[-1]
    if x.ndim not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_contiguous():
        return x, (count, size, 1, size, 0)
    view = x if x.ndim == 3 else x.unsqueeze(1)
    return x, (count, size, view.shape[1], view.stride(0), view.stride(1))


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, summed: Tensor | None, rstd: Tensor, eps: float
) -> None:
    if x.numel():
        x, sizes = _rows(x)
        settings = config("rms_norm", x.device, H=sizes[1])
        kernel = _forward_kernel if settings["BLOCK"] >= sizes[1] else _wide_forward_kernel
        grid = (triton.cdiv(sizes[0], settings["ROWS"]),)
        tensors = (x, residual, weight.contiguous(), out, summed, rstd)
        start(kernel, grid, *tensors, eps, *sizes, ADD=residual is not None, ACC=accumulator(x.dtype), **settings)


def _launch_backward(
    grad_out: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, grad_x: Tensor
) -> Tensor:
    """Fill `grad_x`; returns the weight's gradient in parts [n, H], to be summed in order."""
    x, sizes = _rows(x)
    settings = config("rms_norm_backward", x.device, H=sizes[1])
    settings["ACC"] = accumulator(x.dtype)
    tiles = triton.cdiv(sizes[0], settings["ROWS"])
    programs = min(tiles, multiprocessors(x.device) * settings.pop("PROGRAMS"))
    partial = torch.empty((programs, sizes[1]), dtype=rstd.dtype, device=x.device)
    tensors, add = (grad_out, grad_summed, x, weight, rstd, grad_x), grad_summed is not None
    if settings["BLOCK"] >= sizes[1]:
        start(_backward_kernel, (programs,), *tensors, partial, *sizes, ADD=add, **settings)
        return partial
    del settings["STAGES"]
    start(_wide_backward_kernel, (tiles,), *tensors, *sizes, ADD=add, **settings)
    grid = (programs, triton.cdiv(sizes[1], settings["BLOCK"]))
    start(_wide_weight_kernel, grid, grad_out, x, rstd, partial, *sizes, **settings)
    return partial


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, weight)


@_add_forward.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, rstd = _empty_outputs(x, weight)
    return out, _empty_like(x), rstd


@_backward.register_fake
def _(grad_out: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(weight)


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # nothing asks for the roots, nor for zeros in their place


def _differentiate(ctx, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return None, None, None
    return *_backward(grad_out, None, *ctx.saved_tensors), None


def _add_save(ctx, inputs, output) -> None:
    _, summed, rstd = output
    ctx.save_for_backward(summed, inputs[2], rstd)
    ctx.set_materialize_grads(False)  # after the last norm nothing asks for `summed` either


def _add_differentiate(
    ctx, grad_out: Tensor | None, grad_summed: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return grad_summed, grad_summed, None, None
    grad, grad_weight = _backward(grad_out, grad_summed, *ctx.saved_tensors)
    return grad, grad, grad_weight, None


_forward.register_autograd(_differentiate, setup_context=_save)
_add_forward.register_autograd(_add_differentiate, setup_context=_add_save)
