"""Causal attention over packed sequences: grouped queries, any head size, optional sliding window.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j

over j of the same sequence with j <= i and, with a window w, i - j < w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.kernels import attention_library, flash
from bylaw.kernels.backend import choose
from bylaw.kernels.layout import Layout, plan

__all__ = ["Layout", "attention", "band", "plan", "reference"]
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
    """`attention` in plain torch, a sequence at a time: no padding, and no copy but the one that joins them."""
    if not layout.tokens:
        return torch.zeros_like(q)
    sequences = zip(*(x.split(list(layout.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(a, b, c, window) for a, b, c in sequences if len(a)])


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Within one sequence."""
    mask = None if window == 0 or len(q) <= window else band(len(q), window, q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, S, D]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length], whether a query at the row's place sees the key at the column's: the last `window` of them."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
