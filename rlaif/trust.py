"""How far a judge's labels can be trusted, read from the labels alone, and its calibration against known answers.

option mass     probability on the two option letters together: low mass means that the judge meant to say another thing
position bias   how far a reading leans to the letter A, the mean of both orders less 1/2: it cancels in the label
consistent      share of readings that prefer the same answer in both orders, of those of two different answers
ties            labels that prefer neither answer
abstentions     labels and readings that could not be read, by reason
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bylaw.model.records import Record
from bylaw.model.settings import require

TIE = 0.005
LITTLE = 0.5
"""Of the probability on all letters together, below which their comparison says little of the judge."""
BINS = 10
Z = 1.959964  # of 95 %
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def trust(preferences: Sequence[Record], tie: float = TIE) -> dict[str, Any]:
    """Measures of the labels and of the readings behind them, over all and by principle ("principles").

    A label ties when it is at most `tie` from 1/2; "same_text" are the ties whose answers are the same words, which no
    judge can tell apart. The option mass is that of every reading that was asked, abstained or not; position bias and
    consistency are those of the readings that count. Preferences without readings (people's) are counted in "pairs"
    and "labels" alone. Raises ValueError for a tie outside 0 to 1/2.
    """
    require(0 <= tie <= 0.5, "tie", tie, "0 to 0.5")
    readings = [one | {"same": _same(p)} for p in preferences for one in p.get("labels", ())]
    by_principle: dict[str, list[Record]] = {}
    for one in readings:
        by_principle.setdefault(one["principle"]["id"], []).append(one)
    return {
        "pairs": len(preferences),
        "labels": _labels(preferences, tie) | {"same_text": sum(_ties(p, tie) and _same(p) for p in preferences)},
        "tie": tie,
        **_readings(readings, tie),
        "principles": {id: _readings(some, tie) for id, some in by_principle.items()},
    }


def calibration(p: Sequence[float], truth: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """How probabilities `p` [N] compare with known answers `truth` [N], 1 for yes and 0 for no (or between).

    "ece" is the mean distance of the two by bin, over pairs (arXiv 1706.04599, equation 3); "reliability" the table
    behind it (`bylaw.rlaif.reward.reliability`); "accuracy" how often p is on the truth's side of 1/2, where the truth
    has a side (p = 1/2 is half right), None where it never has. Raises ValueError for none, or for what is not 0 to 1.
    """
    import torch  # late, so that `trust` alone needs none

    from bylaw.kernels.preference_loss import expected_calibration_error, preference_accuracy
    from bylaw.rlaif.reward import reliability

    predicted, known = (torch.tensor(list(values), dtype=torch.float64) for values in (p, truth))
    ece = expected_calibration_error(predicted, known, bins)
    right, decided = preference_accuracy(predicted, 1 - predicted, known)
    return {
        "answers": len(predicted),
        "accuracy": float(right / decided) if decided else None,
        "ece": float(ece),
        "reliability": reliability(predicted, known, bins),
    }


def describe_trust(measured: dict[str, Any]) -> str:
    """The measures as tables for a person."""
    labels, mass = measured["labels"], measured["option_mass"]
    lines = [
        f"{measured['pairs']} pairs: {labels['read']} labels, {labels['ties']} of them ties "
        f"(at most {measured['tie']:g} from 1/2; {labels['same_text']} of answers with the same words)",
        *(f"  abstained, {count}: {reason}" for reason, count in labels["abstained"].items()),
        "",
    ]
    width = max([len("principle"), *map(len, measured["principles"])])
    heads = ("readings", "abst.", "ties", "mass", "mass 5%", "bias", "|bias|", "consistent")
    lines.append(f"{'principle':<{width}}" + "".join(f"{head:>11}" for head in heads))
    rows = {"all": measured} | measured["principles"]
    lines += [f"{id:<{width}}" + "".join(f"{cell:>11}" for cell in _cells(row)) for id, row in rows.items()]
    lines += [f"  abstained, {count}: {reason}" for reason, count in measured["readings"]["abstained"].items()]
    if mass:
        lines += ["", "option mass     " + _histogram(mass["histogram"], 0.0)]
    if measured["position_bias"]:
        lines.append("position bias   " + _histogram(measured["position_bias"]["histogram"], -0.5))
    return "\n".join([*lines, "", _KEY])


_KEY = """\
mass        probability on the two option letters: mean, and what all but 5% of the questions have at least
bias        lean to the answer shown first, cancelled by asking in both orders: mean, and mean size
consistent  share of readings of two different answers that prefer the same answer in both orders"""


def _labels(records: Sequence[Record], tie: float) -> dict[str, Any]:
    """Counts of what was read, of ties, and of abstentions by reason: of preferences, or of readings."""
    reasons = Counter(one["abstained"] for one in records if one["abstained"])
    return {
        "read": len(records) - reasons.total(),
        "ties": sum(_ties(one, tie) for one in records),
        "abstained": dict(sorted(reasons.items())),
    }


def _ties(one: Record, tie: float) -> bool:
    return not one["abstained"] and 0.5 - tie <= one["p_a"] <= 0.5 + tie


def _same(preference: Record) -> bool:
    return preference["a"]["text"] == preference["b"]["text"]


def _readings(readings: Sequence[Record], tie: float) -> dict[str, Any]:
    sides = ("a_first", "b_first")
    masses = [asked["mass"] for one in readings for side in sides for asked in _asked(one, side)]
    counted = [one for one in readings if not one["abstained"] and all(side in one for side in sides)]
    biases = [one["position_bias"] for one in counted]
    leans = [[one[side]["p_first"] - 0.5 for side in sides] for one in counted if not one["same"]]
    sided = [first * second for first, second in leans if first * second]  # one half in an order is no preference
    return {
        "readings": _labels(readings, tie),
        "option_mass": spread(masses, 0.0, 1.0),
        "position_bias": spread(biases, -0.5, 0.5, absolute=True),
        "consistent": sum(product < 0 for product in sided) / len(sided) if sided else None,
    }


def _asked(reading: Record, side: str) -> list[Record]:
    """What was asked in one order and answered with letters: once, or after each of several thoughts."""
    every = reading.get(f"{side}_each", [reading[side]] if side in reading else [])
    return [one for one in every if "mass" in one]


def wilson(share: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `trials`, at least 1 (Wilson 1927, JASA 22)."""
    middle = share + Z * Z / (2 * trials)
    reach = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    whole = 1 + Z * Z / trials
    # At the ends the formula gives 0 and 1 themselves, and floats a hair beside them.
    return (middle - reach) / whole if share > 0 else 0.0, (middle + reach) / whole if share < 1 else 1.0


def spread(values: Sequence[float], low: float, high: float, absolute: bool = False) -> dict[str, Any] | None:
    """Mean, quantiles and histogram in equal bins of [low, high]; None for no values."""
    if not values:
        return None
    known = np.asarray(values, dtype=np.float64)
    # exp and a sum may leave a mass a hair above 1, which belongs to the last bin.
    counts, _ = np.histogram(known.clip(low, high), bins=BINS, range=(low, high))
    return {
        "mean": float(known.mean()),
        **({"mean_absolute": float(np.abs(known).mean())} if absolute else {}),
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(known, QUANTILES).tolist(), strict=True)),
        "histogram": counts.tolist(),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    counts, mass, bias = row["readings"], row["option_mass"], row["position_bias"]
    cells = [str(counts["read"]), str(sum(counts["abstained"].values())), str(counts["ties"])]
    cells += [f"{mass['mean']:.3f}", f"{mass['quantiles']['0.05']:.3f}"] if mass else ["-", "-"]
    cells += [f"{bias['mean']:+.3f}", f"{bias['mean_absolute']:.3f}"] if bias else ["-", "-"]
    return [*cells, "-" if row["consistent"] is None else f"{row['consistent']:.1%}"]


def _histogram(counts: Sequence[int], low: float) -> str:
    return "  ".join(f"{low + n / BINS:.1f}: {count}" for n, count in enumerate(counts))
