"""SwiGLU (Shazeer 2020, arXiv 2002.05202) over the fused projection: silu(gate) * up."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate_up` [T, 2I] holds the gate in its first half and the up projection in its second; returns [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
