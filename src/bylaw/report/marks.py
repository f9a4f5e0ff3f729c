"""The marks that a judge gave to PPO's answers as their reward, by principle (rlaif/direct.py has their form)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bylaw.model.records import Record


@dataclass(frozen=True)
class Marks:
    """A principle's marks, each from 1, not at all, to 10, as well as an answer can."""

    id: str
    count: int
    mean: float | None
    """None where it gave none."""
    abstained: dict[str, int]
    """Answers that could not be marked, by reason."""


def marks_of(rollouts: Iterable[Record], ids: Sequence[str]) -> list[Marks]:
    """What the ratings of the episodes say, by principle: those of `ids` first, in their order. Nothing is kept of an
    episode, as there may be many.
    """
    sums: dict[str, float] = {}
    counts: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for one in (reading for episode in rollouts for reading in _readings(episode)):
        id = one["principle"]["id"]
        why = reasons.setdefault(id, Counter())
        sums.setdefault(id, 0.0)
        if one["abstained"]:
            why[one["abstained"]] += 1
        else:
            counts[id] += 1
            sums[id] += one["mean"]
    order = sorted(sums, key=lambda id: ids.index(id) if id in ids else len(ids))
    means = {id: sums[id] / counts[id] if counts[id] else None for id in order}
    return [Marks(id, counts[id], means[id], dict(reasons[id])) for id in order]


def _readings(episode: Record) -> list[dict[str, Any]]:
    return (episode.get("rating") or {}).get("readings", [])
