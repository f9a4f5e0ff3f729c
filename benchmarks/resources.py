"""What each operation's kernels take on GPUs that need not be there: registers, spills, shared memory, instructions.

    python benchmarks/resources.py [--op NAME ...] [--arch sm_90 ...] [--check] [--write] [--quick]

Compiles the production launches of benchmarks/operations for sm_80, sm_90, sm_100, gfx942, and for sm_89, which stands
for every card that takes the rows "small" of the configurations. --check fails, with a list, on:

- a spill on sm_90 or sm_100, shared memory over the device's limit, a 16-bit product that misses the tensor cores;
- more registers, spills or shared memory than the table benchmarks/resources.json says, an instruction class that is
  gone, and a kernel that is not in the table, or only there.

The table is of one version of Triton. With another, the first line alone is checked. After a change on purpose,
--write makes the table anew.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from bylaw.benchmarks.fake_gpu import INSTRUCTIONS, TARGETS, Resources, compile_launch, require_compiler
from bylaw.benchmarks.gate import described
from bylaw.benchmarks.script import modules, script, workers

TABLE = Path(__file__).parent / "resources.json"
# Bytes of shared memory a program may have. On sm_89 there is more, but the rows "small" serve smaller cards too.
SHARED = {"sm_80": 166_912, "sm_89": 65_536, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
NEVER_SPILL = ("sm_90", "sm_100")
QUICK = ("sm_90",)
AMOUNTS = ("registers", "spill", "shared")
Row = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which kernels to compile, and what to do with their figures."""

    op: tuple[str, ...] = ()
    """Operations; all, when none is named."""
    arch: tuple[str, ...] = ()
    """Architectures; all, when none is named."""
    check: bool = False
    """Exit with 1 if a rule is broken or a figure grew."""
    write: bool = False
    """Write the figures into the table."""
    quick: bool = False
    """Only sm_90, unless --arch names others: what CI runs."""
    jobs: int = len(os.sched_getaffinity(0))
    """Compilers that run at once."""


@dataclass(frozen=True)
class Task:
    """One launch of one operation for one architecture."""

    operation: str
    launch: str
    architecture: str
    tensor_cores: bool

    def key(self, kernel: str) -> str:
        return f"{self.operation} | {self.launch} | {kernel} | {self.architecture}"


def main(config: Config) -> int:
    """Compile, print, and do what the flags say. Returns the exit status."""
    require_compiler()
    operations, architectures = tuple(modules(config.op)), chosen_architectures(config)
    table = read_table()
    known = table["versions"] == versions()
    if config.write and not known and (config.op or set(architectures) != set(TARGETS)):
        raise ValueError(f"the table is of {table['versions']}, this is {versions()}: --write all of it, not a part")
    rows, complaints = compile_all(tasks(operations, architectures), config.jobs)
    before = {key: row for key, row in table["kernels"].items() if _covered(key, operations, architectures)}
    if config.write:
        others = {key: row for key, row in table["kernels"].items() if key not in before}
        TABLE.write_text(as_text(others | rows))
    elif known:
        complaints += changes(rows, before)
    else:
        print(f"growth was not compared: the table is of {table['versions']}, this is {versions()}")
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints and config.check else 0


def chosen_architectures(config: Config) -> tuple[str, ...]:
    """Those that the flags name. Raises ValueError for one that is unknown."""
    for name in config.arch:
        if name not in TARGETS:
            raise ValueError(f"no such architecture: {name!r}; allowed: {', '.join(TARGETS)}")
    return config.arch or (QUICK if config.quick else tuple(TARGETS))


def tasks(operations: Sequence[str], architectures: Sequence[str]) -> list[Task]:
    """Every launch of the operations, for every architecture. Raises ValueError where two launches share a name."""
    found = [
        Task(operation, launch.name, architecture, launch.tensor_cores)
        for operation, module in modules(operations).items()
        for launch in module.launches()
        for architecture in architectures
    ]
    if len(set(found)) < len(found):
        raise ValueError(f"two launches have one name: {[task.key('') for task in found if found.count(task) > 1]}")
    return found


def compile_all(todo: Sequence[Task], jobs: int) -> tuple[dict[str, Row], list[str]]:
    """The figures of every kernel, printed as they come, and the rules that they break."""
    rows: dict[str, Row] = {}
    complaints: list[str] = []
    with workers(jobs) as each:
        for task, kernels in zip(todo, each(compile_task, todo), strict=True):
            complaints += broken_rules(task, kernels)
            for kernel in kernels if not isinstance(kernels, str) else ():
                key = task.key(kernel.kernel)
                rows[key] = as_row(kernel)
                print(f"{key:<80}", *(f"{name} {amount:<6}" for name, amount in rows[key].items()), flush=True)
    return rows, complaints


def compile_task(task: Task) -> list[Resources] | str:
    """The kernels of one launch, or why it does not compile."""
    (module,) = modules([task.operation]).values()
    (launch,) = (launch for launch in module.launches() if launch.name == task.launch)
    try:
        return compile_launch(launch, task.architecture)
    except Exception as error:  # whatever the compiler raises: one launch's failure is a line of the report
        return described(error)


def broken_rules(task: Task, kernels: list[Resources] | str) -> list[str]:
    """What no table excuses: a failure to compile, spills, too much shared memory, products off the tensor cores."""
    if isinstance(kernels, str):
        return [f"{task.key('(all)')}: does not compile: {kernels}"]
    broken = []
    for kernel in kernels:
        key, limit = task.key(kernel.kernel), SHARED[task.architecture]
        if kernel.spill and task.architecture in NEVER_SPILL:
            broken.append(f"{key}: spills {kernel.spill} bytes a thread")
        if kernel.shared > limit:
            broken.append(f"{key}: {kernel.shared} bytes of shared memory; there are {limit}")
        if task.tensor_cores and kernel.dot and not kernel.on_tensor_cores():
            broken.append(f"{key}: its 16-bit products miss the tensor cores")
    if task.tensor_cores and not any(kernel.dot for kernel in kernels):
        broken.append(f"{task.key('(all)')}: should use the tensor cores, but has no 16-bit product")
    return broken


def changes(rows: Mapping[str, Row], committed: Mapping[str, Row]) -> list[str]:
    """What grew, what is gone, and what only one of the two tables holds."""
    found = [f"{key}: not in the table; --write it" for key in rows if key not in committed]
    found += [f"{key}: only in the table; --write it anew" for key in committed if key not in rows]
    for key in rows.keys() & committed.keys():
        now, before = rows[key], committed[key]
        found += [f"{key}: {name} {before[name]} -> {now[name]}" for name in AMOUNTS if now[name] > before[name]]
        found += [
            f"{key}: no {name} any more" for name in INSTRUCTIONS if name in before.keys() - now.keys() - {"local"}
        ]
    return sorted(found)


def as_row(kernel: Resources) -> Row:
    return {"registers": kernel.registers, "spill": kernel.spill, "shared": kernel.shared, **kernel.instructions}


def versions() -> dict[str, str]:
    """What the figures depend on besides the source."""
    tools = knobs.nvidia
    return {"triton": triton.__version__, "ptxas": f"{tools.ptxas.version}, {tools.ptxas_blackwell.version}"}


def read_table() -> dict[str, Any]:
    """The committed table, or an empty one where there is none yet."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"versions": versions(), "kernels": {}}


def as_text(rows: Mapping[str, Row]) -> str:
    """The table as JSON, a line for each kernel, so that a change shows as one line."""
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    return f'{{\n  "versions": {json.dumps(versions())},\n  "kernels": {{\n{lines}\n  }}\n}}\n'


def _covered(key: str, operations: Sequence[str], architectures: Sequence[str]) -> bool:
    operation, *_, architecture = key.split(" | ")
    return operation in operations and architecture in architectures


if __name__ == "__main__":
    script(main, Config, __doc__)
