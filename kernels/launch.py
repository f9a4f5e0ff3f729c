"""How kernels are launched: frozen block sizes by architecture, and the dtypes that arithmetic is done in.

Nothing is tuned while a model trains: each operation has a table in configs/, remade by benchmarks/tune.py. A table
maps an architecture to rows; the first row whose bounds (`when`) all hold is taken, so rows stand from narrow to wide.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bylaw.kernels.backend import INTERPRETED

# Cards that are launched like a listed one. Others get the rows "small", made to fit in 64 KiB of shared memory.
LIKE = {"sm_87": "sm_80", "sm_103": "sm_100", "gfx950": "gfx942"}
Config = dict[str, Any]


def config(operation: str, device: torch.device, **sizes: int) -> Config:
    """Launch settings (block sizes, num_warps, num_stages) of `operation` for tensors on `device` of these sizes."""
    return select(operation, _table(operation)[settings_name(operation, device)], sizes)


def select(operation: str, rows: list[Config], sizes: dict[str, int]) -> Config:
    """The first of `rows` whose bounds all hold. benchmarks/tune.py puts itself in this place, to try other rows."""
    for row in rows:
        if all(sizes[key] <= bound for key, bound in row.get("when", {}).items()):
            return {key: value for key, value in row.items() if key != "when"}
    raise ValueError(f"{operation}: no launch settings for {sizes}; rows: {rows}")


def settings_name(operation: str, device: torch.device) -> str:
    """Whose rows of the operation's table are taken on `device`: an architecture's, or "small"."""
    name = LIKE.get(architecture(device), architecture(device))
    return name if name in _table(operation) else "small"


@cache
def _table(operation: str) -> dict[str, list[Config]]:
    return json.loads((Path(__file__).parent / "configs" / f"{operation}.json").read_text())


def start(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Launch `kernel`, unless the grid is empty. (Type checkers take `kernel[grid]` for the function it was made from.)

    A kernel's scalars are to be annotated np.float64: else a Python float arrives as float32, whatever ACC is.
    """
    if all(grid):
        kernel[grid](*arguments, **settings)


def architecture(device: torch.device) -> str:
    """The name that tables use, as "sm_90" or "gfx942"; a CPU's is "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    target: Any = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, for kernels whose programs stay; few on a CPU, so that each has several tiles."""
    if device.type != "cuda":
        return 3 if device.type == "cpu" else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums are held in: float32, and float64 for float64 input (gradient checks)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> tl.dtype:
    """What `tl.dot` is fed with: the input's dtype, but float32 for bfloat16 under the interpreter, which has none."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]
