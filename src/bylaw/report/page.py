"""The page itself: data and figures into the templates, with a policy that forbids all but its own style and script."""

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bylaw import words
from bylaw.attribution import Attribution, attribute
from bylaw.model.records import Record, write_atomic
from bylaw.model.settings import require
from bylaw.report import conflicts, flags, judged, panels, shown, story, strips
from bylaw.report.gather import RunFacts, gather, rewards_by_judge
from bylaw.report.sample import Written, sample
from bylaw.rlaif.trust import trust
from bylaw.sums import write_sums_within

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
CHAINS_BUDGET, LABELS_BUDGET = 900_000, 1_600_000
"""Bytes that the cards of chains and of labels may take: the page stays under 3 MB."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page about a run."""

    out: Path | None = None
    """Where to write it; left out, report.html in the run's folder."""
    chains: int = 300
    """Chains on the page at most: of a larger run a sample is shown."""
    labels: int = 300
    """Labels on the page at most."""
    seed: int = 0
    """Draws the samples."""

    def __post_init__(self) -> None:
        require(self.chains >= 0, "chains", self.chains, "0 or more")
        require(self.labels >= 0, "labels", self.labels, "0 or more")


def write_report(folder: Path, config: ReportConfig) -> Path:
    """Write the page of the run in `folder` and return its path; inside the folder, SHA256SUMS learns of it. The same
    run gives the same bytes.

    Raises ValueError when `folder` is no run folder, or a file in it is broken.
    """
    out = config.out or folder / "report.html"
    write_atomic(out, render(gather(folder), config))
    write_sums_within(folder, out)
    return out


def render(run: RunFacts, config: ReportConfig) -> str:
    """The page as HTML. Whatever a model, a person or a file wrote is escaped, and made visible, on its way in."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    made, facts = environment(), attribute(run.chains, run.preferences, run.constitution)
    shared = _shared(run, facts)
    measured = trust(run.preferences)
    values = shared | _cards(made, run, config, shared) | {
        "style": Markup(style),
        "script": Markup(script),
        "policy": POLICY.format(style=_source(style), script=_source(script)),
        "run": run,
        "by_judge": rewards_by_judge(run.recipe),
        "seed": config.seed,
        "flags": flags.flags(run, measured, facts.principles),
        "strangers": [row for row in facts.principles if not row.title],
        "furthest": max([abs(row.direction) for row in facts.principles if row.direction is not None], default=0.0),
        "trusted": measured,
        "conflicts": conflicts.grouped(facts.conflicts, run.preferences),
        "figures": panels.behaviour(run.evaluations, run.summary.get("revision_curve")),
        "curves": panels.curves(run),
        "judge": judged.judge(run),
    }  # fmt: skip
    return made.get_template("page.html.jinja").render(values)


def environment() -> jinja2.Environment:
    """Jinja2 that escapes everything, shows what is hidden, and stops at a name that is not there."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=words.visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": words.number, "percent": words.percent, "share": words.share, "points": words.points,
        "signed": words.signed, "clip": words.clip, "duration": words.duration, "plain": plain_table,
    }  # fmt: skip
    made.globals |= {"diff": words.word_diff, "many": words.many, "story": story, "shown": shown, "strips": strips}
    made.globals |= {"sides": conflicts.sides, "kept": flags.KEPT}
    made.globals |= {"asked_of": judged.asked_of, "unwilling": judged.unwilling}
    return made


def _shared(run: RunFacts, facts: Attribution) -> dict[str, Any]:
    """What the page and each card of it know."""
    name = run.folder.resolve().name
    return {
        "name": name,
        "quoted": shlex.quote(name),
        "principles": {principle.id: principle for principle in run.constitution.principles},
        "facts": {row.id: row for row in facts.principles},
        "marked": {one.id: one for one in run.marks},
        "threshold": facts.threshold,
        "trace": partial(trace_command, name),
    }


def _cards(made: jinja2.Environment, run: RunFacts, config: ReportConfig, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Chains and labels as they are shown, labels that decide first."""

    def write(template: str, record: Record) -> str:
        return made.get_template(template).render({**shared, "one": record})

    chain, label = (partial(write, f"{name}.html.jinja") for name in ("chain", "label"))
    chains = sample(run.chains, shown.drawn, chain, config.chains, CHAINS_BUDGET, config.seed)
    labels = sample(run.preferences, shown.strata, label, config.labels, LABELS_BUDGET, config.seed)
    return {"chains": _html(chains), "labels": _html(sorted(labels, key=lambda one: shown.place(one[0])))}


def _html(cards: Sequence[Written]) -> list[Markup]:
    """Cards that a template has escaped."""
    return [Markup(html) for _, html in cards]


def trace_command(name: str, id: str) -> str:
    """What to type to follow a record of the run in the folder `name`, in the folder in which that lies."""
    return f"bylaw trace {shlex.quote(name)} {shlex.quote(id)}"


def plain_table(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested table as rows of dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        rows += plain_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _source(text: str) -> str:
    """How a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
