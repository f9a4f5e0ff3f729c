"""Loss and measures of a reward model on soft preferences: P(a better than b) = sigma(score_a - score_b).

The model is Bradley and Terry's (1952); labels that are probabilities are those of arXiv 2212.08073, section 4.1.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, start


def preference_loss(
    score_a: Tensor,
    score_b: Tensor,
    p_a: Tensor,
    margin: Tensor | float = 0.0,
    centring: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy per pair [B], -[p log sigma(d) + (1 - p) log sigma(-d)] with d = score_a - score_b - margin.

    `score_a`, `score_b` [B]; `p_a` [B], the label's probability that a is better, 0 to 1. A pair whose label abstained
    is to be left out, not given 0.5. `margin`, a number or [B], is how far a should score above b (Touvron et al. 2023,
    arXiv 2307.09288, section 3.2.2): below 0 where b is better. `centring` > 0 adds centring (score_a + score_b)^2,
    which draws the scores to a mean of 0 (Eisenstein et al. 2023, arXiv 2312.09244). The scores have a gradient, label
    and margin have none.

    Raises ValueError for shapes that differ, a label or margin that requires grad, a centring below 0 or infinite, a
    backend that cannot run there, and, where the values are on a CPU, a label outside 0 to 1.
    """
    _check(score_a, score_b, p_a)
    _check_options(score_a, p_a, margin, centring)
    if choose("preference_loss", backend, score_a) == "reference":
        return reference(score_a, score_b, p_a, margin, centring)
    if isinstance(margin, Tensor):
        return _forward(score_a, score_b, p_a, margin, 0.0, centring)
    return _forward(score_a, score_b, p_a, None, margin, centring)


def reference(
    score_a: Tensor, score_b: Tensor, p_a: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """`preference_loss` in plain torch."""
    difference = score_a - score_b - margin
    # Two terms, not softplus(-d) + (1 - p) d, in which the loss of a confident pair is lost to rounding.
    loss = -(p_a * F.logsigmoid(difference) + (1 - p_a) * F.logsigmoid(-difference))
    return loss + centring * (score_a + score_b).square() if centring else loss


@torch.no_grad()
def preference_accuracy(score_a: Tensor, score_b: Tensor, p_a: Tensor) -> tuple[Tensor, Tensor]:
    """How often the higher score is the likelier answer: (right, counted), two scalars to add up and then divide.

    Pairs labelled 0.5 have no right answer and are not counted. Equal scores are half right, so a model that says
    nothing has 0.5. Shapes and errors are those of `preference_loss`.
    """
    _check(score_a, score_b, p_a)
    agreement = torch.sign(score_a - score_b) * torch.sign(p_a - 0.5)  # 1 right, 0 no verdict, -1 wrong
    decided = p_a != 0.5
    return torch.where(decided, (agreement + 1) / 2, 0).sum(), decided.sum()


@torch.no_grad()
def expected_calibration_error(predicted: Tensor, p_a: Tensor, bins: int = 10) -> Tensor:
    """Mean over pairs of |mean prediction - mean label| in the pair's bin: a scalar, 0 to 1.

    `predicted` [N] = sigma(score_a - score_b) and `p_a` [N] are probabilities; the bins are equal parts of 0 to 1 by
    prediction (Guo et al. 2017, arXiv 1706.04599, equation 3, for soft labels). Raises ValueError for no pairs, shapes
    that differ, a probability outside 0 to 1, or bins below 1.
    """
    if predicted.ndim != 1 or predicted.shape != p_a.shape or not len(predicted):
        shapes = f"{tuple(predicted.shape)} and {tuple(p_a.shape)}"
        raise ValueError(f"predicted and p_a have the shapes {shapes}; allowed: both [N], N at least 1")
    if bins < 1:
        raise ValueError(f"bins is {bins}; allowed: 1 or more")
    _check_probabilities("predicted", predicted)
    _check_probabilities("p_a", p_a)
    bin_of = (predicted * bins).long().clamp(max=bins - 1)
    gaps = (predicted - p_a).double()
    return gaps.new_zeros(bins).index_add_(0, bin_of, gaps).abs().sum() / len(predicted)


@triton.jit
def pair_loss(difference, p_a):
    """The loss of a pair and its derivative by the difference of the scores."""
    power = tl.exp(-tl.abs(difference))
    # log(1 + power) would lose a small power, and (1 + power) - 1 says what was added (Kahan's log1p).
    above = 1 + power
    tail = tl.where(above == 1, power, tl.log(above) * (power / tl.where(above == 1, 1, above - 1)))
    loss = p_a * (tl.maximum(-difference, 0) + tail) + (1 - p_a) * (tl.maximum(difference, 0) + tail)
    sigmoid = tl.where(difference >= 0, 1, power) / above
    rest = tl.where(difference >= 0, power, 1) / above
    return loss, (1 - p_a) * sigmoid - p_a * rest


@triton.jit
def _load_pair(score_a, score_b, p_a, margins, pairs, inside, margin, MARGINS: tl.constexpr, ACC: tl.constexpr):
    """The sum and the difference of the scores, less the margin, and the label."""
    a = tl.load(score_a + pairs, inside, other=0.0).to(ACC)
    b = tl.load(score_b + pairs, inside, other=0.0).to(ACC)
    difference = a - b - tl.full((), margin, ACC)
    if MARGINS:
        difference -= tl.load(margins + pairs, inside, other=0.0).to(ACC)
    return a + b, difference, tl.load(p_a + pairs, inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["COUNT"])
def _forward_kernel(
    score_a,
    score_b,
    p_a,
    margins,
    losses,
    COUNT,
    margin: np.float64,
    centring: np.float64,
    MARGINS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < COUNT
    total, difference, label = _load_pair(score_a, score_b, p_a, margins, pairs, inside, margin, MARGINS, ACC)
    loss, _ = pair_loss(difference, label)
    loss += tl.full((), centring, ACC) * total * total
    tl.store(losses + pairs, loss.to(losses.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["COUNT"])
def _backward_kernel(
    score_a,
    score_b,
    p_a,
    margins,
    grad_losses,
    grad_a,
    grad_b,
    COUNT,
    margin: np.float64,
    centring: np.float64,
    MARGINS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < COUNT
    total, difference, label = _load_pair(score_a, score_b, p_a, margins, pairs, inside, margin, MARGINS, ACC)
    _, slope = pair_loss(difference, label)
    pull = 2 * tl.full((), centring, ACC) * total
    grad = tl.load(grad_losses + pairs, inside, other=0.0).to(ACC)
    tl.store(grad_a + pairs, (grad * (pull + slope)).to(grad_a.dtype.element_ty), inside)
    tl.store(grad_b + pairs, (grad * (pull - slope)).to(grad_b.dtype.element_ty), inside)


@torch.library.custom_op("bylaw::preference_loss", mutates_args=())
def _forward(
    score_a: Tensor, score_b: Tensor, p_a: Tensor, margins: Tensor | None, margin: float, centring: float
) -> Tensor:
    losses = _empty_losses(score_a, score_b, p_a, margins)
    _launch(_forward_kernel, [score_a, score_b, p_a], margins, [losses], margin, centring)
    return losses


@torch.library.custom_op("bylaw::preference_loss_backward", mutates_args=())
def _backward(
    score_a: Tensor,
    score_b: Tensor,
    p_a: Tensor,
    margins: Tensor | None,
    margin: float,
    centring: float,
    grad_losses: Tensor,
) -> tuple[Tensor, Tensor]:
    grads = _contiguous_like(score_a), _contiguous_like(score_b)
    _launch(_backward_kernel, [score_a, score_b, p_a], margins, [grad_losses.contiguous(), *grads], margin, centring)
    return grads


def _launch(
    kernel: triton.JITFunction,
    inputs: list[Tensor],
    margins: Tensor | None,
    others: list[Tensor],
    margin: float,
    centring: float,
) -> None:
    given = [*inputs, inputs[0] if margins is None else margins]  # a kernel takes no None
    count, settings = given[0].numel(), config("preference_loss", given[0].device)
    start(
        kernel,
        (triton.cdiv(count, settings["BLOCK"]),),
        *(tensor.contiguous() for tensor in given),
        *others,
        count,
        margin,
        centring,
        MARGINS=margins is not None,
        ACC=accumulator(_dtype(*given)),
        **settings,
    )


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes)


def _empty_losses(score_a: Tensor, *others: Tensor | None) -> Tensor:
    return score_a.new_empty(score_a.shape, dtype=_dtype(score_a, *others))


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_forward.register_fake
def _(score_a: Tensor, score_b: Tensor, p_a: Tensor, margins: Tensor | None, margin: float, centring: float) -> Tensor:
    return _empty_losses(score_a, score_b, p_a, margins)


@_backward.register_fake
def _(
    score_a: Tensor,
    score_b: Tensor,
    p_a: Tensor,
    margins: Tensor | None,
    margin: float,
    centring: float,
    grad_losses: Tensor,
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(score_a), _contiguous_like(score_b)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.margin, ctx.centring = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(*ctx.saved_tensors, ctx.margin, ctx.centring, grad_losses)
    return *grads, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(score_a: Tensor, score_b: Tensor, p_a: Tensor) -> None:
    if not score_a.shape == score_b.shape == p_a.shape:
        shapes = [tuple(part.shape) for part in (score_a, score_b, p_a)]
        raise ValueError(f"score_a, score_b, p_a have the shapes {shapes}; allowed: the same [B] for all")
    if p_a.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the values
        _check_probabilities("p_a", p_a)


def _check_options(score_a: Tensor, p_a: Tensor, margin: Tensor | float, centring: float) -> None:
    if isinstance(margin, Tensor) and margin.shape != score_a.shape:
        shapes = f"{tuple(margin.shape)} and score_a {tuple(score_a.shape)}"
        raise ValueError(f"margin has the shape {shapes}; allowed: the same, or a number for all pairs")
    for name, given in (("p_a", p_a), ("margin", margin)):
        if isinstance(given, Tensor) and given.requires_grad:
            raise ValueError(f"{name} requires grad, and has none here; allowed: {name}.detach()")
    if not 0 <= centring < math.inf:
        raise ValueError(f"centring is {centring}; allowed: 0 (off) and finite numbers above")


def _check_probabilities(name: str, values: Tensor) -> None:
    good = (values >= 0) & (values <= 1)  # False for NaN
    if not good.all():
        raise ValueError(f"{name} holds {values[~good][0].item()}; allowed: probabilities, 0 to 1")
