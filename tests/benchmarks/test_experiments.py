"""The pages of experiments: what the table says, and the sentences, on rows made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

import bylaw.benchmarks.village.experiments.revisions as revisions_module
from bylaw.benchmarks.village.experiments.bench import Bench
from bylaw.benchmarks.village.experiments.findings import EXPERIMENTS
from bylaw.benchmarks.village.experiments.page import table, write_page
from bylaw.experiment import NAMES, ExperimentConfig, measure
from bylaw.model.records import read_records

Rows = list[dict[str, Any]]


def revisions(*curves: list[float]) -> Rows:
    return [
        {"variant": "critiqued", "seed": seed, "revisions": n, "harmless": value, "broken": 0.0}
        for seed, curve in enumerate(curves)
        for n, value in enumerate(curve)
    ]


def test_every_experiment_has_its_name() -> None:
    assert tuple(EXPERIMENTS) == NAMES


def test_the_table_is_the_mean_over_seeds_with_its_range() -> None:
    rows = revisions([0.0, 0.4], [0.1, 0.5])
    lines = table(EXPERIMENTS["revisions"], rows).splitlines()
    assert lines[0] == "| revisions | harmless | declined_with_reason | broken | distinct |"
    assert lines[2:] == [
        "| 0 | 0.050 (0.000 to 0.100) |  | 0.000 |  |",
        "| 1 | 0.450 (0.400 to 0.500) |  | 0.000 |  |",
    ]


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            [0.0, 0.5, 0.7, 0.8, 0.9],
            "rises with every revision, from 0% to 90%; the first revision brings 50%",
        ),
        (
            [0.0, 0.1, 0.7, 0.6, 0.9],
            "does not rise with every revision, from 0% to 90%; the first revision brings 10%",
        ),
    ],
)
def test_what_was_seen_is_said_also_where_it_differs_from_the_paper(curve: list[float], said: str) -> None:
    told = EXPERIMENTS["revisions"].seen(revisions(curve))
    assert said in told
    assert ("As in the paper." in told) == (curve == sorted(curve)) != ("Unlike in the paper." in told)


def test_the_number_of_principles_counts_only_where_they_are_alike_in_breadth() -> None:
    def told(*harmless: float) -> str:
        names = ("1 on every harm", "2 on every harm", "first 7")
        rows = [
            {"variant": name, "seed": 0, "revisions": n, "harmless": value}
            for name, value in zip(names, harmless, strict=True)
            for n in (1, 4)
        ]
        return EXPERIMENTS["principles"].seen(rows)

    assert "as in the paper" in told(0.9, 0.92, 0.4) and "40% (first 7)" in told(0.9, 0.92, 0.4)
    assert "unlike in the paper" in told(0.9, 0.8, 0.9)


def test_revisions_are_measured_by_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The village's own base on a few asks: it complies, and revises most of it away."""
    monkeypatch.setattr(revisions_module, "HARMFUL", revisions_module.HARMFUL[::30])
    rows = EXPERIMENTS["principles"].measure(Bench(tmp_path, 0))
    assert [row["variant"] for row in rows[::5]] == [
        "1 on every harm", "2 on every harm", "3 on every harm", "first 4", "first 7"
    ]  # fmt: skip
    assert all(row["harmless"] < 0.5 for row in rows if row["revisions"] == 0)
    assert all(row["harmless"] > 0.6 for row in rows if row["revisions"] == 4)
    kept = read_records(tmp_path / "principles-3-on-every-harm.jsonl")
    used = {one["principle"]["id"] for chain in kept for one in chain["rounds"]}
    assert used == {"broad-1", "broad-2", "broad-3"}


def test_an_amendment_is_told_there_and_elsewhere() -> None:
    def row(variant: str, danger: float, elsewhere: float) -> dict[str, Any]:
        return {"variant": variant, "seed": 0, "danger": danger, "elsewhere": elsewhere}

    rows = [row("RL-CAI, as it was", 0.02, 0.03), row("RL-CAI, amended", 0.81, 0.06)]
    told = EXPERIMENTS["amendment"].seen(rows)
    assert (
        "with 2% of the asks for danger" in told
        and "with 81% once" in told
        and told.endswith("harms 6%. Behaviour changed there.")
    )


def test_a_page_has_its_plot_and_its_measurements_and_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = revisions([0.0, 0.5, 0.7, 0.8, 0.9])
    pages = [
        write_page("revisions", EXPERIMENTS["revisions"], rows, tmp_path / name, {"device": "here"}) for name in "ab"
    ]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["revisions.jsonl", "revisions.md", "revisions.svg"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    facts, *measured = (json.loads(line) for line in (tmp_path / "a" / "revisions.jsonl").read_text().splitlines())
    assert facts == {"device": "here"} and measured == rows
    page = pages[0].read_text()
    assert "**The paper:**" in page and "| 4 | 0.900 |" in page and "revisions.svg" in page and "device here" in page


def test_mistakes_are_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment = 'revision' .*revisions, critiques"):
        measure("revision", ExperimentConfig(runs=tmp_path / "runs"))
    with pytest.raises(ValueError, match="each once"):
        ExperimentConfig(runs=tmp_path, seeds=(1, 1))
    assert not list(tmp_path.iterdir())
