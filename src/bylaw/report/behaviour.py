"""What was found of a run's models, under one set of names: by a world's oracle, which writes summary.json, or by
`bylaw evaluate`, whose rules read words. A run may have both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bylaw.evaluation import OF_A_RUN
from bylaw.model.records import Record

LABELS = {"base": "Base", "sl_cai": "SL-CAI", "rl_cai": "RL-CAI", "dpo_cai": "DPO-CAI"}
WHEN = {"base": "Before", "sl_cai": "After revisions", "rl_cai": "Final", "dpo_cai": "Final"}
MEANS = {
    "base": "the model as it came",
    "sl_cai": "it has learnt from its own answers, as it criticised and rewrote them",
    "rl_cai": "it has then practised, and was drawn towards what the judge prefers",
    "dpo_cai": "it has then learnt from the judge's preferences",
}
# A measure of summary.json, and the rate of an evaluation that is the same.
RATES = {
    "complied_harmful": "harmful_compliance",
    "refused_harmful": "refused",
    "named_right_principle": "named_right",
    "helpful_benign": "helpfulness",
    "over_refused": "over_refusal",
    "evaded": "evasive",
    "broken": "broken",
    "cut": "truncated",
}
_OF_REFUSALS = ("refused_with_reason", "named_right_principle")


@dataclass(frozen=True)
class Model:
    """One model of the run: its name in the files, and what was measured of it."""

    key: str
    measures: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Its name in the field, short enough for figures."""
        return LABELS[self.key]

    @property
    def when(self) -> str:
        """Its place in the run, for a reader who does not know the name."""
        return WHEN[self.key]

    @property
    def means(self) -> str:
        """What it has learnt so far."""
        return MEANS[self.key]


@dataclass(frozen=True)
class Evaluation:
    """The models in the order in which they are made, as one reader of their answers found them."""

    by_rules: bool
    """Whether rules read the answers, else a world's oracle."""
    models: list[Model]
    asked: str = ""
    """What was asked, where others were asked otherwise."""
    trained_on: int = 0
    """How many of the prompts the run was trained on."""

    @property
    def reader(self) -> str:
        """Who read the answers, and to which prompts where that has to be said."""
        return ("rules" if self.by_rules else "the world's oracle") + (f" on {self.asked}" if self.asked else "")

    @property
    def ends(self) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Measures of the base and of the newest model, if there are both."""
        found = self.models
        return (found[0].measures, found[-1].measures) if len(found) > 1 and found[0].key == "base" else None

    @property
    def stakes(self) -> list[tuple[str, Sequence[float | None]]]:
        """By kind of harm, or by principle at stake: how often each model helps with it."""
        every = [model.measures.get("complied_by_kind") or {} for model in self.models]
        names = dict.fromkeys(name for one in every for name in one)
        return [(name, [one.get(name) for one in every]) for name in names]


def evaluations(summary: Record, found: Sequence[Record]) -> list[Evaluation]:
    """Those that a run has, the oracle's word first: of summary.json, and of what `bylaw evaluate` found."""
    told = Evaluation(False, [Model(name, _told(summary[name])) for name in LABELS if summary.get(name)])
    read = [
        Evaluation(
            True,
            [Model(name, _read(one[name])) for name in OF_A_RUN if one.get(name)],
            _apart(one.get("asked") or {}) if len(found) > 1 else "",
            one.get("trained_on") or 0,
        )
        for one in found
    ]
    return [one for one in (told, *read) if one.models]


def _apart(asked: Mapping[str, Any]) -> str:
    """The files of prompts, and what else sets an evaluation apart from others of the same files."""
    parts = [" and ".join(asked.get("files", ["prompts"]))]
    parts.append(f"the first {asked['limit']:,.0f} of each" if asked.get("limit") else "")
    parts.append(f"{asked['samples']:,.0f} answers each" if asked.get("samples", 1) > 1 else "")
    parts.append(f"seed {asked['seed']:.0f}" if asked.get("seed") else "")
    return ", ".join(filter(None, parts))


def _told(measured: Mapping[str, Any]) -> Record:
    """An oracle's measures. A share of no refusals is none, whatever is written for it."""
    none = _OF_REFUSALS if measured.get("refused_harmful") == 0 else ()
    known = {name: value for name, value in measured.items() if value is not None and name not in none}
    return known | {"intervals": {name: one for name, one in known.get("intervals", {}).items() if name not in none}}


def _read(measured: Mapping[str, Any]) -> Record:
    """Measures of `bylaw evaluate` by the names of summary.json. "intervals" has the 95 % interval of each, "of" the
    number of its answers, and "complied_by_kind" the share of answers that comply, by principle at stake.
    """
    rates = {name: measured[rate] for name, rate in RATES.items() if measured.get(rate)}
    complied = {id: rates.get("harmful_compliance") for id, rates in measured["by_principle"].items()}
    return {
        **{name: rate["share"] for name, rate in rates.items()},
        "intervals": {name: (rate["low"], rate["high"]) for name, rate in rates.items()},
        "of": {name: rate["answers"] for name, rate in rates.items()},
        "complied_by_kind": {id: rate["share"] for id, rate in complied.items() if rate},
        "answers": measured["counts"]["answers"],
    }
