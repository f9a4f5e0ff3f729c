"""The reward model's loss on soft labels, with margin and centring."""

from collections.abc import Iterator
from typing import Any

import torch

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import preference_loss as module
from bylaw.kernels.preference_loss import preference_loss, reference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness. It is really the launch that costs."""
    for pairs in [16] if small else [64, 4096]:
        yield Case(
            operation="preference_loss",
            shape={"B": pairs},
            inputs=lambda device, dtype, b=pairs: _inputs(b, device),
            ours=preference_loss,
            forward=Floor(bytes=20 * pairs),
            backward=Floor(bytes=28 * pairs),
            differentiable=("score_a", "score_b"),
            peers={"torch": reference, "torch.compile": torch.compile(reference)},
        )


def launches() -> Iterator[Launch]:
    def run() -> None:
        row = torch.empty(4096, device="meta")
        module._forward(row, row, row, row, 0.0, 0.01)
        module._backward(row, row, row, row, 0.0, 0.01, row)
        module._forward(row, row, row, None, 0.0, 0.0)
        module._backward(row, row, row, None, 0.0, 0.0, row)

    yield Launch("float32", run)


def _inputs(pairs: int, device: torch.device) -> dict[str, Any]:
    """In float32 whatever the dtype of the rest: so are scores in training."""
    score_a, score_b, margin = torch.randn(3, pairs, device=device)
    return {
        "score_a": score_a,
        "score_b": score_b,
        "p_a": torch.rand(pairs, device=device),
        "margin": margin,
        "centring": 0.01,
    }
