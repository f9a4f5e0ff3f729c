"""The trainer's own weights, which the engine samples from: their version, and the phase in which shards are whole."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bylaw.model.lora import active_stamp, idle_parameters

CACHED, LAUNCHED = 1 << 15, 1 << 23
"""Integers of 8 bytes that a CPU core has in its cache, and that a GPU takes at once."""
SCRAMBLE = 0x1E3779B97F4A7C15
"""Its multiples modulo 2**64 look random (Knuth's multiplicative hashing, by the golden ratio)."""
FSDP = "torch.distributed.fsdp."


def weight_version(model: nn.Module) -> bytes:
    """16 bytes that name `model`'s parameters and buffers: their names, shapes, dtypes and bits, on one device. Of
    adapters, it is the one in use that counts, and its settings.

    Read from the values, because a write through `.data` and an all-gather of FSDP leave torch's version counters as
    they were. What is hashed are the sums of each matrix's columns, taken as integers modulo 2**64, with an odd factor
    for each row that is as good as random: no change, swap or shift of values that training makes cancels in them.
    Weights that come back get their version back.
    One pass over the weights, one synchronisation with a GPU. Of DTensors, this rank's shards are read.
    """
    digest = hashlib.blake2b(active_stamp(model).encode(), digest_size=16)
    sums: list[Tensor] = []
    idle = idle_parameters(model)
    named: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in (one for one in named if one[0] not in idle):
        # A DTensor is told by its method: its class takes seconds to import, and most programs have none.
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(f"{name} {tuple(local.shape)} {local.dtype}\n".encode())
        sums.append(_sums(_integers(local.detach())))
    if sums:
        digest.update(torch.cat(sums).cpu().numpy().data)
    return digest.digest()


def _integers(tensor: Tensor) -> Tensor:
    """The bits of `tensor` [..., C] as a matrix of the widest integers that its rows divide into."""
    matrix = torch.atleast_2d(tensor).flatten(end_dim=-2).contiguous()
    size = matrix.element_size()
    width = math.gcd(8, matrix.shape[1] * size, matrix.storage_offset() * size)
    return matrix.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width])


def _sums(bits: Tensor) -> Tensor:
    """Sums of the columns of `bits` [R, C] as int64, each row times an odd number of its own."""
    rows, columns = bits.shape
    odd = (torch.arange(rows, device=bits.device) * SCRAMBLE) | 1
    size = CACHED if bits.device.type == "cpu" else LAUNCHED
    total = torch.zeros(columns, dtype=torch.int64, device=bits.device)
    for piece, factors in zip(*(x.split(max(1, size // max(1, columns))) for x in (bits, odd)), strict=True):
        total += (piece * factors[:, None]).sum(0)
    return total


@contextmanager
def sampling_phase(model: nn.Module) -> Iterator[None]:
    """In it, every parameter that FSDP2 (`fully_shard`) keeps in shards is whole, and no forward talks to other ranks.

    All ranks enter together, for one all-gather; then each may run as many forwards as it likes and leave when it is
    done. A phase within a phase changes nothing. Without FSDP2 there is nothing to do, and no parameter is copied.
    Whole parameters are those of the phase only: step no optimiser and take no state_dict before it ends.

    Raises ValueError where FSDP2 casts inputs or outputs on the way: the sampler must see what the trainer sees.
    """
    modules = _sharded_modules(model)
    # FSDP2 works by hooks: without them its modules are plain ones. They also keep its state alive: hold on to them.
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    try:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = _without_fsdp(before), _without_fsdp(after)
            module.reshard()  # an evaluation may have left it whole, and a step have moved its shards since
        # Not as inference tensors, if the caller is in that mode: FSDP2 keeps them, and training would fail on them.
        with torch.inference_mode(False):
            for module in modules:
                module.unshard()
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to, if their hooks are in place; checks that they cast nothing."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # takes seconds, and is loaded already where there is one

    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    modules = [m for m in modules if len(_without_fsdp(m._forward_hooks)) < len(m._forward_hooks)]
    for module in modules:
        policy = module._get_fsdp_state()._mp_policy
        if (policy.cast_forward_inputs and policy.param_dtype) or policy.output_dtype:
            raise ValueError(
                f"a module's {policy} casts what goes in or out, which sampling would leave out; use "
                "MixedPrecisionPolicy(cast_forward_inputs=False) without output_dtype in fully_shard"
            )
    return modules


def _without_fsdp(hooks: dict[int, Callable]) -> dict[int, Callable]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if not hook.__module__.startswith(FSDP))
