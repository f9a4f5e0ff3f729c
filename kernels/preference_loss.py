"""Loss and measures of a reward model on soft preferences: P(a better than b) = sigma(score_a - score_b).

The model is Bradley and Terry's (1952); labels that are probabilities are those of arXiv 2212.08073, section 4.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(score_a: Tensor, score_b: Tensor, p_a: Tensor) -> Tensor:
    """Cross-entropy per pair [B], -[p log sigma(d) + (1 - p) log sigma(-d)] with d = score_a - score_b.

    `score_a`, `score_b` [B]; `p_a` [B], the label's probability that a is better, 0 to 1. A pair whose label abstained
    is to be left out, not given 0.5. Raises ValueError for shapes that differ or a label outside 0 to 1.
    """
    _check(score_a, score_b, p_a)
    margin = score_a - score_b
    # Two terms, not softplus(-d) + (1 - p) d, in which the loss of a confident pair is lost to rounding.
    return -(p_a * F.logsigmoid(margin) + (1 - p_a) * F.logsigmoid(-margin))


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


def _check(score_a: Tensor, score_b: Tensor, p_a: Tensor) -> None:
    if not score_a.shape == score_b.shape == p_a.shape:
        shapes = [tuple(part.shape) for part in (score_a, score_b, p_a)]
        raise ValueError(f"score_a, score_b, p_a have the shapes {shapes}; allowed: the same [B] for all")
    _check_probabilities("p_a", p_a)


def _check_probabilities(name: str, values: Tensor) -> None:
    good = (values >= 0) & (values <= 1)  # False for NaN
    if not good.all():
        raise ValueError(f"{name} holds {values[~good][0].item()}; allowed: probabilities, 0 to 1")
