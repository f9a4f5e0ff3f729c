"""The page of an experiment: its question, the paper's finding, a table over seeds, a plot, and what was seen."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bylaw.benchmarks.village.experiments.bench import Bench, Row
from bylaw.model.records import write_atomic

Rows = Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A finding to look for."""

    title: str
    paper: str
    """What the paper found, and where."""
    measure: Callable[[Bench], list[Row]]
    by: tuple[str, ...]
    """The columns that name a line of the table, beside which the seeds are averaged."""
    columns: tuple[str, ...]
    x: str
    y: str
    seen: Callable[[Rows], str]
    """What the measurements say, in words."""


def write_page(name: str, experiment: Experiment, rows: Rows, folder: Path, facts: dict[str, Any]) -> Path:
    """Write NAME.jsonl, NAME.svg and NAME.md to `folder`; returns the page's path. `facts` say how it was measured."""
    lines = [json.dumps(facts), *(json.dumps(row) for row in rows)]
    write_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    _plot(experiment, rows, folder / f"{name}.svg")
    told = "; ".join(f"{key} {value}" for key, value in facts.items())
    text = (
        f"# {experiment.title}\n\n**The paper:** {experiment.paper}\n\n**Here:** {experiment.seen(rows)}\n\n"
        f"![{experiment.y} by {experiment.x}]({name}.svg)\n\n{table(experiment, rows)}\n\n"
        f"Mean over seeds, and in brackets the least and the most. {told}. The measurements: `{name}.jsonl`.\n"
    )
    write_atomic(folder / f"{name}.md", text)
    return folder / f"{name}.md"


def table(experiment: Experiment, rows: Rows) -> str:
    """In Markdown, a line for each value of the columns `by`."""
    head = [*experiment.by, *experiment.columns]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for key, group in groups(experiment.by, rows).items():
        cells = [_spread([row[column] for row in group if column in row]) for column in experiment.columns]
        lines.append(f"| {' | '.join([*map(str, key), *cells])} |")
    return "\n".join(lines)


def groups(by: Sequence[str], rows: Rows) -> dict[tuple[Any, ...], list[Row]]:
    """Rows with the same values in the columns `by`, in the order in which they first come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in by), []).append(row)
    return found


def average(rows: Rows, column: str, **where: Any) -> float:
    """The mean of a column over the rows that have these values."""
    return mean(row[column] for row in rows if all(row.get(key) == value for key, value in where.items()))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if max(values) == min(values):
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _plot(experiment: Experiment, rows: Rows, path: Path) -> None:
    """A line for each variant and seed; a bar for each variant where there is nothing on the x axis but its name."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'bylaw[report]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bylaw"  # the same rows, the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, ((variant,), group) in enumerate(groups(("variant",), rows).items()):
        for i, (_, line) in enumerate(groups(("seed",), group).items()):
            x, y = ([row[name] for row in line] for name in (experiment.x, experiment.y))
            label = variant if i == 0 else None
            axes.plot(x, y, marker="o", markersize=4, color=f"C{number}", label=label, linewidth=1)
    axes.set_xlabel(experiment.x.replace("_", " "))
    axes.set_ylabel(experiment.y.replace("_", " "))
    if experiment.x != "variant":
        axes.legend(fontsize=8)
    axes.grid(linewidth=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
