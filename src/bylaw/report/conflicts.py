"""Principles in conflict, by the principle that stands in most of them: one heading, and whom it opposes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bylaw.attribution import Conflict
from bylaw.model.records import Record
from bylaw.report.shown import deciders

GROUPS, AGAINST, EXAMPLES = 4, 12, 3
"""Headings, principles under each, and examples of each, at most."""


@dataclass(frozen=True)
class Against:
    """Another principle: pairs on which both decided, and those of them on which they decided for different answers."""

    id: str
    both: int
    opposed: int


@dataclass(frozen=True)
class Group:
    """A principle and those that it opposes, the most often opposed first."""

    id: str
    against: list[Against]
    others: int
    """How many more it opposes."""
    examples: list[Record]
    """Preferences on which they are furthest apart."""


@dataclass(frozen=True)
class Conflicts:
    """The groups that the page shows, and in how many pairs of principles there is any conflict."""

    groups: list[Group]
    shown: int
    all: int


def grouped(found: Sequence[Conflict], preferences: Sequence[Record]) -> Conflicts:
    """The conflicts under the principles that stand in most of those that no heading has yet."""
    left, groups = list(found), []
    by_id = {one["id"]: one for one in preferences}
    while left and len(groups) < GROUPS:
        head = _most(left)
        own = [one for one in left if head in (one.first, one.second)]
        left = [one for one in left if one not in own]
        examples = dict.fromkeys(id for n in range(EXAMPLES) for one in own for id in one.examples[n : n + 1])
        shown = [by_id[id] for id in list(examples)[:EXAMPLES]]
        against = [_against(one, head) for one in own[:AGAINST]]
        groups.append(Group(head, against, len(own) - len(against), shown))
    return Conflicts(groups, sum(len(group.against) for group in groups), len(found))


def sides(preference: Record, group: Group) -> dict[str, list[tuple[str, float]]]:
    """For each answer, those of the group's principles that decided for it, and how probable each finds it better."""
    ids = {group.id, *(one.id for one in group.against)}
    told = [(id, p, to) for id, p, to in deciders(preference) if id in ids]
    return {side: [(id, p if side == "a" else 1 - p) for id, p, to in told if to == side] for side in "ab"}


def _most(found: Sequence[Conflict]) -> str:
    """Who stands in most of the conflicts; of several, who is opposed on more pairs."""
    times: Counter[str] = Counter()
    opposed: Counter[str] = Counter()
    for one in found:
        for id in (one.first, one.second):
            times[id] += 1
            opposed[id] += one.opposed
    return max(times, key=lambda id: (times[id], opposed[id]))


def _against(one: Conflict, head: str) -> Against:
    return Against(one.second if head == one.first else one.first, one.both, one.opposed)
