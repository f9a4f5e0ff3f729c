"""The optimiser and the step that every trainer shares, as plain functions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bylaw.kernels import adamw as kernel
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.settings import OptimSettings
from bylaw.model.sharding import back_to_shards, gradient_norm, is_shared_out, local, sum_whole_gradients


class MasterAdamW(torch.optim.AdamW):
    """AdamW for 16-bit parameters. Each has a float32 master copy that takes the steps, kept beside the moments; the
    parameter is that copy, rounded.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scale: Tensor | None = None) -> Any:
        """One step on the gradients times `grad_scale`, a float32 tensor with one number on their device; None is 1."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, grad_scale)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            master = parameter.detach().to(torch.float32, copy=True)
            state |= {"step": torch.zeros(()), "master": master}
            state |= {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        state["step"] += 1  # on the CPU, as torch.optim.AdamW keeps it: to read it is no synchronisation
        assert parameter.grad is not None
        kernel.adamw(
            local(parameter),
            local(state["master"]),
            local(parameter.grad),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            grad_scale=torch.ones((), device=parameter.device) if grad_scale is None else grad_scale,
        )


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over `model`'s parameters, with weight decay on matrices only.

    Where any of them has 16 bits, all get float32 master copies.
    """
    back_to_shards(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    # What data ranks share out stands apart: torch's operations on lists take one kind of tensor.
    groups = [
        {"params": [p for p in matrices if not is_shared_out(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in matrices if is_shared_out(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
    return (MasterAdamW if low else torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_epsilon,
        fused=not low,  # one pass over memory, on a CPU too
    )


def scheduled(settings: OptimSettings, peak: float, step: int, steps: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: a linear warm-up to `peak`, then the schedule."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return peak * (1 - done) if settings.schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    max_grad_norm: float,
    parallel: Parallel = ALONE,
) -> float:
    """One step on the gradients that stand in `model`, clipped to `max_grad_norm`; returns their norm before the clip.

    Raises FloatingPointError on a gradient that is not finite, before any parameter moves.
    """
    named = trained(model, optimizer)
    sum_whole_gradients(named, parallel)
    length = gradient_norm(named, parallel)
    scale = torch.clamp(max_grad_norm / (length + 1e-6), max=1.0)
    norm = float(length)  # the step's one synchronisation with a GPU
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; no parameter of this model was changed. A lower learning rate may help"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if isinstance(optimizer, MasterAdamW):
        optimizer.step(grad_scale=scale)
    else:
        torch._foreach_mul_([local(p.grad) for _, p in named if p.grad is not None], scale)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The parameters of `model`, by name, that `optimizer` moves."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in moved]
