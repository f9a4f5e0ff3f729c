"""Rewards, masked statistics and the KL controller by hand-worked numbers, and bugs that other trainers shipped."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.rlaif.advantages import (
    explained_variance,
    importance_weights,
    masked_mean,
    masked_whiten,
    next_kl_coef,
    token_rewards,
)

NAN = float("nan")


def wide(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def mask_of(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


def test_masked_mean_by_hand() -> None:
    assert masked_mean(wide(1.0, 100.0, 3.0), mask_of(1, 0, 1)) == 2  # SkyRL #1305: the mean over all was 34.7
    assert masked_mean(wide(7.0), mask_of(1)) == 7
    assert masked_mean(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool)) == 1


@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e30])
def test_what_the_mask_leaves_out_has_no_part(junk: float) -> None:
    """OpenRLHF #1240: multiplied by the mask, NaN * 0 is NaN."""
    x = wide(1.0, junk, 3.0, 8.0).requires_grad_()
    mask = mask_of(1, 0, 1, 1)
    mean = masked_mean(x, mask)
    assert mean == 4
    (gradient,) = torch.autograd.grad(mean, x)
    torch.testing.assert_close(gradient, wide(1 / 3, 0, 1 / 3, 1 / 3))
    for shift_mean in (True, False):
        whitened = masked_whiten(x, mask, shift_mean)
        torch.testing.assert_close(whitened[mask], masked_whiten(x[mask], mask[mask], shift_mean))
        assert whitened[1] == 0
        (gradient,) = torch.autograd.grad(whitened[0], x)
        assert gradient.isfinite().all() and gradient[1] == 0


def test_whitening_by_hand() -> None:
    x, mask = wide(1.0, 3.0, 1000.0, 5.0, 7.0), mask_of(1, 1, 0, 1, 1)
    # mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5; with the padding, as trlx had it, the mean would be 203
    deviations = wide(-3.0, -1.0, 0.0, 1.0, 3.0) / math.sqrt(5 + 1e-8)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=True), deviations)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), torch.where(mask, deviations + 4, 0))


def test_shift_mean_takes_the_mean_away_and_its_absence_keeps_it() -> None:
    """torchtune rlhf/rewards.py:176 had the sign reversed, so advantages were not centred."""
    x = 5 + 3 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1000, dtype=torch.bool)
    centred, kept = (masked_whiten(x, mask, shift_mean) for shift_mean in (True, False))
    assert abs(float(centred.mean())) < 1e-12
    torch.testing.assert_close(kept.mean(), x.mean())
    for whitened in (centred, kept):
        assert float(whitened.var(correction=0)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_of_one_of_equals_and_of_none(shift_mean: bool) -> None:
    rest = 0.0 if shift_mean else 6.0
    assert masked_whiten(wide(6.0), mask_of(1), shift_mean).tolist() == [rest]
    assert masked_whiten(wide(6.0, 6.0), mask_of(1, 1), shift_mean).tolist() == [rest, rest]
    assert masked_whiten(wide(NAN, 6.0), mask_of(0, 0), shift_mean).tolist() == [0.0, 0.0]
    assert masked_whiten(wide(), mask_of(), shift_mean).shape == (0,)


def test_bad_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps none of 2 elements"):
        masked_mean(torch.zeros(2), mask_of(0, 0))
    with pytest.raises(ValueError, match=r"mask is torch.float32 \(2,\); allowed: torch.bool"):
        masked_mean(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"shape of x, \(2,\)"):
        masked_whiten(torch.zeros(2), mask_of(1), True)


def test_token_rewards_by_hand() -> None:
    logprobs, reference = wide(-1.0, -2.0, -0.5, -3.0), wide(-1.5, -1.0, -0.5, -1.0)
    rewards = token_rewards(wide(10.0, 20.0), logprobs, reference, torch.tensor([0, 3, 4]), kl_coef=0.1)
    # k1 = .5, -1, 0, -2: each token pays its own, and only the last of an episode has the score (rlhf-book #216).
    torch.testing.assert_close(rewards, wide(-0.05, 0.1, 10.0, 20.2))


def test_episode_rewards_sum_to_the_score_less_the_kl_of_the_response() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, lengths = torch.randn(4, dtype=torch.float64, generator=generator), [5, 1, 2, 9]
    logprobs, reference = torch.randn(2, 17, dtype=torch.float64, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rewards = token_rewards(scores, logprobs.requires_grad_(), reference, cu_seqlens, 0.3)
    assert not rewards.requires_grad
    sums = torch.stack([episode.sum() for episode in rewards.split(lengths)])
    kl = torch.stack([episode.sum() for episode in (logprobs - reference).split(lengths)])
    torch.testing.assert_close(sums, scores - 0.3 * kl)
    without = token_rewards(scores, logprobs, reference, cu_seqlens, 0.0)
    assert torch.equal(without[cu_seqlens[1:] - 1], scores) and (without != 0).sum() == 4


def test_token_rewards_refuse_what_does_not_fit() -> None:
    three = torch.zeros(3)
    with pytest.raises(ValueError, match="episode 1 has no tokens"):
        token_rewards(torch.zeros(3), three, three, torch.tensor([0, 2, 2, 3]), 0.1)
    with pytest.raises(ValueError, match=r"scores have the shape \(2,\); allowed: \(1,\)"):
        token_rewards(torch.zeros(2), three, three, torch.tensor([0, 3]), 0.1)
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\); allowed: both \[T\]"):
        token_rewards(torch.zeros(1), three, torch.zeros(2), torch.tensor([0, 3]), 0.1)
    with pytest.raises(ValueError, match="offsets that rise from 0 to 3"):
        token_rewards(torch.zeros(1), three, three, torch.tensor([0, 4]), 0.1)
    assert token_rewards(torch.zeros(0), three[:0], three[:0], torch.tensor([0]), 0.1).shape == (0,)


def test_kl_controller_by_hand() -> None:
    assert next_kl_coef(0.15, kl=6.6, target=6, episodes=100, horizon=1000) == pytest.approx(0.15 * (1 + 0.1 * 0.1))
    assert next_kl_coef(0.15, kl=6.0, target=6, episodes=100, horizon=1000) == 0.15
    assert next_kl_coef(0.15, kl=600, target=6, episodes=100, horizon=1000) == pytest.approx(0.15 * 1.02)
    assert next_kl_coef(0.15, kl=-1, target=6, episodes=100, horizon=1000) == pytest.approx(0.15 * 0.98)
    assert next_kl_coef(0.0, kl=600, target=6, episodes=100, horizon=1000) == 0


def test_kl_controller_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="kl is nan"):
        next_kl_coef(0.15, NAN, 6, 1, 1000)
    with pytest.raises(ValueError, match="target is 0; allowed: above 0"):
        next_kl_coef(0.15, 6, 0, 1, 1000)
    with pytest.raises(ValueError, match="horizon is -1"):
        next_kl_coef(0.15, 6, 6, 1, -1)


def test_importance_weights_by_hand() -> None:
    sampler, trainer = wide(-1.0, -2.0, -3.0, -500.0), wide(-1.0, -1.5, -1.0, 500.0)
    expected = wide(1.0, math.exp(0.5), 2.0, 2.0)  # exp(2) and exp(1000) are cut
    torch.testing.assert_close(importance_weights(trainer.requires_grad_(), sampler, 2.0), expected)
    assert importance_weights(sampler[:1], trainer[:1] + 2000, 2.0) > 0  # and no further down than exp(-20)
    assert not importance_weights(trainer, sampler, 2.0).requires_grad
    with pytest.raises(ValueError, match="cap is 0; allowed: above 0"):
        importance_weights(trainer, sampler, 0)
    with pytest.raises(ValueError, match=r"trainer has the shape \(4,\), sampler \(1,\)"):
        importance_weights(trainer, sampler[:1], 2.0)


def test_explained_variance_by_hand() -> None:
    returns = wide(1.0, 2.0, 3.0, 4.0)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 7, returns) == 1  # a constant offset is no spread
    assert explained_variance(torch.full((4,), 2.5), returns) == 0
    # what is left is 0, 0, 0, 2: variance .75, of 1.25
    assert explained_variance(wide(1.0, 2.0, 3.0, 2.0), returns) == pytest.approx(0.4)
    assert explained_variance(-returns, returns) == pytest.approx(-3)


def test_explained_variance_without_meaning_is_nan() -> None:
    assert math.isnan(explained_variance(wide(1.0, 2.0), torch.tensor([0.1, 0.1])))
    assert math.isnan(explained_variance(wide(1.0), wide(1.0)))
    assert math.isnan(explained_variance(wide(), wide()))
    with pytest.raises(ValueError, match=r"values have the shape \(1,\), returns \(2,\)"):
        explained_variance(wide(1.0), wide(1.0, 2.0))
