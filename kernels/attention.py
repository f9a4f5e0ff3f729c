"""Causal attention over packed sequences: grouped queries, any head size, optional sliding window.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j

over j of the same sequence with j <= i and, with a window w, i - j < w.

The reference pads inside attention only: sequences of like length share one dense call, so that the matrix products of
the model stay on the packed stream and little is wasted on unequal lengths.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Sequences share a dense call while the longest is at most this much longer than the shortest ...
LENGTH_RATIO = 1.34
# ... or while all are this short, where a further call costs more than the padding.
SHORT = 32


@dataclass(frozen=True)
class Bucket:
    """Sequences of like length: their tokens' places in the packed stream, and in a dense [rows * length]."""

    rows: int
    length: int
    stream: Tensor  # [n]
    dense: Tensor  # [n]


def plan_buckets(cu_seqlens: Tensor) -> list[Bucket]:
    """Group the sequences of `cu_seqlens` [B+1] by length. Planned once per batch, used by every layer."""
    starts, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
    order = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: -lengths[b])
    groups: list[list[int]] = []
    for b in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest <= max(SHORT, LENGTH_RATIO * lengths[b]):
            groups[-1].append(b)
        else:
            groups.append([b])
    return [_bucket([starts[b] for b in group], [lengths[b] for b in group], cu_seqlens.device) for group in groups]


def _bucket(starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    longest = lengths[0]
    stream = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    dense = torch.cat([torch.arange(row * longest, row * longest + n) for row, n in enumerate(lengths)])
    return Bucket(len(starts), longest, stream.to(device), dense.to(device))


def attention(q: Tensor, k: Tensor, v: Tensor, buckets: list[Bucket], window: int = 0) -> Tensor:
    """Causal attention of `q` [T, Nq, D] over `k` and `v` [T, Nkv, D] within each packed sequence; returns [T, Nq, D].

    Nq is a multiple of Nkv. `window` 0 sees the whole past; w > 0 sees the last w tokens, itself included.
    """
    out = torch.zeros_like(q)
    for bucket in buckets:
        mixed = _dense_attention(_to_dense(q, bucket), _to_dense(k, bucket), _to_dense(v, bucket), window)
        flat = mixed.reshape(bucket.rows * bucket.length, *q.shape[1:])
        out = out.index_copy(0, bucket.stream, flat.index_select(0, bucket.dense))
    return out


def _to_dense(x: Tensor, bucket: Bucket) -> Tensor:
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


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int = 0) -> Tensor:
    """One new query per row over its cache: `q` [B, Nq, D], `keys` and `values` [B, Nkv, S, D], `lengths` [B].

    Row b sees its first lengths[b] cache entries (the newest is the query's own), the last `window` of them if window >
    0. Returns [B, Nq, D].
    """
    rows, heads, head_dim = q.shape
    slots = torch.arange(keys.shape[2], device=q.device)
    seen = slots[None, :] < lengths[:, None]  # [B, S]
    if window > 0:
        seen = seen & (slots[None, :] >= lengths[:, None] - window)
    # The query heads of one group stand as rows of one small matrix, so that their shared keys are read once.
    grouped = q.view(rows, keys.shape[1], heads // keys.shape[1], head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None, :])
    return out.reshape(rows, heads, head_dim)
