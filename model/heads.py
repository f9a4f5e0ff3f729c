"""A transformer with one number per token in place of a vocabulary: the reward model and the value model."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bylaw.model.packing import Packed
from bylaw.model.transformer import Transformer


class ScalarModel(nn.Module):
    """`model(packed)` scores every token [T]. A reward is read at a sequence's last token, a value at each."""

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(trunk.config.hidden_size, 1, bias=False)

    def forward(self, packed: Packed) -> Tensor:
        # In float32 whatever the trunk: a score rounded to bfloat16 keeps 8 bits.
        return F.linear(self.trunk(packed).float(), self.score.weight.float()).squeeze(-1)


@torch.no_grad()
def scalar_model(policy: Transformer, seed: int) -> ScalarModel:
    """A copy of `policy` with a fresh head: N(0, 1/sqrt(H + 1)) as in Stiennon et al. 2020 (arXiv 2009.01325)."""
    trunk = copy.deepcopy(policy)
    trunk.lm_head = None
    model = ScalarModel(trunk)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(model.score.weight.shape, generator=generator)
    model.score.weight.copy_(weight * (policy.config.hidden_size + 1) ** -0.5)
    return model.to(policy.device)
