"""Our attention over packed sequences, backward: without atomics, so that two runs agree to the bit.

    dv_j = sum_i p_ij do_i                      p_ij = exp(s q_i . k_j - lse_i), computed again
    dq_i = s sum_j ds_ij k_j                    ds_ij = p_ij (do_i . v_j - delta_i)
    dk_j = s sum_i ds_ij q_i                    delta_i = do_i . out_i - dlse_i

with s = 1 / sqrt(D) (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 2). One kernel holds queries and walks
keys, for dq; another holds keys and walks the queries of every head in their group, for dk and dv. Each computes p and
ds, which takes seven products of matrices where one kernel with atomics takes five.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.softmax import LN_2, LOG2_E
from bylaw.kernels.tiles import block_at, keys_of, launch, load_rows, place, queries_of, reach, sees, store_rows


@triton.jit
def _walk_keys(
    grad_query, query, grad, peak, delta, k, v, start, k_token, v_token, near, nears, far, blocks, first, length,
    window, MASKED, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add to the queries' gradient what comes from `blocks` blocks of keys, as `block_at` has them."""
    for turn in range(0, blocks):
        n = block_at(turn, near, nears, far, STEP)
        keys = load_rows(k, start + n, k_token, length - n, not MASKED, D, STEP, BLOCK_D).to(query.dtype)
        values = load_rows(v, start + n, v_token, length - n, not MASKED, D, STEP, BLOCK_D).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=ACC)
        if MASKED:
            seen = sees(first + tl.arange(0, BLOCK)[:, None], n + tl.arange(0, STEP)[None, :], window)
            scores = tl.where(seen, scores, -float("inf"))
        weights = tl.exp2(scores * SCALE - peak[:, None])
        grad_weights = tl.dot(grad, tl.trans(values), input_precision="ieee", out_dtype=ACC)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = tl.dot(grad_scores.to(query.dtype), keys, grad_query, input_precision="ieee", out_dtype=ACC)
    return grad_query


@triton.jit(do_not_specialize=["tokens"])
def _queries_kernel(
    q, k, v, out, lse, grad_out, grad_lse, delta, grad_q, cu_seqlens, tiles,
    q_token, q_head, k_token, k_head, v_token, v_head, tokens, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq, and delta on the way: this is the one kernel that has each query's output and gradient at hand once."""
    start, length, first = place(tiles, cu_seqlens, False, TILE, BLOCK)
    if first >= length:
        return
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    left = length - first
    inside = tl.arange(0, BLOCK) < left
    at = head * tokens + start + first + tl.arange(0, BLOCK)
    query = load_rows(q + head * q_head, start + first, q_token, left, False, D, BLOCK, BLOCK_D).to(OPERAND)
    grad = load_rows(grad_out + head * D, start + first, heads * D, left, False, D, BLOCK, BLOCK_D).to(OPERAND)
    output = load_rows(out + head * D, start + first, heads * D, left, False, D, BLOCK, BLOCK_D)
    row_delta = tl.sum(output.to(ACC) * grad.to(ACC), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + at, inside, other=0.0)
    tl.store(delta + at, row_delta, inside)
    peak = tl.load(lse + at, inside, other=0.0) * LOG2_E
    grad_query = tl.zeros([BLOCK, BLOCK_D], ACC)
    whole, wholes, near, nears, far, masked = keys_of(first, length, window, BLOCK, STEP)
    grad_query = _walk_keys(
        grad_query, query, grad, peak, row_delta, k, v, start, k_token, v_token, whole, 0, whole, wholes, first, length,
        window, False, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    grad_query = _walk_keys(
        grad_query, query, grad, peak, row_delta, k, v, start, k_token, v_token, near, nears, far, masked, first,
        length, window, True, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    # Asked again, so that what follows from it holds no registers in the loops.
    start, length, first = place(tiles, cu_seqlens, False, TILE, BLOCK)
    left = length - first
    store_rows(grad_q + head * D, start + first, heads * D, left, grad_query * (SCALE * LN_2), D, BLOCK, BLOCK_D)


@triton.jit
def _walk_queries(
    grad_key, grad_value, key, value, q, grad_out, lse, delta, start, q_token, q_head, tokens, near, nears,
    far, blocks, first, length, window, GROUP: tl.constexpr, MASKED, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add to the keys' and values' gradients what comes from `blocks` blocks of queries of each head in turn.

    Scores are computed transposed, [keys, queries]: compilers for Hopper have got products of a transposed result
    wrong. Queries past the sequence's end are loaded as zero, with zero gradient, and add nothing.
    """
    kv_head, grad_token = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64) * GROUP * D
    for turn in range(0, blocks * GROUP):  # one loop, so that loads run ahead from head to head
        head = kv_head * GROUP + turn // blocks
        m = block_at(turn % blocks, near, nears, far, STEP)
        queries = load_rows(q + head * q_head, start + m, q_token, length - m, False, D, STEP, BLOCK_D).to(key.dtype)
        grads = load_rows(grad_out + head * D, start + m, grad_token, length - m, False, D, STEP, BLOCK_D).to(key.dtype)
        rows = tl.arange(0, STEP)
        at, inside = head * tokens + start + m + rows, rows < length - m
        peak = tl.load(lse + at, inside, other=0.0) * (LOG2_E / SCALE)
        row_delta = tl.load(delta + at, inside, other=0.0)
        # A product starts from what is to be taken from it: fewer registers than to take it from the result.
        scores = tl.broadcast_to(-peak[None, :], [BLOCK, STEP])
        scores = tl.dot(key, tl.trans(queries), scores, input_precision="ieee", out_dtype=ACC)
        if MASKED:
            seen = sees(m + rows[None, :], first + tl.arange(0, BLOCK)[:, None], window)
            scores = tl.where(seen, scores, -float("inf"))
        weights = tl.exp2(scores * SCALE)
        grad_value = tl.dot(weights.to(key.dtype), grads, grad_value, input_precision="ieee", out_dtype=ACC)
        grad_weights = tl.broadcast_to(-row_delta[None, :], [BLOCK, STEP])
        grad_weights = tl.dot(value, tl.trans(grads), grad_weights, input_precision="ieee", out_dtype=ACC)
        grad_scores = weights * grad_weights
        grad_key = tl.dot(grad_scores.to(key.dtype), queries, grad_key, input_precision="ieee", out_dtype=ACC)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["tokens"])
def _keys_kernel(
    q, k, v, lse, grad_out, delta, grad_k, grad_v, cu_seqlens, tiles,
    q_token, q_head, k_token, k_head, v_token, v_head, tokens, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dk and dv: the queries of every head in the group are walked into the same sums."""
    start, length, first = place(tiles, cu_seqlens, True, TILE, BLOCK)
    if first >= length:
        return
    kv_head, token = tl.program_id(1).to(tl.int64), tl.num_programs(1) * D
    left = length - first
    key = load_rows(k + kv_head * k_head, start + first, k_token, left, False, D, BLOCK, BLOCK_D).to(OPERAND)
    value = load_rows(v + kv_head * v_head, start + first, v_token, left, False, D, BLOCK, BLOCK_D).to(OPERAND)
    grad_key = tl.zeros([BLOCK, BLOCK_D], ACC)
    grad_value = tl.zeros([BLOCK, BLOCK_D], ACC)
    whole, wholes, near, nears, far, masked = queries_of(first, length, window, STEP, BLOCK)
    grad_key, grad_value = _walk_queries(
        grad_key, grad_value, key, value, q, grad_out, lse, delta, start, q_token, q_head, tokens, near, nears, far,
        masked, first, length, window, GROUP, True, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    grad_key, grad_value = _walk_queries(
        grad_key, grad_value, key, value, q, grad_out, lse, delta, start, q_token, q_head, tokens, whole, 0, whole,
        wholes, first, length, window, GROUP, False, D, BLOCK_D, SCALE, ACC, BLOCK, STEP,
    )  # fmt: skip
    # Asked again, as above.
    start, length, first = place(tiles, cu_seqlens, True, TILE, BLOCK)
    left = length - first
    store_rows(grad_k + kv_head * D, start + first, token, left, grad_key * (SCALE * LN_2), D, BLOCK, BLOCK_D)
    store_rows(grad_v + kv_head * D, start + first, token, left, grad_value, D, BLOCK, BLOCK_D)


@torch.library.custom_op("bylaw::attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    cu_seqlens: Tensor, tiles: Tensor, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by q, k and v [T, N, D] from those by out [T, Nq, D] and, unless it is None, lse [Nq, T]."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    grad_out, grad_lse = grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v = _outputs(q, k, v)
    delta = torch.empty_like(lse)
    strides = [x.stride(dim) for x in (q, k, v) for dim in (0, 1)]
    group, back = q.shape[1] // k.shape[1], reach(window)
    launch(
        "attention_dq", _queries_kernel, q.shape[1], tiles, q, k, v, out, lse, grad_out, grad_lse, delta, grad_q,
        cu_seqlens, tiles, *strides, len(q), back, GROUP=group,
    )  # fmt: skip
    launch(
        "attention_dkv", _keys_kernel, k.shape[1], tiles, q, k, v, lse, grad_out, delta, grad_k, grad_v,
        cu_seqlens, tiles, *strides, len(q), back, GROUP=group,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    cu_seqlens: Tensor, tiles: Tensor, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
