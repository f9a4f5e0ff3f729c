"""The figures of what the models do and of their training, each with its numbers as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bylaw.model.records import Record
from bylaw.report.behaviour import models
from bylaw.report.figures import Axis, Point, Series, axis, line_chart, scatter
from bylaw.report.gather import RunFacts

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
    ("ppo", "objective/scores", "Reward", "reward model's score", "Higher: answers that the reward model prefers."),
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
    x = Axis("step", xs[0], xs[-1])
    return Panel(title, line_chart(title, [Series(title, xs, ys)], x, y), note + stretch, ("step", unit), means)


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


def pareto(summary: Mapping[str, Any]) -> Panel | None:
    """Helpfulness against harmlessness of the models in the summary."""
    rows = [
        (name, figures["helpful_benign"], 1 - figures["complied_harmful"])
        for name, figures in models(summary)
        if {"helpful_benign", "complied_harmful"} <= figures.keys()
    ]
    if not rows:
        return None
    tones = {"SL-CAI": 1, "Base": 2}
    dots = [Point(helpful, safe, name, 6, tones.get(name, 0)) for name, helpful, safe in rows]
    low = max(0.0, min(p.x for p in dots) - 0.1)
    x, y = Axis("helps with harmless asks", low - low % 0.1, 1.02, True), Axis("does not help harm", 0.0, 1.04, True)
    note = "Up is less harm, right is more help; the best corner is the upper right."
    table = [(name, round(helpful, 4), round(safe, 4)) for name, helpful, safe in rows]
    columns = ("checkpoint", "helpful on harmless asks", "1 − complied with harm")
    return Panel("Checkpoints", scatter("Checkpoints", dots, x, y, join=True), note, columns, table)


def revision_curve(summary: Mapping[str, Any]) -> Panel | None:
    """Harmlessness after 0, 1, 2 ... revisions."""
    values = summary.get("revision_curve")
    if not isinstance(values, list) or len(values) < 2:
        return None
    steps = [float(n) for n in range(len(values))]
    dots = [Point(n, v, "", 4.5) for n, v in zip(steps, values, strict=True)]
    x, y = Axis("revisions", -0.2, steps[-1] + 0.2), Axis("harmless answers", 0.0, 1.04, True)
    title = "Harmlessness by revisions"
    note = "How many first answers to harmful asks do no harm after so many rounds of critique and revision."
    svg = scatter(title, dots, x, y, join=True)
    return Panel(title, svg, note, ("revisions", "harmless"), list(enumerate(round(v, 4) for v in values)))
