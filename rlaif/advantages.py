"""From scores to advantages: rewards per token, masked statistics, whitening, and the weight of the KL penalty."""

import math

import torch
from torch import Tensor

from bylaw.kernels.gae import check_cu_seqlens
from bylaw.kernels.kl import LOG_RATIO_LIMIT, kl_k1

WHITEN_EPSILON = 1e-8
KL_ERROR_LIMIT = 0.2


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` [T] where `mask` [T] (bool) is True: a scalar. What lies elsewhere, NaN too, has no part in it.

    Raises ValueError for shapes that differ, a mask that is not bool, and a mask that keeps nothing.
    """
    kept = _keep(x, mask)
    if not mask.any():
        raise ValueError(f"the mask keeps none of {mask.numel()} elements, so there is no mean; keep at least one")
    return kept.sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """`x` [T] divided by its standard deviation where `mask` [T] (bool) is True, 0 elsewhere.

    With shift_mean the result has mean 0 (for advantages); without, it keeps the mean of x, undivided, and only the
    deviations from it are scaled (for rewards). Mean and variance are those of the kept elements. The variance is the
    biased one, divided by n and not n - 1, as in the code of arXiv 1909.08593 and 2403.17031: so a single element
    whitens to 0 and not NaN; 1e-8 is added to it. Where nothing is kept, all is 0. Raises ValueError for shapes that
    differ and a mask that is not bool.
    """
    kept = _keep(x, mask)
    count = mask.sum().clamp(min=1)
    mean = kept.sum() / count
    centred = torch.where(mask, kept - mean, 0)
    whitened = centred * torch.rsqrt(centred.square().sum() / count + WHITEN_EPSILON)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0)


@torch.no_grad()
def token_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float
) -> Tensor:
    """Rewards [T]: -kl_coef * k1 at each token, and the episode's score at its last (arXiv 1909.08593, equation 2).

    `scores` [B]; `logprobs` and `reference_logprobs` [T] of the response tokens, under the policy that drew them and
    the reference, both at the sampling temperature; `cu_seqlens` [B+1]. Raises ValueError for shapes that do not fit
    and for an episode without tokens, which has no place for its score.
    """
    if logprobs.ndim != 1 or logprobs.shape != reference_logprobs.shape:
        shapes = f"{tuple(logprobs.shape)} and {tuple(reference_logprobs.shape)}"
        raise ValueError(f"logprobs and reference_logprobs have the shapes {shapes}; allowed: both [T]")
    check_cu_seqlens(cu_seqlens, len(logprobs))
    lengths = cu_seqlens.diff()
    if scores.shape != lengths.shape:
        raise ValueError(f"scores have the shape {tuple(scores.shape)}; allowed: ({len(lengths)},), one an episode")
    if (lengths == 0).any():
        empty = int((lengths == 0).nonzero()[0])
        raise ValueError(f"episode {empty} has no tokens, so its score has no place; leave it out or give it one token")
    rewards = -kl_coef * kl_k1(logprobs, reference_logprobs)
    rewards[cu_seqlens[1:] - 1] += scores.to(rewards.dtype)
    return rewards


@torch.no_grad()
def importance_weights(trainer: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap) of each token [T]: truncated importance sampling (Ionides 2008; Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training") between two programs of one policy.

    Multiplied into the policy loss, they correct, up to the cap, for tokens that were drawn by slightly other
    probabilities than those that are trained. Raises ValueError for a cap that is not above 0 and shapes that differ.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; allowed: above 0, such as 2")
    if trainer.shape != sampler.shape:
        raise ValueError(f"trainer has the shape {tuple(trainer.shape)}, sampler {tuple(sampler.shape)}; allowed: one")
    return (trainer - sampler).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)


def next_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The KL weight after `episodes` more: coef * (1 + clip(kl / target - 1, +-0.2) * episodes / horizon).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2. `kl` and `target` are nats per response, measured and wished
    for. A fixed weight needs no function. Raises ValueError for a KL that is not finite (which the clip would hide),
    and for a target or horizon that is not above 0.
    """
    if not math.isfinite(kl):
        raise ValueError(f"kl is {kl}; allowed: a finite number of nats")
    for name, value in (("target", target), ("horizon", horizon)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; allowed: above 0")
    error = min(max(kl / target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    return coef * (1 + error * episodes / horizon)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns), of [T] and [T]: 1 is perfect, 0 as good as a constant, below 0 worse.

    NaN where it has no meaning: returns that do not vary, or no tokens. Raises ValueError for shapes that differ.
    """
    if values.shape != returns.shape:
        raise ValueError(f"values have the shape {tuple(values.shape)}, returns {tuple(returns.shape)}; allowed: one")
    if not returns.numel() or returns.min() == returns.max():
        return math.nan
    wide = returns.double()
    return 1 - float((wide - values.double()).var(correction=0) / wide.var(correction=0))


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 where the mask is False. By where(), as NaN * 0 is NaN, in the backward pass too."""
    if mask.dtype != torch.bool or mask.shape != x.shape:
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"the mask is {found}; allowed: torch.bool in the shape of x, {tuple(x.shape)}")
    return torch.where(mask, x, 0)
