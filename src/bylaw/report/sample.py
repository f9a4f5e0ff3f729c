"""Which records the page shows of a run that has more than a page can hold: drawn by a seed, from every principle."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from bylaw.model.records import Record

Written = tuple[Record, str]
"""A record and the HTML of its card."""


def sample(
    records: Sequence[Record],
    names: Callable[[Record], Iterable[str]],
    write: Callable[[Record], str],
    most: int,
    budget: int,
    seed: int,
) -> list[Written]:
    """At most `most` records whose cards, as `write` makes them, take at most `budget` bytes: all, in their order, or
    a sample as it is drawn.

    Each record has a draw, a function of the seed and its id. The first drawn of every one of its `names` come first,
    then the second of each, so that a principle that is seldom drawn is seen too. One that is too large is passed by.
    """
    if len(records) <= most:
        every = [(record, write(record)) for record in records]
        if sum(_bytes(card) for _, card in every) <= budget:
            return every
    chosen: list[Written] = []
    left = budget
    for tried, place in enumerate(_turns(records, names, seed)):
        if len(chosen) == most or left < budget / 50 or tried >= 2 * most:  # full: the rest is not written
            break
        card = write(records[place])
        if _bytes(card) <= left:
            chosen.append((records[place], card))
            left -= _bytes(card)
    return chosen


def _turns(records: Sequence[Record], names: Callable[[Record], Iterable[str]], seed: int) -> list[int]:
    """The places of the records, in the order in which they are taken."""
    from bylaw.kernels.philox import request_id, uniform_scalar  # torch: not when the page shows all

    drawn = [uniform_scalar(seed, request_id("report", record["id"]), 0) for record in records]
    seen: dict[str, int] = defaultdict(int)
    turn: dict[int, int] = {}
    for place in sorted(range(len(records)), key=drawn.__getitem__):
        ranks = []
        for name in set(names(records[place])):
            ranks.append(seen[name])
            seen[name] += 1
        turn[place] = min(ranks, default=0)
    return sorted(turn, key=lambda place: (turn[place], drawn[place]))


def _bytes(card: str) -> int:
    return len(card.encode())
