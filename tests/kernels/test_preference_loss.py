"""The preference loss against hand-worked numbers, gradcheck and exact arithmetic at large margins."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.preference_loss import expected_calibration_error, preference_accuracy, preference_loss


def wide(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_loss_by_hand() -> None:
    loss = preference_loss(wide(1.0, 0.0, 2.0), wide(0.0, 0.0, 3.0), wide(1.0, 0.3, 0.25))
    e = math.e
    third = -(0.25 * math.log(1 / (1 + e)) + 0.75 * math.log(e / (1 + e)))  # d = -1
    torch.testing.assert_close(loss, wide(math.log(1 + 1 / e), math.log(2), third))


def test_swapping_the_answers_and_the_label_changes_nothing() -> None:
    a, b = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.linspace(0, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(preference_loss(a, b, p), preference_loss(b, a, 1 - p))


def test_gradcheck_and_the_gradient_sigma_minus_p() -> None:
    a, b = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    p = torch.linspace(0, 1, 9, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: preference_loss(x, y, p), (a, b))
    grad_a, grad_b = torch.autograd.grad(preference_loss(a, b, p).sum(), (a, b))
    torch.testing.assert_close(grad_a, (a - b).sigmoid().detach() - p)
    torch.testing.assert_close(grad_b, -grad_a)


def test_a_margin_shifts_the_difference_and_centring_pulls_the_sum_to_0() -> None:
    a, b, p = wide(1.0, 0.0, 2.0), wide(0.0, 0.5, 3.0), wide(1.0, 0.3, 0.25)
    for margin in (0.7, wide(0.5, -1.0, 2.0)):
        assert torch.equal(preference_loss(a, b, p, margin), preference_loss(a - b - margin, torch.zeros(3), p))
    plain = preference_loss(a, b, p)
    torch.testing.assert_close(preference_loss(a, b, p, centring=0.1), plain + wide(0.1, 0.025, 2.5))
    assert torch.equal(preference_loss(a, b, p, 0.0, 0.0), plain)


def test_the_least_loss_is_at_the_label_itself() -> None:
    margin = torch.linspace(-3, 3, 601, dtype=torch.float64)
    best = margin[preference_loss(margin, torch.zeros_like(margin), torch.full_like(margin, 0.8)).argmin()]
    assert float(best) == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_margins_are_stable(dtype: torch.dtype) -> None:
    margin = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4], dtype=dtype, requires_grad=True)
    p = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5], dtype=dtype)
    loss = preference_loss(margin, torch.zeros_like(margin), p)
    assert loss.tolist() == [0.0, 1e4, 1e4, 0.0, 5e3]
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient.tolist() == [0.0, -1.0, 1.0, 0.0, 0.5]


def test_a_confident_pair_keeps_its_small_loss() -> None:
    loss = preference_loss(wide(50.0, -50.0), wide(0.0, 0.0), wide(1.0, 0.0))
    torch.testing.assert_close(loss, wide(math.exp(-50), math.exp(-50)), rtol=1e-9, atol=0)


def test_accuracy_counts_only_pairs_with_a_right_answer() -> None:
    a = wide(1.0, 0.0, 5.0, 2.0, -1.0)
    b = wide(0.0, 1.0, 5.0, 0.0, 0.0)
    right, counted = preference_accuracy(a, b, wide(0.9, 0.6, 0.7, 0.5, 0.1))
    assert (right.item(), counted.item()) == (2.5, 4)  # right, wrong, a tie, no label, right
    right, counted = preference_accuracy(a[:0], b[:0], b[:0])
    assert (right.item(), counted.item()) == (0, 0)


def test_calibration_error_by_hand() -> None:
    predicted = wide(0.05, 0.15, 0.95, 1.0, 0.5)
    labels = wide(0.0, 0.4, 1.0, 0.8, 0.5)
    # With 10 bins: |.05 - 0|, |.15 - .4|, |1.95 - 1.8| in the last bin together, and 0 at one half.
    assert float(expected_calibration_error(predicted, labels)) == pytest.approx((0.05 + 0.25 + 0.15) / 5)
    # With one bin, only the means count: 2.65 and 2.7.
    assert float(expected_calibration_error(predicted, labels, bins=1)) == pytest.approx(0.05 / 5)
    assert expected_calibration_error(labels, labels) == 0
    assert float(expected_calibration_error(wide(1.0), wide(0.0))) == 1


def test_bad_input_is_refused() -> None:
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(2,\), \(1,\)\]"):
        preference_loss(two, two, torch.zeros(1))
    for label in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"p_a holds .*; allowed: probabilities"):
            preference_loss(two, two, torch.tensor([0.5, label]))
        with pytest.raises(ValueError, match="p_a holds"):
            preference_accuracy(two, two, torch.tensor([0.5, label]))
        with pytest.raises(ValueError, match="predicted holds"):
            expected_calibration_error(torch.tensor([0.5, label]), two)
    with pytest.raises(ValueError, match=r"margin has the shape \(3,\) and score_a \(2,\); allowed: the same"):
        preference_loss(two, two, two, torch.zeros(3))
    for centring in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"centring is .*; allowed: 0"):
            preference_loss(two, two, two, centring=centring)
    learned = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="p_a requires grad"):
        preference_loss(two, two, learned)
    with pytest.raises(ValueError, match="margin requires grad"):
        preference_loss(two, two, two, learned)
    with pytest.raises(ValueError, match="N at least 1"):
        expected_calibration_error(two[:0], two[:0])
    with pytest.raises(ValueError, match="bins is 0"):
        expected_calibration_error(two, two, bins=0)


def test_no_pairs() -> None:
    assert preference_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0)).shape == (0,)
