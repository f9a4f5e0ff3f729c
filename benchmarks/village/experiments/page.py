"""The page of an experiment: its question, the paper's finding, a table over seeds, a plot, and what was seen."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
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
    ys: tuple[str, ...]
    """The columns that are plotted over x, a panel each."""
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
        f"![{' and '.join(experiment.ys)} by {experiment.x}]({name}.svg)\n\n{table(experiment, rows)}\n\n"
        "In the table the mean over seeds, and in brackets the least and the most; in the plot a dot for each seed "
        f"and a line for their median. {told}. The measurements: `{name}.jsonl`.\n"
    )
    write_atomic(folder / f"{name}.md", text)
    return folder / f"{name}.md"


def check_plots() -> None:
    """Raise ValueError where matplotlib is missing: before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the page has a plot, and plots need matplotlib; pip install 'bylaw[report]'")


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
    """A panel for each of `ys`: the seeds as faint dots, their median as a line; only dots where x is a name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bylaw"  # the same rows, the same bytes
    from matplotlib import pyplot

    count = len(experiment.ys)
    figure, panels = pyplot.subplots(1, count, figsize=(1.5 + 4.5 * count, 4), layout="constrained", squeeze=False)
    for axes, y in zip(panels[0], experiment.ys, strict=True):
        for number, ((variant,), group) in enumerate(groups(("variant",), rows).items()):
            _draw(axes, experiment, [row for row in group if y in row], y, f"C{number}", str(variant))
        axes.set_xlabel(experiment.x.replace("_", " "))
        axes.set_ylabel(y.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.3)
        if experiment.x == "variant":
            axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=20, ha="right")
        elif all(isinstance(row[experiment.x], int) for row in rows):
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))  # type: ignore[attr-defined]
    if experiment.x != "variant":
        panels[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axes: Any, experiment: Experiment, rows: Rows, y: str, color: str, label: str) -> None:
    axes.plot([row[experiment.x] for row in rows], [row[y] for row in rows], "o", color=color, alpha=0.35, markersize=4)
    middle = [[median(row[name] for row in step) for name in (experiment.x, y)] for step in _steps(experiment, rows)]
    if middle:
        axes.plot(*zip(*middle, strict=True), marker="o", markersize=5, color=color, linewidth=1.6, label=label)


def _steps(experiment: Experiment, rows: Rows) -> list[list[Row]]:
    """Rows of all seeds that belong together, step by step; none where x is a name."""
    return [] if experiment.x == "variant" else list(groups(experiment.by, rows).values())
