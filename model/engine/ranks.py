"""Work shared among the data ranks of a program, so that none of them idles long."""

import uuid
from collections.abc import Iterator
from typing import Any

import torch

from bylaw.model.parallel import ALONE, TENSOR, Parallel


def pull(count: int, parallel: Parallel = ALONE) -> Iterator[int]:
    """Those of 0 to `count` - 1 that no other data rank has taken yet, one by one; alone, all of them.

    Every rank calls it at the same point. Which rank does which work depends on their speed: results must not depend on
    it, as samples do not. Put the longest work first. The ranks of a tensor group get the same, in step.
    """
    if count < 0:
        raise ValueError(f"count = {count} pieces of work; allowed: 0 and above")
    if parallel.alone:
        return iter(range(count))
    return _taken(count, parallel.control.get_group_store(), parallel.tell(f"pull {uuid.uuid4()}"), parallel)


def _taken(count: int, counter: Any, key: str, parallel: Parallel) -> Iterator[int]:
    """The counter `key` goes up by one with each piece that is taken."""
    while True:
        taken = counter.add(key, 1) - 1 if parallel.tensor_rank == 0 else 0
        if parallel.tensor_ranks > 1:
            taken = int(parallel.add(torch.tensor(taken), TENSOR))  # the others add 0: they are told
        if taken >= count:
            return
        yield taken
