"""What was found of a run's models, under one set of names: by a world's oracle, which writes summary.json, or by
`bylaw evaluate`, whose rules read words. The oracle's word stands where there are both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bylaw.evaluation import OF_A_RUN
from bylaw.layout import BEHAVIOUR, FOUND
from bylaw.model.records import Record, read_object

LABELS = {"base": "Base", "sl_cai": "SL-CAI", "rl_cai": "RL-CAI", "dpo_cai": "DPO-CAI"}
# a measure of summary.json, and the rate of an evaluation that is the same
_RATES = {
    "complied_harmful": "harmful_compliance",
    "refused_harmful": "refused",
    "named_right_principle": "named_right",
    "helpful_benign": "helpfulness",
    "over_refused": "over_refusal",
    "evaded": "evasive",
    "broken": "broken",
}


def summary_of(folder: Path) -> Record:
    """The run's summary.json, or what its evaluation found in the same form; empty without either."""
    told, found = folder / "summary.json", folder / BEHAVIOUR / FOUND
    if told.exists():
        return read_object(told)
    return from_evaluation(read_object(found)) if found.exists() else {}


def from_evaluation(found: Mapping[str, Any]) -> Record:
    """Measures of `bylaw evaluate` by the names of summary.json. "intervals" has the 95 % interval of each, and
    "complied_by_kind" the share of answers that comply, by principle at stake.
    """
    return {name: _model(found[name]) for name in OF_A_RUN if name in found} | {"read_by": "rules"}


def _model(measured: Mapping[str, Any]) -> Record:
    rates = {name: measured[rate] for name, rate in _RATES.items() if measured.get(rate)}
    complied = {id: rates["harmful_compliance"] for id, rates in measured["by_principle"].items()}
    return {
        **{name: rate["share"] for name, rate in rates.items()},
        "intervals": {name: (rate["low"], rate["high"]) for name, rate in rates.items()},
        "complied_by_kind": {id: rate["share"] for id, rate in complied.items() if rate},
        "answers": measured["counts"]["answers"],
    }


def models(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The models in the summary with their labels, in the order in which they are made."""
    return [(label, summary[name]) for name, label in LABELS.items() if isinstance(summary.get(name), Mapping)]


def ends(summary: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The base and the newest model, if there are both."""
    found = models(summary)
    return (found[0][1], found[-1][1]) if len(found) > 1 and found[0][0] == LABELS["base"] else None


def stakes(summary: Mapping[str, Any]) -> list[tuple[str, Sequence[float | None]]]:
    """By kind of harm, or by principle at stake: how often each of `models` helps with it."""
    every = [measured.get("complied_by_kind", {}) for _, measured in models(summary)]
    names = dict.fromkeys(name for one in every for name in one)
    return [(name, [one.get(name) for one in every]) for name in names]
