"""The log-prob and entropy kernels against float64 and against torch in the same dtype."""

import math

import pytest
import torch
import torch.nn.functional as F
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import logprob_entropy as module
from bylaw.kernels.logprob_entropy import logprob_entropy, reference


def targets(rows: int, size: int) -> Tensor:
    drawn = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(1))
    drawn[1::3] = -100
    return drawn.to(DEVICE)


def ours(x: Tensor, y: Tensor, temperature: float = 0.7, inplace: bool = False) -> Tensor:
    return torch.stack(logprob_entropy(x, y, temperature, inplace, backend="triton"))


def plain(x: Tensor, y: Tensor, temperature: float = 0.7) -> Tensor:
    return torch.stack(reference(x, y, temperature))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 63), (2, 65), (1, 16), (0, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradient(rows: int, size: int, temperature: float, dtype: torch.dtype) -> None:
    x, grad, y = (3 * random(rows, size)).to(dtype), random(2, rows, seed=2), targets(rows, size)
    exact = gradients(lambda z: plain(z, y, temperature), grad, x.double())
    same = gradients(lambda z: plain(z, y, temperature), grad, x)
    assert_all_as_good(gradients(lambda z: ours(z, y, temperature), grad, x), same, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_lose_no_digits(dtype: torch.dtype) -> None:
    x, grad, y = (random(3, 40) + 1000).to(dtype), random(2, 3, seed=2), targets(3, 40)
    exact = gradients(plain, grad, x.double(), y)
    assert_all_as_good(gradients(ours, grad, x, y), gradients(plain, grad, x, y), exact)


def test_gradient_numerically() -> None:
    y = targets(3, 20)
    assert torch.autograd.gradcheck(lambda x: ours(x, y), random(3, 20).requires_grad_(), fast_mode=True)


def test_the_gradient_in_place_is_the_same_and_takes_no_memory() -> None:
    y, grad, leaf = targets(4, 33), random(2, 4, seed=2).float(), random(4, 50, dtype=torch.float32)
    expected = gradients(lambda x: ours(x[:, 3:36], y), grad, leaf)[1]
    buffer = leaf.requires_grad_() + 0
    before, logits = buffer.detach().clone(), buffer[:, 3:36]  # strided rows
    out = ours(logits, y, inplace=True)
    (got,) = torch.autograd.grad(out, leaf, grad, retain_graph=True)
    assert torch.equal(got, expected) and torch.equal(logits, expected[:, 3:36])
    assert torch.equal(buffer[:, :3], before[:, :3]) and torch.equal(buffer[:, 36:], before[:, 36:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaf, grad)


def test_columns_apart_are_never_overwritten() -> None:
    y, grad, leaf = targets(4, 20), random(2, 4, seed=2).float(), random(20, 4, dtype=torch.float32)
    logits = (leaf.requires_grad_() + 0).T
    before = logits.detach().clone()
    (got,) = torch.autograd.grad(ours(logits, y, inplace=True), logits, grad)
    assert torch.equal(got, gradients(ours, grad, before, y)[1]) and torch.equal(logits, before)


def test_the_operations_are_registered_in_order() -> None:
    x, y, row = random(2, 5, dtype=torch.float32), targets(2, 5), random(2, dtype=torch.float32)
    assert_op(module._forward, x.requires_grad_(), y, 0.7, False)
    assert_op(module._backward, x.detach(), [y, row, row, row.exp(), row, row], 0.7)
    assert_op(module._backward_inplace, x.detach(), [y, row, row, row.exp(), row, row], 0.7)


@pytest.mark.parametrize("inplace", [False, True])
def test_under_torch_compile(inplace: bool) -> None:
    hidden, weight = random(3, 8, dtype=torch.float32), random(20, 8, seed=1, dtype=torch.float32)
    y, grad = targets(3, 20), random(2, 3, seed=2)

    def head(h: Tensor, w: Tensor) -> Tensor:
        return ours(F.linear(h, w), y, inplace=inplace)

    straight = gradients(head, grad, hidden, weight)
    for got, expected in zip(gradients(compiled(head), grad, hidden, weight), straight, strict=True):
        assert torch.equal(got, expected)


def test_two_runs_are_equal_and_a_row_stands_alone() -> None:
    x, y, grad = random(5, 40, dtype=torch.float32), targets(5, 40), random(2, 5, seed=2)
    first = gradients(ours, grad, x, y)
    for got, again in zip(first, gradients(ours, grad, x, y), strict=True):
        assert torch.equal(got, again)
    alone = gradients(ours, grad[:, 2:3], x[2:3], y[2:3])
    assert torch.equal(alone[0], first[0][:, 2:3]) and torch.equal(alone[1], first[1][2:3])


def test_blocks_of_banned_tokens_and_a_broken_row() -> None:
    x = random(4, 40, dtype=torch.float32)
    x[0, :20] = x[1, 3:] = -math.inf
    x[3, 30] = math.nan
    y = torch.tensor([25, 1, 3, 3], device=DEVICE)
    got, expected = gradients(ours, random(2, 4, seed=2), x, y), gradients(plain, random(2, 4, seed=2), x, y)
    for ours_, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_, torchs, equal_nan=True)
    assert got[0][:, 3].isnan().all() and got[0][:, :3].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")  # in numpy under the interpreter
@pytest.mark.parametrize("temperature", [math.inf, 1e-20, 1e-40])
def test_extreme_temperatures(temperature: float) -> None:
    x, y = random(3, 40, dtype=torch.float32), random(3, 40).argmax(1)
    torch.testing.assert_close(ours(x, y, temperature), plain(x, y, temperature))


def test_a_target_outside_the_vocabulary_shows() -> None:
    x, y = random(3, 20, dtype=torch.float32), torch.tensor([20, -1, 19], device=DEVICE)
    assert module._forward(x, y, 1.0, False)[0].isnan().tolist() == [True, True, False]


def test_the_backend_is_checked() -> None:
    with pytest.raises(ValueError, match="logprob_entropy: backend = 'liger'; allowed"):
        logprob_entropy(random(3, 20), targets(3, 20), backend="liger")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_logits_than_32_bits_count() -> None:
    x = torch.randn(1, 151936, dtype=torch.bfloat16, device=DEVICE).repeat(14500, 1).requires_grad_()
    y = torch.full((14500,), 7, device=DEVICE)
    out = ours(x, y)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out[:, 0], out[:, -1]) and torch.equal(gradient[0], gradient[-1])
