"""What an operation's launches compile to, on a machine without their GPU.

An operation runs on tensors of device "meta", as it would on a GPU: a driver that only names a target stands in for
Triton's, each launch ends when it is compiled, and a registered operation runs its body instead of its fake kernel.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from bylaw.benchmarks.case import Launch
from bylaw.kernels.backend import INTERPRETED

# sm_89 stands for all cards that have no rows of their own and take the rows "small".
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Names of instruction classes, and what stands for them in SASS or in AMD's assembly.
TENSOR_CORES = {
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mma.sync": r"\bHMMA",
    "mfma": r"\bv_mfma",
}
INSTRUCTIONS = TENSOR_CORES | {
    "load16": r"\bLDG\.E\.(?:\w+\.)*128\b|\b(?:global|buffer)_load_(?:dwordx4|b128)\b(?!.*\blds\b)",
    "cp.async": r"\bLDGSTS|\bglobal_load_lds|\bbuffer_load_\w+ .*\blds\b",
    "tma": r"\bUTMALDG",
    "local": r"\b(?:STL|LDL)\b|\bscratch_(?:load|store)",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of local memory a thread, shared bytes a program.

    `spill` counts all local memory, as nothing in these kernels but a spilled register lives there. `dot` says that
    the source multiplies 16-bit matrices. `instructions` holds the classes of INSTRUCTIONS that occur.
    """

    kernel: str
    registers: int
    spill: int
    shared: int
    dot: bool = False
    instructions: Mapping[str, int] = field(default_factory=dict)

    def on_tensor_cores(self) -> bool:
        return any(name in TENSOR_CORES for name in self.instructions)


def require_compiler() -> None:
    """Raises ValueError under Triton's interpreter, which compiles nothing."""
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing; unset it")


def compile_launch(launch: Launch, architecture: str) -> list[Resources]:
    """The kernels that `launch` would start on `architecture`, each variant once, in order.

    A kernel's second variant gets the name "kernel 2". Raises ValueError for a launch that starts no kernel.
    """
    kernels: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))
        return kernels[-1]

    with pretending(architecture, compile_only):
        launch.run()
    if not kernels:
        raise ValueError(f"launch {launch.name!r} starts no kernel; its operation must run on tensors of device 'meta'")
    found: dict[str, Resources] = {}
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        variants = sum(name.split()[0] == kernel.name for name in found)
        name = f"{kernel.name} {variants + 1}" if variants else kernel.name
        found[name] = resources(name, kernel.asm, kernel.metadata.shared)
    return list(found.values())


class _Driver(DriverBase):
    """A driver without a device. Its device number is a name, so that no cache mistakes it for a true one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend} {self._target.arch}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is timed where nothing runs")


@contextmanager
def pretending(architecture: str, run: Callable[..., Any]) -> Iterator[None]:
    """Within, the GPU seems to be an `architecture`, and `run` gets what a kernel would be launched with."""

    def body(operation: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        return operation._init_fn(*args, **kwargs)

    with (
        patch.object(JITFunction, "run", run),
        patch.object(CustomOpDef, "__call__", body),
        patch.object(triton.runtime.driver, "_active", _Driver(TARGETS[architecture])),
        patch.dict(os.environ, {"TRITON_DEFAULT_FP_FUSION": "1"}),  # the default, but from 3.9 on with a warning
    ):
        yield


def resources(name: str, asm: Mapping[str, Any], shared: int) -> Resources:
    """Reads them off a compiled kernel: `asm` holds "ttir" and "cubin" or "amdgcn"; `shared` is in bytes."""
    if "cubin" in asm:
        text = _disassembled(asm["cubin"])
        spill = _number(r"\bSTACK:(\d+)", text) + _number(r"\bLOCAL:(\d+)", text)
        registers = _number(r"\bREG:(\d+)", text)
    else:
        text = asm["amdgcn"]
        spilled = 4 * _number(r"\.vgpr_spill_count: *(\d+)", text)
        spill = max(spilled, _number(r"\.private_segment_fixed_size: *(\d+)", text))
        registers = _number(r"\.vgpr_count: *(\d+)", text)
    dot = re.search(r"tt\.dot\b[^\n]*: tensor<[\dx]+x(?:bf16|f16)\b", asm["ttir"]) is not None
    return Resources(name, registers, spill, shared, dot, count_instructions(text))


def count_instructions(text: str) -> dict[str, int]:
    """How often each class of INSTRUCTIONS occurs in `text`, without those that do not."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in what the tools say"
    return int(found[1])


@cache  # launches at several sizes share kernels
def _disassembled(cubin: bytes) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
