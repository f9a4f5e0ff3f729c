"""Settings of low-rank adapters. Plain, without torch, so that `bylaw --help` is quick."""

import math
from dataclasses import dataclass

from bylaw.model.settings import require

ALL = "all-linear"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""A block's linear layers, by their Hugging Face names."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer's weight W learns as W + scale * B A, of small rank."""

    rank: int = 0
    """Rows of A and columns of B; 0 trains the weights themselves, without an adapter."""
    alpha: float = 32.0
    """Scale of the adapter, over its rank."""
    targets: tuple[str, ...] = (ALL,)
    """Linear layers with an adapter, by Hugging Face names (q_proj, v_proj, ...); all-linear takes all of a block's."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732) in place of alpha / rank."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "0 (no adapter) or more")
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        known = self.targets == (ALL,) or (len(self.targets) > 0 and set(self.targets) <= set(LINEARS))
        require(known, "targets", self.targets, f"one or more of {', '.join(LINEARS)}; or {ALL} alone")
        require(len(set(self.targets)) == len(self.targets), "targets", self.targets, "each name once")

        plain = (self.alpha, self.targets, self.rslora) == (32.0, (ALL,), False)
        require(self.rank > 0 or plain, "rank", self.rank, "1 or more where alpha, targets or rslora are set")

    @property
    def modules(self) -> tuple[str, ...]:
        """The targets by name, in the order of a block."""
        return tuple(name for name in LINEARS if name in self.targets or self.targets == (ALL,))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
