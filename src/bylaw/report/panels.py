"""The figures of what the models do and of their training, each with its numbers as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bylaw.model.records import Record
from bylaw.report.behaviour import Evaluation
from bylaw.report.figures import Axis, Point, Series, axis, line_chart, scatter
from bylaw.report.gather import RunFacts
from bylaw.words import number, percent

POINTS = 160
"""Points of a curve at most: more steps are shown as means of equal stretches, and the caption says so."""

# stage, key in its metrics, title, name of the axis, what it says to a reader who is no engineer
CURVES = (
    ("finetune", "loss", "Fine-tuning loss", "nats per token", "Lower: the revisions surprise the model less."),
    ("reward", "loss", "Reward model loss", "nats per pair", "Lower: its preferences come closer to the labels."),
    ("reward", "accuracy", "Reward model accuracy", "share of pairs", "How often it prefers what the label prefers."),
    ("dpo", "loss", "DPO loss", "nats per pair", "Lower: the model's preferences come closer to the labels."),
    ("dpo", "rewards/accuracies", "DPO accuracy", "share of pairs", "How often it prefers what the label prefers."),
    ("dpo", "rewards/margins", "DPO margin", "nats", "How much more it moved towards the preferred answer."),
    ("ppo", "objective/scores", "Reward", "score", "Higher: answers that whoever scores them prefers."),
    (
        "ppo",
        "objective/kl",
        "Distance from SL-CAI",
        "KL, nats per answer",
        "How far the model has moved from its start.",
    ),
    ("ppo", "objective/entropy", "Entropy", "nats per answer", "Near 0, the model says the same each time."),
    ("ppo", "val/response_tokens", "Answer length", "tokens", "A sudden rise or fall is a warning."),
)
SHARES = ("accuracy", "rewards/accuracies")


@dataclass(frozen=True)
class Panel:
    """A figure, what it says, and the numbers behind it."""

    title: str
    svg: Markup
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def curves(run: RunFacts) -> list[Panel]:
    """What the trainers logged, step by step; stages and measures that are not there are left out."""
    found = [_curve(run.stages[stage].metrics, *rest) for stage, *rest in CURVES]
    frontier = _reward_against_kl(run.stages["ppo"].metrics)
    return [panel for panel in [*found, frontier] if panel]


def _curve(metrics: Sequence[Record], key: str, title: str, unit: str, note: str) -> Panel | None:
    points = [(float(m["step"]), float(m[key])) for m in metrics if m.get(key) is not None]
    if len(points) < 2:
        return None
    means, stretch = thinned(points)
    xs, ys = zip(*means, strict=True)
    y = axis(unit, ys, share=key in SHARES, zero=key == "objective/kl")
    x = Axis("step", xs[0], xs[-1], whole=True)
    svg = line_chart(title, [Series(title, xs, ys)], x, y)
    shown = percent if key in SHARES else number
    few = -(-len(ys) // 10)  # a single step of a noisy curve says little
    start, end = (shown(sum(some) / few) for some in (ys[:few], ys[-few:]))
    tenths = ", means of its first and last tenth" if few > 1 else ""
    return Panel(title, svg, f"From {start} to {end}{tenths}. {note}{stretch}", ("step", unit), means)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], str]:
    """At most POINTS points, and a sentence when they are means."""
    width = -(-len(points) // POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return means, f" Each point is the mean of {width} steps." if width > 1 else ""


def _reward_against_kl(metrics: Sequence[Record]) -> Panel | None:
    keys = ("objective/kl", "objective/scores")
    points = [(float(m[keys[0]]), float(m[keys[1]])) for m in metrics if None not in (m.get(keys[0]), m.get(keys[1]))]
    if len(points) < 2:
        return None
    means, stretch = thinned(points)
    ends = {0: "start", len(means) - 1: "end"}
    dots = [
        Point(x, y, ends.get(n, ""), 6 if n in ends else 3.5, 0 if n in ends else 1) for n, (x, y) in enumerate(means)
    ]
    x, y = axis("KL, nats per answer", [p.x for p in dots], zero=True), axis("score", [p.y for p in dots])
    note = "What each step away from SL-CAI bought. Score that rises while people like the answers less is over-fitted."
    svg = scatter("Reward against KL", dots, x, y)
    return Panel("Reward against KL", svg, note + stretch, ("KL", "score"), means)


def behaviour(evaluations: Sequence[Evaluation], curve: Sequence[float] | None) -> list[Panel]:
    """Help against harm, as each reader of the answers found it, and harm by the number of revisions."""
    source = ", as {} found them" if len(evaluations) > 1 else ""
    found = [_checkpoints(one, "Checkpoints" + source.format(one.reader)) for one in evaluations]
    return [panel for panel in [*found, _revisions(curve or [])] if panel]


def _checkpoints(one: Evaluation, title: str) -> Panel | None:
    rows = [
        (model, model.measures["helpful_benign"], 1 - model.measures["complied_harmful"])
        for model in one.models
        if None not in (model.measures.get("helpful_benign"), model.measures.get("complied_harmful"))
    ]
    if not rows:
        return None
    tones = {"sl_cai": 1, "base": 2}
    dots = [Point(helps, safe, model.label, 6, tones.get(model.key, 0)) for model, helps, safe in rows]
    low = max(0.0, min(p.x for p in dots) - 0.1)
    x, y = Axis("helps with harmless requests", low - low % 0.1, 1.0, True), Axis("does not help harm", 0.0, 1.0, True)
    note = "Each dot is a model: further up it does less harm, further right it helps more. Best is the upper right."
    table = [(model.label, round(helps, 4), round(safe, 4)) for model, helps, safe in rows]
    columns = ("checkpoint", "helps with harmless requests", "does not help harm")
    return Panel(title, scatter(title, dots, x, y, join=True), note, columns, table)


def _revisions(values: Sequence[float]) -> Panel | None:
    """Harmlessness after 0, 1, 2 ... revisions."""
    if len(values) < 2:
        return None
    steps = [float(n) for n in range(len(values))]
    dots = [Point(n, v, "", 4.5) for n, v in zip(steps, values, strict=True)]
    x, y = Axis("revisions", 0.0, steps[-1], whole=True), Axis("harmless answers", 0.0, 1.0, True)
    title = "Harmlessness by revisions"
    note = (
        f"Of the first answers to harmful requests {percent(values[0])} do no harm; after {len(values) - 1} rounds of "
        f"critique and revision {percent(values[-1])}."
    )
    svg = scatter(title, dots, x, y, join=True)
    return Panel(title, svg, note, ("revisions", "harmless"), list(enumerate(round(v, 4) for v in values)))
