"""`bylaw kernels`: which implementation of each operation runs on a device, and why."""

import torch
import triton

from bylaw.kernels.attention_library import library
from bylaw.kernels.backend import INTERPRETED, OPERATIONS
from bylaw.kernels.launch import architecture, settings_name

HEAD_DIM = 128  # of most large models; a library may serve some head sizes and not others


def explain(device: torch.device) -> str:
    """A line on the device, and one for each operation: what runs and because of what."""
    width = max(map(len, OPERATIONS))
    lines = [f"{operation:<{width}}  {' because '.join(_choice(operation, device))}" for operation in OPERATIONS]
    return "\n".join([_device(device), "", *lines, "", _hint()])


def _device(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device.type == "cpu":
        return f"CPU, {versions}"
    return f"{torch.cuda.get_device_name(device)} ({architecture(device)}), {versions}"


def _choice(operation: str, device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "reference", "tensors on a CPU take plain torch"
    if operation == "attention":
        found, why = library(device, torch.bfloat16, HEAD_DIM)
        if found is not None:
            return f"library ({found.name})", why
        return "triton", f"{why}; {_settings(operation, device)}"
    return "triton", f"this is a GPU; {_settings(operation, device)}"


def _settings(operation: str, device: torch.device) -> str:
    here, taken = architecture(device), settings_name(operation, device)
    if taken == here:
        return f"launch settings of {here}"
    return f"no launch settings of its own for {here}, it takes those of {taken}"


def _hint() -> str:
    forced = "backend='reference' or 'triton' (attention also 'library') as an argument forces one."
    return f"{forced} Triton's interpreter is on: kernels run on CPU tensors too, slowly." if INTERPRETED else forced
