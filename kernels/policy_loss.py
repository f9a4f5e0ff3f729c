"""PPO's clipped losses for policy and value, and estimators of the KL divergence, on per-token log-probs.

PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7. Value clipping: Huang et al. 2022, "The 37
Implementation Details of Proximal Policy Optimization", detail 9. KL estimators: Schulman 2020, "Approximating KL
Divergence".

Losses are sums over the tokens given, divided by a denominator that the trainer takes over the whole optimiser step
(all ranks, all micro-batches), so how a batch is cut up changes nothing. Statistics add up in the same way: each is a
sum over tokens (float64, without gradient), or a maximum if its name ends in `_max`; `merge_stats` joins those of
several micro-batches, and `mean_stats` divides by the tokens.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Stats = dict[str, Tensor]
LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: far past any clip, far below overflow


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float, denominator: float | Tensor
) -> tuple[Tensor, Stats]:
    """sum_t -min(ratio_t A_t, clamp(ratio_t, 1 - clip, 1 + clip) A_t) / denominator, ratio = exp(new - old log-prob).

    `logprobs`, `old_logprobs` and `advantages` are [T], the latter two constants; the loss is a scalar. The log-ratio
    is clamped to +-20 before exp; a token past that has no gradient. Statistics: `tokens`, `approx_kl_k1` and
    `approx_kl_k3` (old policy to new), `clip_fraction` (tokens where the clip cuts the gradient off), `ratio`,
    `ratio_max`, and `ratio_gap_max`, the largest |ratio - 1|, which is 0 at the first minibatch. Raises ValueError for
    shapes that differ, and for a clip or denominator that is not above 0 (one in a tensor is not read, to spare a
    device the wait).
    """
    _check(clip, denominator, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.minimum(gain, clipped_gain).sum() / denominator
    with torch.no_grad():
        stats = {
            "tokens": _total(torch.ones_like(ratio)),
            "approx_kl_k1": _total(kl_k1(old_logprobs, logprobs)),
            "approx_kl_k3": _total(kl_k3(old_logprobs, logprobs)),
            "clip_fraction": _total(clipped_gain < gain),
            "ratio": _total(ratio),
            "ratio_max": _largest(ratio),
            "ratio_gap_max": _largest((ratio - 1).abs()),
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, denominator: float | Tensor
) -> tuple[Tensor, Stats]:
    """sum_t 0.5 max((V_t - R_t)^2, (clipped V_t - R_t)^2) / denominator, V clipped to old value +- clip.

    `values`, `old_values` and `returns` are [T], the latter two constants; the loss is a scalar. Statistics: `tokens`,
    `value_clip_fraction` (tokens where the clip cuts the gradient off) and `value_error`, (V - R)^2. Raises ValueError
    as `policy_loss` does.
    """
    _check(clip, denominator, values=values, old_values=old_values, returns=returns)
    # Not old + clamp(V - old): that rounds V where nothing is cut, and the statistic would count the difference.
    clipped = values.clamp(old_values - clip, old_values + clip)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * torch.maximum(error, clipped_error).sum() / denominator
    with torch.no_grad():
        stats = {
            "tokens": _total(torch.ones_like(error)),
            "value_clip_fraction": _total(clipped_error > error),
            "value_error": _total(error),
        }
    return loss, stats


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


def merge_stats(parts: Iterable[Mapping[str, Tensor]]) -> Stats:
    """The statistics of several micro-batches as those of one: sums added, `_max` entries by their maximum."""
    merged: Stats = {}
    for part in parts:
        for name, value in part.items():
            join = torch.maximum if name.endswith("_max") else torch.add
            merged[name] = join(merged[name], value) if name in merged else value
    return merged


def mean_stats(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Statistics as a person reads them: each sum divided by `tokens`; `_max` entries and `tokens` as they are.

    Raises ValueError where there are no tokens to divide by.
    """
    tokens = float(stats["tokens"])
    if tokens == 0:
        raise ValueError("these statistics hold no tokens; take their mean after a batch with at least one")
    whole = {name: float(value) for name, value in stats.items()}
    return {name: v if name == "tokens" or name.endswith("_max") else v / tokens for name, v in whole.items()}


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _largest(x: Tensor) -> Tensor:
    return x.max().double() if x.numel() else x.new_zeros((), dtype=torch.float64)


def _check(clip: float, denominator: float | Tensor, **columns: Tensor) -> None:
    shapes = {name: tuple(column.shape) for name, column in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"shapes differ: {shapes}; allowed: the same [T] for all, as broadcasting would add up twice")
    if not clip > 0:
        raise ValueError(f"clip is {clip}; allowed: above 0")
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; allowed: above 0, such as the tokens of the optimiser step")
