"""A transformer with one number per token in place of a vocabulary: the reward model and the value model."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bylaw.model.lora import use_adapter
from bylaw.model.transformer import Stream, Transformer


class ScalarModel(nn.Module):
    """`model(stream)` scores every token [T], or those that the stream wants. A reward is read at a sequence's last
    token, a value at each.

    The trunk may be another model's too: it runs with `adapter` (model/lora.py) whichever that uses; None: without any.
    """

    def __init__(self, trunk: Transformer, adapter: str | None = None) -> None:
        super().__init__()
        self.trunk, self.adapter = trunk, adapter
        self.score = nn.Linear(trunk.config.hidden_size, 1, bias=False)

    def forward(self, stream: Stream) -> Tensor:
        with use_adapter(self.trunk, self.adapter):
            hidden = self.trunk(stream)
        return self.read(hidden)

    def read(self, hidden: Tensor) -> Tensor:
        """The scores [T] of the trunk's hidden states [T, H]: where another head on the trunk needs those too."""
        # In float32 whatever the trunk: a score rounded to bfloat16 keeps 8 bits.
        # A copy, as FSDP2 puts hooks on what a model returns, which a view would lose.
        return F.linear(hidden.float(), self.score.weight.float()).squeeze(-1).clone()


@torch.no_grad()
def scalar_model(policy: Transformer, seed: int, adapter: str | None = None) -> ScalarModel:
    """A copy of `policy` with a fresh head; with an `adapter` no copy, but `policy` itself, run with that."""
    trunk = policy if adapter is not None else copy.deepcopy(policy)
    if adapter is None:
        trunk.lm_head = None
    model = ScalarModel(trunk, adapter)
    model.score.weight.copy_(fresh_head(policy.config.hidden_size, seed))
    model.score.to(policy.device)
    return model


def fresh_head(hidden: int, seed: int) -> Tensor:
    """A new scalar head's weight [1, H]: N(0, 1/sqrt(H + 1)) as in Stiennon et al. 2020 (arXiv 2009.01325)."""
    return torch.randn((1, hidden), generator=torch.Generator().manual_seed(seed)) * (hidden + 1) ** -0.5
