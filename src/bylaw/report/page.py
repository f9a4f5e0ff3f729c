"""The page itself: data and figures into the template, with a policy that forbids all but its own style and script."""

import base64
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bylaw.attribution import DECIDED, Attribution, Conflict, attribute
from bylaw.model.records import Record, write_atomic
from bylaw.model.settings import require
from bylaw.report import behaviour, flags, judged, panels, story, words
from bylaw.report.figures import meter
from bylaw.report.gather import RunFacts, gather
from bylaw.report.sample import sample
from bylaw.rlaif.trust import trust
from bylaw.sums import write_sums_within

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
CHAINS_BUDGET, LABELS_BUDGET = 1_300_000, 900_000
"""Characters of HTML, about, that chains and labels may take: the page stays under 3 MB."""
CONFLICTS = 8
"""Pairs of principles whose conflict is shown."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page about a run."""

    out: Path | None = None
    """Where to write it; left out, report.html in the run's folder."""
    chains: int = 200
    """Chains on the page at most: of a larger run a sample is shown."""
    labels: int = 100
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
    facts = attribute(run.chains, run.preferences, run.constitution)
    measured = trust(run.preferences)
    chains = sample(run.chains, chain_principles, _chain_size, config.chains, CHAINS_BUDGET, config.seed)
    labels = sample(run.preferences, label_strata, _label_size, config.labels, LABELS_BUDGET, config.seed)
    values = {
        "style": Markup(style),
        "script": Markup(script),
        "policy": POLICY.format(style=_source(style), script=_source(script)),
        "run": run,
        "name": run.folder.resolve().name,
        "seed": config.seed,
        "flags": flags.flags(run, measured, facts.principles),
        "principles": {principle.id: principle for principle in run.constitution.principles},
        "facts": {row.id: row for row in facts.principles},
        "strangers": [row for row in facts.principles if not row.title],
        "threshold": facts.threshold,
        "conflicts": conflicts(run, facts),
        "chains": chains,
        "labels": labels,
        "models": behaviour.models(run.summary),
        "stakes": behaviour.stakes(run.summary),
        "pareto": [panel for panel in (panels.pareto(run.summary), panels.revision_curve(run.summary)) if panel],
        "curves": panels.curves(run),
        "judge": judged.judge(run),
        "trace": partial(trace_command, run.folder),
        "evaluate": f"bylaw evaluate {shlex.quote(str(run.folder))} --harmful FILE --benign FILE",
    }
    return environment().get_template("page.html.jinja").render(values)


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
        "number": words.number, "percent": words.percent, "clip": words.clip, "duration": words.duration,
        "plain": plain_table, "points": words.points,
    }  # fmt: skip
    made.globals |= {"diff": words.word_diff, "many": words.many, "meter": meter, "story": story}
    made.globals |= {
        "chain_principles": chain_principles,
        "label_principles": label_principles,
        "changed": changed,
        "verdict": verdict,
    }
    return made


def chain_principles(chain: Record) -> list[str]:
    """The ids of the principles of its rounds, each once."""
    return list(dict.fromkeys(one["principle"]["id"] for one in chain["rounds"]))


def label_principles(preference: Record) -> list[str]:
    """The ids of the principles that it was judged by."""
    return list(dict.fromkeys(one["principle"]["id"] for one in preference.get("labels", [])))


def verdict(preference: Record) -> str:
    """Which answer the label prefers: a, b, tie (within the threshold of one half), same (equal texts), abstained."""
    p = preference["p_a"]
    if p is None:
        return "abstained"
    if preference["a"]["text"] == preference["b"]["text"]:
        return "same"
    return "tie" if abs(p - 0.5) < DECIDED else "a" if p > 0.5 else "b"


def label_strata(preference: Record) -> list[str]:
    """What a sample of labels draws from alike: each verdict, and each principle that decided."""
    read = [one for one in preference.get("labels", []) if not one["abstained"]]
    return [verdict(preference), *(one["principle"]["id"] for one in read if abs(one["p_a"] - 0.5) >= DECIDED)]


def changed(chain: Record) -> bool:
    """Whether any revision of the chain differs from the answer before it."""
    texts = [chain["answer"]["text"], *(one["revision"]["text"] for one in chain["rounds"])]
    return any(old != new for old, new in pairwise(texts))


def conflicts(run: RunFacts, facts: Attribution) -> dict[str, Any]:
    """The first of the conflicts with their examples: each a preference and its readings by the two principles."""
    shown = facts.conflicts[:CONFLICTS]
    wanted = {id for one in shown for id in one.examples}
    pairs = {preference["id"]: preference for preference in run.preferences if preference["id"] in wanted}
    return {"all": len(facts.conflicts), "shown": [(one, _examples(one, pairs)) for one in shown]}


def _examples(conflict: Conflict, pairs: Mapping[str, Record]) -> list[tuple[Record, list[Record]]]:
    sides = (conflict.first, conflict.second)
    found = [pairs[id] for id in conflict.examples]
    return [(pair, [one for one in pair["labels"] if one["principle"]["id"] in sides]) for pair in found]


def trace_command(folder: Path, id: str) -> str:
    """What to type to follow a record."""
    return f"bylaw trace {shlex.quote(str(folder))} {shlex.quote(id)}"


def plain_table(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested table as rows of dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        rows += plain_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _source(text: str) -> str:
    """How a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _chain_size(chain: Record) -> int:
    """About the characters that the chain takes as HTML. A revision is shown as a diff, so the text before it too."""
    texts = [
        chain["answer"],
        *(one[part] for one in chain["rounds"] for part in ("critique", "revision") if part in one),
    ]
    return 900 + 500 * len(chain["rounds"]) + 2 * _length(texts) + _prompt_length(chain)


def _label_size(preference: Record) -> int:
    readings = preference.get("labels", [])
    thoughts = [t for one in readings for side in (one.get("thoughts") or {}).values() for t in side]
    return (
        1500 + 900 * len(readings) + _length([preference["a"], preference["b"], *thoughts]) + _prompt_length(preference)
    )


def _length(texts: Iterable[Mapping[str, Any]]) -> int:
    return sum(_written(text["text"]) for text in texts)


def _prompt_length(record: Record) -> int:
    turns: Sequence[Mapping[str, Any]] = record["prompt"]
    return sum(_written(str(turn["content"])) for turn in turns)


def _written(text: str) -> int:
    """Bytes of a text on the page."""
    return len(escape(words.visible(words.clip(text))).encode())
