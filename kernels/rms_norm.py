"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., H] by its root mean square and scale it by `weight` [H].

    The mean is taken in float32 (float64 for float64 input) and the result rounded to x's dtype before the
    scale, the order in which Llama checkpoints were trained.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
