"""Settings that several stages share. Plain dataclasses without torch, so that `bylaw --help` is quick."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How text is drawn from a model."""

    temperature: float = 1.0
    """Softmax temperature; 0 is greedy. The paper samples everything at 1 (arXiv 2212.08073, section 3)."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    max_rows: int = 64
    """Sequences decoded together. Results do not depend on it."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (keep all) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 (keep all) to 1")
        require(self.max_rows >= 1, "max_rows", self.max_rows, "1 or more")
        require_cache(self.cache_gib)


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How parameters are updated: AdamW, a schedule, and micro-batches by a token budget."""

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up: constant, or down to 0 in a line or a half cosine."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: int = 8192
    """Tokens in one forward and backward pass. Changes memory and speed, not the objective."""
    activation_checkpointing: Recompute = "none"
    """Recompute activations in the backward pass: none, selective (all but products and attention), or full."""
    compile: bool = False
    """Run the blocks through torch.compile."""
    save_every: int = 100
    """Optimiser steps between training checkpoints, from which a killed stage goes on."""
    keep_checkpoints: int = 1
    """How many of the newest training checkpoints stay on disk while a stage runs."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(0 <= self.learning_rate < math.inf, "learning_rate", self.learning_rate, "0 or more, and finite")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        require(0 < self.adam_epsilon < math.inf, "adam_epsilon", self.adam_epsilon, "above 0, and finite")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more, and finite")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        require(self.micro_batch_tokens >= 1, "micro_batch_tokens", self.micro_batch_tokens, "1 or more")
        require(self.save_every >= 1, "save_every", self.save_every, "1 or more")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "1 or more")


def require_choices(settings: object) -> None:
    """Raise ValueError for a setting that is none of the words that it may be."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            require(getattr(settings, name) in choices, name, getattr(settings, name), " or ".join(map(repr, choices)))


def require_cache(gib: float) -> None:
    """Raise ValueError for a budget of keys and values that is negative, infinite or not a number."""
    require(0 <= gib < math.inf, "cache_gib", gib, "0 (choose by the device) or more")


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError naming the setting, the value it was given, and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} = {value!r} is not possible; allowed: {allowed}")
