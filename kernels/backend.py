"""Which implementation of an operation runs: chosen by device, forced by argument, explained by `bylaw kernels`.

- reference: plain torch, correct in float64; the path on a CPU.
- triton: this project's kernels; the path on a GPU. On a CPU they run under Triton's interpreter, for tests.
- library: another package's kernel, where one is better and installed (attention only).
"""

import os

import torch
from torch import Tensor

OPERATIONS = (
    "linear_loss",
    "linear_logprob",
    "attention",
    "paged_attention",
    "kv_write",
    "shared_prefix_attention",
    "sample",
    "logprob_entropy",
    "rms_norm",
    "rope",
    "swiglu",
    "gae",
    "policy_loss",
    "preference_loss",
    "adamw",
    "linear_preference",
)
BACKENDS = ("auto", "reference", "triton", "library")
# Triton reads the variable when a kernel is decorated, so a change after import would do nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(operation: str, backend: str, tensor: Tensor, library: bool = False) -> str:
    """The backend that runs `operation` on tensors like `tensor`: never "auto". `library`: one is there and fits.

    Raises ValueError for a backend that is unknown, or cannot run there.
    """
    if backend == "auto":
        if tensor.device.type != "cuda":
            return "reference"
        return "library" if library else "triton"
    if backend == "reference" or (backend == "library" and library):
        return backend
    if backend == "triton" and (tensor.device.type in ("cuda", "meta") or INTERPRETED):
        return backend
    raise ValueError(_refusal(operation, backend, tensor, library))


def _refusal(operation: str, backend: str, tensor: Tensor, library: bool) -> str:
    if backend not in BACKENDS:
        return f"{operation}: backend = {backend!r}; allowed: {', '.join(BACKENDS)}"
    if backend == "library":
        return f"{operation}: backend = 'library', but no library that serves this call is installed; allowed: " + (
            ", ".join(name for name in BACKENDS if name != "library")
        )
    return (
        f"{operation}: backend = 'triton' on a tensor on {tensor.device}; allowed: on a GPU, or on a CPU with "
        "TRITON_INTERPRET=1 set before bylaw is imported (slow: for tests)"
    )


def inference_only(operation: str, *tensors: Tensor) -> None:
    """Refuse tensors that want a gradient: without this, one through an operation in place would be wrong in silence.

    Raises ValueError.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{operation}: an input requires grad, but the operation has no gradient; allowed: under torch.no_grad(), "
            "or tensors detached from the graph"
        )
