"""AI preferences: which of two answers keeps a principle better, as a probability (arXiv 2212.08073, section 4.1).

The judge reads the dialogue, a principle and both answers as options (A) and (B). Its log-probs of the two letters,
normalised over the two, are the label. Both orders are asked and averaged, so that a liking for one letter cancels
(arXiv 2309.00267):

    p(a better) = 1/2 [p(A | a first) + 1 - p(A | b first)]

A label is never rounded, and one that cannot be read abstains, with its reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bylaw.constitution.render import comparison_request
from bylaw.constitution.schema import Constitution, Principle, draw
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.chunks import write_chunks
from bylaw.model.engine import Engine
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, read_records
from bylaw.model.sampler import tokenizer_of, turn
from bylaw.rlaif.config import LabelConfig

OPTIONS = (" A", " B")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model that reads principles. `model_hash` names its checkpoint in the records."""

    engine: Engine
    constitution: Constitution
    config: LabelConfig
    seed: int
    model_hash: str

    def principles(self, pair: Record) -> tuple[Principle, ...]:
        """The principles to judge `pair` by: all, or one drawn by weight from the seed and the pair's id."""
        known = self.constitution.for_stage("comparison")
        if self.config.principles == "all":
            return known
        return (draw(known, uniform_scalar(self.seed, request_id("label", pair["id"]), 0)),)

    def prompt(self, principle: Principle, pair: Record, first: str, second: str) -> list[int]:
        """The question with answer `first` ("a" or "b") as option (A), up to where the letter comes."""
        texts = pair[first]["text"], pair[second]["text"]
        question = comparison_request(self.constitution, principle, pair["prompt"], *texts)
        prefix = self.constitution.templates.answer_prefix
        return tokenizer_of(self.engine).prompt_ids([turn("user", question)], prefix=prefix)


def label(judge: Judge, pairs: Sequence[Record], path: Path, parallel: Parallel = ALONE) -> dict[str, Any]:
    """Write one preference per pair to `path`; returns counts and means.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a tokenizer that has no single token for
    an option letter.
    """
    prefix = judge.constitution.templates.answer_prefix
    option_ids = tokenizer_of(judge.engine).option_ids(OPTIONS, after=prefix)

    def work(chunk: Sequence[Record]) -> list[Record]:
        return _preferences(judge, chunk, option_ids)

    write_chunks(path, pairs, judge.config.pairs_per_chunk, work, "label", parallel)
    return summary(read_records(path))


def summary(preferences: Sequence[Record]) -> dict[str, Any]:
    """Counts of labels and abstentions by reason; mean option mass and position bias over the labels that were read."""
    read = [one for p in preferences for one in p["labels"] if not one["abstained"]]
    reasons = [p["abstained"] for p in preferences if p["abstained"]]
    counts: dict[str, Any] = {
        "labels": len(preferences) - len(reasons),
        "abstained": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "same_text": sum(p["a"]["text"] == p["b"]["text"] for p in preferences),
    }
    if read:
        counts["option_mass"] = sum(one["a_first"]["mass"] + one["b_first"]["mass"] for one in read) / (2 * len(read))
        counts["position_bias"] = sum(one["position_bias"] for one in read) / len(read)
    return counts


def _preferences(judge: Judge, pairs: Sequence[Record], option_ids: list[int]) -> list[Record]:
    judge.engine.forget()
    asked = [(pair, principle) for pair in pairs for principle in judge.principles(pair)]
    prompts = [judge.prompt(principle, pair, *order) for pair, principle in asked for order in (("a", "b"), ("b", "a"))]
    context = judge.engine.model.config.max_position_embeddings
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
    candidates = [[token] for token in option_ids]
    scores = dict(zip(fitting, judge.engine.score([(prompts[i], candidates) for i in fitting]), strict=True))
    labels = [
        _label(principle, scores.get(2 * i), scores.get(2 * i + 1), judge.config.min_option_mass)
        for i, (_, principle) in enumerate(asked)
    ]
    by = {"seed": judge.seed, "model": judge.model_hash, "constitution": judge.constitution.hash}
    grouped = iter(labels)
    return [_preference(pair, [next(grouped) for _ in judge.principles(pair)], by) for pair in pairs]


def _label(
    principle: Principle, a_first: list[float] | None, b_first: list[float] | None, min_mass: float
) -> dict[str, Any]:
    """The reading of one principle, from the log-probs of the letters A and B in both orders; None: too long to ask."""
    named: dict[str, Any] = {"principle": {"id": principle.id, "hash": principle.hash}, "weight": principle.weight}
    if a_first is None or b_first is None:
        return named | {"p_a": None, "abstained": "question longer than the judge's context"}
    sides = [_reading(*logprobs) for logprobs in (a_first, b_first)]
    named |= {"a_first": sides[0], "b_first": sides[1]}
    if min(side["mass"] for side in sides) < min_mass:
        return named | {"p_a": None, "abstained": "too little probability on the option letters"}
    first, second = sides[0]["p_first"], sides[1]["p_first"]
    p_a = 0.5 + (first - second) / 2  # so written, equal answers have a half to the last bit
    return named | {"p_a": p_a, "position_bias": (first + second) / 2 - 0.5, "abstained": ""}


def _reading(logprob_a: float, logprob_b: float) -> dict[str, float]:
    mass = math.exp(logprob_a) + math.exp(logprob_b)
    # Normalised in log space: both letters may be too unlikely for exp.
    p_first = 1 / (1 + math.exp(min(700.0, logprob_b - logprob_a)))
    return {"logprob_A": logprob_a, "logprob_B": logprob_b, "mass": mass, "p_first": p_first}


def _preference(pair: Record, labels: list[dict[str, Any]], by: dict[str, Any]) -> Record:
    """The pair with its label: the mean over principles by weight, or the first reason if every one abstained."""
    read = [one for one in labels if not one["abstained"]]
    weight = sum(one["weight"] for one in read)
    p_a = sum(one["weight"] * one["p_a"] for one in read) / weight if read else None
    kept = {key: pair[key] for key in ("id", "prompt_id", "prompt", "a", "b")}
    abstained = "" if read else labels[0]["abstained"]
    return kept | {"p_a": p_a, "abstained": abstained, "labels": labels, "by": by | {"pairs_by": pair["by"]}}
