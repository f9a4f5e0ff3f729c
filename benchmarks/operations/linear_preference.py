"""DPO with its gradient: pairs of responses at the heads of Llama and Qwen models; one case has pairs over the budget.

As in linear_loss, the forward pass has the floor of all matrix products, and "both" is what compares.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import linear_preference as module
from bylaw.kernels.linear_preference import linear_preference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness. S: tokens of a response."""
    shapes = [(32, 128, 2048, 128256), (16, 256, 4096, 151936), (2, 2048, 4096, 151936)]
    for pairs, length, size, vocabulary in [(3, 4, 24, 96)] if small else shapes:
        tokens = 2 * pairs * length
        yield Case(
            operation="linear_preference",
            shape={"B": pairs, "S": length, "H": size, "V": vocabulary},
            inputs=lambda device, dtype, b=pairs, s=length, h=size, v=vocabulary: _inputs(b, s, h, v, device, dtype),
            ours=_ours,
            forward=Floor(bytes=4 * size * (vocabulary + tokens), flops=6.0 * tokens * size * vocabulary),
            differentiable=("hidden", "weight"),
            peers={"torch": _whole, "torch.compile": torch.compile(_whole)},
        )


def _ours(**given: Any) -> Tensor:
    return linear_preference(**given).loss


def _whole(**given: Any) -> Tensor:
    """With all logits at once."""
    tokens, vocabulary = len(given["targets"]), len(given["weight"])
    return linear_preference(**given, logits_bytes=4 * tokens * vocabulary, backend="reference").loss


def launches() -> Iterator[Launch]:
    def run() -> None:
        given = _inputs(1, 8, 64, 151936, torch.device("meta"), torch.bfloat16)
        given["cu_seqlens"] = torch.arange(3) * 8  # read by the host
        module._forward(*given.values(), 0.1, 1.0, 2**29, True, True)

    yield Launch("V=151936", run)


def _inputs(
    pairs: int, length: int, size: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    tokens = 2 * pairs * length
    return {
        "hidden": torch.randn(tokens, size, device=device, dtype=dtype),
        "weight": torch.randn(vocabulary, size, device=device, dtype=dtype) * (2 / size**0.5),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
        "cu_seqlens": torch.arange(2 * pairs + 1) * length,
        "reference_logps": length * (torch.randn(2 * pairs, device=device) / 20 - 11),
        "p_a": torch.rand(pairs, device=device),
    }
