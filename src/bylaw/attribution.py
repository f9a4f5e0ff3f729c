"""What each principle did in a run: how often it was drawn, what it changed, and how it moved the labels.

Everything is read from the records of the chains and of the preferences; no model runs. Which of two answers is called
a is arbitrary, so a principle's direction is told against the others on the same pair: their mean by weight, without
this principle ("the rest").
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bylaw.constitution import Constitution
from bylaw.model.records import Record
from bylaw.model.settings import require
from bylaw.rlaif.trust import TIE

DECIDED = 0.05
"""A principle has decided on a pair when its probability is at least this far from 1/2."""
EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class PrincipleEffect:
    """One principle's part in a run. Shares and means are None where there is nothing to take them over."""

    id: str
    title: str
    """"" for a principle that the constitution does not have: the records are of an earlier text."""
    weight: float | None
    """As in the constitution."""
    rounds: int
    """Rounds of critique that it was drawn for."""
    changed: int
    """Of them, those whose revision differs from the text before it."""
    labels: int
    """Pairs that it gave a probability."""
    abstained: dict[str, int]
    """Pairs that it gave none, by reason."""
    strength: float | None
    """Mean |p - 1/2|."""
    decided: float | None
    """Share of its labels with |p - 1/2| of at least the threshold."""
    direction: float | None
    """Mean of p - 1/2 counted towards the answer that the rest prefers: negative when it pulls against the rest."""
    disagrees: float | None
    """Share of pairs on which it and the rest lie on opposite sides of 1/2, of those where both have a side."""
    flips: int
    """Pairs whose label lies on the other side of 1/2 when this principle's reading is left out."""
    firm_flips: int
    """Of them, those whose label is no tie (rlaif/trust.py) with it nor without it: most others lie near 1/2."""
    lost: int
    """Pairs that have no label without it: no other principle gave one."""
    change: float | None
    """Mean |change of p_a| when its reading is left out, over the pairs that keep a label."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Two principles that decided on the same pairs."""

    first: str
    second: str
    both: int
    """Pairs on which both decided."""
    opposed: int
    """Of them, those on which they decided for different answers."""
    examples: tuple[str, ...]
    """Ids of the preferences on which they are furthest apart."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What each principle did, and which of them conflict most."""

    principles: tuple[PrincipleEffect, ...]
    """In the order of the constitution, then those that only the records know."""
    conflicts: tuple[Conflict, ...]
    """Those that were opposed on some pair, the most often opposed first."""
    chains: int
    pairs: int
    """Preferences with readings by principles."""
    without_readings: int
    """Preferences without any, such as people's: no principle had a part in them."""
    threshold: float
    """The distance from 1/2 that counts as decided."""


def attribute(
    chains: Sequence[Record], preferences: Sequence[Record], constitution: Constitution, decided: float = DECIDED
) -> Attribution:
    """Measure what each principle did to the answers of `chains` and to the labels of `preferences`, either of which
    may be empty. Raises ValueError for a threshold `decided` outside 0 to 1/2.
    """
    require(0 < decided <= 0.5, "decided", decided, "above 0 and at most 0.5")
    read = [preference for preference in preferences if preference.get("labels")]
    ids = _ids(chains, read, constitution)
    rounds, changed = _drawn(chains)
    table = _Labels.of(read, ids, decided)
    known = {principle.id: principle for principle in constitution.principles}
    effects = [
        PrincipleEffect(
            id=id,
            title=known[id].title if id in known else "",
            weight=known[id].weight if id in known else None,
            rounds=rounds[id],
            changed=changed[id],
            **table.effect(k),
        )
        for k, id in enumerate(ids)
    ]
    return Attribution(
        principles=tuple(effects),
        conflicts=tuple(table.conflicts()),
        chains=len(chains),
        pairs=len(read),
        without_readings=len(preferences) - len(read),
        threshold=decided,
    )


def attribute_run(run: Path, decided: float = DECIDED) -> Attribution:
    """`attribute` for a run folder, as far as it has come. Raises FileNotFoundError for one without chains and labels.

    Titles and weights are those of the constitution that judged the pairs, or, before that, that the chains used.
    """
    from bylaw.ledger import Ledger  # torch: only where a run is read

    ledger = Ledger(run)
    if not ledger.chains and not ledger.preferences:
        raise FileNotFoundError(
            f"{run}: nothing in revise/chains.jsonl nor label/preferences.jsonl; run these stages first"
        )
    return attribute(list(ledger.chains.values()), list(ledger.preferences.values()), ledger.constitution, decided)


def describe_attribution(found: Attribution) -> str:
    """The measures as two tables for a person."""
    width = max([len("principle"), *(len(effect.id) for effect in found.principles)])
    heads = (
        "rounds",
        "changed",
        "labels",
        "abst.",
        "strength",
        "decided",
        "direction",
        "disagrees",
        "flips",
        "firm",
        "change",
    )
    lines = [f"{found.chains} chains, {found.pairs} pairs labelled by principles", ""]
    if found.without_readings:
        lines.insert(1, f"{found.without_readings} preferences have no reading by a principle")
    lines.append(f"{'principle':<{width}}" + "".join(f"{head:>10}" for head in heads))
    lines += [
        f"{effect.id:<{width}}" + "".join(f"{cell:>10}" for cell in _cells(effect)) for effect in found.principles
    ]
    lines += ["", _KEY.format(far=found.threshold, tie=TIE), "", "Principles that conflict most:"]
    clashes = [_clash(one) for one in found.conflicts[:10]] or ["none decided against another on the same pair"]
    return "\n".join([*lines, *(f"  {clash}" for clash in clashes)])


def _clash(one: Conflict) -> str:
    examples = ", ".join(one.examples)
    return f"{one.first} and {one.second}: opposed on {one.opposed} of {one.both} pairs, such as {examples}"


_KEY = """\
changed    share of its rounds whose revision differs from the text before
strength   mean distance of its labels from 1/2; decided: share at least {far:g} away
direction  mean of p - 1/2 towards the answer that the other principles prefer; negative: it pulls against them
disagrees  share of pairs where it and the others prefer different answers
flips      pairs whose label changes sides without it; firm: those of them that are no ties (at most {tie:g} from 1/2)
change     mean change of the label without it"""


def _cells(effect: PrincipleEffect) -> list[str]:
    def share(value: float | None, form: str = ".1%") -> str:
        return "-" if value is None else format(value, form)

    changed = share(effect.changed / effect.rounds) if effect.rounds else "-"
    counts = [str(effect.rounds), changed, str(effect.labels), str(sum(effect.abstained.values()))]
    means = [share(effect.strength, ".3f"), share(effect.decided), share(effect.direction, "+.3f")]
    flips = [str(effect.flips), str(effect.firm_flips)]
    return [*counts, *means, share(effect.disagrees), *flips, share(effect.change, ".3f")]


def _ids(chains: Sequence[Record], preferences: Sequence[Record], constitution: Constitution) -> list[str]:
    """All principles, those of the constitution first."""
    drawn = (step["principle"]["id"] for chain in chains for step in chain["rounds"])
    judged = (one["principle"]["id"] for preference in preferences for one in preference["labels"])
    return list(dict.fromkeys([*(principle.id for principle in constitution.principles), *drawn, *judged]))


def _drawn(chains: Sequence[Record]) -> tuple[Counter[str], Counter[str]]:
    """Rounds by principle, and those of them that changed the answer."""
    rounds: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for chain in chains:
        before = chain["answer"]["text"]
        for step in chain["rounds"]:
            id, after = step["principle"]["id"], step["revision"]["text"]
            rounds[id] += 1
            changed[id] += after != before
            before = after
    return rounds, changed


@dataclass(frozen=True)
class _Labels:
    """The readings as a table: pairs in rows, principles in columns."""

    pair_ids: list[str]
    principle_ids: list[str]
    centred: np.ndarray  # [N, K]: p - 1/2, and 0 where there is no label
    weights: np.ndarray  # [N, K]: 0 where there is no label
    reasons: list[Counter[str]]  # [K]: abstentions
    decided: float

    @classmethod
    def of(cls, preferences: Sequence[Record], ids: list[str], decided: float) -> "_Labels":
        column = {id: k for k, id in enumerate(ids)}
        centred, weights = np.zeros((2, len(preferences), len(ids)))
        reasons: list[Counter[str]] = [Counter() for _ in ids]
        for n, preference in enumerate(preferences):
            for one in preference["labels"]:
                k = column[one["principle"]["id"]]
                if one["abstained"]:
                    reasons[k][one["abstained"]] += 1
                else:
                    centred[n, k], weights[n, k] = one["p_a"] - 0.5, one["weight"]
        return cls([preference["id"] for preference in preferences], ids, centred, weights, reasons, decided)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] each: of weight (p - 1/2), and of weight."""
        return (self.weights * self.centred).sum(1), self.weights.sum(1)

    @cached_property
    def sides(self) -> np.ndarray:
        """[N, K]: 1 where the principle decided for a, -1 for b, else 0. Compared as probabilities: 0.6 is 0.1 from
        1/2, though in floating point 0.6 - 0.5 < 0.1.
        """
        p = self.centred + 0.5
        return (p >= 0.5 + self.decided).astype(int) - (p <= 0.5 - self.decided).astype(int)

    def effect(self, k: int) -> dict:
        """The measures of column `k`, by the names of `PrincipleEffect`."""
        has = self.weights[:, k] > 0
        own, weight, others = self.centred[has, k], self.weights[has, k], (self.weights[has] > 0).sum(1) > 1
        total, all_weights = (column[has] for column in self.sums)
        rest = (total - weight * own)[others] / (all_weights - weight)[others]
        whole = total[others] / all_weights[others]
        towards = np.sign(rest) * own[others]
        return {
            "labels": len(own),
            "abstained": dict(sorted(self.reasons[k].items())),
            "strength": _mean(np.abs(own)),
            "decided": _mean(self.sides[has, k] != 0),
            "direction": _mean(towards[rest != 0]),
            "disagrees": _mean(towards[towards != 0] < 0),
            "flips": int((rest * whole < 0).sum()),
            "firm_flips": int(((rest * whole < 0) & (np.minimum(np.abs(rest), np.abs(whole)) > TIE)).sum()),
            "lost": int((~others).sum()),
            "change": _mean(np.abs(whole - rest)),
        }

    def conflicts(self) -> Iterator[Conflict]:
        for_a, for_b = (np.asarray(self.sides == side, dtype=np.float64) for side in (1, -1))  # floats: BLAS is quick
        opposed = for_a.T @ for_b + for_b.T @ for_a  # [K, K]
        both = opposed + for_a.T @ for_a + for_b.T @ for_b
        count = len(self.principle_ids)
        couples = [(i, j) for i in range(count) for j in range(i + 1, count) if opposed[i, j]]
        for i, j in sorted(couples, key=lambda ij: (-opposed[ij], -opposed[ij] / both[ij])):
            rows = np.flatnonzero(self.sides[:, i] * self.sides[:, j] < 0)
            gaps = np.abs(self.centred[rows, i] - self.centred[rows, j])
            examples = tuple(self.pair_ids[n] for n in rows[np.argsort(-gaps, kind="stable")[:EXAMPLES]])
            names = self.principle_ids[i], self.principle_ids[j]
            yield Conflict(
                first=names[0], second=names[1], both=int(both[i, j]), opposed=int(opposed[i, j]), examples=examples
            )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
