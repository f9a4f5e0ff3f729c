"""The optimiser and the step that every trainer shares, as plain functions."""

import math

import torch
from torch import nn

from bylaw.model.settings import OptimSettings


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over `model`'s parameters, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_epsilon,
        foreach=True,
    )


def scheduled(settings: OptimSettings, peak: float, step: int, steps: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: a linear warm-up to `peak`, then the schedule."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return peak * (1 - done) if settings.schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """One step on the gradients that stand in `model`, clipped to `max_grad_norm`; returns their norm before the clip.

    Raises FloatingPointError on a gradient that is not finite, before any parameter moves.
    """
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; no parameter of this model was changed. A lower learning rate may help"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
