"""Direct preference optimisation straight from hidden states (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

For pair b with responses a and b, the label p_b = P(a better), and whole-response log-probs L = sum_t log p_t[y_t]:

    d_b  = beta [(L_a - reference_a) - (L_b - reference_b)]
    loss = sum_b -[p_b log sigma(d_b) + (1 - p_b) log sigma(-d_b)]

The derivative by a token's log-prob is known once both responses of its pair are summed up. So chunks hold whole pairs:
their logits are computed once, and are turned into their gradient by the row kernel of kernels/linear_loss.py. A pair
that does not fit is swept twice, first for its sums (8 T H V operations then, instead of 6).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
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
from bylaw.kernels.linear_loss import Terms, run_rows
from bylaw.kernels.preference_loss import pair_loss, preference_loss


class PreferenceLoss(NamedTuple):
    """The loss, a scalar to differentiate; and each response's log-prob [2B] in nats, without gradient.

    Float32, or float64 for float64 input.
    """

    loss: Tensor
    logps: Tensor


def linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor,
    p_a: Tensor,
    *,
    beta: float = 0.1,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    backend: str = "auto",
) -> PreferenceLoss:
    """The loss above, summed over B pairs, from `hidden` [T, H], `weight` [V, H] and `targets` [T].

    The stream holds the responses a0, b0, a1, b1 ... and nothing else: response i is tokens `cu_seqlens[i]` to
    `cu_seqlens[i + 1]` (int64 [2B + 1]). They are read by the host: on a CPU they make no device wait.
    `reference_logps` [2B] are the log-probs of the responses under the reference model, `p_a` [B] is the label's
    probability that a is better, 0 to 1; both constants. The loss is differentiable by `hidden` and `weight`. Memory is
    that of `linear_loss`.

    Raises ValueError for shapes or dtypes that do not fit, for `cu_seqlens` that do not go from 0 to T without falling,
    a beta, temperature or budget that is not above 0, a backend that cannot run there, and on a CPU for a label or a
    target out of its range; on a GPU, where looking would be waiting, such a target makes the loss NaN.
    """
    check_head(hidden, weight, targets, temperature, logits_bytes)
    _check(cu_seqlens, reference_logps, p_a, beta)
    references, labels = reference_logps.detach().to(wide(hidden)), p_a.detach().to(wide(hidden))
    if choose("linear_preference", backend, hidden) == "reference":
        return reference(hidden, weight, targets, cu_seqlens, references, labels, beta, temperature, logits_bytes)
    scalars = float(beta), float(temperature), logits_bytes
    loss, logps, _, _ = _forward(
        hidden, weight, targets, cu_seqlens, references, labels, *scalars, *wanted_gradients(hidden, weight)
    )
    return PreferenceLoss(loss, logps)


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor,
    p_a: Tensor,
    beta: float = 0.1,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
) -> PreferenceLoss:
    """`linear_preference` in plain torch."""
    _read(cu_seqlens, len(targets))
    check_range(targets, len(weight))
    logprobs, _ = reference_rows(hidden, weight, targets, temperature, logits_bytes)
    lengths = cu_seqlens.diff().to(hidden.device)
    response = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)
    logps = logprobs.new_zeros(len(lengths)).index_add(0, response, logprobs)
    score_a, score_b = (beta * (logps - reference_logps)).view(-1, 2).unbind(1)
    return PreferenceLoss(preference_loss(score_a, score_b, p_a, backend="reference").sum(), logps.detach())


@triton.jit(do_not_specialize=["first"])
def _pairs_kernel(
    logprobs,
    cu_seqlens,
    reference_logps,
    labels,
    losses,
    logps,
    weights,
    first,
    beta: np.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pair's log-probs and loss; and for each of its tokens the weight of -log p that has the loss's derivative."""
    pair = first + tl.program_id(0).to(tl.int64)
    begin, middle = tl.load(cu_seqlens + 2 * pair), tl.load(cu_seqlens + 2 * pair + 1)
    end = tl.load(cu_seqlens + 2 * pair + 2)
    logp_a = _sum(logprobs, begin, middle, ACC, BLOCK)
    logp_b = _sum(logprobs, middle, end, ACC, BLOCK)
    tl.store(logps + 2 * pair, logp_a)
    tl.store(logps + 2 * pair + 1, logp_b)
    ratio_a = logp_a - tl.load(reference_logps + 2 * pair)
    ratio_b = logp_b - tl.load(reference_logps + 2 * pair + 1)
    beta = tl.full((), beta, ACC)
    loss, slope = pair_loss(beta * (ratio_a - ratio_b), tl.load(labels + pair))
    tl.store(losses + pair, loss)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weight = tl.where(tokens < middle, -beta * slope, beta * slope)
        tl.store(weights + tokens, weight, tokens < end)


@triton.jit
def _sum(values, begin, end, ACC: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(values + places, places < end, other=0.0)
    return tl.sum(total)


@torch.library.custom_op("bylaw::linear_preference", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor,
    p_a: Tensor,
    beta: float,
    temperature: float,
    logits_bytes: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs of responses, and the gradients of `hidden` and `weight` (wide); empty where not wanted."""
    bounds = _read(cu_seqlens, len(targets))
    head = Head(hidden, weight, len(targets), logits_bytes, (want_hidden, want_weight))
    losses, logps = p_a.new_empty(p_a.shape), p_a.new_empty(reference_logps.shape)
    logprobs, weights = p_a.new_empty(targets.shape), p_a.new_empty(targets.shape)
    columns = cu_seqlens.to(hidden.device).contiguous(), reference_logps.contiguous(), p_a.contiguous()
    tensors = [logprobs, *columns, losses, logps, weights]
    targets = targets.contiguous()
    settings = {"ACC": accumulator(hidden.dtype), **config("linear_preference", hidden.device)}
    outs = None, logprobs, None
    for first, last in _groups(bounds, head.chunk):
        begin, end = bounds[2 * first], bounds[2 * last]
        chunks = [slice(start, min(start + head.chunk, end)) for start in range(begin, end, head.chunk)]
        for tokens in chunks:
            head.fill(tokens)
            run_rows(head, tokens, None, targets, Terms(), outs, temperature, gradient=False)
        _pairs_kernel[(last - first,)](*[*tensors, first, beta], **settings)
        for tokens in chunks if want_hidden or want_weight else ():
            if len(chunks) > 1:  # else the logits are still there
                head.fill(tokens)
            run_rows(head, tokens, None, targets, Terms(nll=weights), outs, temperature, gradient=True)
            head.add(tokens)
    return losses.sum(), logps, *head.gradients()


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor,
    p_a: Tensor,
    beta: float,
    temperature: float,
    logits_bytes: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = outputs_of(hidden, weight, want_hidden, want_weight)
    return p_a.new_empty(()), p_a.new_empty(reference_logps.shape), *gradients


_forward.register_autograd(scale_gradients, setup_context=save_gradients)


def _groups(bounds: list[int], chunk: int) -> Iterator[tuple[int, int]]:
    """Runs of whole pairs, from one to before the other, of at most `chunk` tokens; a larger pair is alone."""
    first, pairs = 0, len(bounds) // 2
    for pair in range(pairs):
        if pair > first and bounds[2 * pair + 2] - bounds[2 * first] > chunk:
            yield first, pair
            first = pair
    if pairs:
        yield first, pairs


def _read(cu_seqlens: Tensor, tokens: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens is {bounds}; allowed: 0 to T = {tokens} without falling")
    return bounds


def _check(cu_seqlens: Tensor, reference_logps: Tensor, p_a: Tensor, beta: float) -> None:
    pairs = p_a.numel()
    shapes = [tuple(x.shape) for x in (cu_seqlens, reference_logps, p_a)]
    if shapes != [(2 * pairs + 1,), (2 * pairs,), (pairs,)] or cu_seqlens.dtype != torch.int64:
        raise ValueError(
            f"cu_seqlens ({cu_seqlens.dtype}), reference_logps and p_a have the shapes {shapes}; allowed: torch.int64 "
            "[2B + 1], [2B], [B]"
        )
    if not (reference_logps.is_floating_point() and p_a.is_floating_point()):
        raise ValueError(f"reference_logps is {reference_logps.dtype}, p_a {p_a.dtype}; allowed: floating point")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; allowed: above 0")
