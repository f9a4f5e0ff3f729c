"""How long a call takes, how much memory it wants, and what the device itself attains."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS, AT_LEAST, AT_MOST = 3, 10, 2000
# Written between two repetitions: more than any second-level cache, and it gives the host a lead over the device.
SCRUB_BYTES = 2**28
COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class Times:
    """Milliseconds: percentiles over the repetitions."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Rates:
    """What the device attains: bytes read and written per second by a copy, and bfloat16 products on random data."""

    copy: float
    matmul: float


def measure(call: Callable[[], Any], device: torch.device, seconds: float) -> Times:
    """Repeat `call` for about `seconds` after warming up. On a GPU the time is the device's, with a cold cache."""
    once = _cuda_times if device.type == "cuda" else _cpu_times
    estimate = statistics.median(once(call, device, WARM_UPS)) / 1000
    count = min(max(int(seconds / max(estimate, 1e-9)), AT_LEAST), AT_MOST)
    cuts = statistics.quantiles(once(call, device, count), n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7])


def _cuda_times(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    scrub = torch.empty(SCRUB_BYTES, dtype=torch.int8, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    call()
    for start, end in zip(starts, ends, strict=True):
        scrub.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _cpu_times(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that `call` holds at once beyond what is there before it, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rates(device: torch.device, seconds: float) -> Rates:
    """Measure them on `device`."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, seconds)
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = measure(lambda: a @ b, device, seconds)
    return Rates(copy=2 * COPY_BYTES[device.type] / copy.p50 * 1000, matmul=2 * size**3 / matmul.p50 * 1000)
