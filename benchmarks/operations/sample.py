"""Drawing tokens at the vocabularies of Llama, Qwen and Gemma models, without limits and with top-k and top-p.

FlashInfer draws by numbers of its own, so its tokens cannot be compared with ours, and it is no peer here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels.philox import uniform
from bylaw.kernels.sample import reference, sample
from bylaw.kernels.sample_kernel import sample_rows

SHAPES = [(64, 32_000), (64, 151_936), (128, 128_256), (256, 32_000), (256, 262_144)]
CHECKED = (8, 10_000)  # with more, some draws lie within a rounding of the border between two tokens


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for rows, size in [(4, 300)] if small else SHAPES:
        for limited in (False, True):
            yield _case(rows, size, limited, None if small else _case(*CHECKED, limited))


def _case(rows: int, size: int, limited: bool, check: Case | None = None) -> Case:
    return Case(
        operation="sample",
        shape={"B": rows, "V": size, "limited": limited},
        inputs=lambda device, dtype: _inputs(rows, size, limited, device, dtype),
        ours=sample,
        forward=Floor(bytes=2 * rows * size),
        peers={"torch": _torch},
        check=check,
    )


def launches() -> Iterator[Launch]:
    for size in (32_000, 262_144):
        for dtype in (torch.bfloat16, torch.float32):
            yield Launch(f"V={size} {dtype}", lambda v=size, d=dtype: _run(v, d))
    rows = torch.empty(256, dtype=torch.int64, device="meta")
    yield Launch("uniform", lambda: uniform(rows, rows, rows, backend="triton"))


def _run(size: int, dtype: torch.dtype) -> None:
    inputs = {"device": "meta", "dtype": torch.float32}
    rows, k = torch.empty(64, **inputs), torch.empty(64, dtype=torch.int64, device="meta")
    sample_rows(torch.empty(64, size, device="meta", dtype=dtype), rows, rows, k, rows, rows)


def _torch(logits: Tensor, **settings: Tensor) -> tuple[Tensor, Tensor]:
    return reference(logits if logits.dtype == torch.float64 else logits.float(), **settings)


def _inputs(rows: int, size: int, limited: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draws = uniform(torch.tensor(1), torch.arange(rows), torch.tensor(0)).to(device)
    top_k, top_p = (50, 0.95) if limited else (0, 1.0)
    return {
        "logits": 2 * torch.randn(rows, size, device=device, dtype=dtype),
        "uniforms": draws,
        "temperature": torch.full((rows,), 0.8 if limited else 1.0, device=device),
        "top_k": torch.full((rows,), top_k, device=device),
        "top_p": torch.full((rows,), top_p, device=device),
        "min_p": torch.zeros(rows, device=device),
    }
