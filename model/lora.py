"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) on the linear layers of one trunk, several side by side.

A forward pass uses one of them, or none. So policy, value and reward model can share the trunk in memory, and the
reference is the trunk with its adapters off. The arithmetic is PEFT's, of one adapter to a Hugging Face module: q, k
and v are one matrix here, and each has its own A.

Parameters are `<linear layer>.lora_<adapter>.A` and `.B`, as in `blocks.0.qkv.lora_policy.A`, in float32 also beside
16-bit weights. Every rank has them whole.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bylaw.model.config import ModelConfig
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.settings import require
from bylaw.model.transformer import Stream, Transformer
from bylaw.model.weights import Piece, pieces

PARAMETER = re.compile(r"\.lora_(\w+)\.[AB]$")
"""Finds the adapter in a parameter's name."""
HELD = "adapters"  # the trunk's attribute for what is below
Spans = tuple[tuple[int, int], ...]
"""First row and number of rows of each adapted part of a fused weight."""


@dataclass
class Adapters:
    """What is on a trunk. One object, which the trunk and its linear layers hold together."""

    settings: dict[str, LoraSettings] = field(default_factory=dict)
    active: str | None = None
    frozen: list[str] = field(default_factory=list)


class Factors(nn.Module):
    """A [n * r, in] and B [rows of the n parts, r] of one adapter, for the n parts of a linear layer that it adapts."""

    def __init__(self, parts: list[Piece], settings: LoraSettings, weight: Tensor) -> None:
        super().__init__()
        self.spans: Spans = tuple((part.start, part.shape[0]) for part in parts)
        self.scale = settings.scale
        kind: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.A = nn.Parameter(torch.empty(len(parts) * settings.rank, parts[0].shape[1], **kind))
        self.B = nn.Parameter(torch.zeros(sum(part.shape[0] for part in parts), settings.rank, **kind))


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters. It is the layer that was there: optimisers, hooks and FSDP2 hold on to that."""

    adapters: Adapters

    def forward(self, input: Tensor) -> Tensor:
        active = self.adapters.active
        factors = None if active is None else self._modules.get(f"lora_{active}")
        if factors is None:
            return F.linear(input, self.weight, self.bias)
        assert isinstance(factors, Factors)
        # Rounded for the product as MasterAdamW's parameters are; their gradients are summed in float32.
        a, b = factors.A.to(input.dtype), factors.B.to(input.dtype)
        return _Adapted.apply(input, self.weight, self.bias, a, b, factors.spans, factors.scale)  # pyright: ignore[reportReturnType]


class _Adapted(torch.autograd.Function):
    """x W^T + bias, plus scale * (x A^T) B^T in the rows of each part, added in place.

    Kept for the backward pass: x [T, in] and x A^T [T, n * r]; a frozen layer without an adapter would keep neither.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, spans: Spans, scale: float
    ) -> Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.spans, ctx.scale = spans, scale
        # Into memory of our own: activation checkpointing keeps what a product returns, and may not see it change.
        out = x.new_empty(len(x), len(weight))
        torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
        for (start, rows), u, v in _parts(spans, low, b):
            out[:, start : start + rows].addmm_(u, v.T, alpha=scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        (grad,), scale, wanted = grads, ctx.scale, ctx.needs_input_grad
        grad_low, grad_b = torch.empty_like(low), torch.empty_like(b)
        for (start, rows), u, v, gu, gv in _parts(ctx.spans, low, b, grad_low, grad_b):
            part = grad[:, start : start + rows]
            torch.mm(part, v, out=gu)
            torch.mm(part.T, u, out=gv)
        grad_low *= scale
        grad_b *= scale
        grad_x = (grad @ weight).addmm_(grad_low, a) if wanted[0] else None
        grad_weight = grad.T @ x if wanted[1] else None
        grad_bias = grad.sum(0) if wanted[2] else None
        return grad_x, grad_weight, grad_bias, grad_low.T @ x, grad_b, None, None


def _parts(spans: Spans, *pairs: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each span, with its columns of x A^T and its rows of B, and the same of their gradients."""
    rows, rank = [rows for _, rows in spans], pairs[1].shape[1]
    cut = [x.split(rows) if i % 2 else x.split(rank, dim=1) for i, x in enumerate(pairs)]
    return zip(spans, *cut, strict=True)


def adapted_parts(config: ModelConfig, settings: LoraSettings) -> dict[str, list[Piece]]:
    """The Hugging Face weights that get an adapter, in order, under the name of the linear layer that holds them."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces(config):
        module, kind = piece.name.split(".")[-2:]
        if module in settings.modules and kind == "weight":
            found.setdefault(piece.parameter.removesuffix(".weight"), []).append(piece)
    return found


def add_adapter(trunk: Transformer, name: str, settings: LoraSettings, seed: int, *, freeze_base: bool = False) -> None:
    """Put a new adapter on `trunk`. It changes nothing yet: B is 0, and A is drawn from (`seed`, `name`) as PEFT does,
    uniform within 1/sqrt(in).

    `freeze_base`: only adapters learn from now on, until they are merged. Raises ValueError for a name that is taken or
    is not made of letters, digits and _, for rank 0, and for a trunk without memory or cut by tensor parallelism.
    """
    adapters = _adapters(trunk) or Adapters()
    require(re.fullmatch(r"\w+", name, re.ASCII) is not None, "adapter", name, "letters, digits and _")
    require(name not in adapters.settings, "adapter", name, f"a new name; there are {', '.join(adapters.settings)}")
    require(settings.rank > 0, "rank", settings.rank, "1 or more for an adapter (0 trains without one)")
    _check_trunk(trunk)
    for path, parts in adapted_parts(trunk.config, settings).items():
        linear: Any = trunk.get_submodule(path)
        linear.__class__, linear.adapters = AdaptedLinear, adapters
        factors = Factors(parts, settings, linear.weight)
        _draw(factors.A, parts, f"{seed} {name}")
        linear.add_module(f"lora_{name}", factors)
    adapters.settings[name] = settings
    setattr(trunk, HELD, adapters)
    if freeze_base:
        _freeze(trunk, adapters)


def _freeze(trunk: Transformer, adapters: Adapters) -> None:
    for key, parameter in trunk.named_parameters():
        if parameter.requires_grad and not PARAMETER.search(key):
            parameter.requires_grad_(False)
            adapters.frozen.append(key)


@torch.no_grad()
def _draw(a: Tensor, parts: list[Piece], seed: str) -> None:
    """Each part from a generator of its own: what an adapter starts from depends on nothing but names and the seed."""
    for part, rows in zip(parts, a.chunk(len(parts)), strict=True):
        digest = hashlib.blake2b(f"{seed} {part.name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, signed=True))
        bound = rows.shape[1] ** -0.5  # Kaiming's with a = sqrt(5)
        rows.copy_(torch.empty(rows.shape).uniform_(-bound, bound, generator=generator))


def copy_adapter(trunk: Transformer, source: str, target: str) -> None:
    """A new adapter `target` with the settings and values of `source`: a value model that starts as the reward model.

    Errors as for add_adapter, and ValueError for a `source` that is not there.
    """
    add_adapter(trunk, target, adapter_settings(trunk, source), seed=0)
    values, copies = adapter_parameters(trunk, source), adapter_parameters(trunk, target)
    with torch.no_grad():
        for copy, value in zip(copies.values(), values.values(), strict=True):
            copy.copy_(value)


def adapter_settings(trunk: Transformer, name: str) -> LoraSettings:
    """Settings of one adapter. Raises ValueError if it is not there."""
    there = adapter_names(trunk)
    require(name in there, "adapter", name, ", ".join(there) or "none, as add_adapter has put none on this model")
    adapters = _adapters(trunk)
    assert adapters is not None
    return adapters.settings[name]


def adapter_names(trunk: nn.Module) -> list[str]:
    """The adapters on `trunk`, in the order in which they came."""
    adapters = _adapters(trunk)
    return [] if adapters is None else list(adapters.settings)


def active_adapter(trunk: nn.Module) -> str | None:
    """The adapter that a forward pass uses now."""
    adapters = _adapters(trunk)
    return None if adapters is None else adapters.active


def active_stamp(trunk: nn.Module) -> str:
    """What a forward pass depends on besides tensors: the adapter in use and its settings; empty without one."""
    adapters = _adapters(trunk)
    return (
        "" if adapters is None or adapters.active is None else f"{adapters.active} {adapters.settings[adapters.active]}"
    )


def idle_parameters(trunk: nn.Module) -> set[str]:
    """Names of the parameters of adapters that a forward pass does not use now."""
    active = active_adapter(trunk)
    return {key for key, _ in trunk.named_parameters() if (found := PARAMETER.search(key)) and found[1] != active}


@contextmanager
def use_adapter(trunk: Transformer, name: str | None) -> Iterator[None]:
    """In it, `trunk` runs with the adapter `name`; None: as it is without any. Then what was before holds again.

    A backward pass may come later, outside; but what it recomputes (activation checkpointing) it recomputes with the
    adapter of its own time, unless `recomputing` is told. Raises ValueError for an adapter that is not there.
    """
    if name is not None:
        adapter_settings(trunk, name)
    adapters = _adapters(trunk) or Adapters()
    before, adapters.active = adapters.active, name
    try:
        yield
    finally:
        adapters.active = before


@dataclass(frozen=True)
class View:
    """`trunk` under an adapter, whichever it uses otherwise; with None the trunk as it was: a reference model."""

    trunk: Transformer
    adapter: str | None = None

    def __call__(self, stream: Stream) -> Tensor:
        """Hidden states [T, H]."""
        with use_adapter(self.trunk, self.adapter):
            return self.trunk(stream)

    @property
    def head_weight(self) -> Tensor:
        return self.trunk.head_weight

    @property
    def device(self) -> torch.device:
        return self.trunk.device


def recomputing(trunk: Transformer) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """`context_fn` of torch.utils.checkpoint: the backward pass recomputes with the adapter that is in use now."""
    active = active_adapter(trunk)
    return lambda: (nullcontext(), use_adapter(trunk, active))


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What an optimiser trains: the adapter's parameters by name and, of a ScalarModel, its head too."""
    own = {key: p for key, p in model.named_parameters() if (found := PARAMETER.search(key)) and found[1] == name}
    if isinstance(model, Transformer):
        return own
    return own | {key: p for key, p in model.named_parameters() if not key.startswith("trunk.")}


def adapter_module(model: nn.Module, name: str) -> nn.Module:
    """The parameters of `adapter_parameters` as a module, under the same names: what `adamw`, `update` and training
    checkpoints are given where the trunk is shared or frozen. It cannot run.
    """
    holder = nn.Module()
    for key, parameter in adapter_parameters(model, name).items():
        *path, last = key.split(".")
        place = holder
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        place.register_parameter(last, parameter)
    return holder


def merge(trunk: Transformer, name: str) -> None:
    """Add the adapter `name` to the weights, in float32 or wider, and take all adapters off: a plain model, which
    learns as a whole again.

    Of weights that FSDP2 shares out, each rank changes its part. Raises ValueError for an adapter that is not there.
    """
    adapter_settings(trunk, name)
    for linear in _adapted(trunk):
        factors = linear._modules.get(f"lora_{name}")
        if isinstance(factors, Factors):
            _add(linear.weight, factors)
    remove_adapters(trunk)


@torch.no_grad()
def _add(weight: Any, factors: Factors) -> None:
    delta = torch.zeros(weight.shape, dtype=factors.A.dtype, device=weight.device)
    wide = torch.promote_types(delta.dtype, torch.float32)  # adapters that someone has cast to 16 bits
    delta, a, b = delta.to(wide), factors.A.to(wide), factors.B.to(wide)
    for (start, rows), u, v in _parts(factors.spans, a.T, b):
        torch.mm(v, u.T, out=delta[start : start + rows])
    delta *= factors.scale
    if hasattr(weight, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = distribute_tensor(delta, weight.device_mesh, weight.placements, src_data_rank=None)
        weight, delta = weight.to_local(), spread.to_local()
    weight.copy_(weight.to(wide) + delta)


def remove_adapters(trunk: Transformer) -> None:
    """Take all adapters off `trunk`; what they had frozen learns again."""
    adapters = _adapters(trunk)
    if adapters is None:
        return
    linear: Any
    for linear in _adapted(trunk):
        for name in adapters.settings:
            linear._modules.pop(f"lora_{name}", None)
        del linear.adapters
        linear.__class__ = nn.Linear
    for key in adapters.frozen:
        trunk.get_parameter(key).requires_grad_(True)
    delattr(trunk, HELD)


def require_merged(trunk: nn.Module, saver: str) -> None:
    """Raise ValueError if `trunk` has adapters, which `saver` would leave out."""
    names = adapter_names(trunk)
    if names:
        raise ValueError(
            f"the model has adapters ({', '.join(names)}), which {saver} would leave out; merge one into the weights "
            "first, or save it with save_adapter"
        )


def _adapters(trunk: nn.Module) -> Adapters | None:
    return getattr(trunk, HELD, None)


def _adapted(trunk: Transformer) -> list[AdaptedLinear]:
    return [module for module in trunk.modules() if isinstance(module, AdaptedLinear)]


def _check_trunk(trunk: Transformer) -> None:
    if trunk.device.type == "meta":
        raise ValueError("the model is on the meta device; load its weights before an adapter is added")
    cut = {type(m).__name__ for b in trunk.blocks for m in b.children() if isinstance(m, nn.Linear)}
    if cut - {"Linear", "AdaptedLinear"}:
        raise ValueError("tensor-parallel models take no adapters; use 1 tensor-parallel rank with LoRA")
