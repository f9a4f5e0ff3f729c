"""PPO's clipped losses for policy and value, on per-token log-probs and values.

PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7. Dual clip: Ye et al. 2020, arXiv 1912.09729, equation 5. Value
clipping: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 9.

Losses are sums over the tokens given, divided by a denominator that the trainer takes over the whole optimiser step
(all ranks, all micro-batches), so how a batch is cut up changes nothing. Statistics add up in the same way: each is a
sum over tokens (float64, without gradient), or a maximum if its name ends in `_max`; `merge_stats` joins those of
several micro-batches, and `mean_stats` divides by the tokens.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.kl import LIMIT, LOG_RATIO_LIMIT, kl_k1, kl_k3, kl_k3_terms, limited
from bylaw.kernels.launch import accumulator, config

Stats = dict[str, Tensor]
Clip = float | tuple[float, float]
# A statistic is a sum over tokens, or a maximum if its name ends in `_max`; maxima stand last.
POLICY_SUMS = ("tokens", "approx_kl_k1", "approx_kl_k3", "clip_fraction", "dual_clip_fraction", "ratio")
POLICY_STATS = (*POLICY_SUMS, "ratio_max", "ratio_gap_max")
VALUE_STATS = ("tokens", "value_clip_fraction", "value_error")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: Clip,
    denominator: float | Tensor,
    dual_clip: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Stats]:
    """sum_t -min(ratio_t A_t, clamp(ratio_t, 1 - clip, 1 + clip) A_t) / denominator, ratio = exp(new - old log-prob).

    `logprobs`, `old_logprobs` and `advantages` are [T], the latter two constants; the loss is a scalar. A pair
    (low, high) clips to 1 - low and 1 + high (Yu et al. 2025, arXiv 2503.14476, section 3.1). With `dual_clip`, often
    3, the loss of a negative advantage is at most -dual_clip A_t. The log-ratio is clamped to +-20 before exp; a token
    past that has no gradient. A truncated importance weight w >= 0 of a token goes into `advantages`, as w A: its loss
    is then w times what it was.

    Statistics: `tokens`, `approx_kl_k1` and `approx_kl_k3` (old policy to new), `clip_fraction` and
    `dual_clip_fraction` (tokens where the one or the other clip cuts the gradient off, never both), `ratio`,
    `ratio_max`, and `ratio_gap_max`, the largest |ratio - 1|, which is 0 at the first minibatch. Raises ValueError for
    shapes that differ, for a clip or denominator that is not above 0 (one in a tensor is not read, to spare a device
    the wait), a dual clip that is not above 1, and for a backend that cannot run there.
    """
    low, high, dual = clip_bounds(clip, dual_clip)
    _check(denominator, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if choose("policy_loss", backend, logprobs) == "reference":
        return reference(logprobs, old_logprobs, advantages, clip, denominator, dual_clip)
    loss, _, totals = _policy(logprobs, old_logprobs, advantages, low, high, dual)
    return loss / denominator, dict(zip(POLICY_STATS, totals[1:].unbind(), strict=True))


def reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: Clip,
    denominator: float | Tensor,
    dual_clip: float | None = None,
) -> tuple[Tensor, Stats]:
    """`policy_loss` in plain torch."""
    bounds = clip_bounds(clip, dual_clip)
    losses, ratio, cut, dual_cut = clipped_policy(logprobs, old_logprobs, advantages, *bounds)
    with torch.no_grad():
        stats = {
            "tokens": _total(torch.ones_like(ratio)),
            "approx_kl_k1": _total(kl_k1(old_logprobs, logprobs)),
            "approx_kl_k3": _total(kl_k3(old_logprobs, logprobs)),
            "clip_fraction": _total(cut),
            "dual_clip_fraction": _total(dual_cut),
            "ratio": _total(ratio),
            "ratio_max": _largest(ratio),
            "ratio_gap_max": _largest((ratio - 1).abs()),
        }
    return losses.sum() / denominator, stats


def clipped_policy(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token: the loss -min(ratio A, clamp(ratio, low, high) A), for A < 0 at most -dual A; the ratio; and whether
    the clip, and whether the dual clip, cuts it off.
    """
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(low, high) * advantages
    least_gain = dual * advantages
    dual_cut = (advantages < 0) & (least_gain > gain)
    bounded_gain = torch.where(dual_cut, least_gain, torch.minimum(gain, clipped_gain))
    return -bounded_gain, ratio.detach(), clipped_gain < gain, dual_cut


def clip_bounds(clip: Clip, dual_clip: float | None = None) -> tuple[float, float, float]:
    """The ratios that are allowed: from 1 - low, to 1 + high, and for a negative advantage to the dual clip.

    Raises ValueError for a clip that is not above 0, and for a dual clip that is not above 1.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (low > 0 and high > 0):
        raise ValueError(f"clip is {clip}; allowed: above 0, or a pair (low, high) of such")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; allowed: above 1, such as 3, or None for none")
    return 1.0 - low, 1.0 + high, float("inf") if dual_clip is None else float(dual_clip)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip: float,
    denominator: float | Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Stats]:
    """sum_t 0.5 max((V_t - R_t)^2, (clipped V_t - R_t)^2) / denominator, V clipped to old value +- clip.

    `values`, `old_values` and `returns` are [T], the latter two constants; the loss is a scalar. Statistics: `tokens`,
    `value_clip_fraction` (tokens where the clip cuts the gradient off) and `value_error`, (V - R)^2. Raises ValueError
    as `policy_loss` does.
    """
    if not clip > 0:
        raise ValueError(f"clip is {clip}; allowed: above 0")
    _check(denominator, values=values, old_values=old_values, returns=returns)
    if choose("value_loss", backend, values) == "reference":
        return value_reference(values, old_values, returns, clip, denominator)
    loss, _, totals = _value(values, old_values, returns, float(clip))
    return loss / denominator, dict(zip(VALUE_STATS, totals[1:].unbind(), strict=True))


def value_reference(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, denominator: float | Tensor
) -> tuple[Tensor, Stats]:
    """`value_loss` in plain torch."""
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


def _check(denominator: float | Tensor, **columns: Tensor) -> None:
    shapes = {name: tuple(column.shape) for name, column in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"shapes differ: {shapes}; allowed: the same [T] for all, as broadcasting would add up twice")
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; allowed: above 0, such as the tokens of the optimiser step")


# In the functions below choices are made by tl.where: minimum, maximum and clamp pass NaN over, and a policy that has
# diverged must show.


@triton.jit
def policy_terms(logprob, old_logprob, advantage, low, high, dual):
    """Per token, as `clipped_policy`: loss, its derivative by the log-prob, ratio, and which of the clips cuts."""
    gap = logprob - old_logprob
    ratio = tl.exp(limited(gap))
    gain = ratio * advantage
    below = tl.where(ratio > dual, dual, tl.where(ratio < low, low, ratio))
    bounded_gain = tl.where(advantage < 0, below, tl.where(ratio > high, high, ratio)) * advantage
    cut, dual_cut = bounded_gain < gain, bounded_gain > gain
    off = cut | dual_cut
    slope = tl.where(off | (tl.abs(gap) > LIMIT), 0.0, -gain)
    return -tl.where(off, bounded_gain, gain), slope, ratio, cut, dual_cut


@triton.jit
def _largest_of(x):
    return tl.where(tl.sum((x != x).to(tl.int32), 0) != 0, float("nan"), tl.max(x, 0))


@triton.jit(do_not_specialize=["size"])
def _policy_kernel(
    logprobs,
    old_logprobs,
    advantages,
    slopes,
    partials,
    size,
    low: np.float64,
    high: np.float64,
    dual: np.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < size
    new = tl.load(logprobs + tokens, inside, other=0).to(ACC)
    old = tl.load(old_logprobs + tokens, inside, other=0).to(ACC)
    advantage = tl.load(advantages + tokens, inside, other=0).to(ACC)
    low, high, dual = tl.full((), low, ACC), tl.full((), high, ACC), tl.full((), dual, ACC)
    loss, slope, ratio, cut, dual_cut = policy_terms(new, old, advantage, low, high, dual)
    k3, _ = kl_k3_terms(old, new)
    tl.store(slopes + tokens, slope.to(slopes.dtype.element_ty), inside)
    # Places outside have the ratio 1, and 0 in everything else.
    ratio_inside = tl.where(inside, ratio, 0)
    partials += tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials, tl.sum(loss.to(tl.float64)))
    tl.store(partials + programs, tl.sum(inside.to(tl.float64)))
    tl.store(partials + 2 * programs, tl.sum((old - new).to(tl.float64)))
    tl.store(partials + 3 * programs, tl.sum(k3.to(tl.float64)))
    tl.store(partials + 4 * programs, tl.sum(cut.to(tl.int32)).to(tl.float64))
    tl.store(partials + 5 * programs, tl.sum(dual_cut.to(tl.int32)).to(tl.float64))
    tl.store(partials + 6 * programs, tl.sum(ratio_inside.to(tl.float64)))
    tl.store(partials + 7 * programs, _largest_of(ratio_inside).to(tl.float64))
    tl.store(partials + 8 * programs, _largest_of(tl.abs(ratio - 1)).to(tl.float64))


@triton.jit(do_not_specialize=["size"])
def _value_kernel(
    values, old_values, returns, slopes, partials, size, clip: np.float64, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < size
    value = tl.load(values + tokens, inside, other=0).to(ACC)
    old = tl.load(old_values + tokens, inside, other=0).to(ACC)
    target = tl.load(returns + tokens, inside, other=0).to(ACC)
    clip = tl.full((), clip, ACC)
    clipped = tl.where(value < old - clip, old - clip, tl.where(value > old + clip, old + clip, value))
    gap, clipped_gap = value - target, clipped - target
    error, clipped_error = gap * gap, clipped_gap * clipped_gap
    cut = clipped_error > error
    tl.store(slopes + tokens, tl.where(cut, 0.0, gap).to(slopes.dtype.element_ty), inside)
    partials += tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials, tl.sum((0.5 * tl.where(cut, clipped_error, error)).to(tl.float64)))
    tl.store(partials + programs, tl.sum(inside.to(tl.float64)))
    tl.store(partials + 2 * programs, tl.sum(cut.to(tl.float64)))
    tl.store(partials + 3 * programs, tl.sum(error.to(tl.float64)))


@triton.jit(do_not_specialize=["programs"])
def _totals_kernel(partials, totals, loss, programs, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Row by row of `partials` [rows, programs], in one order: the sum of the first SUMS, the largest of the others."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        part = tl.load(partials + row * programs + columns, columns < programs, other=0)
        total += part
        largest = tl.where((part > largest) | (part != part), part, largest)
    result = tl.where(row < SUMS, tl.sum(total), _largest_of(largest))
    tl.store(totals + row, result)
    tl.store(loss, result.to(loss.dtype.element_ty), row == 0)


@torch.library.custom_op("bylaw::policy_loss", mutates_args=())
def _policy(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss summed, its gradient [T], and in float64 the loss again with the statistics of POLICY_STATS."""
    return _run(_policy_kernel, (logprobs, old_logprobs, advantages), (low, high, dual), POLICY_STATS)


@torch.library.custom_op("bylaw::value_loss", mutates_args=())
def _value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run(_value_kernel, (values, old_values, returns), (clip,), VALUE_STATS)


def _run(
    kernel: triton.JITFunction, columns: tuple[Tensor, ...], scalars: tuple[float, ...], names: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    x = columns[0]
    settings = config("policy_loss", x.device)
    programs = triton.cdiv(x.numel(), settings["BLOCK"])
    loss, slopes, totals = _outputs(x, names)
    partials = x.new_empty((1 + len(names), programs), dtype=torch.float64)
    if programs:
        rows = [column.contiguous() for column in columns]
        kernel[(programs,)](*rows, slopes, partials, x.numel(), *scalars, ACC=accumulator(x.dtype), **settings)
    settings["SUMS"] = 1 + sum(not name.endswith("_max") for name in names)
    _totals_kernel[(1 + len(names),)](partials, totals, loss, programs, **settings)
    return loss, slopes, totals


def _outputs(x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(x.shape), x.new_empty(1 + len(names), dtype=torch.float64)


@_policy.register_fake
def _(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logprobs, POLICY_STATS)


@_value.register_fake
def _(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(values, VALUE_STATS)


@torch.library.custom_op("bylaw::scaled", mutates_args=())
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` times the scalar `factor`, in `dtype`: all that is left to do in the backward pass of a loss that took its
    gradient along. In one pass, without an intermediate in a wider dtype.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    # With a dimension, the factor counts for the dtype that this is computed in: a bfloat16 x would round it.
    return torch.mul(x, factor.reshape(1), out=out)


@scaled.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])
    ctx.constants = len(inputs) - 1


def _differentiate(ctx, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    (slopes,) = ctx.saved_tensors
    grad = None if grad_loss is None else scaled(slopes, grad_loss, slopes.dtype)
    return grad, *(None,) * ctx.constants


_policy.register_autograd(_differentiate, setup_context=_save)
_value.register_autograd(_differentiate, setup_context=_save)
