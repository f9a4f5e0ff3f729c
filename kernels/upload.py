"""From the host to a GPU without a wait."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`. The host goes on while a GPU still has work before the copy.

    From pageable memory torch would wait for that work; torch keeps the pinned memory until the copy is done.
    """
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
