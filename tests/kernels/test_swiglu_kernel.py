"""The SwiGLU kernels against float64 and against torch in the same dtype."""

import pytest
import torch
from precision import DTYPES, assert_all_as_good, assert_op, compiled, gradients, random

from bylaw.kernels import swiglu as module
from bylaw.kernels.swiglu import reference, swiglu


def ours(x: torch.Tensor) -> torch.Tensor:
    return swiglu(x, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 126), (2, 130), (2, 144), (0, 6), (2, 3, 10), (4, 0)])
def test_forward_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = 4 * random(*shape), random(*shape[:-1], shape[-1] // 2, seed=1)
    exact = gradients(reference, grad.to(dtype).double(), x.to(dtype).double())
    assert_all_as_good(gradients(ours, grad, x.to(dtype)), gradients(reference, grad, x.to(dtype)), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4864, 8 * 1001, 2 * 1001, 1001, 14336])
def test_production_shapes(size: int, dtype: torch.dtype) -> None:
    test_forward_and_gradient((1023, 2 * size), dtype)


def test_gradient_numerically() -> None:
    assert torch.autograd.gradcheck(ours, random(3, 10).requires_grad_())


def test_the_operations_are_registered_in_order() -> None:
    x = random(3, 10, dtype=torch.float32).requires_grad_()
    assert_op(module._forward, x)
    assert_op(module._backward, x.detach(), random(3, 5, dtype=torch.float32))


def test_under_torch_compile() -> None:
    x = random(3, 10, dtype=torch.float32)
    grad = random(3, 5, seed=1)
    for got, expected in zip(gradients(compiled(ours), grad, x), gradients(ours, grad, x), strict=True):
        assert torch.equal(got, expected)


def test_input_that_is_not_contiguous_and_two_runs() -> None:
    x, grad = random(10, 3, dtype=torch.float32), random(3, 5, seed=1)
    straight = gradients(ours, grad, x.T.contiguous())
    for got, again, expected in zip(gradients(ours, grad, x.T), gradients(ours, grad, x.T), straight, strict=True):
        assert torch.equal(got, again) and torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, in numpy under the interpreter
def test_saturates_without_overflow() -> None:
    x = torch.tensor([[-1e30, 1e30, -1000.0, 3.0, 2.0, 5.0]], device=random(1).device)
    torch.testing.assert_close(ours(x).cpu(), torch.tensor([[0.0, 2e30, 0.0]]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\); allowed"):
        swiglu(random(2, 3))
    with pytest.raises(ValueError, match="backend = 'cuda'; allowed: auto, reference, triton, library"):
        swiglu(random(2, 4), backend="cuda")
    with pytest.raises(ValueError, match="no library"):
        swiglu(random(2, 4), backend="library")
