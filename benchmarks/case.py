"""What an operation tells the benchmarks: production shapes, floors, and the launches to compile ahead of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Floor:
    """The least an operation has to do: bytes read and written, and floating-point operations of matrix products."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `inputs(device, dtype)` makes keyword arguments; floating tensors named in `differentiable` get a gradient. `ours`
    is called with them and `backend=`, each of `peers` with them alone; all return the same tensor(s), which are
    compared before anything is timed. A peer that is not installed is left out by `peers` itself. An operation that
    changes its input in place gets fresh clones while it is checked, and the same tensors again and again while timed.
    `check` is a case of the same settings that is checked instead, where float64 at this shape would not fit a device.
    """

    operation: str
    shape: Mapping[str, int]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    ours: Callable[..., Outputs]
    forward: Floor
    backward: Floor | None = None
    differentiable: tuple[str, ...] = ()
    peers: Mapping[str, Callable[..., Outputs]] = field(default_factory=dict)
    check: "Case | None" = None


@dataclass(frozen=True)
class Launch:
    """One production configuration to compile without a GPU: `run` calls the operation on tensors of device "meta"."""

    name: str
    run: Callable[[], Any]
    tensor_cores: bool = False
