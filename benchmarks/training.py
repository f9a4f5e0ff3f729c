"""How fast the trainers are: beside Transformers and TRL on the same weights and data, or alone on a device.

    python benchmarks/training.py --peer trl [--trl-ppo FOLDER] [--workload NAME ...] [--out FILE.jsonl]

runs [sft_padded], [sft_best], [reward], [ppo_separate] and [ppo_shared] on this CPU in float32. Each side has a process
of its own, with its own peak memory, and they take turns. What they compute is compared in the same run; where it
differs, nothing is told of how fast it was, and the exit status is 1. `ratio` is ours over theirs by each side's
best run, above 1 where ours is faster.

The peers: pip install transformers accelerate datasets trl, and for PPO, which TRL has no longer,
pip install --no-deps --target FOLDER trl==1.12.0.

On a GPU, everything that a result file wants is

    python benchmarks/training.py --device cuda --shape qwen2-1.5b --out benchmarks/results/NAME.jsonl
"""

import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bylaw.benchmarks.engine import began_at, opened
from bylaw.benchmarks.gate import described
from bylaw.benchmarks.kernels import commit, device_name, versions
from bylaw.benchmarks.script import script
from bylaw.benchmarks.training_check import Mismatch, agreement
from bylaw.benchmarks.training_config import COMPARED, WAYS, TrainingConfig, ways
from bylaw.benchmarks.training_peer import ppo_version
from bylaw.benchmarks.training_peer import versions as peer_versions
from bylaw.benchmarks.training_side import Process, SideFailed, Task, Told
from bylaw.benchmarks.training_workloads import SHAPES, ordered, write_models

UNITS = {"sft": "tokens", "reward": "pairs", "ppo": "episodes"}
HEADER = (
    f"{'workload':<16}{'unit':<10}{'ours: best':>11}{'median':>9}{'MiB':>7}{'peer: best':>12}{'median':>9}{'MiB':>7}"
    f"{'ratio':>7}  checked; peer's way"
)
Record = dict[str, Any]


def main(config: TrainingConfig) -> int:
    """Check, measure, print and append. Returns the exit status: 1 if anything differs or fails.

    Raises ValueError for a device or a peer that is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds none; allowed: cpu")
    torch.set_num_threads(config.threads)
    about, failed = origin(config), 0
    print(f"{about['model']}, {about['device']}" + (f"\n{HEADER}" if config.peer == "trl" else ""))
    with opened(config.out) if config.out else contextlib.nullcontext() as file:
        for record in compared(config) if config.peer == "trl" else alone(config):
            print(as_line(record), flush=True)
            failed += "failed" in record
            if file:
                file.write(json.dumps(record | about) + "\n")
                file.flush()
    return 1 if failed else 0


def origin(config: TrainingConfig) -> Record:
    """What every record says about where it comes from."""
    device = torch.device(config.device)
    peer = {}
    if config.peer == "trl":
        peer = peer_versions()
        if any(COMPARED[name] == "ppo" for name in config.chosen):
            peer["trl (PPO)"] = ppo_version(config.trl_ppo)
    return {
        "model": config.model,
        "sizes": asdict(config.sizes),
        "threads": config.threads,
        "device": device_name(device),
        "versions": versions(device) | peer,
        "commit": commit(),
        "command": shlex.join(sys.argv),
    }


def compared(config: TrainingConfig) -> Iterator[Record]:
    """Each workload. What fails is a record too, and the run goes on."""
    with tempfile.TemporaryDirectory(prefix="bylaw-bench-") as place:
        write_models(Path(place), config.model, config.sizes)
        for name in config.chosen:
            began, load = time.time(), os.getloadavg()[0]
            try:
                record = measure(config, Path(place), name)
            except (SideFailed, Mismatch) as error:
                record = {"failed": described(error)}
            yield {"workload": name, "date": began_at(began), "load": [load, os.getloadavg()[0]]} | record


def alone(config: TrainingConfig) -> Iterator[Record]:
    """Each workload of ours by itself."""
    from bylaw.benchmarks.training_alone import measure as measure_alone

    for name in config.chosen:
        began = time.time()
        try:
            record = measure_alone(config, name)
        except Exception as error:
            record = {"failed": described(error)}
        yield {"workload": name, "date": began_at(began)} | record


def measure(config: TrainingConfig, place: Path, name: str) -> Record:
    """One workload. Raises Mismatch if the sides do not compute the same."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Process(task(config, place, name, "ours")))
        way, peer, tried = opponent(config, place, name, stack)
        checked = compare(config, name, ours, peer, way)
        repeats = range(1, 1 + (1 if config.quick else config.repeats))
        turns = [(ours.run(repeat), peer.run(repeat)) for repeat in repeats]
    for one, other in turns:
        if "loss" in one and not (way and WAYS[way].sort):
            checked |= agreement({"loss": one["loss"]}, {"loss": other["loss"]})
    mine, theirs = rate([one for one, _ in turns]), rate([other for _, other in turns])
    about = {"unit": UNITS[COMPARED[name]], "peer_way": way or "as it is", "peer_ways": tried, "checked": checked}
    return about | {"ours": mine, "peer": theirs} | ratios(mine, theirs)


def task(config: TrainingConfig, place: Path, name: str, side: str, way: str = "") -> Task:
    """What a process is to do: our side of a workload, or the peer's."""
    kind = COMPARED[name]
    if side == "ours":
        makers = {"sft": "sft", "reward": "reward", "ppo": "ppo_side"}
        way = name.removeprefix("ppo_") if kind == "ppo" else ""
        return Task(kind, f"bylaw.benchmarks.training_ours:{makers[kind]}", place, config.sizes, config.threads, way)
    packages = config.trl_ppo.resolve() if kind == "ppo" and config.trl_ppo else None
    maker = f"bylaw.benchmarks.training_peer:{kind}"
    return Task(kind, maker, place, config.sizes, config.threads, way, packages)


def opponent(
    config: TrainingConfig, place: Path, name: str, stack: contextlib.ExitStack
) -> tuple[str, Process, dict[str, Any]]:
    """The peer; where it has several ways, each is run once and the fastest is taken. Their seconds are told."""
    if len(ways(name)) == 1:
        return "", stack.enter_context(Process(task(config, place, name, "peer"))), {}
    tried: dict[str, Any] = {}
    for way in ways(name):
        try:
            with Process(task(config, place, name, "peer", way)) as process:
                tried[way] = process.run(0)["seconds"]
        except SideFailed as error:
            tried[way] = str(error)
    found = {way: seconds for way, seconds in tried.items() if isinstance(seconds, float)}
    if not found:
        raise SideFailed(f"no way to use the peer works: {next(iter(tried.values()))}")
    way = min(found, key=lambda one: found[one])
    return way, stack.enter_context(Process(task(config, place, name, "peer", way))), tried


def compare(config: TrainingConfig, name: str, ours: Process, peer: Process, way: str) -> Record:
    """The first check, which also warms both sides up. Raises Mismatch."""
    kind, vocab_size = COMPARED[name], SHAPES[config.model].vocab_size
    if kind == "ppo":
        mine, theirs = ours.check(), peer.check()
        if name == "ppo_shared":  # the value's gradient moves the trunk, and so the second epoch's policy
            mine.pop("policy_loss")
        return agreement(mine, {key: theirs[key] for key in mine})
    warm, told = ours.run(0), peer.run(0)
    if kind == "reward":
        return agreement({"loss": warm["loss"]}, {"loss": told["loss"]})
    batch = ordered(config.sizes, vocab_size, 0, WAYS[way])[: config.sizes.batch]
    return agreement(ours.check(batch), {"loss": told["loss"]})


def rate(runs: Sequence[Told]) -> Record:
    """Useful units per second, of the best run and by the median, and what the runs told."""
    seconds, useful = [run["seconds"] for run in runs], runs[0]["useful"]
    told = {key: [run[key] for run in runs] for key in runs[0] if key not in ("seconds", "useful", "peak_bytes")}
    return {
        "best": useful / min(seconds),
        "median": useful / statistics.median(seconds),
        "seconds": seconds,
        "useful": useful,
        "peak_bytes": runs[-1]["peak_bytes"],
    } | told


def ratios(ours: Record, theirs: Record) -> Record:
    """Ours over theirs: by the best run, by the median, and by the processor's time, whatever else the machine did."""
    found = {"ratio_median": ours["median"] / theirs["median"]}
    found["ratio_cpu"] = sum(theirs["cpu_seconds"]) / sum(ours["cpu_seconds"])
    return {"ratio": ours["best"] / theirs["best"]} | found


def as_line(record: Record) -> str:
    """A record as a line of the printed table."""
    if "failed" in record:
        return f"{record['workload']:<16}FAILED {record['failed']}"
    if "mfu" in record:
        share = f"{100 * record['mfu']:.1f} %" if record["mfu"] else record["note"]
        split = "".join(f"; {key} {value:.2f}" for key, value in record.items() if key.startswith("time/"))
        return f"{record['workload']:<16}{record['tokens_per_second']:.0f} tokens/s; MFU {share}{split}"
    cells = "".join(
        f"{side['best']:>{width}.2f}{side['median']:>9.2f}{side['peak_bytes'] / 2**20:>7.0f}"
        for side, width in ((record["ours"], 11), (record["peer"], 12))
    )
    told = ", ".join(f"{key} within {gap:.0e}" for key, gap in record["checked"].items())
    return f"{record['workload']:<16}{record['unit']:<10}{cells}{record['ratio']:>7.2f}  {told}; {record['peer_way']}"


if __name__ == "__main__":
    # Python has put this folder first on its path: Transformers imports a package `kernels`, and would find a file.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    script(main, TrainingConfig, __doc__)
