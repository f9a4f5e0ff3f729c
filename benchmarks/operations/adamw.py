"""One AdamW step of a bfloat16 matrix with float32 state: 28 bytes for each weight."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels.adamw import adamw

NUMBERS: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 10}
CHANGED = ("parameter", "master", "exp_avg", "exp_avg_sq")


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for rows, columns in [(16, 24)] if small else [(896, 896), (4096, 4096), (28672, 4096)]:
        yield Case(
            operation="adamw",
            shape={"O": rows, "I": columns},
            inputs=lambda device, dtype, r=rows, c=columns: _inputs(r, c, device, dtype),
            ours=_ours,
            # Reads the gradient and three of the state, writes those three and the parameter.
            forward=Floor(bytes=(2 + 3 * 4 + 3 * 4 + 2) * rows * columns),
            peers={"torch": _torch, "torch.compile": torch.compile(_torch), "torch fused": _torch_fused},
        )


def _ours(backend: str = "auto", **inputs: Any) -> tuple[Tensor, ...]:
    adamw(**inputs, backend=backend)
    return tuple(inputs[name] for name in CHANGED)


def _torch(**inputs: Any) -> tuple[Tensor, ...]:
    return _ours(backend="reference", **inputs)


def _torch_fused(
    parameter: Tensor, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_scale: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    """torch's own kernel, on the master copy: it has no other way to a 16-bit parameter."""
    options = {key: value for key, value in NUMBERS.items() if key != "step"}
    step = torch.full((), float(NUMBERS["step"]), device=grad.device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [master], [grad.to(master.dtype) * grad_scale], [exp_avg], [exp_avg_sq], [], [step],
        amsgrad=False, maximize=False, **options,
    )  # fmt: skip
    parameter.copy_(master)
    return parameter, master, exp_avg, exp_avg_sq


def launches() -> Iterator[Launch]:
    yield Launch("O=4096", lambda: _ours("triton", **_inputs(4096, 4096, torch.device("meta"), torch.bfloat16)))


def _inputs(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def drawn() -> Tensor:
        return torch.randn(rows, columns, device=device)

    master = drawn()
    return {
        "parameter": master.to(dtype),
        "master": master,
        "grad": drawn().to(dtype),
        "exp_avg": drawn(),
        "exp_avg_sq": drawn().square(),
        "grad_scale": torch.full((), 0.5, device=device),
        **NUMBERS,
    }
