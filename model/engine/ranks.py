"""Work shared among the processes of a torchrun program, so that none of them idles long."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import count as counted
from itertools import repeat, takewhile
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class Ranks:
    """The ranks of this program, taking work from one counter; a program of one process does it all by itself.

    Each rank makes it at the same point, and calls the same methods in the same order. Which rank does which work
    depends on their speed: results must not depend on it, as samples do not.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        """`timeout`: how long the first rank at a `gather` waits for the last."""
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self.timeout = timeout
        # Of its own, since NCCL has no barrier that names who is missing, and moves objects through GPU memory.
        self._group: Any = None if alone else dist.new_group(backend="gloo", timeout=timeout)
        self._pulls = 0

    def pull(self, count: int, chunk: int) -> Iterator[range]:
        """The parts of range(count), `chunk` at a time, that no other rank has taken. Put the longest work first."""
        if count < 0 or chunk < 1:
            raise ValueError(f"count = {count}, chunk = {chunk}; allowed: 0 and above, 1 and above")
        starts = takewhile(lambda start: start < count, self._starts(chunk))
        return (range(start, min(start + chunk, count)) for start in starts)

    def _starts(self, chunk: int) -> Iterator[int]:
        if self._group is None:
            return counted(0, chunk)
        self._pulls += 1  # a new counter for each call, the same on every rank
        store, key = self._group.get_group_store(), f"pull {self._pulls}"
        return ((store.add(key, 1) - 1) * chunk for _ in repeat(None))

    def gather(self, results: Mapping[int, Result], count: int) -> list[Result]:
        """Every rank's `results` of work 0 to count - 1, in order, on every rank. They travel as pickles.

        Raises RuntimeError when a rank does not come within the timeout (rank 0 names it), and when a result is missing
        or there twice.
        """
        parts: list[Mapping[int, Result]] = [results]
        if self._group is not None:
            dist.monitored_barrier(self._group, self.timeout, wait_all_ranks=True)
            parts *= dist.get_world_size(self._group)
            dist.all_gather_object(parts, dict(results), group=self._group)
        merged = {index: result for part in parts for index, result in part.items()}
        missing = [index for index in range(count) if index not in merged]
        total = sum(map(len, parts))
        if missing or total != count:
            raise RuntimeError(f"{total} results for {count} pieces of work, of which {missing[:10]} have none")
        return [merged[index] for index in range(count)]
