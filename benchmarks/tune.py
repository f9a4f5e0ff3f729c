"""Remake an operation's launch settings in kernels/configs for the GPU at hand.

    python benchmarks/tune.py --op NAME
    python benchmarks/tune.py --op NAME --dry-run [--arch sm_90]    without a GPU: print what would be timed

Row by row of the tables that the operation's production launches use: the settings next to it are those with one number
halved or doubled, one stage more or less, or one switch turned (an operation's module in benchmarks/operations may list
its own, by `candidates(table, row)`). Those that do not compile, spill or take too much shared memory are dropped ahead
of time; the rest are checked against float64 and timed on all cases that use the row. The fastest takes its place, and
its neighbours are tried, until none is faster. After it, make the resource table anew: benchmarks/resources.py --write.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from bylaw.benchmarks.case import Case
from bylaw.benchmarks.fake_gpu import compile_launch, pretending, require_compiler
from bylaw.benchmarks.gate import described
from bylaw.benchmarks.kernels import DTYPE, Bench, check_where_it_fits, exactness, implementations, passes
from bylaw.benchmarks.resources import SHARED
from bylaw.benchmarks.script import modules, script, workers
from bylaw.benchmarks.timing import Rates, measure
from bylaw.kernels import launch

CONFIGS = Path(launch.__file__).parent / "configs"
FASTER = 0.99  # of the time before, or a change is noise
MOST = {"num_warps": 16, "num_stages": 5, "STAGES": 5}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to tune."""

    op: str
    """The operation."""
    arch: str = ""
    """Of a dry run: the architecture. Otherwise it is the GPU's."""
    dry_run: bool = False
    """Compile and print the candidates; time and write nothing."""
    rounds: int = 8
    """At most so many steps from the row as it is."""
    seconds: float = 0.2
    """How long each measurement lasts, about."""
    jobs: int = len(os.sched_getaffinity(0))
    """Compilers that run at once."""


@dataclass(frozen=True, order=True)
class Place:
    """A row in a table of kernels/configs, among those of one architecture."""

    table: str
    index: int


@dataclass(frozen=True)
class Trial:
    """Where a candidate is tried ahead of time: the launches of `operation` that take their settings from `place`."""

    operation: str
    architecture: str
    place: Place
    launches: frozenset[str]


def main(config: Config) -> int:
    """Tune every row that is in use, or print the candidates for it. Returns the exit status."""
    require_compiler()
    (module,) = modules([config.op]).values()
    architecture = chosen_architecture(config)
    with workers(config.jobs) as each:
        for place, launches in sorted(places_in_use(module, architecture).items()):
            row = read_table(place.table)[architecture][place.index]
            print(f"{place.table}, {architecture}, row {place.index}: {json.dumps(row)}", flush=True)
            near = partial(candidates, module, place.table)
            usable = partial(drop_bad, each, Trial(config.op, architecture, place, frozenset(launches)))
            if config.dry_run:
                print(*(f"  {json.dumps(one)}" for one in usable(near(row))), sep="\n", flush=True)
            else:
                timer = Timer(module, place, config.seconds)
                if timer.cases:
                    write_row(place, architecture, climb(row, near, usable, timer, config.rounds))
                else:
                    print("  no case of the bench uses it; it stays as it is", flush=True)
    return 0


def chosen_architecture(config: Config) -> str:
    """What is tuned for. Raises ValueError without a GPU, but for a dry run, and for one without rows of its own."""
    known = [name for name in SHARED if name != "sm_89"]  # which takes the rows "small"
    if config.dry_run:
        found = config.arch or "sm_90"
    elif torch.cuda.is_available():
        found = launch.architecture(torch.device("cuda"))
        found = launch.LIKE.get(found, found)
    else:
        raise ValueError("settings are timed on a GPU, and torch finds none; --dry-run prints what would be timed")
    if found not in known or config.arch not in ("", found):
        asked = f" and --arch {config.arch!r}" if config.arch else ""
        raise ValueError(f"tuning for {found!r}{asked}; allowed: {', '.join(known)}, and on a GPU its own")
    return found


@contextmanager
def trying(place: Place | None = None, row: Row | None = None) -> Iterator[set[Place]]:
    """Within, `row` stands at `place`, under the bounds of the row that is there. Gives the places that are used."""
    used: set[Place] = set()
    select = launch.select

    def substituted(operation: str, rows: list[Row], sizes: dict[str, int]) -> Row:
        marked = [{**one, "place": index} for index, one in enumerate(rows)]
        if row is not None and place is not None and place.table == operation:
            marked[place.index] = {**bounds(rows[place.index]), **row, "place": place.index}
        chosen = select(operation, marked, sizes)
        used.add(Place(operation, chosen.pop("place")))
        return chosen

    with patch.object(launch, "select", substituted):
        yield used


def bounds(row: Row) -> Row:
    return {key: value for key, value in row.items() if key == "when"}


def settings(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "when"}


def places_in_use(module: ModuleType, architecture: str) -> dict[Place, set[str]]:
    """The rows that the operation's production launches take, each with the names of those launches."""
    found: dict[Place, set[str]] = {}
    for one in module.launches():
        with pretending(architecture, lambda *args, **kwargs: None), trying() as used:
            one.run()
        for place in used:
            found.setdefault(place, set()).add(one.name)
    return found


def candidates(module: ModuleType, table: str, row: Row) -> list[Row]:
    """Rows to try instead of `row`: the module's own, or those that differ from it in one number."""
    own = getattr(module, "candidates", None)
    return list(own(table, row)) if own else list(neighbours(settings(row)))


def neighbours(row: Row) -> Iterator[Row]:
    """`row` with one number halved or doubled, one stage more or less, or one switch turned; also in its groups."""
    for key in sorted(row):
        value = row[key]
        if isinstance(value, dict):
            steps: list[Any] = list(neighbours(value))
        elif isinstance(value, bool):
            steps = [not value]
        else:
            near = (value - 1, value + 1) if "stages" in key.lower() else (value // 2, value * 2)
            steps = [number for number in near if 0 < number <= MOST.get(key, number)]
        yield from ({**row, key: step} for step in steps)


def drop_bad(each: Callable[..., Any], trial: Trial, rows: Sequence[Row]) -> list[Row]:
    """Those of `rows` that compile, do not spill and fit in shared memory; says why others are left out."""
    kept = []
    for row, fault in zip(rows, each(partial(fault_of, trial), rows), strict=True):
        if fault:
            print(f"  left out {json.dumps(row)}: {fault}", flush=True)
        else:
            kept.append(row)
    return kept


def fault_of(trial: Trial, row: Row) -> str:
    """Why `row` cannot be used, or ""."""
    (module,) = modules([trial.operation]).values()
    for one in module.launches():
        if one.name not in trial.launches:
            continue
        try:
            with trying(trial.place, row):
                kernels = compile_launch(one, trial.architecture)
        except Exception as error:  # whatever the compiler raises
            return f"{one.name} does not compile: {described(error)}"
        for kernel in kernels:
            if kernel.spill or kernel.shared > SHARED[trial.architecture]:
                return f"{one.name} {kernel.kernel}: {kernel.spill} bytes spilled, {kernel.shared} of shared memory"
    return ""


def climb(
    row: Row,
    near: Callable[[Row], list[Row]],
    usable: Callable[[list[Row]], list[Row]],
    time: Callable[[Row], float],
    rounds: int,
) -> Row:
    """The fastest row that steps from `row` to its fastest neighbour lead to; `time` of a wrong one is inf."""
    best = settings(row)
    times, tried = time(best), [best]
    print(f"  {times:.4f} ms {json.dumps(best)}", flush=True)
    for _ in range(rounds):
        fresh = usable([one for one in near(best) if one not in tried])
        tried += fresh
        measured = [(time(one), index) for index, one in enumerate(fresh)]
        fastest, index = min(measured, default=(math.inf, 0))
        if fastest >= FASTER * times:
            break
        best, times = fresh[index], fastest
        print(f"  {times:.4f} ms {json.dumps(best)}", flush=True)
    return best


class Timer:
    """Checks and times a row on a GPU, over all production cases that use its place."""

    def __init__(self, module: ModuleType, place: Place, seconds: float, device: str = "cuda") -> None:
        self._small = list(module.cases(small=True))
        self._place, self._bench = place, Bench(torch.device(device), Rates(1.0, 1.0), seconds, peers=False)
        self.cases = [case for case in module.cases(small=False) if self._uses(case)]

    def _uses(self, case: Case) -> bool:
        call, device = implementations(case, self._bench)[self._bench.ours], self._bench.device
        with trying() as used:
            for one, _ in passes(case, call, case.inputs(device, DTYPE)).values():
                one()
        return self._place in used

    def __call__(self, row: Row) -> float:
        """Geometric mean of the milliseconds of all cases and passes; inf where a result is wrong or a case fails."""
        with trying(self._place, row):
            try:
                return statistics.geometric_mean([ms for case in self.cases for ms in self._times(case)])
            except Exception as error:  # a candidate that fails on the device, in whatever way, is not taken
                print(f"  left out {json.dumps(row)}: {described(error)}", flush=True)
                return math.inf

    def _times(self, case: Case) -> list[float]:
        found, _ = check_where_it_fits(case, self._small, self._bench)
        exactness(found[self._bench.ours], must_be_good=True)
        torch.manual_seed(0)
        call = implementations(case, self._bench)[self._bench.ours]
        timed = passes(case, call, case.inputs(self._bench.device, DTYPE)).values()
        return [measure(one, self._bench.device, self._bench.seconds).p50 for one, _ in timed]


def read_table(name: str) -> dict[str, list[Row]]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def write_row(place: Place, architecture: str, row: Row) -> None:
    """Put `row` into the table on disk, under the bounds that are there."""
    table = read_table(place.table)
    table[architecture][place.index] = {**bounds(table[architecture][place.index]), **row}
    (CONFIGS / f"{place.table}.json").write_text(as_text(table))


def as_text(table: Mapping[str, Sequence[Row]]) -> str:
    """The table as JSON, a line for each row."""
    parts = []
    for name, rows in table.items():
        lines = [json.dumps(row) for row in rows]
        inside = lines[0] if len(lines) == 1 else "\n    " + ",\n    ".join(lines) + "\n  "
        parts.append(f"  {json.dumps(name)}: [{inside}]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    script(main, Config, __doc__)
