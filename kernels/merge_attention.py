"""Attention over parts of the keys, merged by log-sum-exp.

Softmax attention over all keys is the mean of that over parts of them, weighted by each part's sum of exponentials
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099, section 3.1):

    lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

A part without keys has out 0 and lse -inf. Within a part the sum runs online (Milakov and Gimelshein 2018, arXiv
1805.02867). Log-sum-exps are natural logarithms in float32 (float64 for float64 inputs), [Nq, T].
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.launch import accumulator, config, start


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The attention over two parts of the keys, `out` [T, Nq, D] and `lse` [Nq, T] each, as one: (out, lse) again.

    Has no gradient. Raises ValueError for shapes or dtypes that do not fit, an input that requires grad, and a backend
    that cannot run there.
    """
    shapes = [tuple(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
    if out_a.ndim != 3 or shapes[0] != shapes[2] or not shapes[1] == shapes[3] == shapes[0][1::-1]:
        raise ValueError(f"parts of the shapes {shapes}; allowed: twice [T, Nq, D] and [Nq, T]")
    if out_a.dtype != out_b.dtype or not lse_a.dtype == lse_b.dtype == lse_dtype(out_a):
        dtypes = [x.dtype for x in (out_a, lse_a, out_b, lse_b)]
        raise ValueError(f"parts of the dtypes {dtypes}; allowed: one for out, and {lse_dtype(out_a)} for lse")
    inference_only("merge_attention", out_a, lse_a, out_b, lse_b)
    if choose("merge_attention", backend, out_a) == "reference":
        return reference(out_a, lse_a, out_b, lse_b)
    return _merge(out_a, lse_a, out_b, lse_b)


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_attention` in plain torch."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - _finite(lse)).exp().T.unsqueeze(-1) for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def reference_part(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `q` [..., N, M, D] over `k` and `v` [..., N, S, D] where `seen` (broadcast to [..., N, M, S]) holds.

    Returns out [..., N, M, D] in q's dtype and lse [..., N, M]; the arithmetic is in at least float32.
    """
    wide = lse_dtype(q)
    scores = q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - _finite(lse).unsqueeze(-1)).exp()
    return (weights @ v.to(wide)).to(q.dtype), lse


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)


def softmax_scale(head_dim: int) -> float:
    """What scores are multiplied by before exp2: 1 / sqrt(D), and the change from base e."""
    return head_dim**-0.5 / math.log(2)


@triton.jit
def attend_block(q, k, v, seen, top, total, acc, SCALE: tl.constexpr, ACC: tl.constexpr):
    """One block of keys more: `top` and `total` [M] are the largest exponent of 2 so far and the sum of powers relative
    to it, `acc` [M, D] their sum with the values. A row may see nothing of the block; all see all of it if `seen` is
    None.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1) * SCALE)
    pivot = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(top - pivot)
    p = tl.exp2(scores * SCALE - pivot[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee", out_dtype=ACC)
    return new, total * keep + tl.sum(p, 1), acc


@triton.jit
def merge_part(part, part_lse, top, total, acc):
    """One part more: `top` [M] is the largest lse so far, `total` and `acc` as in `attend_block`."""
    new = tl.maximum(top, part_lse)
    pivot = tl.where(new == float("-inf"), 0.0, new)
    keep, add = tl.exp(top - pivot), tl.exp(part_lse - pivot)
    return new, total * keep + add, acc * keep[:, None] + part * add[:, None]


@triton.jit
def normalize(top, total, acc):
    """(out, lse) of the sums above, `top` in base e."""
    total = tl.where(total == 0, 1.0, total)
    return acc / total[:, None], top + tl.log(total)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _pair_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, tokens, heads, a_head, a_token, b_head, b_token,
    D: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    real = head < heads
    place = (token * heads + head)[:, None] * D + d[None, :]
    inside = real[:, None] & (d < D)[None, :]
    top = tl.full([BLOCK_H], float("-inf"), ACC)
    total = tl.zeros([BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_H, BLOCK_D], ACC)
    part_lse = tl.load(lse_a + head * a_head + token * a_token, real, other=0.0)
    top, total, acc = merge_part(tl.load(out_a + place, inside, other=0.0).to(ACC), part_lse, top, total, acc)
    part_lse = tl.load(lse_b + head * b_head + token * b_token, real, other=0.0)
    top, total, acc = merge_part(tl.load(out_b + place, inside, other=0.0).to(ACC), part_lse, top, total, acc)
    merged, merged_lse = normalize(top, total, acc)
    tl.store(out + place, merged.to(out.dtype.element_ty), inside)
    tl.store(lse + head.to(tl.int64) * tokens + token, merged_lse, real)


@triton.jit(do_not_specialize=["tokens", "heads", "window", "split_tokens", "splits"])
def _splits_kernel(
    parts, lses, lengths, out, lse, tokens, heads, window, split_tokens, splits,
    D: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    real = head < heads
    place = (token * heads + head)[:, None] * D + d[None, :]
    inside = real[:, None] & (d < D)[None, :]
    lse_place = head.to(tl.int64) * tokens + token
    first, last = 0, splits
    if lengths is not None:
        # Only the splits that hold keys were written.
        length = tl.load(lengths + token)
        first, last = tl.maximum(length - window, 0) // split_tokens, tl.cdiv(length, split_tokens)
    top = tl.full([BLOCK_H], float("-inf"), ACC)
    total = tl.zeros([BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_H, BLOCK_D], ACC)
    for i in range(first, last):
        split = i * heads.to(tl.int64) * tokens
        part_lse = tl.load(lses + split + lse_place, real, other=0.0)
        part = tl.load(parts + split * D + place, inside, other=0.0)
        top, total, acc = merge_part(part, part_lse, top, total, acc)
    merged, merged_lse = normalize(top, total, acc)
    tl.store(out + place, merged.to(out.dtype.element_ty), inside)
    tl.store(lse + lse_place, merged_lse, real)


@torch.library.custom_op("bylaw::merge_attention", mutates_args=())
def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out_a, out_b = out_a.contiguous(), out_b.contiguous()
    tokens, heads, _ = out_a.shape
    out, lse = torch.empty_like(out_a), lse_a.new_empty((heads, tokens))
    if out.numel():
        grid, settings = _settings(out)
        strides = *lse_a.stride(), *lse_b.stride()
        start(_pair_kernel, grid, out_a, lse_a, out_b, lse_b, out, lse, tokens, heads, *strides, **settings)
    return out, lse


@_merge.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def merge_splits(
    parts: Tensor,
    lses: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None = None,
    window: int = 0,
    split_tokens: int = 1,
) -> None:
    """Merge `parts` [splits, T, Nq, D] with `lses` [splits, Nq, T] into `out` and `lse`, always in the same order.

    With `lengths` [T], split i of row t holds the keys from i * split_tokens on of the last `window` of lengths[t], and
    is not read if it has none; without, all are read.
    """
    tokens, heads, _ = out.shape
    grid, settings = _settings(out)
    sizes = tokens, heads, window, split_tokens, len(parts)
    start(_splits_kernel, grid, parts, lses, lengths, out, lse, *sizes, **settings)


def _settings(out: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    tokens, heads, head_dim = out.shape
    settings = config("merge_attention", out.device)
    block_d = triton.next_power_of_2(head_dim)
    block_h = max(1, settings.pop("BLOCK") // block_d)
    shapes = {"D": head_dim, "ACC": accumulator(out.dtype), "BLOCK_H": block_h, "BLOCK_D": block_d}
    return (tokens, triton.cdiv(heads, block_h)), {**shapes, **settings}
