"""Log-probabilities of given tokens straight from hidden states, without holding [T, V] logits for the whole stream.

logprob_t = z_t[y_t] - logsumexp(z_t),   z_t = W h_t / temperature
entropy_t = -sum_v p_t[v] log p_t[v]
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 512 * 2**20


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Log-prob [T] of `targets` [T] under softmax(`hidden` [T, H] @ `weight` [V, H].T / temperature).

    Logits live in chunks of at most `logits_bytes`; where one chunk is not enough, they are computed again in the
    backward pass instead of being kept. Raises ValueError for a temperature that is not above 0.
    """
    _check_temperature(temperature)
    chunk = _chunk_tokens(weight, logits_bytes)
    if hidden.shape[0] <= chunk:
        return _chunk_logprob(hidden, weight, targets, temperature)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_logprob(h, weight, y, temperature) for h, y in pieces])
    return torch.cat(
        [checkpoint(_chunk_logprob, h, weight, y, temperature, use_reentrant=False) for h, y in pieces]  # type: ignore[misc]
    )


@torch.no_grad()
def linear_entropy(
    hidden: Tensor, weight: Tensor, temperature: float = 1.0, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Entropy [T] in nats of softmax(`hidden` @ `weight`.T / temperature), without gradient: a statistic."""
    _check_temperature(temperature)
    chunks = hidden.split(_chunk_tokens(weight, logits_bytes))
    return torch.cat([_chunk_entropy(h, weight, temperature) for h in chunks])


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature!r}: log-probs need a temperature above 0")


def _chunk_tokens(weight: Tensor, logits_bytes: int) -> int:
    return max(1, logits_bytes // (4 * weight.shape[0]))


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 1.0:
        return logits
    # Largest logit first, as the sampler does: however small the temperature, it stays 0 and nothing becomes NaN.
    return (logits - logits.detach().amax(dim=-1, keepdim=True)) / temperature


def _chunk_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy(_logits(hidden, weight, temperature), targets, reduction="none")


def _chunk_entropy(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(_logits(hidden, weight, temperature), dim=-1)
    return torch.special.entr(log_p.exp()).sum(-1)  # 0 where p is 0, also where log p is -inf
