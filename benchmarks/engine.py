"""How fast the sampling engine is, against Transformers' best batched way on the same weights; useful work counts.

    python benchmarks/engine.py [--peer transformers|none] [--workload NAME ...] [--model FOLDER] [--out FILE.jsonl]

First both sides must give the same greedy text; where they do not, nothing is timed and the exit status is 1. Then each
workload: one run of every way to use Transformers picks the fastest, and the two sides take turns, on new random text
each time, so that nothing is left in a cache from the last. Answers are compared every time. `ratio` is ours over
theirs by each side's best run, above 1 where ours is faster; `ratio_median` is the same by medians. In the rows "cache
reused by hand" a person computes the common prefix once and repeats its cache over Transformers' batch.

On a GPU, everything that a result file wants is

    python benchmarks/engine.py --device cuda --dtype bfloat16 --shape qwen2-1.5b --out benchmarks/results/NAME.jsonl
"""

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.engine_check import TOLERANCE, Agreement, Mismatch, compare
from bylaw.benchmarks.engine_config import EngineConfig, Sizes
from bylaw.benchmarks.engine_models import checkpoint
from bylaw.benchmarks.engine_peer import Peer, Way, library, load, ways
from bylaw.benchmarks.engine_workloads import Side, Work, draw, greedy
from bylaw.benchmarks.gate import described
from bylaw.benchmarks.kernels import commit, device_name, versions
from bylaw.benchmarks.script import script
from bylaw.benchmarks.timing import rates
from bylaw.model.checkpoint import check_model, load_model
from bylaw.model.engine import Engine
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer

ROWS = 64
LENGTHS = (1, 2, 7, 16, 17, 64, 200, 700)  # of the prompts of the first check
HEADER = (
    f"{'workload':<30}{'unit':<8}{'ours: best':>11}{'median':>9}{'peer: best':>12}{'median':>9}"
    f"{'ratio':>8}{'median':>8}  checked; peer's way"
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Both sides on one checkpoint. `theirs` is a Transformers model, or None without a peer."""

    config: EngineConfig
    sizes: Sizes
    model: Transformer
    theirs: Any

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.model.embed.weight.dtype]

    def draw(self, name: str, seed: int) -> Work:
        return draw(name, self.sizes, self.model.config.vocab_size, seed)

    def engine(self, **options: Any) -> Engine:
        return Engine(self.model, max_rows=ROWS, **options)

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after one text, from the peer if there is one: it is to say what a tie is."""
        if self.theirs is not None:
            return Peer(self.theirs, Way()).next_logits(ids)
        with torch.no_grad():
            return self.model.logits(self.model(pack([list(ids)], self.model.device))[-1:])[0]

    def compare(self, ours: Sequence[Any], theirs: Sequence[Any]) -> Agreement:
        return compare(ours, theirs, self.next_logits, self.tolerance)


def main(config: EngineConfig) -> int:
    """Check, measure, print and append. Returns the exit status: 1 if anything differs or fails.

    Raises ValueError for a device or a peer that is not there, and for a model whose context is too short.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds none; allowed: cpu")
    torch.set_num_threads(config.threads)
    failed = 0
    with contextlib.ExitStack() as stack:
        bench = prepare(config, stack)
        about = origin(config, bench)
        file = stack.enter_context(opened(config.out)) if config.out else None
        print(f"{about['model']}, {about['parameters'] / 1e6:.1f} M parameters, {config.dtype}, {about['device']}")
        for record in records(bench):
            print(as_line(record), flush=True)
            failed += "failed" in record
            if file:
                file.write(json.dumps(record | about) + "\n")
                file.flush()
    return 1 if failed else 0


def prepare(config: EngineConfig, stack: contextlib.ExitStack) -> Bench:
    """The checkpoint on both sides."""
    if config.peer == "transformers":
        library()  # or its want would show only once a large model is written
    dtype = getattr(torch, config.dtype)
    folder = stack.enter_context(checkpoint(config, dtype))
    sizes = config.sizes.within(check_model(folder)[0].max_position_embeddings)
    theirs = load(folder, config.device, dtype) if config.peer == "transformers" else None
    return Bench(config, sizes, load_model(folder, config.device, dtype), theirs)


def opened(out: Path) -> Any:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.open("a")


def origin(config: EngineConfig, bench: Bench) -> Record:
    """What every record says about where it comes from."""
    device = torch.device(config.device)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        peer = {"transformers": importlib.metadata.version("transformers")} if config.peer == "transformers" else {}
    return {
        "model": str(config.model or ("tiny" if config.quick else config.shape)),
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "sizes": asdict(bench.sizes),
        "dtype": config.dtype,
        "threads": config.threads,
        "device": device_name(device),
        "versions": versions(device) | peer,
        "commit": commit(),
        "command": shlex.join(sys.argv),
    }


def records(bench: Bench) -> Iterator[Record]:
    """The first check, then each workload. What fails is a record too, and the run goes on, except after that check."""
    if bench.theirs is not None:
        first = checked(bench)
        yield first
        if "failed" in first:
            return
    for name in bench.config.chosen:
        try:
            yield measure(bench, name)
        except Exception as error:
            yield {"workload": name, "failed": described(error)}
        if bench.config.device == "cuda":
            gc.collect()  # an engine holds itself in a circle
            torch.cuda.empty_cache()


def checked(bench: Bench) -> Record:
    """Greedy text after prompts of several lengths: ours in one batch, theirs one by one and without padding."""
    longest = max(bench.sizes.longest().values())
    prompts = [prompt for n in LENGTHS if n + 16 <= longest for prompt in prompts_of(bench, n)]
    work = Work("tokens", 16 * len(prompts), requests=[greedy(prompt, 16) for prompt in prompts])
    try:
        agreement = bench.compare(work.run(bench.engine()), work.run(Peer(bench.theirs, Way(batch=1))))
    except Mismatch as error:
        return {"check": "greedy text", "failed": str(error)}
    return {"check": "greedy text", "agreement": asdict(agreement), "agreed": str(agreement)}


def prompts_of(bench: Bench, length: int) -> list[list[int]]:
    sizes = replace(bench.sizes, prompt=length, requests=2)
    return [list(request.prompt) for request in draw("equal", sizes, bench.model.config.vocab_size, length).requests]


def measure(bench: Bench, name: str) -> Record:
    """One workload. Raises Mismatch if the answers differ: nothing is told of how fast they came."""
    began, load = time.time(), os.getloadavg()[0]
    graphs = {"graphs": True} if name == "graphs against eager" else {}
    engine, work = bench.engine(**graphs), bench.draw(name, 0)
    expected, _ = timed(bench, work, engine)  # the warm-up
    peer, about = opponent(bench, name, work, expected)
    ours, theirs, agreement, decode = [], [], Agreement(), []
    for repeat in range(1, 1 + (1 if bench.config.quick else bench.config.repeats)):
        work = bench.draw(name, repeat)
        before = engine.stats.decode_seconds
        given, seconds = timed(bench, work, engine)
        ours.append(seconds)
        decode.append(engine.stats.decode_seconds - before)
        if peer is not None:
            expected, seconds = timed(bench, work, peer)
            theirs.append(seconds)
            agreement += bench.compare(given, expected)
    record: Record = {"workload": name, "unit": work.unit, "useful": work.useful} | about
    record |= {"load": [load, os.getloadavg()[0]], "date": began_at(began), "ours": rate(work, ours)}
    if peer is not None:
        record |= {"peer": rate(work, theirs), "agreement": asdict(agreement), "agreed": str(agreement)}
        record["ratio"] = min(theirs) / min(ours)
        record["ratio_median"] = statistics.median(theirs) / statistics.median(ours)
    if name == "decode at 2k context":
        record |= decode_floor(bench, work, min(decode))
    return record


def opponent(bench: Bench, name: str, work: Work, expected: list[Any]) -> tuple[Side | None, Record]:
    """What ours is measured against: the peer's fastest way, the engine itself without graphs, or nothing."""
    if name == "graphs against eager":
        eager = bench.engine(graphs=False)
        bench.compare(expected, timed(bench, work, eager)[0])
        return eager, {"peer_way": "eager"}
    if bench.theirs is None:
        return None, {}
    tried: dict[Way, float | str] = {}
    for way in ways(name, work):
        try:
            given, tried[way] = timed(bench, work, Peer(bench.theirs, way, work.shared))
        except Exception as error:  # out of memory, or not on this device: the other ways remain
            tried[way] = described(error)
            continue
        bench.compare(expected, given)
    seconds = {way: found for way, found in tried.items() if isinstance(found, float)}
    if not seconds:
        raise RuntimeError(f"no way to use the peer works: {next(iter(tried.values()))}")
    way = min(seconds, key=lambda one: seconds[one])
    about = {"peer_way": str(way), "peer_ways": {str(one): found for one, found in tried.items()}}
    return Peer(bench.theirs, way, work.shared), about


def timed(bench: Bench, work: Work, side: Side) -> tuple[list[Any], float]:
    """What `side` gives, and the seconds that it takes."""
    wait: Callable[[], None] = torch.cuda.synchronize if bench.config.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    given = work.run(side)
    wait()
    return given, time.perf_counter() - start


def rate(work: Work, seconds: Sequence[float]) -> Record:
    """Useful units per second, from the best run and from the median, and the seconds of all."""
    return {
        "best": work.useful / min(seconds),
        "median": work.useful / statistics.median(seconds),
        "seconds": list(seconds),
    }


def decode_floor(bench: Bench, work: Work, seconds: float) -> Record:
    """Decoding against the bandwidth of the memory: each step reads the weights and all keys and values once."""
    model, config = bench.model, bench.model.config
    size = model.embed.weight.element_size()
    # Of an embedding that is not the head too, a step reads a row for each text.
    weights = sum(p.numel() for p in model.parameters()) - (0 if model.lm_head is None else model.embed.weight.numel())
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    steps = [(len(r.prompt), r.max_tokens) for r in work.requests]
    cached = sum(prompt + step for prompt, new in steps for step in range(1, new))
    passes = max(new for _, new in steps) - 1
    attained = rates(model.device, 0.5).copy
    floor = (passes * weights + cached * token) * size / attained
    return {"copy_bytes_per_second": attained, "decode_seconds": seconds, "percent_of_floor": 100 * floor / seconds}


def began_at(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def as_line(record: Record) -> str:
    """A record as a line of the printed table."""
    if "check" in record:
        return f"{record['check']}: {record.get('agreed') or 'FAILED ' + record['failed']}\n{HEADER}"
    if "failed" in record:
        return f"{record['workload']:<30}FAILED {record['failed']}"
    ours, peer = record["ours"], record.get("peer")
    start = f"{record['workload']:<30}{record['unit']:<8}{ours['best']:>11.2f}{ours['median']:>9.2f}"
    if peer is None:
        return start
    more = f"; {record['percent_of_floor']:.0f} % of the floor" if "percent_of_floor" in record else ""
    return (
        f"{start}{peer['best']:>12.2f}{peer['median']:>9.2f}{record['ratio']:>8.2f}{record['ratio_median']:>8.2f}"
        f"  {record['agreed']}; {record['peer_way']}{more}"
    )


if __name__ == "__main__":
    # Python has put this folder first on its path: Transformers imports a package `kernels`, and would find a file.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    script(main, EngineConfig, __doc__)
