"""What the processes of a torchrun program say once: the same mistake found by all of them is one line, not many."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # the command line's help comes without torch
    from bylaw.model.parallel import Parallel

Value = TypeVar("Value")
USAGE_ERROR = 2


def by_first(parallel: "Parallel", work: Callable[[], Value]) -> Value:
    """What `work` gives on the first rank, on all of them. Every rank calls it at the same point.

    A ValueError or OSError is raised on the first rank; the others leave with exit code 2.
    """
    if parallel.alone:
        return work()
    told, error = None, None
    if parallel.first:
        try:
            told = (work(),)
        except (ValueError, OSError) as refused:
            error = refused
    told = parallel.tell(told)
    if told is not None:
        return told[0]
    parallel.meet()  # none is gone while another still listens
    if error is not None:
        raise error
    sys.exit(USAGE_ERROR)


@contextmanager
def once_a_machine() -> Iterator[None]:
    """What every process of a machine finds wrong before they are joined is said by the first of them; the others leave
    with exit code 2.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (ValueError, OSError):
        sys.exit(USAGE_ERROR)
