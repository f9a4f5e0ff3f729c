"""The language-model head in chunks of tokens: what the losses on hidden states share.

logits_t = W h_t, with h [T, H] and W [V, H]. No more of them exist at once than a budget of bytes allows. The kernels
take the gradient along while a chunk is at hand, so nothing is computed twice (6 T H V operations, as much as with all
logits kept); plain torch computes a chunk again in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bylaw.kernels.linear_logprob import LOGITS_BYTES
from bylaw.kernels.policy_loss import scaled
from bylaw.kernels.softmax import check_temperature, tempered

Tokens = slice | Tensor  # a chunk: neighbours, or places [n] of tokens that differ


class Head:
    """One buffer for the logits of a chunk, and the gradients that chunk after chunk adds to.

    Logits are float32 (float64 for float64 input) whatever the dtype of `hidden`, so that log-probs agree with those of
    `linear_logprob` to rounding: PPO's first ratio has to be 1. A row kernel writes their gradient over them in the
    dtype of `hidden`: a 16-bit row takes the first half of its logits' memory. The gradient of `weight` is summed in
    float32: 16-bit sums over many chunks lose what later chunks add.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, count: int, logits_bytes: int, wanted: tuple[bool, bool]
    ) -> None:
        """For `count` tokens of `hidden`, in chunks within `logits_bytes` (of one token at least)."""
        self.hidden, self.weight, self.wanted = hidden, weight, wanted
        dtype = wide(hidden)
        # Rows begin at multiples of 256 bytes, whatever V is: matrix products are slow without 16.
        self.stride = -(-weight.shape[0] // 64) * 64
        tokens = max(1, logits_bytes // (dtype.itemsize * self.stride))
        tokens = tokens if tokens < 128 else tokens // 128 * 128  # whole tiles of a matrix product
        self.chunk = max(1, min(tokens, count))
        self.buffer = hidden.new_empty((self.chunk, self.stride), dtype=dtype)
        self.grad_hidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
        self.grad_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=dtype)
        self._fresh = True

    def fill(self, tokens: Tokens) -> None:
        """Logits of `tokens` into the buffer."""
        rows = self.hidden[tokens]
        _multiply(rows, self.weight.T, self.buffer[: len(rows), : self.weight.shape[0]])

    @property
    def gradient(self) -> Tensor:
        """The buffer as the row kernel writes it: [chunk, stride or, for 16 bits, 2 stride]."""
        return self.buffer.view(self.hidden.dtype)

    def add(self, tokens: Tokens) -> None:
        """Take the gradient of the logits of `tokens`, now in the buffer, to `hidden` and `weight`."""
        rows = self.hidden[tokens]
        gradient = self.gradient[: len(rows), : self.weight.shape[0]]
        if self.wanted[0]:
            self.grad_hidden[tokens] = gradient @ self.weight
        if self.wanted[1]:
            _multiply(gradient.T, rows, self.grad_weight, add=not self._fresh)
            self._fresh = False

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of `hidden`, in its dtype, and of `weight`, wide; empty where not wanted."""
        if self._fresh:
            self.grad_weight.zero_()
        return self.grad_hidden, self.grad_weight


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """`out` = `left` @ `right`, or more of it, summed in the dtype of `out`."""
    wider: dict[str, Any] = {}
    if left.dtype != out.dtype:
        if out.device.type == "cuda":
            wider = {"out_dtype": out.dtype}
        else:
            left, right = left.to(out.dtype), right.to(out.dtype)
    if add:
        torch.addmm(out, left, right, out=out, **wider)
    else:
        torch.mm(left, right, out=out, **wider)


@torch.no_grad()
def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [T, V] of all of `hidden` [T, H], never rounded to 16 bits. For a few rows; no gradient."""
    out = hidden.new_empty((len(hidden), len(weight)), dtype=wide(hidden))
    _multiply(hidden, weight.T, out)
    return out


def wide(hidden: Tensor) -> torch.dtype:
    """The dtype of logits, log-probs and sums over tokens."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def wanted_gradients(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether each is to be differentiated by, here and now."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad


def outputs_of(hidden: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, Tensor]:
    """Tensors like those of `Head.gradients`, for fake kernels."""
    grad_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=wide(hidden))
    return hidden.new_empty(hidden.shape if wanted[0] else (0,)), grad_weight


def save_gradients(ctx, inputs, output) -> None:
    """Of an operation from (hidden, weight, ...) to (loss, ..., gradient of hidden, gradient of weight)."""
    ctx.set_materialize_grads(False)  # of the other outputs: zeros of the size of the weight
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-2:])
    ctx.weight_dtype, ctx.constants = inputs[1].dtype, len(inputs) - 2


def scale_gradients(ctx, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    """The backward pass of such an operation: its gradients times that of its loss."""
    saved = zip(ctx.saved_tensors, (ctx.saved_tensors[0].dtype, ctx.weight_dtype), strict=True)
    grads = [None if grad_loss is None or x.ndim != 2 else scaled(x, grad_loss, dtype) for x, dtype in saved]
    return *grads, *(None,) * ctx.constants


def reference_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, logits_bytes: int, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob [n] of each target, and the entropy [n] where asked for: plain torch, differentiable.

    Where one chunk is not enough, logits are computed again in the backward pass instead of being kept.
    """
    chunk = max(1, logits_bytes // (4 * weight.shape[0]))
    if len(hidden) <= chunk:
        return _chunk_rows(hidden, weight, targets, temperature, entropy)
    rows = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            rows.append(checkpoint(_chunk_rows, h, weight, y, temperature, entropy, use_reentrant=False))
        else:
            rows.append(_chunk_rows(h, weight, y, temperature, entropy))
    logprobs, entropies = zip(*rows, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _chunk_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    log_p = F.log_softmax(tempered(F.linear(hidden, weight), temperature), dim=-1)
    logprobs = -F.nll_loss(log_p, targets, reduction="none")
    if not entropy:
        return logprobs, None
    # At a very low temperature log p is -inf, and 0 times that is NaN, as is its gradient.
    return logprobs, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, logits_bytes: int) -> None:
    """ValueError for shapes and dtypes that do not fit, a temperature or a budget that is not above 0."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and len(weight)
    if not fits or targets.shape != hidden.shape[:1]:
        raise ValueError(f"{shapes}; allowed: [T, H], [V, H] with V at least 1, [T]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or targets.dtype != torch.int64:
        dtypes = f"hidden {hidden.dtype}, weight {weight.dtype}, targets {targets.dtype}"
        raise ValueError(f"{dtypes}; allowed: one floating dtype for hidden and weight, torch.int64 for targets")
    check_temperature(temperature)
    if not logits_bytes > 0:
        raise ValueError(f"logits_bytes is {logits_bytes}; allowed: above 0, such as {LOGITS_BYTES}")


def check_range(targets: Tensor, vocabulary: int) -> None:
    """ValueError for a target outside 0 to `vocabulary` - 1. Only on a CPU: a GPU would be waited for."""
    if targets.device.type == "cpu" and bool(((targets < 0) | (targets >= vocabulary)).any()):
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"targets hold {low} to {high}; allowed: 0 to {vocabulary - 1}, or ignore_index")
