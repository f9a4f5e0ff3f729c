"""Draw one token per row of logits, with temperature, top-k and top-p set row by row.

A draw is the inverse of the cumulative distribution, in the order of token index, at a uniform number that the caller
brings (kernels/philox.py). So a row's token depends on its own logits, settings and number, and on nothing else in the
batch.
"""

import torch
from torch import Tensor


def sample(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature), cut to the top_k likeliest tokens and then to the top_p nucleus.

    `logits` [B, V]; `uniforms` [B] in [0, 1); `temperature` [B], 0 for the likeliest token; `top_k` [B], 0 for no
    limit; `top_p` [B] in (0, 1], 1 for no limit. The nucleus is the fewest likeliest tokens, of those that top_k left,
    that hold at least top_p together (Holtzman et al. 2020, section 3.1). Of tokens that tie, the lower index is first.

    Returns tokens [B] (int64) and logprobs [B] (float32; float64 for float64 logits). A log-prob is under the
    distribution drawn from: tempered, cut and renormalised. Without limits that is the whole tempered softmax, the one
    that the trainer computes; with a limit it is not, and an importance ratio would be wrong. A row at temperature 0
    reports its log-prob at temperature 1, uncut. A logit of -inf bans its token.

    Raises ValueError for wrong shapes, a setting out of range, or a row whose largest logit is NaN or infinite.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    _check(logits, uniforms, temperature, top_k, top_p)
    return reference(logits, uniforms, temperature, top_k, top_p)


def reference(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample` in plain torch, on input that is known to be good."""
    greedy = temperature == 0
    divisor = temperature.to(logits.dtype).masked_fill(greedy, 1.0)
    # Largest logit first: however small the temperature, it stays 0 and the others at worst become -inf, never NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / divisor[:, None]
    cut = (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1)) & ~greedy
    if cut.any():  # only these rows are sorted; the others keep the bits they have in a batch without limits
        scaled[cut] = _truncate(scaled[cut], top_k[cut], top_p[cut])
    logprobs = torch.log_softmax(scaled, dim=-1)
    tokens = _inverse_cdf(logprobs, uniforms)
    if greedy.any():
        tokens = torch.where(greedy, logits.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`scaled` [B, V] with -inf for each token outside its row's top_k and top_p."""
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    limit = torch.where(top_k > 0, top_k, scaled.shape[1])
    ordered = ordered.masked_fill(rank >= limit[:, None], float("-inf"))
    probs = ordered.double().softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # what the likelier tokens hold together; 0 for the first, which always stays
    ordered = ordered.masked_fill(before >= top_p[:, None], float("-inf"))
    return torch.empty_like(scaled).scatter_(1, index, ordered)


def _inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds uniform * total: tokens [B].

    The total is the sum's own last value, not 1, and in float64 uniform * total < total for every float32 below 1. So
    such a token exists however the sum was rounded; and since the sum steps up there, its probability is above 0.
    """
    cdf = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True)[:, 0]


def _check(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have the shape {tuple(logits.shape)}; allowed: [B, V] with V at least 1")
    rows = {"uniforms": uniforms, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, values in rows.items():
        if values.shape != logits.shape[:1]:
            raise ValueError(f"{name} has the shape {tuple(values.shape)}; allowed: ({len(logits)},), one for each row")
    infinity = float("inf")
    _check_rows("uniforms", uniforms, (uniforms >= 0) & (uniforms < 1), "0 to below 1")
    _check_rows("temperature", temperature, (temperature >= 0) & (temperature < infinity), "0 and finite numbers above")
    _check_rows("top_k", top_k, top_k >= 0, "0 (no limit) and above")
    _check_rows("top_p", top_p, (top_p > 0) & (top_p <= 1), "above 0 to 1 (no limit)")
    largest = logits.amax(dim=-1)  # NaN if any of the row is
    _check_rows("the largest logit", largest, largest.isfinite(), "finite numbers; the model's output is broken")


def _check_rows(name: str, values: Tensor, good: Tensor, allowed: str) -> None:
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name} of row {row} is {values[row].item()}; allowed: {allowed}")
