"""A judge on pairs whose better answer is known, such as people's preferences: asked as it labels, by the principles.

Where "accuracy" is low the judge does not see what people see, or the principles ask for something else: the measures
by principle tell which.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bylaw.model.records import Record, read_records
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.label import label
from bylaw.rlaif.trust import calibration, wilson


def ask_known(judge: Judge, known: Sequence[Record], path: Path) -> list[Record]:
    """The judge's preferences between the answers of `known`, whose own `p_a` it does not see. What a killed call wrote
    to `path` is gone on with. Errors as `label`.
    """
    label(judge, known, path)
    return read_records(path)


def measure_known(known: Sequence[Record], labelled: Sequence[Record]) -> dict[str, Any]:
    """How the labels agree with the pairs' own `p_a`, over all and by principle ("principles").

    "accuracy": of the labels that were read, the share on the side that is known; one of exactly 1/2 is half right.
    "interval": that of the accuracy, of 95 %, with the labels as trials.
    "ece" and "reliability" compare how sure a label is of its side with how often that is right (arXiv 1706.04599).
    Each is None where nothing was read.
    """
    truth = {one["id"]: one["p_a"] for one in known}
    by_principle: dict[str, list[tuple[float | None, float]]] = {}
    for one in labelled:
        for reading in one["labels"]:
            by_principle.setdefault(reading["principle"]["id"], []).append((reading["p_a"], truth[one["id"]]))
    reasons = [one["abstained"] for one in labelled if one["abstained"]]
    return {
        "pairs": len(labelled),
        "abstained": {why: reasons.count(why) for why in sorted(set(reasons))},
        **_agreement([(one["p_a"], truth[one["id"]]) for one in labelled]),
        "principles": {id: _agreement(some) for id, some in by_principle.items()},
    }


def describe_known(found: dict[str, Any]) -> str:
    """The measures as tables for a person."""
    pairs, read = found["pairs"], found["read"]
    lines = [f"{pairs} pair{'' if pairs == 1 else 's'}, {read} label{'' if read == 1 else 's'} read"]
    lines += [f"  abstained, {count}: {why}" for why, count in found["abstained"].items()]
    lines += [f"  rows left out, {count}: {why}" for why, count in found.get("left_out", {}).items()]
    width = max([len("principle"), *map(len, found["principles"])])
    lines += ["", f"{'principle':<{width}}{'read':>8}{'accuracy':>11}{'95 % interval':>16}{'ece':>9}"]
    for id, row in ({"all": found} | found["principles"]).items():
        lines.append(f"{id:<{width}}{row['read']:>8}{_cells(row)}")
    if found["read"]:
        lines += ["", f"{'sure from':<10}{'pairs':>8}{'sure':>8}{'right':>8}"]
    for row in found["reliability"] or ():
        lines.append(f"{row['from']:<10.1f}{row['pairs']:>8}{row['predicted']:>8.1%}{row['label']:>8.1%}")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    if not row["read"]:
        return f"{'-':>11}{'-':>16}{'-':>9}"
    low, high = row["interval"]
    return f"{row['accuracy']:>11.1%}{f'{low:.1%} to {high:.1%}':>16}{row['ece']:>9.3f}"


def _agreement(labels: Sequence[tuple[float | None, float]]) -> dict[str, Any]:
    """Of labels and what is known, both as the probability that answer a is better."""
    read = [(p, known) for p, known in labels if p is not None]
    if not read:
        return {"read": 0, "accuracy": None, "interval": None, "ece": None, "reliability": None}
    sure = [max(p, 1 - p) for p, _ in read]
    right = [0.5 if p == 0.5 else known if p > 0.5 else 1 - known for p, known in read]
    found = calibration(sure, right)
    return {
        "read": len(read),
        "accuracy": sum(right) / len(read),
        "interval": wilson(sum(right) / len(read), len(read)),
        "ece": found["ece"],
        "reliability": found["reliability"],
    }
