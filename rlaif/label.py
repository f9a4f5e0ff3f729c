"""AI preferences: which of two answers keeps a principle better, as a probability (arXiv 2212.08073, section 4.1).

The judge reads the dialogue, a principle and both answers as options (A) and (B). Its log-probs of the two letters,
normalised over the two, are the label. Both orders are asked and averaged, so that a liking for one letter cancels
(arXiv 2309.00267):

    p(a better) = 1/2 [p(A | a first) + 1 - p(A | b first)]

A judge that thinks first writes one or more thoughts for each order, and the probabilities after them are averaged.
They come out near to 0 and 1, so the label, averaged over thoughts, orders and principles, is then clamped, by the
paper to 40 to 60 %; what it was is kept as `unclamped`, and what each principle says stays as it was read.

A label is never rounded, and one that cannot be read abstains, with its reason.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bylaw.constitution.schema import Principle
from bylaw.model.chunks import write_chunks
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, read_records
from bylaw.rlaif.config import LabelConfig
from bylaw.rlaif.judge import ORDERS, Judge
from bylaw.rlaif.reader import CENSORED, FILTERED, Reading

TOO_LITTLE = "too little probability on the option letters"
NO_THOUGHT = "no thought, or no room for one"
Kept = Mapping[str, Mapping[str, dict[str, Any]]]
"""Readings that are known, by a pair's id and a principle's."""


def label(judge: Judge, pairs: Sequence[Record], path: Path, parallel: Parallel = ALONE) -> dict[str, Any]:
    """Write one preference per pair to `path`; returns counts and means.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a judge that cannot be asked: such as
    one whose tokenizer has no single token for an option letter.
    """
    judge.check()

    def work(chunk: Sequence[Record]) -> list[Record]:
        return preferences(judge, chunk)

    write_chunks(path, pairs, judge.config.pairs_per_chunk, work, "label", parallel)
    return summary(read_records(path))


def summary(preferences: Sequence[Record]) -> dict[str, Any]:
    """Counts of labels and abstentions by reason; mean option mass and position bias over the labels that were read;
    of a judge that thinks, how many thoughts it had, were cut, or gave no letter, and how many labels were clamped.
    """
    every = [one for p in preferences for one in p["labels"]]
    read = [one for one in every if not one["abstained"]]
    reasons = [p["abstained"] for p in preferences if p["abstained"]]
    counts: dict[str, Any] = {
        "labels": len(preferences) - len(reasons),
        "abstained": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "same_text": sum(p["a"]["text"] == p["b"]["text"] for p in preferences),
    }
    if read:
        counts["option_mass"] = sum(one["a_first"]["mass"] + one["b_first"]["mass"] for one in read) / (2 * len(read))
        counts["position_bias"] = sum(one["position_bias"] for one in read) / len(read)
    thoughts = [thought for one in every for side in one.get("thoughts", {}).values() for thought in side]
    if thoughts:
        sides = [side for one in every for order in ORDERS for side in one[f"{order}_each"]]
        counts["thoughts"] = len(thoughts)
        counts["cut_thoughts"] = sum(thought["finish"] == "length" for thought in thoughts)
        counts["unread_thoughts"] = sum(bool(side.get("abstained")) for side in sides)
        counts["clamped"] = sum(one["p_a"] != one.get("unclamped", one["p_a"]) for one in preferences)
    return counts


def preferences(judge: Judge, pairs: Sequence[Record], kept: Kept | None = None) -> list[Record]:
    """The preferences of some pairs, asked together. Readings `kept` from an earlier label are not asked for."""
    judge.reader.forget()
    by_pair = [judge.principles(pair) for pair in pairs]
    known = [
        (pair, one, (kept or {}).get(pair["id"], {}).get(one.id))
        for pair, principles in zip(pairs, by_pair, strict=True)
        for one in principles
    ]
    fresh = iter(_ask(judge, [(pair, one) for pair, one, reading in known if reading is None]))
    labels = [(next(fresh) if reading is None else reading) | judge.named(one) for _, one, reading in known]
    grouped = _grouped(labels, [len(principles) for principles in by_pair])
    by = judge.provenance()
    return [
        _preference(pair, ofpair, by, judge.config) | judge.drawn(pair)
        for pair, ofpair in zip(pairs, grouped, strict=True)
    ]


def _ask(judge: Judge, asked: Sequence[tuple[Record, Principle]]) -> list[dict[str, Any]]:
    """The reading of each pair by a principle: thoughts first, if there are any, then all letters in one call."""
    count = judge.config.thoughts
    keys = [(pair["id"], one.id, order) for pair, one in asked for order in ORDERS]
    shown = {id: judge.shown(pair) for id, pair in {pair["prompt_id"]: pair for pair, _ in asked}.items()}
    dialogues = [judge.dialogue(one, pair, order, shown[pair["prompt_id"]]) for pair, one in asked for order in ORDERS]
    thoughts: list[list[Record]] = [[] for _ in keys]
    if count:
        opened = [judge.thought(d, (*key, n)) for d, key in zip(dialogues, keys, strict=True) for n in range(count)]
        thoughts = _grouped(judge.reader.think(opened), [count] * len(keys))
    texts = [[thought["text"] for thought in one] or [""] for one in thoughts]
    questions = [judge.question(d, text) for d, said in zip(dialogues, texts, strict=True) for text in said]
    readings = _grouped(judge.reader.read(questions), [len(said) for said in texts])
    sides = [(_thought_out(judge, read, said), said) for read, said in zip(readings, thoughts, strict=True)]
    return [
        judge.named(one) | _label(first, second, judge.config)
        for (_, one), first, second in zip(asked, sides[::2], sides[1::2], strict=True)
    ]


def _thought_out(judge: Judge, readings: Sequence[Reading], thoughts: Sequence[Record]) -> list[Reading]:
    """The readings, less those that stand on no thought at all, where there was to be one, or on a censored one."""
    faults = [_fault(judge, thought) for thought in thoughts] or [""]
    return [Reading(None, why) if why else one for one, why in zip(readings, faults, strict=True)]


def _fault(judge: Judge, thought: Record) -> str:
    """Why nothing stands on a thought; "" if something may. One that is an answer at once leaves no words before it."""
    if thought["finish"] == CENSORED:
        return FILTERED
    return NO_THOUGHT if judge.question([], thought["text"]) == judge.question([]) else ""


def _grouped(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive items, so many in each group."""
    rest = iter(items)
    return [[next(rest) for _ in range(size)] for size in sizes]


Side = tuple[list[Reading], list[Record]]
"""Of one order of the answers: a reading for each thought, or one without, and the thoughts."""


def _label(a_first: Side, b_first: Side, config: LabelConfig) -> dict[str, Any]:
    """The reading of one principle from both orders."""
    each = {
        name: [_reading(one, config) for one in side[0]] for name, side in zip(ORDERS, (a_first, b_first), strict=True)
    }
    means = [_mean(readings) for readings in each.values()]
    found: dict[str, Any] = {} if None in means else dict(zip(ORDERS, means, strict=True))
    if config.thoughts:
        found |= {"thoughts": {"a_first": a_first[1], "b_first": b_first[1]}}
        found |= {f"{name}_each": readings for name, readings in each.items()}
    unread = [readings[0]["abstained"] for readings in each.values() if all(one["abstained"] for one in readings)]
    if unread:
        return found | {"p_a": None, "abstained": unread[0]}
    first, second = (mean["p_first"] for mean in means if mean is not None)
    p_a = 0.5 + (first - second) / 2  # so written, equal answers have a half to the last bit
    return found | {"p_a": p_a, "position_bias": (first + second) / 2 - 0.5, "abstained": ""}


def _reading(reading: Reading, config: LabelConfig) -> dict[str, Any]:
    """The letters' log-probs, their share of all probability, and the first one's of both; and why they say nothing."""
    if reading.logprobs is None:
        return {"abstained": reading.why}
    logprob_a, logprob_b = reading.logprobs
    mass = math.exp(logprob_a) + math.exp(logprob_b)
    # Normalised in log space: both letters may be too unlikely for exp.
    p_first = 1 / (1 + math.exp(min(700.0, logprob_b - logprob_a)))
    side = {"logprob_A": logprob_a, "logprob_B": logprob_b, "mass": mass, "p_first": p_first}
    bounded = {"bounded": True} if reading.bounded else {}
    return side | bounded | {"abstained": "" if mass >= config.min_option_mass else TOO_LITTLE}


def _mean(readings: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One side from those of its readings that say something; from those that have letters at all, if none does.

    Log-probs are those of the mean probabilities. None where there is no letter.
    """
    lettered = [one for one in readings if "mass" in one]
    used = [one for one in lettered if not one["abstained"]] or lettered
    if not used:
        return None
    side = {name: value for name, value in used[0].items() if name != "abstained"}
    if len(used) > 1:
        for name in ("logprob_A", "logprob_B"):
            most = max(one[name] for one in used)
            side[name] = most + math.log(math.fsum(math.exp(one[name] - most) for one in used) / len(used))
        side |= {name: math.fsum(one[name] for one in used) / len(used) for name in ("mass", "p_first")}
        side |= {"bounded": True} if any("bounded" in one for one in used) else {}
    return side


def _preference(pair: Record, labels: list[dict[str, Any]], by: dict[str, Any], config: LabelConfig) -> Record:
    """The pair with its label: the mean over principles by weight, or the first reason if every one abstained."""
    read = [one for one in labels if not one["abstained"]]
    weight = sum(one["weight"] for one in read)
    p_a = sum(one["weight"] * one["p_a"] for one in read) / weight if read else None
    kept = {key: pair[key] for key in ("id", "prompt_id", "prompt", "a", "b")}
    abstained = "" if read else labels[0]["abstained"]
    said = {"p_a": p_a} if p_a is None or not config.thoughts else _clamped(p_a, config.clamp)
    return kept | said | {"abstained": abstained, "labels": labels, "by": by | {"pairs_by": pair["by"]}}


def _clamped(p_a: float, clamp: float) -> dict[str, float]:
    """Only after all averaging: clamped parts would not average to what the whole is clamped to."""
    return {"p_a": min(max(p_a, clamp), 1 - clamp), "unclamped": p_a}
