"""PPO's losses against hand-worked numbers and gradcheck; the KL estimators against a KL summed over a vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.kl import kl_k1, kl_k2, kl_k3
from bylaw.kernels.policy_loss import mean_stats, merge_stats, policy_loss, value_loss


def wide(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_batch(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    old, change, advantages = torch.randn(3, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (old + 0.3 * change).to(dtype), old.to(dtype), advantages.to(dtype)


def close(value: float | Tensor, expected: float) -> bool:
    return math.isclose(float(value), expected, rel_tol=1e-12, abs_tol=1e-12)


def test_policy_loss_by_hand() -> None:
    ratio = wide(1.0, 1.5, 1.5, 0.5, 0.5)
    advantages = wide(2.0, 1.0, -1.0, 1.0, -1.0)
    loss, stats = policy_loss(ratio.log(), torch.zeros(5).double(), advantages, clip=0.2, denominator=10)
    # min(rA, clip(r)A) = 2, 1.2 (cut), -1.5, 0.5, -0.8 (cut)
    assert close(loss, -(2 + 1.2 - 1.5 + 0.5 - 0.8) / 10)
    means = mean_stats(stats)
    assert means["tokens"] == 5
    assert close(means["clip_fraction"], 2 / 5)
    assert close(means["ratio"], 5 / 5) and close(means["ratio_max"], 1.5) and close(means["ratio_gap_max"], 0.5)
    assert close(means["approx_kl_k1"], -2 * (math.log(1.5) + math.log(0.5)) / 5)
    assert close(means["approx_kl_k3"], (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 5)


def test_policy_gradient_is_cut_where_the_clip_is_and_else_ratio_times_advantage() -> None:
    logprobs = wide(1.0, 1.5, 1.5, 0.5, 0.5).log().requires_grad_()
    loss, _ = policy_loss(logprobs, torch.zeros(5).double(), wide(2.0, 1.0, -1.0, 1.0, -1.0), 0.2, denominator=2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -wide(2.0, 0.0, -1.5, 0.5, 0.0) / 2)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
def test_policy_gradcheck(dual_clip: float | None) -> None:
    logprobs, old, advantages = random_batch(40)
    denominator = torch.tensor(7.0, dtype=torch.float64)
    logprobs.requires_grad_()
    _, stats = policy_loss(logprobs, old, advantages, 0.2, denominator, dual_clip)
    assert (stats["dual_clip_fraction"] > 0) == (dual_clip is not None)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, 0.2, denominator, dual_clip)[0], logprobs)


def test_dual_clip_by_hand() -> None:
    ratio, advantages = wide(5.0, 2.0, 0.5, 5.0, 3.5, 5.0), wide(-2.0, -2.0, -2.0, 2.0, -1.0, 0.0)
    logprobs = ratio.log().requires_grad_()
    loss, stats = policy_loss(logprobs, torch.zeros(6).double(), advantages, 0.2, denominator=2, dual_clip=3)
    # max(min(rA, clip(r)A), 3A) for A < 0: -6 (dual), -4, -1.6 (cut); for A > 0 no dual clip: 2.4 (cut); -3 (dual); 0
    assert close(loss.detach(), -(-6 - 4 - 1.6 + 2.4 - 3) / 2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -wide(0.0, -4.0, 0.0, 0.0, 0.0, 0.0) / 2)
    assert stats["clip_fraction"] == 2 and stats["dual_clip_fraction"] == 2
    without, stats = policy_loss(logprobs, torch.zeros(6).double(), advantages, 0.2, denominator=2)
    assert close(without.detach(), -(-10 - 4 - 1.6 + 2.4 - 3.5) / 2)
    assert stats["clip_fraction"] == 2 and stats["dual_clip_fraction"] == 0


@pytest.mark.parametrize("dual_clip", [None, 1.6])
def test_an_importance_weight_may_go_into_the_advantage(dual_clip: float | None) -> None:
    """w min(rA, clip(r)A) = min(r wA, clip(r) wA) for a weight w >= 0, and so with the dual clip."""
    logprobs, old, advantages = random_batch(200)
    weights = random_batch(201)[2][1:].exp().clamp(max=2.0)  # truncated
    weights[:5] = 0
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    folded, stats = policy_loss(logprobs, old, weights * advantages, (0.2, 0.3), 1, dual_clip)
    assert stats["clip_fraction"] > 0 and (stats["dual_clip_fraction"] > 0) == (dual_clip is not None)
    torch.testing.assert_close(folded, -(weights * gain).sum(), rtol=1e-12, atol=0)


def test_the_first_minibatch_has_ratio_one_exactly() -> None:
    logprobs, _, advantages = random_batch(100, torch.float32)
    loss, stats = policy_loss(logprobs, logprobs.clone(), advantages, 0.2, 100)
    assert stats["ratio_gap_max"] == 0 and stats["clip_fraction"] == 0 and stats["approx_kl_k3"] == 0
    torch.testing.assert_close(loss, -advantages.mean())


@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
def test_a_log_ratio_far_off_is_clamped_and_has_no_gradient(gap: float) -> None:
    logprobs = torch.tensor([gap, 0.0]).requires_grad_()
    loss, stats = policy_loss(logprobs, torch.zeros(2), torch.tensor([-1.0, 1.0]), 0.2, 1)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in stats.values())
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, -1.0]
    assert float(stats["ratio_max"]) == pytest.approx(math.exp(20) if gap > 0 else 1.0)


def test_value_loss_by_hand() -> None:
    values, old, returns = wide(1.0, 2.0, 2.0, -2.0), wide(1.1, 1.0, 1.0, 0.0), wide(3.0, 5.0, 0.0, 1.0)
    loss, stats = value_loss(values, old, returns, clip=0.5, denominator=4)
    # errors (V - R)^2 = 4, 9, 4, 9; V clipped = 1, 1.5, 1.5, -.5, errors 4, 12.25 (cut), 2.25, 2.25
    assert close(loss, 0.5 * (4 + 12.25 + 4 + 9) / 4)
    means = mean_stats(stats)
    assert means["tokens"] == 4 and close(means["value_clip_fraction"], 1 / 4) and close(means["value_error"], 26 / 4)


def test_value_gradcheck() -> None:
    values, old, returns = random_batch(40)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, 0.2, 3.0)[0], values.requires_grad_())


def test_a_value_within_the_clip_is_never_counted_as_cut() -> None:
    # old + (V - old) is not V in float32: a clip written so counts about half of these as cut.
    values, old, returns = random_batch(1000, torch.float32)
    loss, stats = value_loss(values, old, returns, clip=100.0, denominator=1000)
    assert stats["value_clip_fraction"] == 0
    torch.testing.assert_close(loss, 0.5 * (values - returns).square().mean())


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_micro_batches_add_up_to_the_whole(loss_of) -> None:
    batch = [part.requires_grad_(i == 0) for i, part in enumerate(random_batch(50))]
    whole, stats = loss_of(*batch, 0.2, 50)
    (gradient,) = torch.autograd.grad(whole, batch[0])
    cuts = [slice(0, 1), slice(1, 40), slice(40, 50), slice(50, 50)]
    parts = [loss_of(*(part[cut] for part in batch), 0.2, 50) for cut in cuts]
    total = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, batch[0])[0], gradient)
    assert mean_stats(merge_stats(part for _, part in parts)) == pytest.approx(mean_stats(stats), rel=1e-12)


def test_statistics_carry_no_gradient_and_merge_takes_the_largest_maximum() -> None:
    logprobs, old, advantages = random_batch(4)
    _, stats = policy_loss(logprobs.requires_grad_(), old, advantages, 0.2, 4)
    assert not any(value.requires_grad for value in stats.values())
    assert all(value.dtype == torch.float64 for value in stats.values())
    merged = merge_stats([{"tokens": wide(2.0)[0], "a": wide(3.0)[0], "b_max": wide(5.0)[0]}] * 2)
    assert mean_stats(merged) == {"tokens": 4.0, "a": 1.5, "b_max": 5.0}
    assert merge_stats([]) == {}


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_no_tokens_and_one(loss_of) -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = loss_of(empty, torch.zeros(0), torch.zeros(0), 0.2, 5)
    loss.backward()
    assert loss == 0 and stats["tokens"] == 0
    with pytest.raises(ValueError, match="hold no tokens"):
        mean_stats(stats)
    one, stats = loss_of(torch.tensor([0.1]), torch.zeros(1), torch.ones(1), 0.2, 1)
    assert one.shape == () and stats["tokens"] == 1


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_bad_input_is_refused(loss_of) -> None:
    three, one = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"shapes differ: .*'returns': \(1,\)|shapes differ: .*'advantages': \(1,\)"):
        loss_of(three, three, one, 0.2, 1)
    with pytest.raises(ValueError, match="clip is 0"):
        loss_of(three, three, three, 0.0, 1)
    for denominator in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="denominator is"):
            loss_of(three, three, three, 0.2, denominator)


@pytest.mark.parametrize("dual_clip", [1.0, 0.0, -3.0, float("nan")])
def test_a_dual_clip_must_be_above_one(dual_clip: float) -> None:
    with pytest.raises(ValueError, match=r"dual_clip is .*allowed: above 1, such as 3, or None"):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.2, 1, dual_clip)


def test_kl_estimators_by_hand() -> None:
    p, q = wide(0.5, 0.5, 0.25).log(), wide(0.25, 0.5, 0.5).log()
    two = math.log(2)
    torch.testing.assert_close(kl_k1(p, q), wide(two, 0.0, -two))
    torch.testing.assert_close(kl_k2(p, q), wide(two**2 / 2, 0.0, two**2 / 2))
    torch.testing.assert_close(kl_k3(p, q), wide(0.5 - 1 + two, 0.0, 2 - 1 - two))


def test_k1_and_k3_have_the_mean_of_the_exact_kl_and_k2_its_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(11, dtype=torch.float64, generator=generator).requires_grad_()
    policy = logits.log_softmax(-1)
    reference = torch.randn(11, dtype=torch.float64, generator=generator).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (got,) = torch.autograd.grad((policy.detach().exp() * kl_k2(policy, reference)).sum(), logits)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_kl_gradcheck(estimator) -> None:
    logprobs, reference, _ = random_batch(10)
    assert torch.autograd.gradcheck(estimator, (logprobs.requires_grad_(), reference.requires_grad_()))


def test_k3_keeps_small_differences_and_survives_large_ones() -> None:
    small = kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0 + 2.0**-12]))
    assert float(small) == pytest.approx(2.0**-25, rel=0.01)  # d^2 / 2, which exp(d) - 1 - d loses in float32
    far = kl_k3(torch.tensor([-500.0, 500.0]), torch.zeros(2))
    assert far.isfinite().all() and (far > 0).all()
    assert kl_k3(torch.zeros(0), torch.zeros(0)).shape == (0,)
