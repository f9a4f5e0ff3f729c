"""What to worry about in the judge and in its labels. Each flag says what was found, and against which bound."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bylaw.model.records import Record
from bylaw.report.flag import ENOUGH, Flag, level
from bylaw.report.forms import SIDES
from bylaw.report.gather import RunFacts
from bylaw.report.judged import asked_of
from bylaw.report.shown import same
from bylaw.words import many, percent, points

SURE = 0.05
"""Picked is what has more than one half and this."""
TURNED = 0.2
BIAS = 0.05
MASS = 0.9
ABSTAINED = 0.05
SAME = 0.2
TIES = 0.3
LEAN = 0.03
ABOVE_CHANCE = 0.15
ECE = 0.1


def judge_flags(run: RunFacts, measured: Record) -> Iterator[Flag]:
    """Those of the judge, of its labels, and of what it was asked where the answer is known. `measured` is what
    `trust` says of the labels.
    """
    yield from _position(measured)
    yield from _order(run.preferences)
    yield from _mass(measured)
    yield from _labels(run.preferences, measured)
    yield from _known(run)


def _position(measured: Record) -> Iterator[Flag]:
    bias = _mean(measured)
    if abs(bias) > BIAS:
        text = f"By {points(bias)} on average (bound {points(BIAS)}). Both orders are averaged, which cancels it."
        yield Flag(level(abs(bias) > 3 * BIAS), f"The judge leans to the answer shown {_place(bias)}", text)
        return
    rows = {id: row for id, row in measured["principles"].items() if row["readings"]["read"] >= ENOUGH}
    leaning = {id: _mean(row) for id, row in rows.items() if abs(_mean(row)) > BIAS}
    if leaning:
        told = "; ".join(f"{id}: {points(mean)} to the {_place(mean)}" for id, mean in leaning.items())
        text = (
            f"Over all principles its leans cancel, by single ones they do not (bound {points(BIAS)}): {told}. Both "
            "orders are averaged, which cancels it."
        )
        worst = max(map(abs, leaning.values()))
        yield Flag(level(worst > 3 * BIAS), "By some principles the judge leans to one place", text)


def _mean(measured: Record) -> float:
    return measured["position_bias"]["mean"] if measured["position_bias"] else 0.0


def _place(bias: float) -> str:
    return "first" if bias > 0 else "second"


def _order(preferences: Sequence[Record]) -> Iterator[Flag]:
    readings = [one for p in preferences if not same(p) for one in p.get("labels") or [] if not one["abstained"]]
    asked = [one for one in readings if all(one.get(side) for side in SIDES)]
    leans = [[one[side]["p_first"] - 0.5 for side in SIDES] for one in asked]
    decided = [lean for lean in leans if min(map(abs, lean)) > SURE]
    turned = sum(first * second > 0 for first, second in decided)
    if len(decided) >= ENOUGH and turned > TURNED * len(decided):
        text = (
            f"{percent(turned / len(decided))} of {many(len(decided), 'judgement')} that are decided in both orders "
            f"(over {percent(0.5 + SURE)} each time) go to the same place, not to the same answer (bound "
            f"{percent(TURNED)}). Their labels stay near one half, and teach little."
        )
        yield Flag(level(turned > 2 * TURNED * len(decided)), "The order often decides", text)


def _mass(measured: Record) -> Iterator[Flag]:
    mass = measured["option_mass"]["mean"] if measured["option_mass"] else 1.0
    if mass < MASS:
        text = (
            f"On average {percent(mass)} of its probability lies on the letters A and B (bound {percent(MASS)}): it "
            "often wanted to say something else."
        )
        yield Flag("worry", "The judge often does not answer with a letter", text)


def _labels(preferences: Sequence[Record], measured: Record) -> Iterator[Flag]:
    pairs, reasons = measured["pairs"], measured["labels"]["abstained"]
    if reasons:
        told = sum(reasons.values()) / pairs
        text = "; ".join(f"{reason}: {many(count, 'pair')}" for reason, count in reasons.items())
        text = f"They teach nothing (bound: none; a worry above {percent(ABSTAINED)}). {text}."
        yield Flag(level(told > ABSTAINED), f"{percent(told, 1)} of the labels abstain", text)
    yield from _ties(preferences, measured)
    known = [p["p_a"] for p in preferences if not p["abstained"]]
    lean = sum(known) / len(known) - 0.5 if len(known) >= ENOUGH else 0.0
    if abs(lean) > LEAN:
        text = (
            f"The mean label is {percent(0.5 + lean, 1)}. Answers A and B are drawn alike, so it should be one half, "
            f"give or take {points(LEAN)}."
        )
        yield Flag("worry", f"Labels lean to answer {'A' if lean > 0 else 'B'}", text)


def _ties(preferences: Sequence[Record], measured: Record) -> Iterator[Flag]:
    pairs, labels = measured["pairs"], measured["labels"]
    alike = sum(map(same, preferences)) / pairs if pairs else 0.0
    if alike > SAME:
        text = (
            f"Two equal answers cannot be compared (bound {percent(SAME)}). A higher temperature or more varied "
            "prompts give more to learn from."
        )
        yield Flag(level(alike > 3 * SAME), f"{percent(alike)} of the pairs have twice the same text", text)
    unlike, ties = labels["read"] - labels["same_text"], labels["ties"] - labels["same_text"]
    if unlike >= ENOUGH and ties > TIES * unlike:
        text = (
            f"Of {many(unlike, 'label')} of two different answers, {ties:,} lie within {points(measured['tie'])} of "
            f"one half (bound {percent(TIES)}). They say that neither answer is better, and teach next to nothing."
        )
        yield Flag(level(ties > 2 * TIES * unlike), f"{percent(ties / unlike)} of the labels are ties", text)


def _known(run: RunFacts) -> Iterator[Flag]:
    """Where the right answer is known: by a world's oracle, and from `bylaw judge`."""
    ece, of = run.summary.get("label_ece"), run.summary.get("labels_decided")
    if ece is not None and ece > ECE:
        among = "" if of is None else f" over {many(round(of), 'judgement')}"
        yield _uncalibrated("The judge's probabilities are badly calibrated", ece, among)
    for one in run.known:
        yield from _file(one)


def _file(one: Mapping[str, Any]) -> Iterator[Flag]:
    if one["read"] < ENOUGH or one.get("accuracy") is None:
        return
    things = f"{one['read']:,.0f} known answers of {asked_of(one)}"
    chance = one["chance"] if one.get("chance") is not None else 0.5
    least = chance + ABOVE_CHANCE
    if one["accuracy"] < least:
        text = (
            f"Of {things} it has {percent(one['accuracy'], 1)} right; a coin would have {percent(chance)} (bound "
            f"{percent(least)})."
        )
        yield Flag("worry", "The judge hardly knows better than chance", text)
    if one.get("ece") is not None and one["ece"] > ECE:
        yield _uncalibrated(f"The judge is badly calibrated on {asked_of(one)}", one["ece"], f" over {things}")


def _uncalibrated(title: str, ece: float, among: str) -> Flag:
    text = f"They are off by {points(ece)} on average{among} (expected calibration error, bound {points(ECE)})."
    return Flag("worry", title, text)
