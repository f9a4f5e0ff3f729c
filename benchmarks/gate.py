"""Is a result right? Its error is measured in float64, beside that of torch in the same dtype, before it is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case

Call = Callable[..., Any]


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64, over the largest value, of the tensor that fares worst beside torch's.

    `error` is ours, `torch_error` the reference's in the same dtype, `difference` that between the two. A tensor of
    integers has as its error the fraction of entries that differ.
    """

    error: float
    torch_error: float
    difference: float
    rounding: float

    @property
    def ratio(self) -> float:
        """Our error over torch's, or over one rounding of the dtype where torch's is smaller than half of it."""
        return 0.0 if self.error == 0 else self.error / max(self.torch_error, self.rounding / 2, 1e-300)

    @property
    def as_good(self) -> bool:
        """At most twice torch's error, or one rounding; never with a NaN."""
        return self.ratio <= 2


def weights_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What flows back into each output that has a graph: random numbers, the same in every dtype; 1 into a loss."""
    return [_weights(output) for output in outputs if output.requires_grad]


def _weights(output: Tensor) -> Tensor:
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(0)
    drawn = torch.randn(output.shape, generator=generator, device=output.device)
    return drawn.bfloat16().to(output.dtype)


def differentiate(outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of `inputs`; the graph stays."""
    reached = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(reached, inputs, weights, retain_graph=True)


def dtypes(value: Any) -> list[str]:
    """The dtypes of the floating tensors in `value`, in order of appearance."""
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch.")] if value.is_floating_point() else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return list(dict.fromkeys(name for one in inside for name in dtypes(one)))


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def fresh(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of all tensors in `value`, strided alike, the floating ones in `dtype` where one is given."""
    if isinstance(value, Tensor):
        wanted = dtype if dtype and value.is_floating_point() else value.dtype
        if 0 in value.stride():  # expanded: its entries share memory, and cannot be written one by one
            return value.detach().to(wanted, copy=True)
        return torch.empty_strided(value.shape, value.stride(), dtype=wanted, device=value.device).copy_(value.detach())
    if isinstance(value, dict):
        return {key: fresh(one, dtype) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fresh(one, dtype) for one in value)
    return value


def ready(inputs: Mapping[str, Any], differentiable: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A copy of `inputs` whose tensors named in `differentiable` want a gradient."""
    copies = fresh(dict(inputs), dtype)
    for name in differentiable:
        copies[name].requires_grad_()
    return copies


def results(call: Call, case: Case, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs of `call` and its gradients, on copies of `inputs`."""
    copies = ready(inputs, case.differentiable, dtype)
    outputs = as_tuple(call(**copies))
    wanted = [copies[name] for name in case.differentiable]
    grads = differentiate(outputs, weights_of(outputs), wanted) if wanted else ()
    return [tensor.detach() for tensor in (*outputs, *grads)]


def check(case: Case, calls: Mapping[str, Call], device: torch.device, dtype: torch.dtype) -> dict[str, Errors | str]:
    """The errors of each of `calls` on `case`, or what it raised (but for want of memory, which is raised again)."""
    torch.manual_seed(0)
    inputs = case.inputs(device, dtype)

    def reference(**arguments: Any) -> Any:
        return case.ours(**arguments, backend="reference")

    exact = results(reference, case, inputs, torch.float64)
    same = results(reference, case, inputs)
    found: dict[str, Errors | str] = {}
    for name, call in calls.items():
        try:
            found[name] = compare(results(call, case, inputs), same, exact)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a peer's failure, of whatever kind, is a line of the report
            found[name] = described(error)
    return found


def described(error: Exception) -> str:
    """An error in one line; a RuntimeError's text says enough."""
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:500]


def compare(ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """The `Errors` of the worst of the tensors. Raises ValueError where their number or shapes differ."""
    if len(ours) != len(exact):
        raise ValueError(f"the results and gradients are {len(ours)} tensors; allowed: {len(exact)}")
    for got, true in zip(ours, exact, strict=True):
        if got.shape != true.shape:
            raise ValueError(f"the result has the shape {tuple(got.shape)}; allowed: {tuple(true.shape)}")
    every = [_errors(*tensors) for tensors in zip(ours, torchs, exact, strict=True)]
    found = worst(every)
    assert isinstance(found, Errors)
    return found


def worst(found: Sequence[Errors | str]) -> Errors | str:
    """A failure or a NaN if there is one, or the errors with the largest ratio."""
    return max(found, key=lambda one: (2, 0) if isinstance(one, str) else (int(one.ratio != one.ratio), one.ratio))


def _errors(ours: Tensor, torchs: Tensor, exact: Tensor) -> Errors:
    if not exact.is_floating_point():
        parts = (float((a != b).double().mean()) for a, b in ((ours, exact), (torchs, exact), (ours, torchs)))
        return Errors(*parts, rounding=0.0)
    scale = max(float(exact.masked_fill(exact.isinf(), 0).abs().max()), 1e-300)
    parts = (_distance(a, b) / scale for a, b in ((ours, exact), (torchs, exact), (ours, torchs)))
    return Errors(*parts, rounding=torch.finfo(ours.dtype).eps)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())  # infinities that agree are no error
