"""Attention over dense keys with its log-sum-exp, for the CPU: one part of what `merge_parts` puts together.

    out, lse = dense_attention(q, k, v)        lse_i = log sum_j exp(q_i . k_j / sqrt(D)), over the j that i sees

The query heads that share keys stand as further queries, so that each key is read once.
"""

import torch
from torch import Tensor

from bylaw.kernels.merge_attention import reference_part


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of `q` [B, N, M, D] over `k` and `v` [B, N, S, D]: out [B, N, M, D] and lse [B, N, M]. No gradient.

    `bias` (`hiding`; it broadcasts to [B, N, M, S]) hides keys, of which every query must see one at least; without it
    all are seen, or with `causal` (M = S) those up to a query's own place. Strides are free but for the last dimension.
    """
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        # The operation behind torch's scaled_dot_product_attention on a CPU, which alone also returns the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return reference_part(q, k, v, seen.tril() if causal else seen if bias is None else bias == 0)


def hiding(seen: Tensor, q: Tensor) -> Tensor:
    """What is added to the scores of queries like `q`: 0 where `seen` holds, -inf elsewhere."""
    return q.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def merge_parts(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys as one: `out` [..., D] and `lse` [...] each, (out, lse) again.

    A part that is empty for a query has lse -inf and a finite out; not both (Hydragen, Juravsky et al. 2024, arXiv
    2402.05099, section 3.1).
    """
    weight = torch.sigmoid(lse_a - lse_b).to(out_a.dtype).unsqueeze(-1)
    return torch.lerp(out_b, out_a, weight), torch.logaddexp(lse_a, lse_b)
