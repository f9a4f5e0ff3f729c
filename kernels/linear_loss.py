"""Losses of given tokens straight from hidden states, with their gradient, without holding [T, V] logits.

With z_t = W h_t / temperature, p_t = softmax(z_t), log-prob l_t = log p_t[y_t] and entropy H_t = -sum p_t log p_t:

    loss = sum_t  nll_t (-l_t) + clipped policy loss(l_t, old_t, A_t) - entropy_t H_t + kl_t k(l_t, reference_t)

with k one of the estimators k2 and k3. Each term is a function of per-token log-probs (kernels/policy_loss.py and
kl.py), so a token's derivatives by l_t and H_t are known as soon as its logits are, and a row kernel writes over them

    dloss / dlogit_j = [dloss/dl (delta_j - p_j) - dloss/dH p_j (log p_j + H)] / temperature
"""

from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.kl import KL_ESTIMATORS, kl_k2_terms, kl_k3_terms
from bylaw.kernels.launch import accumulator, config
from bylaw.kernels.linear_head import (
    LOGITS_BYTES,
    Head,
    check_head,
    check_range,
    outputs_of,
    reference_rows,
    save_gradients,
    scale_gradients,
    wanted_gradients,
    wide,
)
from bylaw.kernels.policy_loss import Clip, clip_bounds, clipped_policy, policy_terms
from bylaw.kernels.softmax import IGNORE, LEAST, LN_2, add_logits, bounded_temperature, exponent_scale, finish


class TokenLoss(NamedTuple):
    """The loss, a scalar to differentiate; and without gradient, per token [T] in nats, 0 where it is ignored:

    log-probs, and entropies if the loss has the entropy term (else None). Float32, or float64 for float64 input.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None


class Terms(NamedTuple):
    """The terms of the loss: columns [T], constants, None where a term is absent; and its settings."""

    nll: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None
    kl: Tensor | None = None
    low: float = 1.0
    high: float = 1.0
    dual: float = float("inf")
    kl_estimator: str = "k3"

    def at(self, tokens: Tensor) -> "Terms":
        return Terms._make(x[tokens] if isinstance(x, Tensor) else x for x in self)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    clip: Clip = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_estimator: Literal["k2", "k3"] = "k3",
    temperature: float = 1.0,
    ignore_index: int | None = IGNORE,
    logits_bytes: int = LOGITS_BYTES,
    backend: str = "auto",
) -> TokenLoss:
    """The loss above, summed over tokens, from `hidden` [T, H], `weight` [V, H] and `targets` [T].

    `nll`, `advantages`, `entropy` and `kl` are coefficients [T], None for a term that is absent; `advantages` need
    `old_logprobs` [T] and `kl` needs `reference_logprobs` [T]. All are constants: only `hidden` and `weight` get a
    gradient. `clip` and `dual_clip` are those of `policy_loss`, and importance weights go into `advantages` as there.
    `kl_estimator` is what `kl` weighs. Over tokens drawn from the policy, the gradient of k2 has as its mean that of
    KL(policy, reference), and k3's that of KL(reference, policy).

    Tokens whose target is `ignore_index` take part in nothing and cost nothing, but to find them the host waits for the
    device once; `ignore_index=None` says that there are none, and nothing waits. The kernels take beyond inputs and
    gradients: logits of at most `logits_bytes` (of one token at least), and one [V, H] in float32 if `weight` wants a
    gradient. Their logits are float32 whatever the dtype; the reference's have the dtype of `hidden`.

    Raises ValueError for shapes or dtypes that do not fit, half a term or none, an estimator that is unknown, a
    temperature, clip or budget not above 0, a dual clip not above 1, a backend that cannot run there, and on a CPU a
    target outside 0 to V - 1; on a GPU, where looking would be waiting, such a target makes the loss NaN.
    """
    check_head(hidden, weight, targets, temperature, logits_bytes)
    columns = nll, old_logprobs, advantages, entropy, reference_logprobs, kl
    constants = (None if x is None else x.detach().to(wide(hidden)) for x in columns)
    terms = Terms._make((*constants, *clip_bounds(clip, dual_clip), kl_estimator))
    _check(terms, len(targets))
    if choose("linear_loss", backend, hidden) == "reference":
        return reference(hidden, weight, targets, terms, temperature, ignore_index, logits_bytes)
    wanted = wanted_gradients(hidden, weight)
    loss, logprobs, entropies, _, _ = _forward(
        hidden, weight, targets, *terms, float(temperature), ignore_index, logits_bytes, *wanted
    )
    return TokenLoss(loss, logprobs, None if entropy is None else entropies)


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    terms: Terms,
    temperature: float = 1.0,
    ignore_index: int | None = IGNORE,
    logits_bytes: int = LOGITS_BYTES,
) -> TokenLoss:
    """`linear_loss` in plain torch."""
    kept, size = _kept(targets, ignore_index), len(targets)
    if kept is not None:
        hidden, targets, terms = hidden[kept], targets[kept], terms.at(kept)
    check_range(targets, len(weight))
    logprobs, entropy = reference_rows(hidden, weight, targets, temperature, logits_bytes, terms.entropy is not None)
    loss = token_losses(logprobs, entropy, terms).sum()
    rows = (None if x is None else _spread(x.detach(), kept, size) for x in (logprobs, entropy))
    return TokenLoss._make((loss, *rows))


def token_losses(logprobs: Tensor, entropy: Tensor | None, terms: Terms) -> Tensor:
    """The loss of each token, a function of its log-prob and entropy."""
    losses = []
    if terms.nll is not None:
        losses.append(terms.nll * -logprobs)
    if terms.advantages is not None and terms.old_logprobs is not None:
        bounds = terms.low, terms.high, terms.dual
        losses.append(clipped_policy(logprobs, terms.old_logprobs, terms.advantages, *bounds)[0])
    if terms.entropy is not None and entropy is not None:
        losses.append(-terms.entropy * entropy)
    if terms.kl is not None and terms.reference_logprobs is not None:
        losses.append(terms.kl * KL_ESTIMATORS[terms.kl_estimator](logprobs, terms.reference_logprobs))
    return reduce(torch.add, losses)


@triton.jit
def token_terms(
    logprob, entropy, token, nll, old_logprobs, advantages, entropy_weights, references, kl, low, high, dual, K2
):
    """`token_losses` for one token, with the derivatives by its log-prob and by its entropy."""
    loss = logprob * 0
    by_logprob = logprob * 0
    by_entropy = logprob * 0
    ACC: tl.constexpr = logprob.dtype
    if nll is not None:
        weight = tl.load(nll + token).to(ACC)
        loss -= weight * logprob
        by_logprob -= weight
    if advantages is not None:
        old, advantage = tl.load(old_logprobs + token).to(ACC), tl.load(advantages + token).to(ACC)
        value, slope, _, _, _ = policy_terms(logprob, old, advantage, low, high, dual)
        loss += value
        by_logprob += slope
    if entropy_weights is not None:
        by_entropy -= tl.load(entropy_weights + token).to(ACC)
        loss += by_entropy * entropy
    if kl is not None:
        weight, other = tl.load(kl + token).to(ACC), tl.load(references + token).to(ACC)
        if K2:
            value, slope = kl_k2_terms(logprob, other)
        else:
            value, slope = kl_k3_terms(logprob, other)
        loss += weight * value
        by_logprob += weight * slope
    return loss, by_logprob, by_entropy


@triton.jit(do_not_specialize=["first"])
def _rows_kernel(
    logits,
    gradient,
    places,
    targets,
    nll,
    old_logprobs,
    advantages,
    entropy_weights,
    references,
    kl,
    losses,
    logprobs,
    entropies,
    first,
    SIZE,
    row_stride,
    gradient_stride,
    low: np.float64,
    high: np.float64,
    dual: np.float64,
    temperature: np.float64,
    K2: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of `logits` [chunk, SIZE] becomes its gradient; `gradient` may be the same memory in a narrower dtype."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    if places is not None:
        token = tl.load(places + token)
    logits += row * row_stride
    temperature = tl.full((), temperature, ACC)
    scale = exponent_scale(temperature)
    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0, ACC)
    weighted = tl.full((), 0, ACC)
    for start in range(0, SIZE, BLOCK):
        z = _load(logits, start + tl.arange(0, BLOCK), SIZE, row_stride)
        top, total, weighted = add_logits(top, total, weighted, z, scale)
    log_total, entropy = finish(total, weighted)
    target = tl.load(targets + token)
    chosen = tl.load(logits + target, (target >= 0) & (target < SIZE), other=float("nan"))
    logprob = (chosen - top) / temperature - log_total
    low, high, dual = tl.full((), low, ACC), tl.full((), high, ACC), tl.full((), dual, ACC)
    loss, by_logprob, by_entropy = token_terms(
        logprob, entropy, token, nll, old_logprobs, advantages, entropy_weights, references, kl, low, high, dual, K2
    )
    tl.store(logprobs + token, logprob)
    if losses is not None:
        tl.store(losses + token, loss)
    if entropies is not None:
        tl.store(entropies + token, entropy)
    if gradient is not None:
        gradient += row * gradient_stride
        by_logprob /= temperature
        by_entropy /= temperature
        share = 1 / total
        for start in range(0, SIZE, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            exponent = (_load(logits, columns, SIZE, row_stride) - top) * scale
            probability = tl.exp2(exponent) * share
            slope = by_logprob
            if entropy_weights is not None:
                slope += by_entropy * (tl.maximum(exponent, LEAST) * LN_2 - log_total + entropy)
            # The target's part is taken in before rounding: 1 - p of a likely target would lose its digits after.
            value = tl.where(columns == target, by_logprob, 0.0) - probability * slope
            # A 16-bit block of the gradient covers half of the logits that it stands for, or of earlier ones; of this
            # block every thread must have read its own before any thread writes.
            tl.debug_barrier()
            tl.store(gradient + columns, value.to(gradient.dtype.element_ty), columns < row_stride)


@triton.jit
def _load(logits, columns, SIZE, row_stride):
    """-inf past SIZE. A row's memory goes on to `row_stride`, a multiple of 64: loads are wide whatever SIZE is."""
    z = tl.load(logits + columns, columns < row_stride, other=float("-inf"))
    return tl.where(columns < SIZE, z, float("-inf"))


def run_rows(
    head: Head,
    tokens: slice,
    places: Tensor | None,
    targets: Tensor,
    terms: Terms,
    outs: tuple[Tensor | None, Tensor, Tensor | None],
    temperature: float,
    gradient: bool,
) -> None:
    """The row kernel on the logits of `tokens`, or of places[tokens], that the head's buffer holds.

    `outs`: losses, log-probs and entropies [T], written at those tokens. `gradient`: whether logits become theirs.
    """
    *columns, low, high, dual, kl_estimator = terms
    written = head.gradient if gradient else None
    strides = head.buffer.stride(0), 0 if written is None else written.stride(0)
    arguments = [head.buffer, written, places, targets, *columns, *outs, tokens.start, len(head.weight), *strides]
    arguments += [low, high, dual, bounded_temperature(temperature)]
    k2 = terms.kl is not None and kl_estimator == "k2"  # without the term one variant does for both
    settings = {"K2": k2, "ACC": accumulator(head.hidden.dtype), **config("linear_loss", head.hidden.device)}
    _rows_kernel[(tokens.stop - tokens.start,)](*arguments, **settings)


@torch.library.custom_op("bylaw::linear_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    entropy: Tensor | None,
    reference_logprobs: Tensor | None,
    kl: Tensor | None,
    low: float,
    high: float,
    dual: float,
    kl_estimator: str,
    temperature: float,
    ignore_index: int | None,
    logits_bytes: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs, entropies, and the gradients of `hidden` and `weight` (wide); what is not wanted is empty."""
    columns = nll, old_logprobs, advantages, entropy, reference_logprobs, kl
    constants = (None if x is None else x.contiguous() for x in columns)
    terms = Terms._make((*constants, low, high, dual, kl_estimator))
    places = _kept(targets, ignore_index)
    count = len(targets) if places is None else len(places)
    head = Head(hidden, weight, count, logits_bytes, (want_hidden, want_weight))
    losses, logprobs, entropies = _empty_rows(hidden, True), _empty_rows(hidden, True), _empty_rows(hidden, entropy)
    if places is not None:
        for x in (losses, logprobs, entropies, head.grad_hidden):
            x.zero_()
    outs = losses, logprobs, None if entropy is None else entropies
    for first in range(0, count, head.chunk):
        chunk = slice(first, min(first + head.chunk, count))
        tokens = chunk if places is None else places[chunk]
        head.fill(tokens)
        gradient = want_hidden or want_weight
        run_rows(head, chunk, places, targets.contiguous(), terms, outs, temperature, gradient)
        if gradient:
            head.add(tokens)
    return losses.sum(), logprobs, entropies, *head.gradients()


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    entropy: Tensor | None,
    reference_logprobs: Tensor | None,
    kl: Tensor | None,
    low: float,
    high: float,
    dual: float,
    kl_estimator: str,
    temperature: float,
    ignore_index: int | None,
    logits_bytes: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs = _empty_rows(hidden, True)
    gradients = outputs_of(hidden, weight, want_hidden, want_weight)
    return logprobs.new_empty(()), logprobs, _empty_rows(hidden, entropy), *gradients


_forward.register_autograd(scale_gradients, setup_context=save_gradients)


def _empty_rows(hidden: Tensor, wanted: Tensor | bool | None) -> Tensor:
    return hidden.new_empty(0 if wanted is None else len(hidden), dtype=wide(hidden))


def _kept(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Places of the tokens that count; None for all."""
    if ignore_index is None:
        return None
    places = (targets != ignore_index).nonzero().squeeze(-1)
    return None if len(places) == len(targets) else places


def _spread(x: Tensor, places: Tensor | None, size: int) -> Tensor:
    return x if places is None else x.new_zeros(size).index_copy_(0, places, x)


def _check(terms: Terms, tokens: int) -> None:
    columns = {name: x for name, x in terms._asdict().items() if isinstance(x, Tensor)}
    for name, x in columns.items():
        if x.shape != (tokens,) or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; allowed: floating point ({tokens},), or None")
    for one, other in (("advantages", "old_logprobs"), ("kl", "reference_logprobs")):
        if (one in columns) != (other in columns):
            raise ValueError(f"of {one} and {other} only one is given; allowed: both or neither")
    if terms.kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {terms.kl_estimator!r}; allowed: {', '.join(KL_ESTIMATORS)}")
    if not columns:
        raise ValueError("the loss has no term; give nll, advantages, entropy or kl")
