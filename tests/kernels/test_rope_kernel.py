"""The rotary kernels against float64 and against torch in the same dtype; in place, and under autograd."""

from collections.abc import Callable

import pytest
import torch
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import rope as module
from bylaw.kernels.rope import reference, rope

# (T, Nq, Nk, D). Under the interpreter a tile is 64 numbers of 2 heads: of 1 to 32 tokens.
SHAPES = [(1, 1, 1, 2), (63, 3, 1, 4), (5, 5, 2, 34), (2, 2, 2, 130), (0, 3, 1, 6), (3, 1, 0, 6)]


def table(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angles = 3 * random(tokens, size // 2, seed=7)
    angles = torch.cat((angles, angles), dim=1).float()
    return angles.cos(), angles.sin()


def over_slices(turn: Callable[..., tuple[Tensor, ...]], q_heads: int) -> Callable[..., Tensor]:
    """`turn` on slices of one projection, as the model has them; the values stand behind them, untouched."""

    def run(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        k_heads = (qkv.shape[1] - q_heads) // 2
        q, k, v = qkv.split((q_heads, k_heads, k_heads), dim=1)
        return torch.cat((*turn(q, k, cos, sin), v), dim=1)

    return run


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin, backend="triton")


def torchs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference(q, cos, sin), reference(k, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_in_place_and_gradients_of_slices(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, q_heads, k_heads, size = shape
    heads = q_heads + 2 * k_heads
    qkv, grad = random(tokens, heads, size).to(dtype), random(tokens, heads, size, seed=1)
    cos, sin = table(tokens, size)

    def results(turn: Callable[..., tuple[Tensor, ...]], x: Tensor, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
        run = over_slices(turn, q_heads)
        return [*gradients(lambda x: run(x, *angles), grad.to(dtype), x), run(x.clone(), *angles)]

    got, same_dtype = results(ours, qkv, (cos, sin)), results(torchs, qkv, (cos, sin))
    exact = results(torchs, qkv.double(), (cos.double(), sin.double()))
    assert_all_as_good(tuple(got), tuple(same_dtype), tuple(exact))
    assert torch.equal(got[0], got[2]), "in place and under autograd the same"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(8191, 32, 8, 128), (8191, 14, 2, 64), (1025, 16, 8, 256), (1025, 32, 32, 80)])
def test_production_shapes(shape: tuple[int, int, int, int]) -> None:
    for dtype in DTYPES:
        test_forward_in_place_and_gradients_of_slices(shape, dtype)


def test_without_a_gradient_it_is_in_place() -> None:
    qkv = random(3, 4, 6, dtype=torch.float32).requires_grad_()
    cos, sin = table(3, 6)
    before = qkv.detach().clone()
    turned = ours(qkv[:, :2], qkv[:, 2:3], cos, sin)
    assert torch.equal(qkv, before), "autograd needs what it saved"
    with torch.no_grad():
        q, k = ours(qkv[:, :2], qkv[:, 2:3], cos, sin)
    assert q.data_ptr() == qkv.data_ptr() and k.data_ptr() == qkv[:, 2:].data_ptr()
    assert torch.equal(qkv, torch.cat((*turned, before[:, 3:]), dim=1))


def test_memory_that_cannot_be_written_is_left_alone() -> None:
    cos, sin = table(4, 6)
    single = random(1, 2, 6, dtype=torch.float32)
    columns = random(6, 2, 4, dtype=torch.float32)
    for x in (single.expand(4, 2, 6), columns.permute(2, 1, 0)):
        before, other = x.clone(), x.clone()
        for turned in (*ours(x, other, cos, sin), *ours(other, x, cos, sin), *ours(other, other, cos, sin)):
            torch.testing.assert_close(turned, reference(before, cos, sin), atol=1e-6, rtol=0)
        assert torch.equal(x, before), "it may not be overwritten in part"


def test_gradients_numerically() -> None:
    cos, sin = (x.double() for x in table(3, 4))
    assert torch.autograd.gradcheck(
        lambda x: over_slices(ours, 1)(x, cos, sin), random(3, 3, 4).requires_grad_(), fast_mode=True
    )
    q, k = random(2, 1, 4).requires_grad_(), random(2, 1, 4, seed=1)
    assert torch.autograd.gradcheck(lambda q: ours(q, k, cos[:2], sin[:2]), q)


def test_the_operations_are_registered_in_order() -> None:
    cos, sin = table(3, 4)
    qkv = random(3, 4, 4, dtype=torch.float32)
    q, k = qkv[:, :2], qkv[:, 2:3]
    assert_op(module._rotate, q.clone(), k.clone(), cos, sin)
    assert_op(module._rotated, q.detach().requires_grad_(), k.detach().requires_grad_(), cos, sin, False)


def test_under_torch_compile() -> None:
    cos, sin = table(3, 4)
    qkv, grad = random(3, 4, 4, dtype=torch.float32), random(3, 4, 4, seed=1)

    def projected(x: Tensor) -> Tensor:
        return over_slices(ours, 2)(2 * x, cos, sin)  # not a leaf, as a projection is not

    straight, through = gradients(projected, grad, qkv), compiled(projected)
    for got, expected in zip(gradients(through, grad, qkv), straight, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(through(qkv), straight[0])
        given = 2 * qkv
        assert torch.equal(compiled(over_slices(ours, 2))(given, cos, sin), straight[0])
        assert torch.equal(given, straight[0]), "in place for the caller too"


def test_two_runs_give_the_same_bits() -> None:
    cos, sin = table(5, 10)
    qkv, grad = random(5, 4, 10, dtype=torch.float32), random(5, 4, 10, seed=1)
    one, two = (gradients(lambda x: over_slices(ours, 2)(x, cos, sin), grad, qkv) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_refusals() -> None:
    cos, sin = table(2, 4)
    q, k = random(2, 3, 4).to(DEVICE), random(2, 1, 4).to(DEVICE)
    for bad in (k[:1], k[..., :2], k.float(), k[0]):
        with pytest.raises(ValueError, match=r"rope: q is torch.float64 \(2, 3, 4\) and k is .*; allowed"):
            rope(q, bad, cos, sin)
    with pytest.raises(ValueError, match="with an even D"):
        rope(q[..., :3], k[..., :3], cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match=r"cos and sin have the shapes \(2, 4\) and \(2, 3\); allowed: \[T, D\]"):
        rope(q, k, cos, sin[:, :3])
    with pytest.raises(ValueError, match="backend = 'cuda'"):
        rope(q, k, cos, sin, backend="cuda")
