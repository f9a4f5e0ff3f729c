"""The RMSNorm kernels, alone and after an addition, against float64 and against torch in the same dtype."""

from collections.abc import Callable

import pytest
import torch
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import rms_norm as module
from bylaw.kernels.rms_norm import add_reference, add_rms_norm, reference, rms_norm

EPS = 1e-2  # large enough to be seen
# Under the interpreter rows are packed by 4 up to 16, and 2 up to 64; wider ones are walked by blocks of 32.
SHAPES = [(1, 63), (9, 13), (63, 6), (3, 65), (2, 3, 40), (0, 6), (3, 0)]


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS, backend="triton")


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, EPS)


def ours_added(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(add_rms_norm(x, residual, weight, EPS, backend="triton"))


def torchs_added(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(add_reference(x, residual, weight, EPS))


def inputs(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """`count` of x (and residual), then the weight."""
    return [2 * random(*shape, seed=i) for i in range(count)] + [1 + random(shape[-1], seed=9)]


def assert_precise(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], grad: Tensor, tensors: list[Tensor], dtype: torch.dtype
) -> None:
    low = [x.to(dtype) for x in tensors]
    exact = gradients(torchs, grad.to(dtype).double(), *(x.double() for x in low))
    assert_all_as_good(gradients(ours, grad, *low), gradients(torchs, grad, *low), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_precise(ours, torchs, random(*shape, seed=5), inputs(shape, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_after_an_addition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_precise(ours_added, torchs_added, random(2, *shape, seed=5), inputs(shape, 2), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(4097, 32, 128), (8191, 1024), (2049, 4096), (1031, 8192), (257, 16384), (65, 20000)]
)
def test_production_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_precise(ours_added, torchs_added, random(2, *shape, seed=5), inputs(shape, 2), dtype)


def test_gradients_numerically() -> None:
    for shape in ((2, 3), (2, 70)):
        tensors = [x.requires_grad_() for x in inputs(shape, 2)]
        assert torch.autograd.gradcheck(ours, (tensors[0], tensors[2]), fast_mode=True)
        assert torch.autograd.gradcheck(ours_added, tensors, fast_mode=shape[1] > 3)


def test_only_one_of_the_outputs_is_used() -> None:
    for used in (0, 1):
        results = []
        for backend in ("reference", "triton"):
            x, residual, weight = (x.float().requires_grad_() for x in inputs((3, 10), 2))
            out = add_rms_norm(x, residual, weight, EPS, backend)[used]
            results.append(
                torch.autograd.grad(out, (x, residual, weight), random(3, 10, seed=5).float(), allow_unused=True)
            )
        for expected, got in zip(*results, strict=True):
            assert (expected is None) == (got is None)
            if expected is not None and got is not None:
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_rounded_before_the_scale() -> None:
    x, _, weight = (x.half() for x in inputs((8, 60), 2))
    assert (ours(x, weight) == torchs(x, weight)).double().mean() > 0.98, "but where the root's last bit differs"
    late = torchs(x.float(), weight.float()).half()
    assert (ours(x, weight) == late).double().mean() < 0.9


def test_the_operations_are_registered_in_order() -> None:
    x, residual, weight = (x.float().requires_grad_() for x in inputs((2, 5), 2))
    rstd = random(2, seed=3, dtype=torch.float32).abs()
    assert_op(module._forward, x, weight, EPS)
    assert_op(module._add_forward, x, residual, weight, EPS)
    for grad_summed in (None, residual.detach()):
        assert_op(module._backward, x.detach(), grad_summed, x.detach(), weight.detach(), rstd)


def test_under_torch_compile() -> None:
    x, residual, weight = (x.float() for x in inputs((3, 10), 2))
    for function, tensors in ((ours, (x, weight)), (ours_added, (x, residual, weight))):
        grad = random(*function(*tensors).shape, seed=5)
        straight = gradients(function, grad, *tensors)
        for got, expected in zip(gradients(compiled(function), grad, *tensors), straight, strict=True):
            assert torch.equal(got, expected)


def heads(qkv: Tensor) -> Tensor:
    return qkv.view(4, 7, 5)[:, 2:5]


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[::3, 1:], heads], ids=["columns", "strided", "heads"])
def test_input_that_is_not_contiguous_and_two_runs(view: Callable[[Tensor], Tensor]) -> None:
    base = random(4, 35, dtype=torch.float32)
    x = view(base)
    residual, weight = random(*x.shape, seed=1, dtype=torch.float32), random(x.shape[-1], seed=2, dtype=torch.float32)
    grad = random(2, *x.shape, seed=5)
    straight = gradients(ours_added, grad, x.contiguous(), residual, weight)

    def viewed(base: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return ours_added(view(base), residual.transpose(0, 1).contiguous().transpose(0, 1), weight)

    one, two = (gradients(viewed, grad, base, residual, weight) for _ in range(2))
    for got, again in zip(one, two, strict=True):
        assert torch.equal(got, again)
    for got, expected in zip((one[0], view(one[1]), *one[2:]), straight, strict=True):
        assert torch.equal(got, expected)
    alone = gradients(lambda base, weight: ours(view(base), weight), grad[0], base, weight)
    for got, expected in zip(alone, gradients(ours, grad[0], x.contiguous(), weight), strict=True):
        assert torch.equal(view(got) if got.shape == base.shape else got, expected)


@pytest.mark.parametrize("size", [10, 60, 70])
def test_a_row_does_not_depend_on_the_others(size: int) -> None:
    x, residual, weight = (x.float() for x in inputs((5, size), 2))
    grad = random(2, 5, size, seed=5)
    together = gradients(ours_added, grad, x, residual, weight)
    alone = gradients(ours_added, grad[:, 3:4], x[3:4], residual[3:4], weight)
    for got, expected in zip((together[0][:, 3:4], *(t[3:4] for t in together[1:3])), alone[:3], strict=True):
        assert torch.equal(got, expected)


def test_the_result_of_mixed_dtypes_is_torchs() -> None:
    x, weight = (x.float() for x in inputs((3, 10), 1))
    out = ours(x.half(), weight)
    torch.testing.assert_close(out, torchs(x.half(), weight), atol=1e-6, rtol=1e-6)
    assert out.dtype == torch.float32


def test_refusals() -> None:
    x, weight = random(2, 3), random(3)
    with pytest.raises(ValueError, match=r"rms_norm: x has the shape \(2, 3\) and weight \(2,\); allowed"):
        rms_norm(x, weight[:2], EPS)
    with pytest.raises(ValueError, match=r"residual is torch.float32 \(2, 3\); allowed: what x is, torch.float64"):
        add_rms_norm(x, x.float(), weight, EPS)
    with pytest.raises(ValueError, match="backend = 'cuda'"):
        add_rms_norm(x, x, weight, EPS, backend="cuda")


def test_auto_is_the_reference_on_a_cpu() -> None:
    x, residual, weight = inputs((3, 4), 2)
    if DEVICE == "cpu":
        assert torch.equal(rms_norm(x, weight, EPS), reference(x, weight, EPS))
    normed, summed = add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), EPS)
    assert torch.equal(summed, (x + residual).cpu()) and torch.equal(normed, reference(summed, weight.cpu(), EPS))
