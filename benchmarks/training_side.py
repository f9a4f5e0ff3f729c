"""One side of a comparison in a process of its own: its peak memory is its own, and no two versions of TRL meet."""

import gc
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bylaw.benchmarks.gate import described
from bylaw.benchmarks.training_config import Kind, Sizes

Told = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a side is to do."""

    kind: Kind
    maker: str
    """The module and the function there that makes the side of a task, "module:function"."""
    folder: Path
    """Where the models are."""
    sizes: Sizes
    threads: int
    way: str = ""
    """One of several ways that a side can go."""
    packages: Path | None = None
    """A folder that comes first where packages are looked for."""


class Run(NamedTuple):
    """One run: `work` is timed; `told` reads off its result what happened, and is not."""

    work: Callable[[], Any]
    told: Callable[[Any], Told]


class Side(NamedTuple):
    """`prepare` makes the run of a repetition, from the first weights; `check` gives figures that must agree."""

    prepare: Callable[[int], Run]
    check: Callable[[Any], Told]


class SideFailed(RuntimeError):
    """A side could not do its part; the message is its error."""


class Process:
    """A side in its process. Use it as a context."""

    def __init__(self, task: Task) -> None:
        context = get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._theirs, task), daemon=True)

    def __enter__(self) -> "Process":
        self._process.start()
        self._theirs.close()  # so that its end is seen here
        try:
            self._answer()
        except SideFailed:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # which ends it
        self._process.join(10)
        self._process.terminate()
        self._process.join()

    def run(self, repeat: int) -> Told:
        """Do it once. What it tells, its seconds by the clock and of the processor, and the most memory so far."""
        return self._ask("run", repeat)

    def check(self, about: Any = None) -> Told:
        return self._ask("check", about)

    def _ask(self, *message: Any) -> Told:
        self._pipe.send(message)
        return self._answer()

    def _answer(self) -> Told:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideFailed(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise SideFailed(answer)
        return answer


def serve(pipe: Connection, task: Task) -> None:
    """What the process does."""
    _silence()
    answer(pipe, task)


def answer(pipe: Connection, task: Task) -> None:
    """Make the side, then answer until the pipe ends. An error is the last answer, as text."""
    if task.packages:
        sys.path.insert(0, str(task.packages))
    try:
        import torch

        torch.set_num_threads(task.threads)
        module, name = task.maker.split(":")
        side: Side = getattr(importlib.import_module(module), name)(task)
        pipe.send({})
        while True:
            verb, about = pipe.recv()
            pipe.send(side.check(about) if verb == "check" else _run(side, about))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(described(error))


def _run(side: Side, repeat: int) -> Told:
    run = side.prepare(repeat)
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    done = run.work()
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return run.told(done) | took | {"peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process ever held. Not ru_maxrss: that keeps the peak of the process it came from."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _silence() -> None:
    """Trainers print and warn; what matters comes through the pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
