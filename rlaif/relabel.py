"""Labels under an amended constitution: only what the amendment can have changed is asked again.

A reading is carried over if the judge would be asked the very same in both orders, thought and all. What is drawn anew,
reworded or added is asked; then each pair's average is taken over the principles that judge it now.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bylaw.constitution.schema import Principle
from bylaw.model.chunks import write_chunks
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, read_records
from bylaw.rlaif.judge import ORDERS, Judge
from bylaw.rlaif.label import preferences
from bylaw.rlaif.trust import TIE

EXACT = 1e-9
"""As near to a half as this is neither side: sums of weights round."""
MOVED = 0.05
"""A label that an amendment moves by this is worth reading, whether it flips or not."""


def relabel(
    before: Judge, judge: Judge, labelled: Sequence[Record], path: Path, parallel: Parallel = ALONE
) -> dict[str, Any]:
    """Write the preferences `labelled`, which `before` made, to `path` as `judge` makes them; returns what it took.

    `comparisons`, of them `touched` (another principle, question or weight) and `asked` anew (`questions`, each in both
    orders). Untouched ones keep their readings to the bit. Raises ValueError where the two judges are not one reader
    with one configuration, or `before` is not what made the labels: then nothing can be carried over.
    """
    check_relabel(before, judge, labelled)
    kept = {one["id"]: carried(before, judge, one) for one in labelled}

    def work(chunk: Sequence[Record]) -> list[Record]:
        return preferences(judge, [pair_of(one) for one in chunk], kept)

    write_chunks(path, labelled, judge.config.pairs_per_chunk, work, "relabel", parallel)
    missing = [[p for p in judge.principles(one) if p.id not in kept[one["id"]]] for one in labelled]
    return {
        "comparisons": len(labelled),
        "touched": sum(_touched(old, new) for old, new in zip(labelled, read_records(path), strict=True)),
        "asked": sum(map(bool, missing)),
        "questions": sum(map(len, missing)),
    }


def check_relabel(before: Judge, judge: Judge, labelled: Sequence[Record]) -> None:
    """The ValueErrors of `relabel`, before any work."""
    if (before.reader.hash, before.config, before.seed) != (judge.reader.hash, judge.config, judge.seed):
        raise ValueError("the labels were made by another judge, or by other settings; make them anew: bylaw label")
    by = before.provenance()
    if other := sorted({name for one in labelled for name in by if one["by"].get(name) != by[name]}):
        raise ValueError(
            f"the labels were made by another {', '.join(other)} than the recipe names now, so they cannot be amended; "
            "put the old one back, or make the labels anew: bylaw label"
        )
    judge.check()


def carried(before: Judge, judge: Judge, preference: Record) -> dict[str, dict[str, Any]]:
    """The readings of a preference whose questions are the same for both judges, by the principle's id."""
    old = {p.id: p for p in before.constitution.for_stage("comparison")}
    new = {p.id: p for p in judge.constitution.for_stage("comparison")}
    found = {}
    for reading in preference["labels"]:
        id = reading["principle"]["id"]
        if id in old and id in new and _asked(before, old[id], preference) == _asked(judge, new[id], preference):
            found[id] = reading
    return found


def flips(before: Sequence[Record], after: Sequence[Record]) -> list[dict[str, Any]]:
    """The labels that changed sides, came to a tie or left one, or began or ceased to abstain: each with its texts and
    the probabilities and principles of both.
    """
    pairs = zip(before, after, strict=True)
    return [_flip(old, new) for old, new in pairs if side(old["p_a"]) != side(new["p_a"])]


def moved(before: Sequence[Record], after: Sequence[Record]) -> list[dict[str, Any]]:
    """The labels that flipped by more than a tie or moved by MOVED or more, the furthest first, as `flips` has them:
    most labels lie near a half, where one crosses it by a hair and another moves far on its own side.
    """
    pairs = zip(before, after, strict=True)
    found = [_flip(old, new) for old, new in pairs if _flips_firmly(old, new) or _move(old, new) >= MOVED]
    return sorted(found, key=lambda one: _move(one["before"], one["after"]), reverse=True)


def movement(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """`firm_flips`: flips between labels that are no ties (rlaif/trust.py), or of an abstention; `moved`: labels that
    moved by MOVED or more; `mean_change`: of p_a, over labels that stand on both sides, None without any.
    """
    pairs = list(zip(before, after, strict=True))
    changes = [_move(old, new) for old, new in pairs if None not in (old["p_a"], new["p_a"])]
    return {
        "firm_flips": sum(_flips_firmly(old, new) for old, new in pairs),
        "moved": sum(_move(old, new) >= MOVED for old, new in pairs),
        "mean_change": sum(changes) / len(changes) if changes else None,
    }


def side(p_a: float | None, tie: float = EXACT) -> str:
    """What a label says: a, b, tie (at most `tie` from a half), or abstained."""
    if p_a is None:
        return "abstained"
    return "tie" if abs(p_a - 0.5) <= tie else "a" if p_a > 0.5 else "b"


def _flips_firmly(old: Record, new: Record) -> bool:
    sides = side(old["p_a"], TIE), side(new["p_a"], TIE)
    return sides[0] != sides[1] and "tie" not in sides


def _move(old: Record, new: Record) -> float:
    """How far a label moved; one that began or ceased to abstain by as much as there is."""
    if old["p_a"] is None or new["p_a"] is None:
        return float(old["p_a"] is not new["p_a"])
    return abs(new["p_a"] - old["p_a"])


def pair_of(preference: Record) -> Record:
    """The pair that a preference was made of, as rlaif/compare.py wrote it."""
    return {key: preference[key] for key in ("id", "prompt_id", "prompt", "a", "b")} | {
        "by": preference["by"]["pairs_by"]
    }


def _asked(judge: Judge, principle: Principle, pair: Record) -> list[object]:
    """All that decides a reading: the question in both orders, and how a thought before it begins."""
    dialogues = [judge.dialogue(principle, pair, order) for order in ORDERS]
    thoughts = [judge.thought(dialogue, ()) for dialogue in dialogues] if judge.config.thoughts else []
    return [*map(judge.question, dialogues), *thoughts]


def _touched(old: Record, new: Record) -> bool:
    """Whether a label stands on other readings or weights than before."""

    def stands_on(preference: Record) -> list[Any]:
        return [{k: v for k, v in one.items() if k != "principle"} | _named(one) for one in preference["labels"]]

    return stands_on(old) != stands_on(new)


def _named(reading: Record) -> dict[str, str]:
    return {"principle": reading["principle"]["id"]}


def _flip(old: Record, new: Record) -> dict[str, Any]:
    kept = {key: old[key] for key in ("id", "prompt_id", "prompt")}
    texts = {name: old[name]["text"] for name in "ab"}
    return kept | texts | {"before": _said(old), "after": _said(new)}


def _said(preference: Record) -> dict[str, Any]:
    labels = {one["principle"]["id"]: one["p_a"] for one in preference["labels"]}
    return {"side": side(preference["p_a"]), "p_a": preference["p_a"], "labels": labels}
