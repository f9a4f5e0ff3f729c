"""Decode attention: one new query per row over a cache in pages, grouped queries, optional sliding window.

    out_b = sum_j softmax_j(q_b . k_j / sqrt(D)) v_j    over the keys j < lengths[b] of row b, the last `window` of them

The keys of a row are split over programs and their parts merged (FlashDecoding, Dao et al. 2023); the query heads that
share keys stand as rows of one tile, so that each key is read once (pages: Kwon et al. 2023, arXiv 2309.06180).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.kv_write import check_cache
from bylaw.kernels.launch import accumulator, config, multiprocessors, operand, start
from bylaw.kernels.merge_attention import (
    attend_block,
    lse_dtype,
    merge_splits,
    normalize,
    reference_part,
    softmax_scale,
)
from bylaw.kernels.softmax import LN_2

SPLIT_TOKENS = 512
# More query heads on one head of keys than this take a further program.
GROUP_ROWS = 64
MAX_HEAD_DIM = 256
UNLIMITED = 2**31 - 1


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    window: int = 0,
    split_tokens: int = SPLIT_TOKENS,
    backend: str = "auto",
) -> Tensor:
    """Attention of `q` [B, Nq, D] over `keys` and `values` [P, page, Nkv, D]; returns [B, Nq, D].

    Key j of row b is token j % page of page block_table[b, j // page]; row b has lengths[b] of them, its newest the
    query's own, and zeros for an output if it has none. `block_table` [B, max_pages] and `lengths` [B] are int32.
    `window` 0 sees all keys; w > 0 sees the last w.

    A program takes `split_tokens` keys. The borders depend on a key's place alone, so that a row's bits do not depend
    on the other rows of its batch. 0 takes as many as fill the GPU instead: quicker for few rows, not the same bits.

    Has no gradient. Raises ValueError for shapes, dtypes and strides that do not fit, a split below 16 that is not 0,
    a head size over 256, an input that requires grad, a backend that cannot run there, and, in the reference alone,
    lengths and pages that are not there.
    """
    return paged_attention_lse(q, keys, values, block_table, lengths, window, split_tokens, backend)[0]


def paged_attention_lse(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    window: int = 0,
    split_tokens: int = SPLIT_TOKENS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`paged_attention`, and the log-sum-exp [B, Nq] of each query's scaled scores; -inf without keys."""
    _check(q, keys, values, block_table, lengths, window, split_tokens)
    inference_only("paged_attention", q, keys, values)
    if choose("paged_attention", backend, q) == "reference":
        return reference(q, keys, values, block_table, lengths, window)
    out, lse = _forward(q, keys, values, block_table, lengths, window, split_tokens)
    return out, lse.T


def reference(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, window: int = 0
) -> tuple[Tensor, Tensor]:
    """`paged_attention_lse` in plain torch; gathers the pages."""
    page, kv_heads = keys.shape[1:3]
    table = _used_pages(block_table, lengths, page, len(keys))
    slots = torch.arange(table.shape[1] * page, device=q.device)
    seen = slots < lengths[:, None]  # [B, S]
    if window > 0:
        seen = seen & (slots >= lengths[:, None] - window)
    k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (keys, values))  # [B, Nkv, S, D]
    v = v.masked_fill(~seen[:, None, :, None], 0.0)  # what was never written may be NaN
    grouped = q.unflatten(1, (kv_heads, -1))
    out, lse = reference_part(grouped, k, v, seen[:, None, None])
    return out.flatten(1, 2), lse.flatten(1, 2)


def _used_pages(block_table: Tensor, lengths: Tensor, page: int, pages: int) -> Tensor:
    """`block_table` as wide as the longest row needs, with page 0 where a row has none."""
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest > block_table.shape[1] * page or bool((lengths < 0).any()):
        raise ValueError(
            f"lengths run from {int(lengths.min())} to {longest}; allowed: 0 to {block_table.shape[1] * page} for "
            f"{block_table.shape[1]} pages of {page}"
        )
    table = block_table[:, : triton.cdiv(longest, page)].long()
    used = torch.arange(table.shape[1], device=table.device) * page < lengths[:, None]
    table = table.masked_fill(~used, 0)
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
        raise ValueError(f"block_table names pages {int(table.min())} to {int(table.max())}; allowed: 0 to {pages - 1}")
    return table


def _check(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, window: int, split_tokens: int
) -> None:
    if q.ndim != 3 or not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q has the shape {tuple(q.shape)}; allowed: [B, Nq, D], D up to {MAX_HEAD_DIM}")
    check_cache(keys, values, q.shape[1], q)
    if block_table.ndim != 2 or len(block_table) != len(q) or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; allowed: torch.int32 [{len(q)}, max_pages]"
        )
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths are {lengths.dtype} {tuple(lengths.shape)}; allowed: torch.int32 [{len(q)}]")
    if window < 0:
        raise ValueError(f"window = {window}; allowed: 0 (no window), or 1 and more")
    if split_tokens < 16 and split_tokens != 0:
        raise ValueError(f"split_tokens = {split_tokens}; allowed: 16 and more, or 0 (as many as fill the GPU)")


@triton.jit(do_not_specialize=["table_row", "rows", "window", "split_tokens"])
def _kernel(
    q, keys, values, block_table, lengths, out, lse, q_row, q_head, page_stride, slot_stride, kv_head_stride, table_row,
    rows, heads, window, split_tokens, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WHOLE: tl.constexpr,
    SCALE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = (tl.program_id(1) // tiles).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    start, oldest = split * split_tokens, tl.maximum(length - window, 0)
    end = tl.minimum(start + split_tokens, length)
    if not WHOLE and tl.maximum(start, oldest) >= end:
        return

    member = tl.program_id(1) % tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    head = kv_head * GROUP + member
    real = member < GROUP
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d < D)[None, :]
    query = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], inside, other=0.0).to(DOT)
    top = tl.full([BLOCK_G], float("-inf"), ACC)
    total = tl.zeros([BLOCK_G], ACC)
    acc = tl.zeros([BLOCK_G, BLOCK_D], ACC)
    # Blocks begin at the same places whatever the window hides.
    begin = start + tl.maximum(oldest - start, 0) // BLOCK_N * BLOCK_N
    for n in range(begin, end, BLOCK_N):
        slot = n + tl.arange(0, BLOCK_N)
        seen = (slot >= oldest) & (slot < end)
        page = tl.load(block_table + row * table_row + slot // PAGE, seen, other=0).to(tl.int64)
        place = page * page_stride + slot % PAGE * slot_stride + kv_head * kv_head_stride
        place, there = place[:, None] + d[None, :], seen[:, None] & (d < D)[None, :]
        k = tl.load(keys + place, there, other=0.0).to(DOT)
        v = tl.load(values + place, there, other=0.0).to(DOT)
        top, total, acc = attend_block(query, k, v, seen[None, :], top, total, acc, SCALE, ACC)

    part, part_lse = normalize(top * LN_2, total, acc)
    target = (split.to(tl.int64) * rows + row) * heads + head
    tl.store(out + target[:, None] * D + d[None, :], part.to(out.dtype.element_ty), inside)
    tl.store(lse + (split.to(tl.int64) * heads + head) * rows + row, part_lse, real)


@torch.library.custom_op("bylaw::paged_attention", mutates_args=())
def _forward(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, window: int, split_tokens: int
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, D], lse [Nq, B])."""
    rows, heads, head_dim = q.shape
    page, kv_heads = keys.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty((heads, rows), dtype=lse_dtype(q))
    if not rows:
        return out, lse
    q, block_table, lengths = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, block_table, lengths))
    window = window or UNLIMITED
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    block_g = min(GROUP_ROWS, max(16, triton.next_power_of_2(group)))
    settings = config("paged_attention", q.device, head_dim=block_d, itemsize=q.element_size())
    tiles = kv_heads * triton.cdiv(group, block_g)
    slots = block_table.shape[1] * page
    split_tokens = split_tokens or _filling(rows * tiles, slots, settings["BLOCK_N"], q.device)
    splits = max(1, triton.cdiv(slots, split_tokens))
    # A single part is the result.
    parts = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=lse.dtype)
    lses = lse if splits == 1 else lse.new_empty((splits, *lse.shape))
    start(
        _kernel, (rows, tiles, splits), q, keys, values, block_table, lengths, parts, lses, *q.stride()[:2],
        *keys.stride()[:3], block_table.stride(0), rows, heads, window, split_tokens,
        GROUP=group, D=head_dim, PAGE=page, WHOLE=splits == 1, SCALE=softmax_scale(head_dim), DOT=operand(q.dtype),
        ACC=accumulator(q.dtype), BLOCK_G=block_g, BLOCK_D=block_d, **settings,
    )  # fmt: skip
    if splits > 1:
        merge_splits(parts, lses, out, lse, lengths, window, split_tokens)
    return out, lse


def _filling(programs: int, slots: int, block: int, device: torch.device) -> int:
    """Keys per split, whole blocks, so that the device is filled about twice over."""
    splits = max(1, 2 * multiprocessors(device) // programs)
    return max(1, triton.cdiv(slots, splits * block)) * block


@_forward.register_fake
def _(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, window: int, split_tokens: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q))
