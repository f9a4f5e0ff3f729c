"""Where a process stands in a torchrun program: data ranks share out each batch, tensor ranks each matrix.

One process alone is `ALONE`. Ranks of one tensor group do the same work on the same data, in step.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")
DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True)
class Parallel:
    """The place of this process, and its ways to the others. Every rank calls the same methods in the same order."""

    data_rank: int = 0
    data_ranks: int = 1
    tensor_rank: int = 0
    tensor_ranks: int = 1
    mesh: Any = None  # DeviceMesh of (DATA, TENSOR); None in a program of one process that torchrun did not start
    control: Any = None  # gloo: NCCL has no barrier that names who is missing
    background: Any = None  # gloo, for checkpoints that are written while training goes on
    timeout: timedelta = timedelta(minutes=30)
    shares: bool = True  # whether data ranks share out the parameters; of a model that is only sampled from they do not

    @property
    def alone(self) -> bool:
        return self.mesh is None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.data_rank == self.tensor_rank == 0

    def meet(self) -> None:
        """Wait for all ranks. Raises RuntimeError naming those that do not come within the timeout."""
        if not self.alone:
            dist.monitored_barrier(self.control, self.timeout, wait_all_ranks=True)

    def add(self, tensor: Tensor, axis: str = DATA) -> Tensor:
        """The sum of `tensor` over the ranks of `axis`, in place."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.mesh.get_group(axis))
        return tensor

    def merge(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of the same names on all data ranks: their sums, or maxima of those whose names end in `_max`."""
        if self.alone or self.data_ranks == 1:
            return dict(stats)
        group, merged = self.mesh.get_group(DATA), dict(stats)
        for join, ends in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
            names = sorted(name for name in stats if name.endswith("_max") == ends)
            if names:
                values = torch.stack([stats[name].detach().double() for name in names])
                dist.all_reduce(values, join, group=group)
                merged |= dict(zip(names, values.unbind(), strict=True))
        return merged

    def gather(self, part: Part) -> list[Part]:
        """Each data rank's `part`, in order. They travel as pickles."""
        if self.alone or self.data_ranks == 1:
            return [part]
        parts: list[Any] = [None] * self.data_ranks
        dist.all_gather_object(parts, part, group=self.mesh.get_group(DATA))
        return parts

    def tell(self, value: Part) -> Part:
        """What the first rank gives as `value`, on all ranks."""
        if self.alone:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.control)
        return told[0]


ALONE = Parallel()


@contextmanager
def parallel_program(
    device: str, tensor_ranks: int = 1, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Parallel]:
    """This process's place in the program that torchrun started; ALONE where it started none.

    `device` is "cpu" or "cuda"; each process of a machine takes the GPU of its LOCAL_RANK. Raises ValueError where
    `tensor_ranks` does not divide the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor_ranks < 1 or world % tensor_ranks:
        raise ValueError(f"tensor_parallel = {tensor_ranks} with {world} processes; allowed: a divisor of their number")
    if "TORCHELASTIC_RUN_ID" not in os.environ and world == 1:
        yield ALONE
        return
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout)
    try:
        mesh = init_device_mesh(kind, (world // tensor_ranks, tensor_ranks), mesh_dim_names=(DATA, TENSOR))
        for axis in (DATA, TENSOR):  # a mesh gives its groups torch's own timeout
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(axis))
        control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        yield Parallel(
            data_rank=mesh.get_local_rank(DATA),
            data_ranks=world // tensor_ranks,
            tensor_rank=mesh.get_local_rank(TENSOR),
            tensor_ranks=tensor_ranks,
            mesh=mesh,
            control=control,
            background=background,
            timeout=timeout,
        )
    except BaseException:
        if kind != "cuda":  # NCCL would wait for ranks that wait for this one; torchrun ends them when this one exits
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Items 0..n-1 shared out so that the ranks have like numbers of tokens; each share in the items' order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += lengths[item]
    return [sorted(share) for share in shares]
