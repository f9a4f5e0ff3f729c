"""Draws the records of benchmarks/kernels.py: how near to its floor each implementation of each operation comes."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PASSES = ("forward", "backward", "both")
OURS = ("triton", "reference")
ROW = 0.24  # inches


def plot(records: Path, picture: Path) -> None:
    """A row for each case, a panel for each pass, a mark for each implementation at its percentage of the floor.

    Of each, the last measurement in the JSONL file `records` counts. Raises ValueError if there is none.
    """
    latest = read(records)
    if not latest:
        raise ValueError(f"{records} holds no measurement to draw")
    cases = sorted({case for case, _, _ in latest}, reverse=True)
    names = sorted({name for _, _, name in latest}, key=lambda name: (name not in OURS, name))
    size = (16, 2 + ROW * len(cases))
    figure, panels = pyplot.subplots(1, len(PASSES), figsize=size, sharey=True, layout="constrained")
    for wanted, axes in zip(PASSES, panels, strict=True):
        for name in names:
            measured = {case: one for (case, done, who), one in latest.items() if (done, who) == (wanted, name)}
            style: dict[str, Any] = {"marker": "D", "color": "black", "zorder": 3} if name in OURS else {"marker": "o"}
            percents = [one["percent_of_floor"] for one in measured.values()]
            axes.scatter(percents, [cases.index(case) for case in measured], s=22, label=name, **style)
        axes.set_yticks(range(len(cases)), cases, fontsize=7)
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.grid(axis="y", linewidth=0.3)
        axes.set_title(wanted)
        axes.set_xlabel("% of the floor")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(", ".join(sorted({record["device"] for record in latest.values()})))
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def read(records: Path) -> dict[tuple[str, str, str], Any]:
    """The last measurement of each case, pass and implementation."""
    latest: dict[tuple[str, str, str], Any] = {}
    for line in records.read_text().splitlines():
        record = json.loads(line)
        if "ms" in record:
            shape = " ".join(f"{name}={size}" for name, size in record["shape"].items())
            latest[f"{record['operation']} {shape}", record["pass"], record["implementation"]] = record
    return latest
