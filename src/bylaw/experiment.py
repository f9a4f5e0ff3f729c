"""`bylaw experiment NAME`: a finding of the papers, looked for on the village."""

import platform
from dataclasses import dataclass
from pathlib import Path

from bylaw.model.settings import require

NAMES = (
    "revisions",
    "critiques",
    "principles",
    "soft-labels",
    "ensemble",
    "clamp",
    "pareto",
    "overoptimisation",
    "amendment",
)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Measure one finding over seeds. Runs are kept, shared by all experiments, and gone on with when killed."""

    runs: Path
    """Folder for the runs: one for each seed."""
    out: Path | None = None
    """Folder for the page, its plot and its measurements; left out, that of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds: one run of the pipeline each."""

    def __post_init__(self) -> None:
        require(bool(self.seeds) and min(self.seeds) >= 0, "seeds", self.seeds, "one or more, each 0 or more")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each once")


def measure(name: str, config: ExperimentConfig) -> Path:
    """Measure and write the page; returns its path. Raises ValueError for a name that is not in `NAMES`."""
    require(name in NAMES, "experiment", name, ", ".join(NAMES))
    from bylaw.benchmarks.village.experiments.bench import Bench
    from bylaw.benchmarks.village.experiments.findings import EXPERIMENTS
    from bylaw.benchmarks.village.experiments.page import check_plots, write_page
    from bylaw.runs import versions

    check_plots()
    chosen = EXPERIMENTS[name]
    rows = [row for seed in config.seeds for row in chosen.measure(Bench(config.runs / f"seed-{seed}", seed))]
    seeds = " ".join(map(str, config.seeds))
    facts = {"command": f"bylaw experiment {name} --seeds {seeds}", "device": f"{platform.machine()} CPU", **versions()}
    return write_page(name, chosen, rows, config.out or config.runs, facts)
