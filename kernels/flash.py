"""Our attention over packed sequences, forward: FlashAttention-2 (Dao 2023, arXiv 2307.08691).

A program holds one block of one head's queries and walks the keys before them with a running maximum and sum. Blocks
that are seen entirely are walked apart from those that need a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.flash_backward import backward
from bylaw.kernels.layout import Layout
from bylaw.kernels.softmax import LN_2
from bylaw.kernels.tiles import block_at, keys_of, launch, load_rows, place, reach, sees, store_rows


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int = 0) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural logarithm of each query's sum of exponentials. Both have a gradient.

    Returns (out [T, Nq, D], lse [Nq, T] in float32, or float64 for float64 input).
    """
    return _forward(q, k, v, layout.cu_seqlens, layout.tiles, window)


@triton.jit
def _walk(
    total, weight, peak, query, k, v, start, k_token, v_token, near, nears, far, blocks, first, length,
    window, MASKED, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Take `blocks` blocks of keys, as `block_at` has them, into the output, its weight and its largest exponent."""
    for turn in range(0, blocks):
        n = block_at(turn, near, nears, far, STEP)
        keys = load_rows(k, start + n, k_token, length - n, not MASKED, D, STEP, BLOCK_D).to(query.dtype)
        values = load_rows(v, start + n, v_token, length - n, not MASKED, D, STEP, BLOCK_D).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=ACC)
        if MASKED:
            seen = sees(first + tl.arange(0, BLOCK)[:, None], n + tl.arange(0, STEP)[None, :], window)
            scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)
        pivot = new_peak
        if MASKED:  # a row that has seen no key yet must not subtract -inf from itself
            pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(scores * SCALE - pivot[:, None])
        decay = tl.exp2(peak - pivot)
        weight = weight * decay + tl.sum(weights, 1)
        total = tl.dot(weights.to(query.dtype), values, total * decay[:, None], input_precision="ieee", out_dtype=ACC)
        peak = new_peak
    return total, weight, peak


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, tiles, q_token, q_head, k_token, k_head, v_token, v_head, tokens, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    start, length, first = place(tiles, cu_seqlens, False, TILE, BLOCK)
    if first >= length:
        return
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    left = length - first
    query = load_rows(q + head * q_head, start + first, q_token, left, False, D, BLOCK, BLOCK_D).to(OPERAND)
    total = tl.zeros([BLOCK, BLOCK_D], ACC)
    weight = tl.zeros([BLOCK], ACC)
    peak = tl.full([BLOCK], -float("inf"), ACC)
    whole, wholes, near, nears, far, masked = keys_of(first, length, window, BLOCK, STEP)
    total, weight, peak = _walk(
        total, weight, peak, query, k, v, start, k_token, v_token, whole, 0, whole, wholes, first, length,
        window, False, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    total, weight, peak = _walk(
        total, weight, peak, query, k, v, start, k_token, v_token, near, nears, far, masked, first, length,
        window, True, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    # Asked again, so that what follows from it holds no registers in the loops.
    start, length, first = place(tiles, cu_seqlens, False, TILE, BLOCK)
    left = length - first
    weight = tl.where(weight > 0, weight, 1.0)  # rows past the sequence's end may have seen no key
    store_rows(out + head * D, start + first, heads * D, left, total / weight[:, None], D, BLOCK, BLOCK_D)
    rows = tl.arange(0, BLOCK)
    tl.store(lse + head * tokens + start + first + rows, (peak + tl.log2(weight)) * LN_2, rows < left)


@torch.library.custom_op("bylaw::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, tiles: Tensor, window: int) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = _outputs(q)
    strides = (x.stride(dim) for x in (q, k, v) for dim in (0, 1))
    launch(
        "attention", _forward_kernel, q.shape[1], tiles, q, k, v, out, lse, cu_seqlens, tiles, *strides, len(q),
        reach(window), GROUP=q.shape[1] // k.shape[1],
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, tiles: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=wide)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, tiles, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, tiles)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, tiles = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward(q, k, v, out, lse, grad_out, grad_lse, cu_seqlens, tiles, ctx.window)
    return *grads, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
