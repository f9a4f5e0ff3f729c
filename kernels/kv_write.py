"""Rotary embedding in place, and the new keys and values into pages of the cache, in one launch.

A cache is `keys` and `values` [P, page, Nkv, D]: P pages of 16, 32 or 64 tokens. Slot s is token s % page of page
s // page; a sequence owns the pages of its row in a block table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.launch import accumulator, config, start
from bylaw.kernels.rope import reference as rope_reference
from bylaw.kernels.rope import turned

PAGE_SIZES = (16, 32, 64)
FORWARD = tl.constexpr(False)  # which way `turned` turns; type checkers refuse a bool for a constexpr


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    backend: str = "auto",
) -> None:
    """Rotate `q` [T, Nq, D] and `k` [T, Nkv, D] in place, and write k and `v` [T, Nkv, D] to their `slots`.

    The three may be slices of one projection. `cos` and `sin` [T, D] are `rope`'s, the same in both halves; the
    arithmetic is in float32. `slots` [T] int64: where token t goes in the cache; -1 writes nothing; no slot may stand
    twice. Has no gradient.

    Raises ValueError for shapes, dtypes and strides that do not fit, an input that requires grad, a backend that
    cannot run there, and, in the reference alone, a slot that is not in the cache.
    """
    _check(q, k, v, cos, sin, keys, values, slots)
    inference_only("kv_write", q, k, v, keys, values)
    run = reference if choose("kv_write", backend, q) == "reference" else _write
    run(q, k, v, cos, sin, keys, values, slots)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """`kv_write` in plain torch."""
    pages, page = keys.shape[:2]
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= pages * page):
        span = f"{int(slots.min())} to {int(slots.max())}"
        raise ValueError(f"slots run from {span}; allowed: -1 to {pages * page - 1} for {pages} pages of {page}")
    wide = torch.promote_types(q.dtype, torch.float32)
    for x in (q, k):
        x.copy_(rope_reference(x.to(wide), cos.to(wide), sin.to(wide)))
    written = slots >= 0
    places = slots[written] // page, slots[written] % page
    keys[places], values[places] = k[written], v[written]


def check_cache(keys: Tensor, values: Tensor, heads: int, like: Tensor) -> None:
    """Whether `keys` and `values` are a cache that `heads` query heads of `like` can use. Raises ValueError.

    Strides are free but for the last, so that a layer's cache may be a view; it is never copied.
    """
    if keys.ndim != 4 or keys.shape != values.shape or keys.shape[1] not in PAGE_SIZES:
        raise ValueError(
            f"keys and values have the shapes {tuple(keys.shape)} and {tuple(values.shape)}; allowed: the same "
            f"[P, page, Nkv, D] with a page of {', '.join(map(str, PAGE_SIZES))} tokens"
        )
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(
            f"keys and values have the strides {keys.stride()} and {values.stride()}; allowed: the same, and 1 in the "
            "last dimension"
        )
    if keys.shape[3] != like.shape[-1] or heads < 1 or heads % keys.shape[2]:
        raise ValueError(
            f"{heads} query heads of size {like.shape[-1]} over {keys.shape[2]} heads of size {keys.shape[3]}; "
            "allowed: a multiple of the cache's heads, of the same size"
        )
    if not like.dtype == keys.dtype == values.dtype:
        raise ValueError(f"dtypes {like.dtype}, {keys.dtype} and {values.dtype}; allowed: one for queries and cache")


def _check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[2] % 2 == 0
    if not fits or any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError(
            f"q, k and v have the shapes {shapes} and strides {[x.stride() for x in (q, k, v)]}; allowed: [T, Nq, D] "
            "and twice [T, Nkv, D], D even and its stride 1"
        )
    check_cache(keys, values, q.shape[1], q)
    if k.shape[1] != keys.shape[2] or not q.dtype == k.dtype == v.dtype:
        found = f"{k.shape[1]} heads of {k.dtype} and {v.dtype}"
        raise ValueError(f"k and v have {found}; allowed: the cache's {keys.shape[2]} of {q.dtype}")
    tokens, _, head_dim = q.shape
    if cos.shape != (tokens, head_dim) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin have the shapes {tuple(cos.shape)} and {tuple(sin.shape)}; allowed: [{tokens}, {head_dim}]"
        )
    if slots.shape != (tokens,) or slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype} {tuple(slots.shape)}; allowed: torch.int64 [{tokens}]")


@triton.jit
def _kernel(
    q, k, v, cos, sin, keys, values, slots, q_token, q_head, k_token, k_head, v_token, v_head,
    page_stride, slot_stride, kv_head_stride, Q_HEADS, KV_HEADS,
    HALF: tl.constexpr, PAGE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token: of q, or of k and v.

    In place this is safe because a tile is at least as large as the number of threads: no two load the same number.
    """
    token = tl.program_id(0).to(tl.int64)
    q_blocks = tl.cdiv(Q_HEADS, BLOCK_H)
    block = tl.program_id(1)
    head = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    angle = token * 2 * HALF + d
    if block < q_blocks:
        head += block * BLOCK_H
        inside = (head < Q_HEADS) & (d < HALF)
        place = q + token * q_token + head * q_head + d
        first, second = turned(place, cos, sin, angle, inside, HALF, FORWARD, ACC)
        tl.store(place, first.to(q.dtype.element_ty), inside)
        tl.store(place + HALF, second.to(q.dtype.element_ty), inside)
    else:
        head += (block - q_blocks) * BLOCK_H
        inside = (head < KV_HEADS) & (d < HALF)
        slot = tl.load(slots + token)
        # Compared as a tile: a mask made with a scalar is one of integers to the interpreter.
        written = inside & (slot + tl.zeros_like(head) >= 0)
        target = slot // PAGE * page_stride + slot % PAGE * slot_stride + head.to(tl.int64) * kv_head_stride + d
        place = k + token * k_token + head * k_head + d
        first, second = turned(place, cos, sin, angle, inside, HALF, FORWARD, ACC)
        tl.store(place, first.to(k.dtype.element_ty), inside)
        tl.store(place + HALF, second.to(k.dtype.element_ty), inside)
        tl.store(keys + target, first.to(k.dtype.element_ty), written)
        tl.store(keys + target + HALF, second.to(k.dtype.element_ty), written)
        place = v + token * v_token + head * v_head + d
        tl.store(values + target, tl.load(place, written), written)
        tl.store(values + target + HALF, tl.load(place + HALF, written), written)


@torch.library.custom_op("bylaw::kv_write", mutates_args=("q", "k", "keys", "values"))
def _write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    tokens, heads, head_dim = q.shape
    _, page, kv_heads, _ = keys.shape
    settings = config("kv_write", q.device)
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, settings.pop("BLOCK") // block_d)
    grid = tokens, triton.cdiv(heads, block_h) + triton.cdiv(kv_heads, block_h)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    start(
        _kernel, grid, q, k, v, cos.contiguous(), sin.contiguous(), keys, values, slots.contiguous(), *strides,
        *keys.stride()[:3], heads, kv_heads,
        HALF=head_dim // 2, PAGE=page, ACC=accumulator(q.dtype), BLOCK_H=block_h, BLOCK_D=block_d, **settings,
    )  # fmt: skip


@_write.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None: ...
