"""What the operations on logits share: temperature, ignored targets, and softmax statistics in one pass.

The jit functions keep the state of a row (or of each row of a tile) after some of its logits z, at a temperature t:

    top      = max z                                      -inf before the first logit
    total    = sum 2^s,     s = (z - top) log2(e) / t     0 before the first logit
    weighted = sum s 2^s                                  0 before the first logit

Everything is seen from `top`, so nothing overflows and entropy does not lose digits to large logits. A logit of -inf is
a token that cannot be drawn, or a place outside the row: it adds nothing. NaN and +inf make the results NaN.

    top, total, weighted = add_logits(top, total, weighted, logits, scale)    for each block
    log_total, entropy = finish(total, weighted)
    logprob = (z - top) / t - log_total    never above 0, since one of the terms of total is 1
    log_normalizer = top / t + log_total

`scale` is `exponent_scale(t)`; t comes from `bounded_temperature`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE = -100  # as in torch.nn.functional.cross_entropy
IGNORED: tl.constexpr = tl.constexpr(IGNORE)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Instead of -inf where a product with 0 follows; 2 to its power is 0.
LEAST: tl.constexpr = tl.constexpr(-1e30)


def check_temperature(temperature: float) -> None:
    """ValueError unless `temperature` is above 0; infinity is allowed."""
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature!r}: log-probs need a temperature above 0")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError for a target that is neither a token nor -100. Only on a CPU: elsewhere it would wait."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((targets < 0) | (targets >= vocabulary)) & (targets != IGNORE)
    if bad.any():
        raise ValueError(
            f"targets hold {targets[bad][0].item()}; allowed: 0 to {vocabulary - 1}, and {IGNORE} for none"
        )


def bounded_temperature(temperature: float) -> float:
    """`temperature` within what float32 can divide by and be divided by: infinity and 1e-40 make no NaN."""
    return min(max(temperature, 2.0**-125), 2.0**125)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """`logits` [..., V] / temperature in float32 (float64 for float64), each row less a constant."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 1.0:
        return logits
    # Largest logit first, as the sampler does: however small the temperature, it stays 0 and nothing becomes NaN.
    return (logits - logits.detach().amax(dim=-1, keepdim=True)) / temperature


def picked(log_probs: Tensor, targets: Tensor) -> Tensor:
    """`log_probs` [T, V] at `targets` [T]: 0, without gradient, where a target is -100."""
    ignored = targets == IGNORE
    return log_probs.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0.0)


@triton.jit
def exponent_scale(temperature):
    """What a difference of logits is multiplied with to be an exponent of 2."""
    return LOG2_E / temperature


@triton.jit
def add_logits(top, total, weighted, logits, scale):
    """The state [...] after `logits` [..., BLOCK], which are -inf outside the row."""
    new_top = tl.maximum(top, tl.max(logits, axis=-1))
    pivot = _finite(new_top)
    total, weighted = _seen_from(pivot, top, total, weighted, scale)
    exponent = (logits - tl.expand_dims(pivot, -1)) * scale
    power = tl.exp2(exponent)
    total += tl.sum(power, axis=-1)
    weighted += tl.sum(tl.maximum(exponent, LEAST) * power, axis=-1)
    return new_top, total, weighted


@triton.jit
def add_states(top, total, weighted, tops, totals, weighteds, scale):
    """The state [...] after the states [..., BLOCK] of other parts of the row; -inf, 0, 0 for a part that is empty."""
    new_top = tl.maximum(top, tl.max(tops, axis=-1))
    pivot = _finite(new_top)
    total, weighted = _seen_from(pivot, top, total, weighted, scale)
    totals, weighteds = _seen_from(tl.expand_dims(pivot, -1), tops, totals, weighteds, scale)
    return new_top, total + tl.sum(totals, axis=-1), weighted + tl.sum(weighteds, axis=-1)


@triton.jit
def finish(total, weighted):
    """log sum exp((z - top) / t), and the entropy; both in nats."""
    log_total = tl.log(total)
    return log_total, log_total - LN_2 * weighted / total


@triton.jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN


@triton.jit
def _seen_from(pivot, top, total, weighted, scale):
    """`total` and `weighted` with exponents counted from `pivot`, at or above `top`."""
    shift = tl.maximum((top - pivot) * scale, LEAST)
    factor = tl.exp2(shift)
    return total * factor, (weighted + shift * total) * factor
