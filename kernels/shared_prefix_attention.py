"""Many queries over one common prefix, each then over its own sequence; the prefix is read once for all of them.

A query at place i of a sequence that follows a prefix of P tokens sees every key of the prefix, keys j <= i of its own
sequence, and with a window w only what is less than w tokens back. The two parts are merged by log-sum-exp
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099). Several prefixes, one behind the other, are as many parts:

    scoring    shared_prefix_attention(q, k, v, layout, prefix_k, prefix_v)
    decoding   out, lse = paged_attention_lse(q, keys, values, block_table, lengths)    over each row's own tokens
               merge_attention(*prefix_attention(q, prefix_k, prefix_v), out, lse.T)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels import flash
from bylaw.kernels.attention import band
from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.dense_attention import dense_attention, hiding
from bylaw.kernels.launch import accumulator, config, operand, start
from bylaw.kernels.layout import Layout
from bylaw.kernels.merge_attention import (
    attend_block,
    lse_dtype,
    merge_attention,
    merge_splits,
    normalize,
    reference_part,
    softmax_scale,
)
from bylaw.kernels.merge_attention import reference as reference_merge
from bylaw.kernels.paged_attention import MAX_HEAD_DIM, SPLIT_TOKENS
from bylaw.kernels.softmax import LN_2
from bylaw.kernels.tiles import load_rows

# Whether `_step` may load all its keys. (A type checker would refuse a bool for a constexpr.)
ALL, SOME = tl.constexpr(True), tl.constexpr(False)
__all__ = [
    "merge_attention",
    "prefix_attention",
    "reference",
    "reference_prefix",
    "shared_prefix_attention",
    "suffix_attention",
]


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    prefix_k: Tensor,
    prefix_v: Tensor,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of packed sequences that all follow one prefix; returns [T, Nq, D].

    `q` [T, Nq, D], `k` and `v` [T, Nkv, D] are packed by `layout` (`attention.plan`); `prefix_k` and `prefix_v` are
    [P, Nkv, D]. Keys are rotated by their place in the whole text, so a sequence's first token stands at P. `window` 0
    sees everything before; w > 0 the last w tokens, itself included. P may be 0.

    Has no gradient. Raises ValueError for shapes or dtypes that do not fit, a head size over 256 on our kernels, an
    input that requires grad, and a backend that cannot run there.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[:1] != q.shape[:1] or len(q) != layout.tokens:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"q, k and v have the shapes {shapes}, the layout {layout.tokens} tokens; allowed: [T, Nq, D] and twice "
            "[T, Nkv, D] of the layout's T tokens"
        )
    _check(q, k, v, window)
    _check(q, prefix_k, prefix_v, window)
    inference_only("shared_prefix_attention", q, k, v, prefix_k, prefix_v)
    if not _on_kernels("shared_prefix_attention", backend, q):
        return reference(q, k, v, layout, prefix_k, prefix_v, window)
    places = _places(layout) if window else None
    # Enough queries to fill the device without splitting the prefix.
    out, lse = _prefix(q, prefix_k, prefix_v, places, window, 0)
    return merge_attention(out, lse, *flash.forward(q, k, v, layout, window), "triton")[0]


def prefix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    window: int = 0,
    places: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query of `q` [T, Nq, D] over all of `prefix_k` and `prefix_v` [P, Nkv, D].

    Returns out [T, Nq, D] and the log-sum-exp [Nq, T] of the scaled scores; 0 and -inf where a query sees nothing. With
    a `window`, `places` [T] int32 says how far behind the prefix each query stands: 0 follows it.

    A program takes `split_tokens` keys, and their parts are merged; 0 gives each program the whole prefix, which is
    quicker for thousands of queries. For a given `split_tokens` a query's bits do not depend on the others.

    Has no gradient. Raises ValueError as `shared_prefix_attention`, for a window without places, and for a split below
    16 that is not 0.
    """
    _check(q, prefix_k, prefix_v, window)
    if window and (places is None or places.shape != q.shape[:1] or places.dtype != torch.int32):
        found = None if places is None else f"{places.dtype} {tuple(places.shape)}"
        raise ValueError(f"places = {found}; allowed with a window: torch.int32 [{len(q)}]")
    if split_tokens < 16 and split_tokens != 0:
        raise ValueError(f"split_tokens = {split_tokens}; allowed: 16 and more, or 0 (no split)")
    inference_only("prefix_attention", q, prefix_k, prefix_v)
    places = places if window else None
    if not _on_kernels("prefix_attention", backend, q):
        return reference_prefix(q, prefix_k, prefix_v, places, window)
    return _prefix(q, prefix_k, prefix_v, places, window, split_tokens)


def suffix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What `shared_prefix_attention` merges with its prefix: causal attention within each packed sequence.

    Returns out [T, Nq, D] and the log-sum-exp [Nq, T], to be merged with several prefixes. Errors and arguments as
    there.
    """
    _check(q, k, v, window)
    inference_only("shared_prefix_attention", q, k, v)
    if not _on_kernels("shared_prefix_attention", backend, q):
        return _reference_suffix(q, k, v, layout, window)
    return flash.forward(q, k, v, layout, window)


def reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, prefix_k: Tensor, prefix_v: Tensor, window: int = 0
) -> Tensor:
    """`shared_prefix_attention` in plain torch; it, too, reads the prefix once."""
    places = _places(layout) if window else None
    prefix = reference_prefix(q, prefix_k, prefix_v, places, window)
    return reference_merge(*prefix, *_reference_suffix(q, k, v, layout, window))[0]


def reference_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, places: Tensor | None = None, window: int = 0
) -> tuple[Tensor, Tensor]:
    """`prefix_attention` in plain torch."""
    tokens, length, kv_heads = len(q), len(prefix_k), prefix_k.shape[1]
    seen = torch.ones(tokens, length, dtype=torch.bool, device=q.device)
    if places is not None:
        seen = torch.arange(length, device=q.device) > length + places[:, None] - window
    grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Nkv, group, T, D]
    k, v = (x.transpose(0, 1)[:, None] for x in (prefix_k, prefix_v))  # [Nkv, 1, P, D]
    out, lse = reference_part(grouped, k, v, seen)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


def _reference_suffix(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> tuple[Tensor, Tensor]:
    """Causal attention within each sequence, and its log-sum-exp [Nq, T]."""
    sequences = zip(*(x.split(list(layout.lengths)) for x in (q, k, v)), strict=True)
    parts = [_causal_part(a, b, c, window) for a, b, c in sequences if len(a)]
    if not parts:
        return torch.zeros_like(q), q.new_zeros(q.shape[1::-1], dtype=lse_dtype(q))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def _causal_part(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Within one sequence."""
    bias = hiding(band(len(q), window, q.device), q) if 0 < window < len(q) else None
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, Nq, S, D]
    out, lse = dense_attention(q, k, v, bias, causal=bias is None)
    return out[0].transpose(0, 1), lse[0]


def _places(layout: Layout) -> Tensor:
    """Each token's place in its sequence, [T] int32."""
    starts, lengths = layout.cu_seqlens[:-1], layout.cu_seqlens.diff()
    # Told how many there are, a GPU need not be asked.
    starts = starts.repeat_interleave(lengths, output_size=layout.tokens)
    return torch.arange(layout.tokens, dtype=torch.int32, device=starts.device) - starts


def _check(q: Tensor, k: Tensor, v: Tensor, window: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"queries {tuple(q.shape)} over keys {tuple(k.shape)} and values {tuple(v.shape)}; allowed: [T, Nq, D] and "
            "twice [P, Nkv, D], Nq a multiple of Nkv"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes {q.dtype}, {k.dtype} and {v.dtype}; allowed: one for queries, keys and values")
    if window < 0:
        raise ValueError(f"window = {window}; allowed: 0 (no window), or 1 and more")


def _on_kernels(operation: str, backend: str, q: Tensor) -> bool:
    """Whether our kernels run. Raises ValueError for heads that they do not take."""
    if choose(operation, backend, q) == "reference":
        return False
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"heads of size {q.shape[2]}; allowed: 1 to {MAX_HEAD_DIM}, or backend='reference'")
    return True


@triton.jit
def _step(
    query, k, v, k_token, v_token, start, n, left, oldest, top, total, acc,
    WHOLE: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`attend_block` with the BLOCK_N keys from `start` + `n` on, of which `left` exist, or all if WHOLE."""
    keys = load_rows(k, start + n, k_token, left, WHOLE, D, BLOCK_N, BLOCK_D).to(query.dtype)
    values = load_rows(v, start + n, v_token, left, WHOLE, D, BLOCK_N, BLOCK_D).to(query.dtype)
    block = tl.arange(0, BLOCK_N)[None, :]
    seen = None
    if WINDOWED:
        seen = (n + block >= oldest[:, None]) & (block < left)
    elif not WHOLE:
        seen = block < left
    return attend_block(query, keys, values, seen, top, total, acc, SCALE, ACC)


@triton.jit(do_not_specialize=["tokens", "prefix", "split_tokens", "window"])
def _kernel(
    q, k, v, places, out, lse, q_token, q_head, k_token, k_head, v_token, v_head, heads, tokens, prefix, split_tokens,
    window, WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's rows are the queries of one group, then of the next token's: all see the same keys."""
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_token, first_head = first_row // GROUP, kv_head * GROUP
    # The rows' own offsets are 32-bit: they live as long as the loop, and registers are short.
    row = (first_row % GROUP).to(tl.int32) + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, row % GROUP
    real = token < tokens - first_token
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = real[:, None] & (d < D)
    q += first_token * q_token + first_head * q_head
    query = tl.load(q + (token * q_token + head * q_head)[:, None] + d, inside, other=0.0).to(DOT)
    start = split * split_tokens
    count = tl.minimum(prefix - start, split_tokens).to(tl.int32)
    first, oldest = 0, None
    if WINDOWED:
        # Counted from the split's first key, and for the tile's last rows, that are none, from far behind.
        oldest = (prefix - start + 1 - window + tl.load(places + first_token + token, real, other=2**30)).to(tl.int32)
        first = tl.minimum(tl.maximum(tl.min(oldest), 0), count) // BLOCK_N * BLOCK_N
    whole = count // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    k += kv_head * k_head
    v += kv_head * v_head
    for n in range(first, whole, BLOCK_N):
        top, total, acc = _step(
            query, k, v, k_token, v_token, start, n, BLOCK_N, oldest, top, total, acc,
            ALL, WINDOWED, D, BLOCK_D, SCALE, ACC, BLOCK_N,
        )  # fmt: skip
    for n in range(whole, count, BLOCK_N):
        top, total, acc = _step(
            query, k, v, k_token, v_token, start, n, count - n, oldest, top, total, acc,
            SOME, WINDOWED, D, BLOCK_D, SCALE, ACC, BLOCK_N,
        )  # fmt: skip
    part, part_lse = normalize(top * LN_2, total, acc)
    out += ((split * tokens + first_token) * heads + first_head) * D
    tl.store(out + (token * heads + head)[:, None] * D + d, part.to(out.dtype.element_ty), inside)
    lse += (split * heads + first_head) * tokens + first_token
    tl.store(lse + head * tokens.to(tl.int64) + token, part_lse, real)


@torch.library.custom_op("bylaw::prefix_attention", mutates_args=())
def _prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, places: Tensor | None, window: int, split_tokens: int
) -> tuple[Tensor, Tensor]:
    """(out [T, Nq, D], lse [Nq, T])."""
    tokens, heads, head_dim = q.shape
    prefix, kv_heads, _ = prefix_k.shape
    out, lse = q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=lse_dtype(q))
    if not q.numel():
        return out, lse
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, prefix_k, prefix_v))
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    sizes = {"head_dim": block_d, "itemsize": q.element_size(), "split": int(split_tokens > 0)}
    settings = config("shared_prefix_attention", q.device, **sizes)
    split_tokens = split_tokens or max(1, prefix)
    splits = max(1, triton.cdiv(prefix, split_tokens))
    # A single part is the result.
    parts = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=lse.dtype)
    lses = lse if splits == 1 else lse.new_empty((splits, *lse.shape))
    strides = (x.stride(dim) for x in (q, k, v) for dim in (0, 1))
    grid = (triton.cdiv(tokens * group, settings["BLOCK_M"]), kv_heads, splits)
    start(
        _kernel, grid, q, k, v, None if places is None else places.contiguous(), parts, lses, *strides, heads, tokens,
        prefix, split_tokens, window, WINDOWED=window > 0, GROUP=group, D=head_dim, BLOCK_D=block_d,
        SCALE=softmax_scale(head_dim), ACC=accumulator(q.dtype), DOT=operand(q.dtype), **settings,
    )  # fmt: skip
    if splits > 1:
        merge_splits(parts, lses, out, lse)
    return out, lse


@_prefix.register_fake
def _(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, places: Tensor | None, window: int, split_tokens: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q))
