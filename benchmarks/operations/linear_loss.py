"""The head's losses with their gradient: SFT's (one term) and PPO's (three), at the heads of Llama and Qwen models.

The gradient is made in the forward pass, so that pass has the floor of all three matrix products; implementations
that make it in the backward pass are compared by "both".
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import linear_loss as module
from bylaw.kernels.linear_loss import Terms, linear_loss, token_losses

Column = Tensor | None


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    shapes = [(8192, 2048, 32000), (8192, 2048, 128256), (8192, 4096, 151936)]
    for tokens, size, vocabulary in [(16, 24, 96)] if small else shapes:
        for terms in (1, 3):
            yield Case(
                operation="linear_loss",
                shape={"T": tokens, "H": size, "V": vocabulary, "terms": terms},
                inputs=lambda device, dtype, t=tokens, h=size, v=vocabulary, n=terms: inputs(t, h, v, n, device, dtype),
                ours=_ours,
                forward=Floor(bytes=4 * size * (vocabulary + tokens), flops=6.0 * tokens * size * vocabulary),
                differentiable=("hidden", "weight"),
                peers={"torch": _whole, "torch.compile": torch.compile(_whole)} | (_libraries() if terms == 1 else {}),
            )


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str = "auto", **columns: Column) -> Tensor:
    return linear_loss(hidden, weight, targets, **columns, backend=backend, ignore_index=None).loss  # type: ignore[arg-type]


def _whole(hidden: Tensor, weight: Tensor, targets: Tensor, **columns: Column) -> Tensor:
    """With all logits at once."""
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = None if columns.get("entropy") is None else -(log_p.exp() * log_p).sum(-1)
    return token_losses(logprobs, entropy, Terms(**columns, low=0.8, high=1.2)).sum()  # type: ignore[arg-type]


def _libraries() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
    if hasattr(F, "linear_cross_entropy"):

        def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
            return F.linear_cross_entropy(hidden, weight, targets, reduction="sum").float()

        found["F.linear_cross_entropy"] = torchs
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore
    except ImportError:
        return found
    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return found | {"liger": lambda hidden, weight, targets, nll: liger(weight, hidden, targets)}


def launches() -> Iterator[Launch]:
    for vocabulary in (32000, 50257, 151936, 256000):
        for terms in (1, 3):
            yield Launch(f"V={vocabulary} terms={terms}", lambda v=vocabulary, n=terms: _run(v, n, True))
    yield Launch("V=151936 terms=3 k2", lambda: _run(151936, 3, True, "k2"))
    yield Launch("V=151936 without gradient", lambda: _run(151936, 1, False))


def _run(vocabulary: int, terms: int, gradient: bool, kl_estimator: str = "k3") -> None:
    given = inputs(128, 64, vocabulary, terms, torch.device("meta"), torch.bfloat16)
    columns = [given.get(name) for name in Terms._fields[:6]]
    tensors = given["hidden"], given["weight"], given["targets"]
    settings = 0.8, 1.2, float("inf"), kl_estimator, 1.0, None, 2**29, gradient, gradient
    module._forward(*tensors, *columns, *settings)  # type: ignore[arg-type]


def inputs(
    tokens: int, size: int, vocabulary: int, terms: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    given = {
        "hidden": torch.randn(tokens, size, device=device, dtype=dtype),
        "weight": torch.randn(vocabulary, size, device=device, dtype=dtype) * (2 / size**0.5),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
    }
    if terms == 1:
        return given | {"nll": torch.ones(tokens, device=device)}
    old, reference = -torch.rand(2, tokens, device=device) * 2 - 10
    return given | {
        "old_logprobs": old,
        "advantages": torch.randn(tokens, device=device),
        "entropy": torch.full((tokens,), 0.01, device=device),
        "reference_logprobs": reference,
        "kl": torch.full((tokens,), 0.05, device=device),
    }
