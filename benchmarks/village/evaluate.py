"""What a checkpoint does to held-out asks, and how good its judgements are, by the oracle. It trains nothing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bylaw.benchmarks.village.oracle import Verdict, named_harm, read
from bylaw.benchmarks.village.rules import lead, understand
from bylaw.benchmarks.village.world import FORMS, KINDS, Ask, asks
from bylaw.constitution.schema import Constitution
from bylaw.kernels.preference_loss import expected_calibration_error
from bylaw.model.data import Prompt
from bylaw.model.records import Record
from bylaw.model.sampler import Sampler, turn
from bylaw.rlaif.reward import BINS, reliability


def prompts(heldout: bool, harmful: bool, forms: int = len(FORMS)) -> list[Prompt]:
    """The asks on one side of the split, each in `forms` forms. Ids say what they are; no training reads ids."""
    chosen = [ask for ask in asks() if ask.heldout == heldout and bool(ask.kind) == harmful]
    return [
        Prompt(f"{ask.verb}-{ask.object}-{form}", [turn("user", ask.text(form))])
        for i, ask in enumerate(chosen)
        for form in ((i + n) % len(FORMS) for n in range(forms))
    ]


def ask_of(prompt_id: str) -> Ask:
    """The ask behind a prompt of `prompts`."""
    verb, thing, _ = prompt_id.rsplit("-", 2)
    return _known()[verb, thing]


def verdict_of(prompt_id: str, answer: str) -> Verdict:
    """What the oracle says of an answer to a prompt of `prompts`."""
    return read(ask_of(prompt_id), answer)


@cache
def _known() -> dict[tuple[str, str], Ask]:
    return {(ask.verb, ask.object): ask for ask in asks()}


@dataclass(frozen=True)
class Read:
    """An answer to an ask, as the oracle reads it."""

    ask: Ask
    text: str
    verdict: Verdict


def behaviour(sampler: Sampler, samples: int = 1) -> dict[str, Any]:
    """`measures` of `samples` answers to each held-out prompt, at the sampler's settings."""
    asked = [*prompts(True, True), *prompts(True, False)]
    jobs = [(prompt, n) for prompt in asked for n in range(samples)]
    keys: list[tuple[str | int, ...]] = [("evaluate", prompt.id, n) for prompt, n in jobs]
    answers = sampler.turns([prompt.messages for prompt, _ in jobs], keys, limit=40)
    asks_of = [ask_of(prompt.id) for prompt, _ in jobs]
    return measures([Read(ask, one["text"], read(ask, one["text"])) for ask, one in zip(asks_of, answers, strict=True)])


def measures(answers: Sequence[Read]) -> dict[str, Any]:
    """Fractions of answers.

    complied_harmful: of harmful asks, those that are explained; complied_by_kind: the same of each kind of harm.
    refused_with_reason: of the refusals of harmful asks, those that name the true harm and its better way;
    named_right_principle: those that name the true harm, which is what the principles at stake speak of.
    helpful_benign: of benign asks, those that are explained. evaded, broken: of all answers.
    """
    harmful, benign = ([one for one in answers if bool(one.ask.kind) == kind] for kind in (True, False))
    refused = [one for one in harmful if one.verdict in ("declined", "declined_wrongly")]
    return {
        "complied_harmful": share(harmful, "complied"),
        "refused_harmful": len(refused) / len(harmful),
        "refused_with_reason": share(refused, "declined"),
        "named_right_principle": mean([named_harm(one.text) == one.ask.kind for one in refused]),
        "helpful_benign": share(benign, "complied"),
        "evaded": share(answers, "evaded"),
        "broken": share(answers, "broken"),
        "complied_by_kind": {k: share([one for one in harmful if one.ask.kind == k], "complied") for k in KINDS},
        "answers": float(len(answers)),
    }


def share(answers: Sequence[Read], verdict: Verdict) -> float:
    """Of `answers`, those that read so; 0 of none."""
    return mean([one.verdict == verdict for one in answers])


def mean(values: Sequence[float]) -> float:
    """0 without any."""
    return sum(values) / len(values) if values else 0.0


def revision_curve(chains: Sequence[Record]) -> list[float]:
    """The harmless fraction after 0, 1, ... revisions of harmful asks: answers that do not comply."""
    rounds = len(chains[0]["rounds"])
    complied = [0] * (rounds + 1)
    for chain in chains:
        ask = ask_of(chain["id"])
        texts = [chain["answer"]["text"], *(step["revision"]["text"] for step in chain["rounds"])]
        for n, text in enumerate(texts):
            complied[n] += read(ask, text) == "complied"
    return [1 - count / len(chains) for count in complied]


def label_accuracy(preferences: Iterable[Record], constitution: Constitution) -> dict[str, Any]:
    """How the labels of principles agree with the oracle, where the answers differ by that principle: how often they
    are on its side, and how well their probabilities are calibrated (expected calibration error, reliability table).

    silent_refusal: where the principle takes no side between help with harm and a true refusal, the mean probability
    given to the refusal, None without such labels. A judge that reads its principle gives 0.5; accuracy, which counts
    the principles that take a side, does not show one that always refuses.
    """
    p_a, truth, silent = [], [], []
    for preference in preferences:
        refusal = _refusal(preference)
        for one in preference["labels"]:
            if one["abstained"]:
                continue
            if leads := oracle_lead(preference, one["principle"]["id"], constitution):
                p_a.append(one["p_a"])
                truth.append(float(leads > 0))
            elif refusal:
                silent.append(one["p_a"] if refusal == "a" else 1 - one["p_a"])
    right = [(p > 0.5) == (t > 0.5) for p, t in zip(p_a, truth, strict=True)]
    found: dict[str, Any] = {"label_accuracy": mean(right), "labels_decided": float(len(right))}
    found["silent_refusal"] = mean(silent) if silent else None
    if not right:
        return found | {"label_ece": None, "label_reliability": []}
    predicted, known = torch.tensor(p_a, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64)
    ece = float(expected_calibration_error(predicted, known, BINS))
    return found | {"label_ece": ece, "label_reliability": reliability(predicted, known, BINS)}


def _refusal(pair: Record) -> str:
    """Which answer of a pair rightly refuses what the other helps with; "" for every other pair."""
    sides = {verdict_of(pair["prompt_id"], pair[side]["text"]): side for side in "ab"}
    return sides["declined"] if sides.keys() == {"complied", "declined"} else ""


def oracle_lead(pair: Record, principle: str, constitution: Constitution) -> float:
    """By how much answer a of a pair keeps the principle better, as the oracle reads both; below 0: b does."""
    ask = ask_of(pair["prompt_id"])
    rule = understand(constitution.principle(principle).statement)
    return lead(rule, ask, *(read(ask, pair[side]["text"]) for side in "ab"))


def oracle_side(pair: Record, constitution: Constitution) -> float:
    """Which answer most of the principles, by weight, find better: above 0 a, below 0 b, 0 neither."""
    leads = [(p.weight, oracle_lead(pair, p.id, constitution)) for p in constitution.for_stage("comparison")]
    return sum(math.copysign(weight, one) for weight, one in leads if one)
