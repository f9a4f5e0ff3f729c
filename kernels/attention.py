"""Causal attention over packed sequences: grouped queries, any head size, optional sliding window.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j

over j of the same sequence with j <= i and, with a window w, i - j < w.

The reference pads inside attention only: sequences of like length share one dense call, so that the matrix products of
the model stay on the packed stream and little is wasted on unequal lengths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.kernels import attention_library, flash
from bylaw.kernels.backend import choose
from bylaw.kernels.layout import Bucket, Layout, make_buckets, plan

__all__ = ["Layout", "attention", "plan", "reference", "to_dense"]
LARGEST_HEAD = 256  # of our kernels


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int = 0, backend: str = "auto") -> Tensor:
    """Causal attention of `q` [T, Nq, D] over `k` and `v` [T, Nkv, D] within each packed sequence; returns [T, Nq, D].

    Nq is a multiple of Nkv. `window` 0 sees the whole past; w > 0 sees the last w tokens, itself included. `layout` is
    that of `plan`, made once per batch. With our own kernels two runs agree to the bit, and a sequence's result does
    not depend on what it is packed with. Raises ValueError for shapes or dtypes that do not fit together, a head size
    above 256 with our kernels, and a backend that cannot run there.
    """
    _check(q, k, v, layout, window)
    found, _ = attention_library.library(q.device, q.dtype, q.shape[2])
    chosen = choose("attention", backend, q, found is not None)
    if chosen == "reference":
        return reference(q, k, v, layout, window)
    if chosen == "library" and found is not None:
        return attention_library.call(found.name, q, k, v, layout.cu_seqlens, layout.max_seqlen, window)
    if q.shape[2] > LARGEST_HEAD:
        raise ValueError(f"heads of size {q.shape[2]}; allowed: up to {LARGEST_HEAD}, or backend='reference'")
    return flash.forward(q, k, v, layout, window)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fit = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and k.shape[1] > 0
    if not fit or q.shape[1] % k.shape[1] or q.shape[0] != layout.tokens:
        raise ValueError(
            f"q, k, v have the shapes {shapes}, and the layout {layout.tokens} tokens; allowed: [T, Nq, D] and twice "
            "[T, Nkv, D], Nq a multiple of Nkv, T as many tokens as the layout has"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; allowed: the same dtype")
    if window < 0:
        raise ValueError(f"window = {window}; allowed: 0 (the whole past) or more")


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int = 0) -> Tensor:
    """`attention` in plain torch. A layout planned for a GPU has no buckets: they are made at each call, for checks."""
    out = torch.zeros_like(q)
    for bucket in layout.buckets or make_buckets(layout.lengths, q.device):
        mixed = _dense_attention(to_dense(q, bucket), to_dense(k, bucket), to_dense(v, bucket), window)
        flat = mixed.reshape(bucket.rows * bucket.length, *q.shape[1:])
        out = out.index_copy(0, bucket.stream, flat.index_select(0, bucket.dense))
    return out


def to_dense(x: Tensor, bucket: Bucket) -> Tensor:
    """The sequences of a bucket out of a packed `x` [T, N, D]: [rows, length, N, D], zeros behind each."""
    # index_copy into zeros rather than a padded gather: its backward is a plain gather, not a scatter with collisions.
    flat = x.new_zeros(bucket.rows * bucket.length, *x.shape[1:])
    flat = flat.index_copy(0, bucket.dense, x.index_select(0, bucket.stream))
    return flat.view(bucket.rows, bucket.length, *x.shape[1:])


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    # [b, s, N, D]; padding lies behind each sequence, so the causal mask alone hides it from every real query.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if window == 0 or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None, :]
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
