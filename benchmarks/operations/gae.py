"""Generalised advantage estimation over packed episodes, as many and as long as PPO's are."""

from collections.abc import Iterator
from typing import Any

import torch

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import gae as module
from bylaw.kernels.gae import gae, reference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness. Episodes are of all lengths up to S."""
    for episodes, longest in [(4, 12)] if small else [(64, 512), (512, 1024), (512, 4096)]:
        lengths = torch.randint(1, longest + 1, (episodes,), generator=torch.Generator().manual_seed(0))
        tokens = int(lengths.sum())
        yield Case(
            operation="gae",
            shape={"B": episodes, "S": longest, "T": tokens},
            inputs=lambda device, dtype, lengths=lengths: _inputs(lengths, device),
            ours=gae,
            forward=Floor(bytes=16 * tokens),
            peers={"torch": reference},
        )


def launches() -> Iterator[Launch]:
    def run() -> None:
        column = torch.empty(100000, device="meta")
        module._launch(column, column, torch.empty(513, dtype=torch.int64, device="meta"), 1.0, 0.95)

    yield Launch("float32", run)


def _inputs(lengths: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """In float32 whatever the dtype of the rest: so are rewards and values in training."""
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    rewards, values = torch.randn(2, int(lengths.sum()), device=device)
    return {"rewards": rewards, "values": values, "cu_seqlens": cu_seqlens, "gamma": 1.0, "lam": 0.95}
