"""Attention of other packages, where one is installed and serves both passes: what `attention` takes on a GPU.

flash-attn is asked for its deterministic backward pass. torch's is deterministic only under
torch.use_deterministic_algorithms(True). Which device a library serves is taken from its sources (flash-attn of August
2026, torch 2.13); no adapter below has been run on a GPU by us yet.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Call = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Library:
    """Another package's attention, whether or not it is there."""

    name: str
    modules: Sequence[str]  # where its function may be; the first that is there is taken
    function: str
    serves: Callable[[int, int], bool]  # by the major compute capability and the head size
    what: str  # `serves`, in words
    adapt: Callable[[Function], Call | str]  # or why it cannot be


@torch.compiler.assume_constant_result
def library(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Library | None, str]:
    """The library for such tensors, or None; and why, as part of a sentence that `bylaw kernels` prints."""
    if device.type != "cuda":
        return None, "libraries run on CUDA devices only"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"no library takes {dtype}"
    if torch.version.hip is not None:
        return None, "no library was tried on AMD"
    major, reasons = torch.cuda.get_device_capability(device)[0], []
    for candidate in LIBRARIES:
        call = load(candidate) if candidate.serves(major, head_dim) else f"serves {candidate.what}"
        if not isinstance(call, str):
            return candidate, "; ".join([*reasons, f"{candidate.name} is there and serves both passes"])
        reasons.append(f"{candidate.name} {call}")
    return None, "; ".join(reasons)


@torch.compiler.allow_in_graph
def call(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int) -> Tensor:
    """`attention` by the library called `name`, one that `library` gave."""
    (chosen,) = (candidate for candidate in LIBRARIES if candidate.name == name)
    run = load(chosen)
    assert not isinstance(run, str), f"{name} {run}"
    return run(q, k, v, cu_seqlens, max_seqlen, window)


@cache
def load(candidate: Library) -> Call | str:
    """A library's attention, or why there is none: the rest of a sentence that begins with its name."""
    faults = []
    for name in candidate.modules:
        try:
            return candidate.adapt(getattr(importlib.import_module(name), candidate.function))
        except ModuleNotFoundError:
            continue
        except Exception as error:  # there but broken, in whatever way: built for another torch, without its function
            faults.append(f"{name}: {' '.join(str(error).split())}")
    return f"cannot be imported ({'; '.join(faults)})" if faults else "is not installed"


def _flash(function: Function, unbounded: int | None) -> Call | str:
    """The form that flash-attn's versions share; `unbounded` stands for no window in this one."""
    if not {"window_size", "deterministic"} <= inspect.signature(function).parameters.keys():
        return "is too old: it has no windows, or no deterministic backward pass"

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int) -> Tensor:
        out = function(
            q, k, v,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            causal=True, window_size=(window - 1, 0) if window else (unbounded, unbounded), deterministic=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp

    return run


def _torch_varlen(function: Function) -> Call | str:
    if not torch.backends.cuda.is_flash_attention_available():
        return "is not in this build of torch"
    if not {"window_size", "enable_gqa"} <= inspect.signature(function).parameters.keys():
        return "is too old: it has no windows, or no grouped queries"

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int) -> Tensor:
        # A right side of 0 is what makes it causal.
        return function(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            window_size=(window - 1 if window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return run


def _flash_4_serves(major: int, size: int) -> bool:
    """Both passes; there is no deterministic one for consumer Blackwell (12)."""
    hopper, blackwell = major == 9 and size <= 256, major in (10, 11) and (size <= 128 or size == 256)
    return size % 8 == 0 and (hopper or blackwell)


LIBRARIES = (
    Library(
        name="flash-attn 4",
        modules=("flash_attn.cute",),
        function="flash_attn_varlen_func",
        serves=_flash_4_serves,
        what="heads of a multiple of 8, on Hopper to 256 and on Blackwell to 128, or 256",
        adapt=lambda function: _flash(function, None),
    ),
    Library(
        name="flash-attn 3",
        modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        function="flash_attn_varlen_func",
        serves=lambda major, size: major == 9 and size % 8 == 0 and size <= 192,  # no deterministic backward above
        what="heads of a multiple of 8 to 192 on Hopper",
        adapt=lambda function: _flash(function, -1),
    ),
    Library(
        name="flash-attn 2",
        modules=("flash_attn",),
        function="flash_attn_varlen_func",
        serves=lambda major, size: major in (8, 9) and size <= 256,
        what="heads to 256 on Ampere, Ada and Hopper",
        adapt=lambda function: _flash(function, -1),
    ),
    Library(
        name="torch.nn.attention.varlen",
        modules=("torch.nn.attention.varlen",),
        function="varlen_attn",
        serves=lambda major, size: major >= 8 and size % 8 == 0 and size <= 256,
        what="heads of a multiple of 8 to 256 from Ampere on",
        adapt=_torch_varlen,
    ),
)
