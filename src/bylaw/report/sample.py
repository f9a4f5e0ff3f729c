"""Which records the page shows of a run that has more than a page can hold: drawn by a seed, from every principle."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from bylaw.model.records import Record


def sample(
    records: Sequence[Record],
    names: Callable[[Record], Iterable[str]],
    size: Callable[[Record], int],
    most: int,
    budget: int,
    seed: int,
) -> list[Record]:
    """At most `most` records whose sizes add up to at most `budget`: all, in their order, or a sample as it is drawn.

    Each record has a draw, a function of the seed and its id. The first drawn of every one of its `names` come first,
    then the second of each, so that a principle that is seldom drawn is seen too. One that is too large is passed by.
    """
    from bylaw.kernels.philox import request_id, uniform_scalar  # torch: not when the page shows all

    if len(records) <= most and sum(map(size, records)) <= budget:
        return list(records)
    drawn = [uniform_scalar(seed, request_id("report", record["id"]), 0) for record in records]
    seen: dict[str, int] = defaultdict(int)
    turn: dict[int, int] = {}
    for place in sorted(range(len(records)), key=drawn.__getitem__):
        ranks = []
        for name in set(names(records[place])):
            ranks.append(seen[name])
            seen[name] += 1
        turn[place] = min(ranks, default=0)
    chosen: list[Record] = []
    left = budget
    for place in sorted(turn, key=lambda place: (turn[place], drawn[place])):
        if len(chosen) == most or left < budget / 50:  # full: the rest is not measured
            break
        needs = size(records[place])
        if needs <= left:
            chosen.append(records[place])
            left -= needs
    return chosen
