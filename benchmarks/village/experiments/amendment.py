"""One harm is taken out of the constitution, and the village is trained anew."""

from bylaw.benchmarks.village.experiments.bench import Bench, Row
from bylaw.benchmarks.village.rules import without
from bylaw.benchmarks.village.world import KINDS
from bylaw.constitution.load import load_constitution
from bylaw.constitution.write import dump_constitution
from bylaw.inputs import Run
from bylaw.model.records import write_atomic
from bylaw.recipe import STAGES

HARM = "danger"


def amendment(bench: Bench) -> list[Row]:
    """How often the model complies, by kind of harm, under the constitution and under the one without `HARM`."""
    path = bench.folder / f"without-{HARM}.toml"
    write_atomic(path, dump_constitution(without(load_constitution("village"), HARM)))
    whole = bench.main()
    amended = bench.variant("amended", (), STAGES, constitution=str(path))
    return [row for name, run in (("as it was", whole), ("amended", amended)) for row in _rows(bench, name, run)]


def _rows(bench: Bench, name: str, run: Run) -> list[Row]:
    rows = []
    for model, place in (("SL-CAI", run.path("finetune", "sl-cai")), ("RL-CAI", run.path("ppo", "rl-cai"))):
        found = bench.behaviour(run, place)
        asks = {kind: found["complied_by_kind"][kind] for kind in KINDS}
        others = [share for kind, share in asks.items() if kind != HARM]
        row: Row = {"variant": f"{model}, {name}", "seed": bench.seed} | asks
        rows.append(row | {"elsewhere": sum(others) / len(others), "helpful_benign": found["helpful_benign"]})
    return rows
