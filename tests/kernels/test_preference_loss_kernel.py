"""The preference-loss kernels against float64 and against torch in the same dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import preference_loss as module
from bylaw.kernels.preference_loss import preference_loss, reference


def pairs(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, labels from 0 to 1 and margins."""
    score_a, score_b, margin = (3 * random(3, count)).to(dtype)
    return score_a, score_b, torch.linspace(0, 1, count, device=DEVICE), margin


def ours(*arguments: Any) -> Tensor:
    return preference_loss(*arguments, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 16, 63])
@pytest.mark.parametrize(("number", "centring"), [(0.0, 0.0), (0.7, 0.0), (None, 0.25)])
def test_values_and_gradients(count: int, number: float | None, centring: float, dtype: torch.dtype) -> None:
    score_a, score_b, label, margins = pairs(count, dtype)
    grad = random(count, seed=1).to(torch.promote_types(dtype, label.dtype))

    def run(function: Callable[..., Tensor], *scores: Tensor) -> tuple[Tensor, ...]:
        margin = margins.to(scores[0].dtype) if number is None else number
        labels = label.to(torch.promote_types(scores[0].dtype, label.dtype))
        return gradients(lambda a, b: function(a, b, labels, margin, centring), grad, *scores)

    exact = run(reference, score_a.double(), score_b.double())
    assert_all_as_good(run(ours, score_a, score_b), run(reference, score_a, score_b), exact)


def test_gradients_numerically() -> None:
    score_a, score_b, label, margin = pairs(9)
    leaves = score_a.requires_grad_(), score_b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ours(a, b, label.double(), margin, 0.3), leaves)


def test_large_margins_are_stable() -> None:
    score = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4], device=DEVICE, requires_grad=True)
    loss = ours(score, torch.zeros_like(score), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5], device=DEVICE))
    assert loss.tolist() == [0.0, 1e4, 1e4, 0.0, 5e3]
    assert torch.autograd.grad(loss.sum(), score)[0].tolist() == [0.0, -1.0, 1.0, 0.0, 0.5]


def test_a_confident_pair_keeps_its_small_loss_and_gradient() -> None:
    score = torch.tensor([12.0, -30.0, 50.0, 0.001], device=DEVICE, requires_grad=True)
    label = torch.tensor([1.0, 0.0, 1.0, 1.0], device=DEVICE)
    loss, sure = ours(score, torch.zeros_like(score), label), reference(score.double(), torch.zeros(()).double(), label)
    torch.testing.assert_close(loss.double(), sure, rtol=1e-6, atol=0)
    got, expected = (torch.autograd.grad(x.sum(), score)[0] for x in (loss, sure))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_input_that_is_not_contiguous_and_two_runs() -> None:
    score_a, score_b, label, margin = pairs(20, torch.float32)
    scores = torch.stack([score_a, score_b], dim=1)
    grad = random(20, seed=1).float()

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return gradients(lambda x, y: ours(x, y, label.repeat_interleave(2)[::2], margin, 0.1), grad, a, b)

    results = run(score_a, score_b), run(score_a, score_b), run(scores[:, 0], scores[:, 1])
    for first, again, strided in zip(*results, strict=True):
        assert torch.equal(first, again) and torch.equal(first, strided)


def test_the_operations_are_registered_in_order() -> None:
    score_a, score_b, label, margin = pairs(3, torch.float32)
    assert_op(module._forward, score_a.requires_grad_(), score_b.requires_grad_(), label, None, 0.5, 0.1)
    assert_op(module._backward, score_a.detach(), score_b.detach(), label, margin, 0.5, 0.1, margin)


def test_under_torch_compile() -> None:
    score_a, score_b, label, margin = pairs(5, torch.float32)
    run = compiled(lambda a, b: ours(a, b, label, margin, 0.1))
    straight = gradients(lambda a, b: ours(a, b, label, margin, 0.1), margin, score_a, score_b)
    for got, expected in zip(gradients(run, margin, score_a, score_b), straight, strict=True):
        assert torch.equal(got, expected)


def test_the_backend_is_checked() -> None:
    with pytest.raises(ValueError, match="preference_loss: backend = 'torch'; allowed"):
        preference_loss(*pairs(3)[:3], backend="torch")
