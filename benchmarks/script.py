"""What the benchmark programs share: the operations there are, work in processes, and how a mistake is told."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import tyro

from bylaw.benchmarks import operations

USAGE_ERROR = 2


def modules(names: Sequence[str] = ()) -> dict[str, ModuleType]:
    """The modules of benchmarks/operations by name: those of `names`, or all of them.

    Raises ValueError for a name that is not there.
    """
    known = sorted(info.name for info in pkgutil.iter_modules(operations.__path__))
    for name in names:
        if name not in known:
            raise ValueError(f"no such operation: {name!r}; allowed: {', '.join(known)}")
    return {name: importlib.import_module(f"{operations.__name__}.{name}") for name in names or known}


@contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Any]]:
    """A `map` over so many processes; over this one for a single job."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool.map


def script(main: Callable[[Any], int], config: type, description: str | None) -> None:
    """Read the flags into `config`, run, and exit with what `main` returns. A mistake is one line and exit code 2."""
    try:
        sys.exit(main(tyro.cli(config, description=description)))
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
