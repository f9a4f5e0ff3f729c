"""The figures of the judge: how sure its labels are, whether it knows and says so, whether it minds the order."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bylaw.model.records import Record
from bylaw.report.figures import Axis, Point, bars, histogram, round_up, scatter
from bylaw.report.forms import SIDES
from bylaw.report.gather import RunFacts
from bylaw.report.panels import Panel
from bylaw.report.shown import same, side
from bylaw.rlaif.trust import LITTLE
from bylaw.words import many, number, percent, points, signed

BINS = 21
"""Of what has a middle: odd, so that the middle is the middle of a bar."""
ON_THE_LINE = "On the line, what it gives 70 % comes true 7 times in 10. Larger dots hold more."


def judge(run: RunFacts) -> list[Panel]:
    """How far to trust the labels: calibration, position bias, option mass, and how decided they are."""
    counts, told = run.stages["reward"].counts, run.summary
    known = [_reliability(f"Judge on {asked_of(one)}", one.get("reliability"), one.get("ece")) for one in run.known]
    found = [
        _labels(run.preferences),
        _reliability("Judgements against known answers", told.get("label_reliability"), told.get("label_ece")),
        *known,
        _bias([one["position_bias"] for one in _counted(run.preferences)]),
        _mass([one["mass"] for one in _asked(run.preferences)]),
        _reliability("Reward model against labels", counts.get("heldout_reliability"), counts.get("heldout_ece")),
    ]
    return [panel for panel in found if panel]


def asked_of(known: Mapping[str, Any]) -> str:
    """The file of a judgement, and what sets it apart from others of the same file."""
    parts = [known["file"], f"the first {known['limit']}" if known.get("limit") else ""]
    asked = known.get("asked") or {}
    parts.append("by whole texts" if known.get("by") == "texts" else "")
    parts.append("as a chat" if asked.get("style") == "chat" else "")
    parts.append(f"begun with “{asked['prefix']}”" if asked.get("prefix") else "")
    return ", ".join(filter(None, parts))


def unwilling(known: Mapping[str, Any]) -> float | None:
    """The probability that a judge gives to letters, where it is so little that its answers by them say little."""
    mass = (known.get("option_mass") or {}).get("mean")
    return mass if known.get("by") == "letters" and mass is not None and mass < LITTLE else None


def _counted(preferences: Sequence[Record]) -> Iterator[Record]:
    """The readings whose position bias `trust` measures."""
    for one in (one for preference in preferences for one in preference.get("labels") or []):
        if not one["abstained"] and all(one.get(order) for order in SIDES):
            yield one


def _asked(preferences: Sequence[Record]) -> Iterator[Record]:
    """The questions whose option mass `trust` measures: one for each order, or for each thought."""
    for one in (one for preference in preferences for one in preference.get("labels") or []):
        for order in SIDES:
            once = [one[order]] if one.get(order) else []
            yield from (asked for asked in one.get(f"{order}_each", once) if "mass" in asked)


def _labels(preferences: Sequence[Record]) -> Panel | None:
    kept = [one["p_a"] for one in preferences if not one["abstained"] and not same(one)]
    if not kept:
        return None
    sides = Counter(map(side, kept))
    alike = sum(not one["abstained"] and same(one) for one in preferences)
    note = (
        f"Of {many(len(kept), 'label')} {sides['a']:,} prefer A, {sides['b']:,} prefer B, and {sides['']:,} lie near "
        "one half: the judge could not tell, or its principles pull to both sides."
    )
    note += f" Left out: {many(alike, 'pair')} of twice the same text." if alike else ""
    edges, counts = histogram(kept, 0.0, 1.0, BINS)
    return _histogram("Labels", edges, counts, "probability that A is better", "labels", note)


def _bias(values: Sequence[float]) -> Panel | None:
    """Symmetric about 0, as far as the values go."""
    if not values:
        return None
    most = min(round_up(max(max(map(abs, values)), 0.01)), 0.5)
    mean, size = sum(values) / len(values), sum(map(abs, values)) / len(values)
    note = (
        f"{many(len(values), 'judgement')}: to the right the judge leans to the answer shown first, to the left to the "
        f"one shown second, by {points(size)} in size and {signed(mean)} on average. Both orders are asked, so that a "
        "lean that is always the same cancels."
    )
    edges, counts = histogram(values, -most, most, BINS)
    return _histogram("Position bias", edges, counts, "lean to the answer shown first", "judgements", note)


def _mass(values: Sequence[float]) -> Panel | None:
    """From a round number below the least to 1."""
    if not values:
        return None
    low = max(1 - round_up(max(1 - min(values), 0.001)), 0.0)
    mean = sum(values) / len(values)
    note = (
        f"Of {many(len(values), 'question')}: {percent(mean, 1)} on average, {percent(min(values), 1)} at least. The "
        "less, the more the judge wanted to say something else."
    )
    edges, counts = histogram(values, low, 1.0, BINS - 1)
    return _histogram("Option mass", edges, counts, "probability on the letters A and B", "questions", note)


def _reliability(title: str, table: object, ece: float | None) -> Panel | None:
    """Mean prediction and outcome of each bin, dots as large as the bin is full."""
    bins = table.get("reliability") if isinstance(table, Mapping) else table
    if not isinstance(bins, list):
        return None
    key = "label" if any("label" in one for one in bins) else "right"
    rows = [(one["pairs"], one["predicted"], one[key]) for one in bins if one.get("pairs") and one.get(key) is not None]
    if not rows:
        return None
    most = max(count for count, *_ in rows)
    dots = [Point(p, seen, "", 3 + 7 * (count / most) ** 0.5) for count, p, seen in rows]
    x, y = Axis("what it gives", 0.0, 1.0, True), Axis("what comes true", 0.0, 1.0, True)
    says = f"Off by {points(ece)} on average (expected calibration error {number(ece)}). " if ece is not None else ""
    svg = scatter(title, dots, x, y, diagonal=True)
    data = [(count, round(p, 4), round(seen, 4)) for count, p, seen in rows]
    return Panel(title, svg, says + ON_THE_LINE, ("of", "what it gives", "what comes true"), data)


def _histogram(title: str, edges: Sequence[float], counts: Sequence[int], unit: str, things: str, note: str) -> Panel:
    svg = bars(title, edges, counts, Axis(unit, edges[0], edges[-1], True), things)
    rows = [(round(a, 6), round(b, 6), n) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    return Panel(title, svg, note, ("from", "to", things), rows)
