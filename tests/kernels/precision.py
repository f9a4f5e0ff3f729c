"""How the kernels' tests compare: with float64, and with what torch attains in the same dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates when it stores bfloat16 and has no arithmetic in it, so that dtype waits for a GPU.
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_as_good(ours: Tensor, torchs: Tensor, exact: Tensor, name: str = "", exponent: float = 0.0) -> None:
    """The kernel's largest error is at most twice that of torch in the same dtype, or one rounding of the result.

    `exponent` is the size of the float32 exponents from which a kernel makes weights anew that torch has kept: their
    rounding is an error of every weight, whatever the dtype.
    """
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape, f"{name}: {ours.dtype} {tuple(ours.shape)}"
    if not exact.numel():
        return
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, torchs))
    eps = max(torch.finfo(ours.dtype).eps, exponent * torch.finfo(torch.float32).eps)
    rounding = eps * float(exact.abs().max())
    assert error <= max(2 * allowed, rounding), f"{name}: error {error:.3g}, torch's {allowed:.3g}"


def assert_all_as_good(
    ours: tuple[Tensor, ...], torchs: tuple[Tensor, ...], exact: tuple[Tensor, ...], exponent: float = 0.0
) -> None:
    """`assert_as_good` for each: an output and its gradients, as `gradients` gives them."""
    for i, (got, same_dtype, true) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_as_good(got, same_dtype, true, f"tensor {i}", exponent)


def gradients(function: Callable[..., Tensor], grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output of `function` and its gradient by each floating input."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, grad_out.to(out.dtype))


def assert_op(operation: Any, *arguments: Any) -> None:
    """torch's own checks of a registered operation: schema, fake kernel, autograd registration, AOT dispatch."""
    results = torch.library.opcheck(operation, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, where a graph break is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
