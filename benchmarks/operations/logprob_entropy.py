"""Log-prob and entropy from logits that exist, at the vocabularies of Llama and Qwen."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import logprob_entropy as module
from bylaw.kernels.logprob_entropy import logprob_entropy, reference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    if small:
        yield _case(16, 96)
    else:
        yield from (_case(8192, size, check=_case(256, size)) for size in (32000, 128256, 151936))


def _case(tokens: int, vocabulary: int, check: Case | None = None) -> Case:
    return Case(
        operation="logprob_entropy",
        shape={"T": tokens, "V": vocabulary},
        inputs=lambda device, dtype: _inputs(tokens, vocabulary, device, dtype),
        ours=logprob_entropy,
        forward=Floor(bytes=2 * tokens * vocabulary),
        backward=Floor(bytes=4 * tokens * vocabulary),
        differentiable=("logits",),
        peers={"torch": reference, "torch.compile": torch.compile(reference)},
        check=check,
    )


def launches() -> Iterator[Launch]:
    def run() -> None:
        logits = torch.empty(8192, 151936, dtype=torch.bfloat16, device="meta")
        targets = torch.empty(8192, dtype=torch.int64, device="meta")
        row = torch.empty(8192, device="meta")
        module._forward(logits, targets, 0.7, False)
        module._backward(logits, [targets, row, row, row, row, row], 0.7)

    yield Launch("V=151936", run)


def _inputs(tokens: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    logits: Tensor = 3 * torch.randn(tokens, vocabulary, device=device, dtype=dtype)
    return {"logits": logits, "targets": torch.randint(vocabulary, (tokens,), device=device), "temperature": 0.7}
