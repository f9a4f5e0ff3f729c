"""How fast each operation is, as a percentage of what its device could do, and how exact.

    python benchmarks/kernels.py [--op NAME ...] [--device cuda|cpu] [--peers] [--out FILE.jsonl] [--plot FILE.png]

First the device's own rates: a copy, and a bfloat16 matrix product. Then every case of benchmarks/operations: a result
whose error against float64 is more than twice that of torch in the same dtype is reported and not timed, and the exit
status is 1. Times are of the device, from a cold cache, on random data. The floor is the longer of the bytes over the
copy rate and the products over the product rate. On a CPU the references run at small shapes, to test the harness.

On a GPU, everything that a result file wants is

    pytest && python benchmarks/kernels.py --peers --out benchmarks/results/NAME.jsonl
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch._functorch import config as functorch

from bylaw.benchmarks.case import Case, Floor
from bylaw.benchmarks.gate import (
    Call,
    Errors,
    as_tuple,
    check,
    described,
    differentiate,
    dtypes,
    ready,
    weights_of,
    worst,
)
from bylaw.benchmarks.script import modules, script
from bylaw.benchmarks.timing import Rates, measure, peak_bytes, rates

DTYPE = torch.bfloat16  # what the floors count bytes in
PACKAGES = ("torch", "triton", "flash-attn", "liger-kernel")
DRIVER_QUERY = ("--query-gpu=driver_version", "--format=csv,noheader")
COLUMNS = ("p20 ms", "p50 ms", "p80 ms", "floor ms")
HEADER = f"{'operation':<26}{'shape':<44}{'implementation':<28}{'pass':<10}" + (
    "".join(f"{column:>10}" for column in COLUMNS) + f"{'% floor':>8}{'peak MiB':>10}{'error':>10}{'ratio':>7}"
)
Record = dict[str, Any]
Pass = tuple[Callable[[], Any], list[Floor]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and where the records go."""

    op: tuple[str, ...] = ()
    """Operations; all, when none is named."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where."""
    peers: bool = False
    """Measure other implementations too, where they are installed."""
    out: Path = Path("runs/kernels.jsonl")
    """Records are appended here."""
    plot: Path | None = None
    """Draw all records of the file here (needs matplotlib)."""
    seconds: float = 0.5
    """How long each measurement lasts, about."""


@dataclass(frozen=True)
class Bench:
    """Where, against what and how long a run measures."""

    device: torch.device
    attained: Rates
    seconds: float
    peers: bool

    @property
    def ours(self) -> str:
        return "triton" if self.device.type == "cuda" else "reference"


def main(config: Config) -> int:
    """Measure, print and append. Returns the exit status: 1 if one of our results is wrong."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds none; allowed: cpu")
    operations = modules(config.op).values()
    plot = plotter() if config.plot else None
    device = torch.device(config.device)
    bench = Bench(device, rates(device, config.seconds), config.seconds, config.peers)
    origin = {"device": device_name(device), "versions": versions(device), "commit": commit()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    # torch.compile would let a backward pass overwrite what it saved, and so run only once.
    with config.out.open("a") as file, functorch.patch(donated_buffer=False):
        for record in itertools.chain([started(bench)], *(run(module, bench) for module in operations)):
            print(as_line(record), flush=True)
            file.write(json.dumps(record | origin) + "\n")
            wrong += "failed" in record and record["implementation"] == bench.ours
    if plot and config.plot:
        plot(config.out, config.plot)
    return 1 if wrong else 0


def started(bench: Bench) -> Record:
    """The first record of a run: when it began, and what the device attains."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": now, "copy_bytes_per_second": bench.attained.copy, "flops_per_second": bench.attained.matmul}


def run(module: ModuleType, bench: Bench) -> Iterator[Record]:
    """All records of one operation. What fails, in whatever way, is a record too, and the run goes on."""
    small = list(module.cases(small=True))
    for case in small if bench.device.type == "cpu" else module.cases(small=False):
        if bench.peers:
            torch.compiler.reset()  # or from the second shape on, a compiled peer would be one for all shapes
        calls = implementations(case, bench)
        about: Record = {"operation": case.operation, "shape": dict(case.shape)}
        try:
            found, about["checked_at"] = check_where_it_fits(case, small, bench)
        except Exception as error:
            found = dict.fromkeys(calls, described(error))
        for name, call in calls.items():
            one = about | {"implementation": name}
            try:
                figures = exactness(found.get(name), must_be_good=name == bench.ours)
                yield from timed(case, call, bench, one | figures)
            except Exception as error:
                yield one | {"failed": described(error)}
            torch.cuda.empty_cache()


def implementations(case: Case, bench: Bench) -> dict[str, Call]:
    """Ours, and the peers if they are wanted."""
    return {bench.ours: partial(case.ours, backend=bench.ours), **(case.peers if bench.peers else {})}


def check_where_it_fits(
    case: Case, small: Sequence[Case], bench: Bench
) -> tuple[dict[str, Errors | str], list[dict[str, int]]]:
    """The errors of the implementations of `case`, and the shapes where they were found.

    That is the case's own `check`, or itself, or where the device has no memory for float64, the `small` cases.
    """

    def checked(one: Case) -> dict[str, Errors | str]:
        return check(one, implementations(one, bench), bench.device, DTYPE)

    at = case.check or case
    try:
        return checked(at), [dict(at.shape)]
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # only now, when no traceback holds tensors any more
    alike = [one for one in small if one.operation == case.operation]
    every = [checked(one) for one in alike]
    names = {name for found in every for name in found}
    return {name: worst([f[name] for f in every if name in f]) for name in names}, [dict(one.shape) for one in alike]


def exactness(errors: Errors | str | None, must_be_good: bool) -> Record:
    """The columns on errors; of a peer that could not be checked, None.

    Raises RuntimeError for a result that is not to be timed: it failed, or it is ours and wrong.
    """
    if isinstance(errors, str):
        raise RuntimeError(errors)
    if errors is None:
        assert not must_be_good, "what is ours is always checked"
        return dict.fromkeys(("error", "torch_error", "error_ratio", "difference_from_torch"))
    if must_be_good and not errors.as_good:
        against = f"torch's in the same dtype is {errors.torch_error:.3g}"
        raise RuntimeError(f"error {errors.error:.3g} against float64; {against}")
    return {
        "error": errors.error,
        "torch_error": errors.torch_error,
        "error_ratio": errors.ratio,
        "difference_from_torch": errors.difference,
    }


def timed(case: Case, call: Call, bench: Bench, about: Record) -> Iterator[Record]:
    """A record for each pass of one implementation."""
    torch.manual_seed(0)
    inputs = case.inputs(bench.device, DTYPE)
    about["dtype"] = "+".join(dtypes(inputs))
    for name, (one, floors) in passes(case, call, inputs).items():
        times = measure(one, bench.device, bench.seconds)
        floor_ms, kind = floor(floors, bench.attained)
        yield about | {
            "pass": name,
            "ms": asdict(times),
            "floor_ms": floor_ms,
            "floor_kind": kind,
            "percent_of_floor": 100 * floor_ms / times.p50,
            "peak_bytes": peak_bytes(one, bench.device),
            "result_bytes": sum(tensor.numel() * tensor.element_size() for tensor in as_tuple(one())),
        }


def passes(case: Case, call: Call, inputs: Mapping[str, Any]) -> dict[str, Pass]:
    """What is timed, with its floors: forward; backward, where it has work of its own; and the two in one."""
    leaves = ready(inputs, case.differentiable)
    forward = partial(call, **leaves)
    if not case.differentiable:
        return {"forward": (torch.no_grad()(forward), [case.forward])}
    outputs = as_tuple(forward())
    weights, wanted = weights_of(outputs), [leaves[name] for name in case.differentiable]

    def gradients() -> Any:
        return differentiate(outputs, weights, wanted)

    def both() -> Any:
        return differentiate(as_tuple(forward()), weights, wanted)

    found: dict[str, Pass] = {"forward": (forward, [case.forward])}
    if case.backward:
        found["backward"] = gradients, [case.backward]
    return found | {"both": (both, [case.forward, *([case.backward] if case.backward else [])])}


def floor(floors: Sequence[Floor], attained: Rates) -> tuple[float, str]:
    """Milliseconds that the device needs at least for one after the other, and which takes most: "bytes" or "flops"."""
    each = [{"bytes": one.bytes / attained.copy, "flops": one.flops / attained.matmul} for one in floors]
    longest = max(each, key=lambda parts: max(parts.values()))
    return 1000 * sum(max(parts.values()) for parts in each), max(longest, key=lambda kind: longest[kind])


def as_line(record: Record) -> str:
    """A record as a line of the printed table."""
    if "started" in record:
        copy, products = record["copy_bytes_per_second"] / 1e9, record["flops_per_second"] / 1e12
        return f"the device copies {copy:.1f} GB/s and multiplies {products:.3f} TFLOP/s in bfloat16\n{HEADER}"
    shape = " ".join(f"{name}={size}" for name, size in record["shape"].items())
    start = f"{record['operation']:<26}{shape:<44}{record['implementation']:<28}"
    if "failed" in record:
        return f"{start}FAILED {record['failed']}"
    ms, peak = record["ms"], record["peak_bytes"]
    memory = "-" if peak is None else f"{peak / 2**20:.0f}"
    times = f"{ms['p20']:>10.4f}{ms['p50']:>10.4f}{ms['p80']:>10.4f}{record['floor_ms']:>10.4f}"
    errors = "" if record["error"] is None else f"{record['error']:>10.1e}{record['error_ratio']:>7.2f}"
    return f"{start}{record['pass']:<10}{times}{record['percent_of_floor']:>8.1f}{memory:>10}{errors}"


def plotter() -> Callable[[Path, Path], None]:
    """The function that draws. Raises ValueError where matplotlib is missing: before the work, not after it."""
    try:
        from bylaw.benchmarks.plot import plot
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib ({error}): pip install 'bylaw[report]', or leave it out") from error
    return plot


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions(device: torch.device) -> dict[str, str]:
    """Of whatever the times depend on: Python, packages, the driver."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device.type == "cuda":
        found |= {
            "cuda": str(torch.version.cuda or torch.version.hip),
            "driver": _output(["nvidia-smi", *DRIVER_QUERY]),
        }
    return found


def commit() -> str:
    """The commit of this checkout, with "-dirty" behind it where files differ from it; "" outside of one."""
    return _output(
        ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty"]
    )


def _output(command: Sequence[str]) -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


if __name__ == "__main__":
    # Python has put this folder first on its path: a peer that imports the package `kernels` would find this file.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    script(main, Config, __doc__)
