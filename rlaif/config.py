"""Settings of the RL-CAI stages. Defaults are the paper's (arXiv 2212.08073, section 4; PPO as in 2204.05862)."""

from dataclasses import dataclass
from typing import Literal

from bylaw.model.settings import OptimSettings, SamplingSettings, require, require_cache


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SamplingSettings):
    """Two answers to each prompt."""

    max_tokens: int = 256
    """Longest answer."""
    pairs_per_prompt: int = 1
    """Pairs drawn for each prompt."""
    prompts_per_chunk: int = 64
    """Prompts worked on together and written together; what a killed stage does again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "pairs_per_prompt", "prompts_per_chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """The probability that answer A keeps a principle better than answer B."""

    principles: Literal["one", "all"] = "one"
    """One principle drawn for each pair by weight, or all of them averaged by weight."""
    min_option_mass: float = 0.02
    """Least probability on the two option letters together, in either order, below which a label abstains."""
    pairs_per_chunk: int = 64
    """Pairs judged together and written together; what a killed stage does again."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""

    def __post_init__(self) -> None:
        require(0 <= self.min_option_mass <= 1, "min_option_mass", self.min_option_mass, "from 0 to 1")
        require(self.pairs_per_chunk >= 1, "pairs_per_chunk", self.pairs_per_chunk, "1 or more")
        require_cache(self.cache_gib)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OptimSettings):
    """Reward model on soft labels."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Reward models overfit: the learning rate goes down to 0 over the run."""
    epochs: int = 1
    """Passes over the pairs; more than 1 overfits on real data (arXiv 2403.17031)."""
    batch_size: int = 64
    """Pairs per optimiser step."""
    heldout_fraction: float = 0.1
    """Share of the prompts whose pairs are kept for accuracy, calibration and the score's mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OptimSettings):
    """PPO against the reward model with a per-token KL penalty to the SL-CAI policy."""

    adam_epsilon: float = 1e-5
    """Added to AdamW's denominator (arXiv 2403.17031)."""
    iterations: int = 100
    """Rollout batches, each followed by updates."""
    rollouts: int = 64
    """Episodes per iteration."""
    max_tokens: int = 128
    """Longest response."""
    temperature: float = 1.0
    """Sampling temperature; every log-prob of the run is taken at it."""
    max_rows: int = 64
    """Sequences decoded together. Results do not depend on it."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""
    epochs: int = 1
    """Passes over each rollout batch."""
    minibatches: int = 4
    """Optimiser steps per pass."""
    clip: float = 0.2
    """Half-width of the policy ratio's clip."""
    value_clip: float = 0.2
    """Half-width of the value's clip around its old value."""
    value_learning_rate: float = 1e-5
    """Peak learning rate of the value model."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: float = 0.001
    """Weight of the per-token KL to the SL-CAI policy in the reward."""
    kl_target: float = 0.0
    """With a target above 0 the weight adapts so that the KL per response (nats) meets it; 0 keeps it fixed."""
    kl_horizon: int = 10_000
    """Episodes over which an adaptive weight moves."""
    critic_warmup: int = 0
    """Iterations in which only the value model learns."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of a response that did not end by itself."""
    normalize_scores: bool = True
    """Divide scores by the standard deviation that the reward model had on held-out answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "rollouts", "max_tokens", "max_rows", "epochs", "minibatches", "kl_horizon"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("clip", "value_clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("kl_coef", "kl_target", "critic_warmup", "missing_eos_penalty", "value_learning_rate"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require_cache(self.cache_gib)
        require(self.temperature > 0, "temperature", self.temperature, "above 0 (PPO needs a distribution)")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(
            self.minibatches <= self.rollouts, "minibatches", self.minibatches, f"at most rollouts = {self.rollouts}"
        )
