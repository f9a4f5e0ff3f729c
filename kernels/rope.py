"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Hugging Face's half-split layout."""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of `x` [T, N, D] by the angles of its position; `cos` and `sin` are [T, D].

    Dimension i < D/2 is paired with i + D/2.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1).to(x.dtype) + rotated * sin.unsqueeze(1).to(x.dtype)
