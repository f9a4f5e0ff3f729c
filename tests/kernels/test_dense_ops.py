"""RMSNorm, rotary embedding and SwiGLU against float64 formulas written here from the papers."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.rms_norm import add_rms_norm, rms_norm
from bylaw.kernels.rope import rope
from bylaw.kernels.swiglu import swiglu


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(positions: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles [T, D/2], and cos and sin [T, D] with the angles of both halves."""
    angles = positions[:, None] * 100.0 ** -(torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    return angles, torch.cat([angles, angles], dim=1).cos(), torch.cat([angles, angles], dim=1).sin()


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 5, 6), (0, 4)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_follows_its_formula(shape: tuple[int, ...], eps: float) -> None:
    x, weight = 3 * random(*shape), random(shape[-1], seed=1)
    expected = torch.empty_like(x)
    for row, out in zip(x.view(-1, shape[-1]), expected.view(-1, shape[-1]), strict=True):
        out.copy_(row / math.sqrt(sum(value * value for value in row.tolist()) / shape[-1] + eps) * weight)
    torch.testing.assert_close(rms_norm(x, weight, eps), expected, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(rms_norm(x.float(), weight.float(), eps).double(), expected, atol=2e-6, rtol=2e-6)


def test_rms_norm_of_a_hand_worked_row() -> None:
    out = rms_norm(torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64), 0.0)
    root = math.sqrt(12.5)  # (9 + 16) / 2
    torch.testing.assert_close(out, torch.tensor([3 / root, 8 / root], dtype=torch.float64))


def test_rms_norm_of_zeros_and_of_extremes() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))
    large = rms_norm(torch.full((1, 4), 200.0, dtype=torch.bfloat16) * 2**40, torch.ones(4, dtype=torch.bfloat16), 1e-6)
    assert torch.equal(large, torch.ones(1, 4, dtype=torch.bfloat16))


def test_rms_norm_rounds_half_precision_before_the_scale() -> None:
    x, weight = random(50, 16).bfloat16(), random(16, seed=1).bfloat16()
    wide = x.double()
    normed = (wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    same = (out == (normed.double() * weight.double()).bfloat16()).double().mean()
    assert same > 0.99, "but for a last bit where the float32 root rounds otherwise"
    late = (wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()).bfloat16()
    assert (out == late).double().mean() < 0.9, "rounding once at the end is something else"


def test_add_rms_norm_is_an_addition_and_a_norm_to_the_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, residual, weight = random(5, 7).to(dtype), random(5, 7, seed=1).to(dtype), random(7, seed=2).to(dtype)
        normed, summed = add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(summed, x + residual) and torch.equal(normed, rms_norm(x + residual, weight, 1e-6))


def test_rms_norm_gradients() -> None:
    x, weight = random(3, 5).requires_grad_(), random(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 10), (2, 34)])
def test_rope_is_a_rotation_of_complex_numbers(heads: int, size: int) -> None:
    positions = torch.tensor([0, 1, 2, 7, 0, 131])
    x = random(len(positions), heads, size)
    angles, cos, sin = table(positions, size)
    half = size // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    for turned in rope(x, x.clone(), cos, sin):
        torch.testing.assert_close(turned, expected, atol=1e-13, rtol=0)
    narrow = rope(x.float(), x[:, :1].float(), cos.float(), sin.float())
    torch.testing.assert_close(narrow[0].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(narrow[1].double(), expected[:, :1], atol=1e-6, rtol=0)


def test_after_rope_only_the_distance_counts() -> None:
    q, k = random(1, 2, 6).expand(40, 2, 6), random(1, 2, 6, seed=1).expand(40, 2, 6)
    _, cos, sin = table(torch.arange(40), 6)
    products = torch.einsum("inD,jnD->nij", *rope(q, k, cos, sin))
    for distance in (-11, 0, 1, 25):
        along = products.diagonal(distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), atol=1e-12, rtol=0)
    assert products.std() > 0.1


def test_rope_keeps_the_dtype_of_its_input() -> None:
    x, cos, sin = torch.ones(2, 1, 4, dtype=torch.bfloat16), torch.ones(2, 4), torch.zeros(2, 4)
    for out in rope(x, x.clone(), cos, sin):
        assert out.dtype == torch.bfloat16 and torch.equal(out, x)


def test_rope_gradients() -> None:
    _, cos, sin = table(torch.tensor([0, 3, 1]), 4)
    q, k = random(3, 2, 4).requires_grad_(), random(3, 1, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("shape", [(1, 2), (5, 14), (0, 6)])
def test_swiglu_follows_its_formula(shape: tuple[int, int]) -> None:
    x = 4 * random(*shape)
    half = shape[1] // 2
    rows = [[row[i] / (1 + math.exp(-row[i])) * row[half + i] for i in range(half)] for row in x.tolist()]
    expected = torch.tensor(rows, dtype=torch.float64).view(shape[0], half)
    torch.testing.assert_close(swiglu(x), expected, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(swiglu(x.float()).double(), expected, atol=1e-5, rtol=1e-6)


def test_swiglu_saturates_without_overflow() -> None:
    out = swiglu(torch.tensor([[-1e30, 1e30, -1000.0, 3.0, 2.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 2e30, 0.0]]))


def test_swiglu_gradients() -> None:
    assert torch.autograd.gradcheck(swiglu, random(3, 6).requires_grad_())
