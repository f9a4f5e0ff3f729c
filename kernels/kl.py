"""Estimators of the KL divergence from per-token log-probs: Schulman 2020, "Approximating KL Divergence"."""

import triton
import triton.language as tl
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: far past any clip, far below overflow
LIMIT: tl.constexpr = tl.constexpr(LOG_RATIO_LIMIT)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token log(policy / reference), for tokens drawn from the policy: unbiased, of either sign, not clamped."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token log(policy / reference)^2 / 2: biased, never negative. As a loss, its gradient is that of the KL."""
    return 0.5 * kl_k1(logprobs, reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token (r - 1) - log r for r = reference / policy: unbiased, never negative, of low variance.

    log r is clamped to +-20 before exp, as in `policy_loss`. expm1 keeps the digits where policy and reference agree.
    """
    log_r = (reference_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_r.expm1() - log_r


KL_ESTIMATORS = {"k2": kl_k2, "k3": kl_k3}  # those to train on: the derivative of k1 says nothing of the reference


@triton.jit
def kl_k2_terms(logprob, reference_logprob):
    """Per token: `kl_k2` and its derivative by the log-prob."""
    gap = logprob - reference_logprob
    return 0.5 * gap * gap, gap


@triton.jit
def kl_k3_terms(logprob, reference_logprob):
    """Per token: `kl_k3` and its derivative by the log-prob."""
    gap = reference_logprob - logprob
    log_r = limited(gap)
    # Triton has no expm1. exp(x) - 1 - x = x^2 / 2 (1 + x / 3 (1 + x / 4 (...))), to float64's last digits below 1.
    series = log_r * 0 + 1
    for i in tl.static_range(17):  # type: ignore[attr-defined]
        series = 1 + series * log_r / (19 - i)
    k3 = tl.where(tl.abs(log_r) < 1, 0.5 * log_r * log_r * series, tl.exp(log_r) - 1 - log_r)
    return k3, tl.where(tl.abs(gap) > LIMIT, 0.0, -(k3 + log_r))


@triton.jit
def limited(x):
    """`x` clamped to +-20, by tl.where: a clamp would pass NaN over, and a policy that has diverged must show."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
