"""Draw one token per row of logits, with temperature, top-k, top-p and min-p set row by row.

A draw is the inverse of the cumulative distribution, in the order of token index, at a uniform number that the caller
brings (kernels/philox.py). So a row's token depends on its own logits, settings and number, and on nothing else in the
batch, and a GPU draws the token that a CPU draws, unless the number lies on the border of two tokens up to rounding.
"""

import torch
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.sample_kernel import STEPS, sample_rows

INFINITY = float("inf")


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature), cut to the top_k likeliest tokens, the top_p nucleus, and min_p.

    `logits` [B, V]; `uniforms` [B] in [0, 1); `temperature` [B], 0 for the likeliest token; `top_k` [B], 0 for no
    limit; `top_p` [B] in (0, 1], 1 for no limit; `min_p` [B] in [0, 1], 0 (or None, for all rows) for no limit.

    The limits apply in this order, each to what the one before left, as in Transformers. The nucleus is the fewest
    likeliest tokens that hold at least top_p together (Holtzman et al. 2020, section 3.1). min_p drops tokens below
    min_p times the probability of the likeliest (Nguyen et al. 2024, arXiv 2407.01082, section 3). vLLM drops them
    first, which keeps fewer where top_p is set as well. Of tokens with the same logit, the lower index is likelier.

    Returns tokens [B] (int64) and logprobs [B] (float32; float64 for float64 logits). A log-prob is under the
    distribution drawn from: tempered, cut and renormalised. Without limits that is the whole tempered softmax, the one
    that the trainer computes; with a limit it is not, and an importance ratio would be wrong. A row at temperature 0
    reports its log-prob at temperature 1, uncut. A logit of -inf bans its token.

    Raises ValueError for wrong shapes, a backend that cannot run there, and float64 logits on the kernels. For a
    setting out of range, and for a row whose largest logit is NaN or infinite, the reference raises ValueError too; the
    kernels, which would have to wait for the GPU to see it, give that row the token -1 and the log-prob NaN.
    """
    settings = (uniforms, temperature, top_k, top_p, min_p)
    _check_shapes(logits, *settings)
    if choose("sample", backend, logits) == "triton":
        if logits.dtype not in STEPS:
            raise ValueError(f"logits are {logits.dtype}; allowed on the kernels: float32 and narrower floats")
        return sample_rows(logits, *settings)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    _check_values(logits, *settings)
    return reference(logits, *settings)


def reference(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sample` in plain torch, on float32 or float64 that is known to be good."""
    greedy = temperature == 0
    divisor = temperature.to(logits.dtype).masked_fill(greedy, 1.0)
    # Largest logit first: however small the temperature, it stays 0 and the others at worst become -inf, never NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / divisor[:, None]
    min_p = torch.zeros_like(top_p) if min_p is None else min_p
    cut = (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1) | (min_p > 0)) & ~greedy
    if cut.any():  # only these rows are sorted; the others keep the bits they have in a batch without limits
        scaled[cut] = _truncate(scaled[cut], logits[cut], top_k[cut], top_p[cut], min_p[cut])
    logprobs = torch.log_softmax(scaled, dim=-1)
    likeliest = logits.argmax(dim=-1)
    tokens = likeliest if greedy.all() else torch.where(greedy, likeliest, _inverse_cdf(logprobs, uniforms))
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(scaled: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`scaled` [B, V] with -inf for each token outside its row's top_k, top_p and min_p."""
    # By the logits: different ones may have become the same after the division.
    index = logits.argsort(dim=-1, descending=True, stable=True)
    ordered, rank = scaled.gather(1, index), torch.arange(scaled.shape[1], device=scaled.device)
    limit = torch.where(top_k > 0, top_k, scaled.shape[1])
    ordered = ordered.masked_fill(rank >= limit[:, None], float("-inf"))
    probs = ordered.double().softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # what the likelier tokens hold together; 0 for the first, which always stays
    ordered = ordered.masked_fill(before >= top_p[:, None], float("-inf"))
    ordered = ordered.masked_fill(ordered < min_p.to(scaled.dtype).log()[:, None], float("-inf"))
    return torch.empty_like(scaled).scatter_(1, index, ordered)


def _inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds uniform * total: tokens [B].

    The total is the sum's own last value, not 1, and in float64 uniform * total < total for every float32 below 1. So
    such a token exists however the sum was rounded; and since the sum steps up there, its probability is above 0.
    """
    cdf = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True)[:, 0]


def _check_shapes(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None
) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have the shape {tuple(logits.shape)}; allowed: [B, V] with V at least 1")
    rows = {"uniforms": uniforms, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, values in rows.items():
        if values is None:
            continue
        if values.shape != logits.shape[:1]:
            raise ValueError(f"{name} has the shape {tuple(values.shape)}; allowed: ({len(logits)},), one for each row")
        if values.device != logits.device:
            raise ValueError(f"{name} is on {values.device}; allowed: {logits.device}, where the logits are")


def _check_values(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None
) -> None:
    _check_rows("uniforms", uniforms, (uniforms >= 0) & (uniforms < 1), "0 to below 1")
    _check_rows("temperature", temperature, (temperature >= 0) & (temperature < INFINITY), "0 and finite numbers above")
    _check_rows("top_k", top_k, top_k >= 0, "0 (no limit) and above")
    _check_rows("top_p", top_p, (top_p > 0) & (top_p <= 1), "above 0 to 1 (no limit)")
    if min_p is not None:
        _check_rows("min_p", min_p, (min_p >= 0) & (min_p <= 1), "0 (no limit) to 1")
    largest = logits.amax(dim=-1)  # NaN if any of the row is
    _check_rows("the largest logit", largest, largest.isfinite(), "finite numbers; the model's output is broken")


def _check_rows(name: str, values: Tensor, good: Tensor, allowed: str) -> None:
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name} of row {row} is {values[row].item()}; allowed: {allowed}")
