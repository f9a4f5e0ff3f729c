"""Log-prob, entropy and log-normaliser from hidden states, at the heads of Llama and Qwen models."""

from collections.abc import Iterator
from typing import Any

import torch

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import linear_logprob as module
from bylaw.kernels.linear_logprob import linear_logprob, reference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness. 64 tokens are a pass over labels."""
    shapes = [(64, 4096, 151936), (8192, 2048, 128256), (8192, 4096, 151936)]
    for tokens, size, vocabulary in [(16, 24, 96)] if small else shapes:
        yield Case(
            operation="linear_logprob",
            shape={"T": tokens, "H": size, "V": vocabulary},
            inputs=lambda device, dtype, t=tokens, h=size, v=vocabulary: _inputs(t, h, v, device, dtype),
            ours=linear_logprob,
            forward=Floor(bytes=2 * size * (vocabulary + tokens) + 20 * tokens, flops=2.0 * tokens * size * vocabulary),
            peers={"torch": reference, "torch.compile": torch.compile(reference)},
        )


def launches() -> Iterator[Launch]:
    for size, vocabulary in ((2048, 32000), (4096, 151936), (3584, 256000)):
        yield Launch(f"H={size} V={vocabulary}", lambda h=size, v=vocabulary: _run(h, v), tensor_cores=True)


def _run(size: int, vocabulary: int) -> None:
    hidden = torch.empty(8192, size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, size, dtype=torch.bfloat16, device="meta")
    module._launch(hidden, weight, torch.empty(8192, dtype=torch.int64, device="meta"), 0.7)


def _inputs(tokens: int, size: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden": torch.randn(tokens, size, device=device, dtype=dtype),
        "weight": torch.randn(vocabulary, size, device=device, dtype=dtype) * (2 / size**0.5),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
        "temperature": 0.7,
    }
