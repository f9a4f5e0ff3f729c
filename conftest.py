"""Without a GPU, Triton kernels run under its interpreter. It must be asked for before any kernel is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
