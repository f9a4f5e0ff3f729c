"""The forms that the page relies on. What a file has otherwise is told by its place, before anything is drawn from it.

A form is a type; NUMBER, a finite one; SHARE, from 0 to 1; a list with the form of its items; a table of forms by key,
where a key that ends in ? may be missing or null and * stands for every key; or a function that gives the form of the
value at hand.
"""

import math
from collections.abc import Mapping
from typing import Any

from bylaw.report.behaviour import RATES

NUMBER, SHARE, PAIR = "a finite number", "a number from 0 to 1", "two numbers from 0 to 1"
_WORDS = {str: "text", dict: "a table", list: "a list"}


def optional(form: Any, *keys: str) -> dict[str, Any]:
    """A table in which each of the keys may be missing."""
    return {f"{key}?": form for key in keys}


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and bool(value.get(key))


def _bins(value: Any) -> Any:
    """A table of reliability, alone or as `bylaw.rlaif.trust.calibration` keeps it."""
    rows = [optional(NUMBER, "pairs", "predicted", "label", "right")]
    return {"reliability?": rows} if isinstance(value, Mapping) else rows


def _interval(value: Any) -> Any:
    """A low and a high end."""
    return [SHARE] if isinstance(value, list) and len(value) == 2 else PAIR


TEXT = {"text": str, "finish?": str, "marks?": [str], "raw?": {"text": str}}
PROMPT = [{"role": str, "content": str}]
PRINCIPLE = {"id": str, "hash": str}
ROUND = {"round": NUMBER, "principle": PRINCIPLE, "critique?": TEXT, "revision": TEXT}
CHAIN = {"id": str, "prompt": PROMPT, "answer": TEXT, "rounds": [ROUND], "by": {"constitution?": str}}
SIDES = ("a_first", "b_first")
_UNREAD = {"principle": PRINCIPLE, "weight": NUMBER, "abstained": str, "thoughts?": {"*": [TEXT]}}
_UNREAD |= optional({"mass": NUMBER, "p_first": SHARE}, *SIDES)
_UNREAD |= optional([optional(NUMBER, "mass")], *(f"{side}_each" for side in SIDES))
_READ = _UNREAD | {"p_a": SHARE}
_LETTERED = _READ | {"position_bias": NUMBER}


def _reading(value: Any) -> Any:
    """A reading that abstains has no probability, and one without letters has no bias."""
    if _has(value, "abstained"):
        return _UNREAD
    return _LETTERED if all(_has(value, side) for side in SIDES) else _READ


_UNLABELLED = {"id": str, "prompt": PROMPT, "a": TEXT, "b": TEXT, "abstained": str, "by": {"constitution?": str}}
_UNLABELLED |= {"labels?": [_reading]}
_LABELLED = _UNLABELLED | {"p_a": SHARE, "unclamped?": SHARE}


def LABEL(value: Any) -> Any:
    """A preference; one that abstains has no probability."""
    return _UNLABELLED if _has(value, "abstained") else _LABELLED


METRICS = {"step": NUMBER} | optional(
    NUMBER, "loss", "accuracy", "rewards/accuracies", "rewards/margins", "objective/scores", "objective/kl",
    "objective/entropy", "val/response_tokens", "val/ended", "collapse/alarms",
)  # fmt: skip
COUNTS = optional(
    NUMBER, "helpful", "helpful_pairs", "revisions", "steps", "train_pairs", "heldout_pairs", "episodes", "iterations",
    "heldout_accuracy", "heldout_sure_accuracy", "heldout_ece", "empty_revisions", "cut_revisions", "empty_helpful",
    "cut_helpful", "marked_revisions", "over_context", "pairs_over_context", "helpful_pairs_over_context",
) | {"heldout_reliability?": _bins}  # fmt: skip
MANIFEST = {"seconds": NUMBER, "finished": str, "device": str, "counts?": COUNTS, "config?": dict, "outputs?": dict}
MANIFEST |= {"inputs?": {"base?": str}, "versions?": dict}
RECIPE = optional(str, "base", "judge", "constitution", "last") | {"ppo?": {"reward?": str}}
RECIPE |= optional(dict, "revise", "finetune", "compare", "label", "reward", "dpo", "judge_server", "lora")
_MODEL = optional(SHARE, *RATES, "refused_with_reason") | {"answers?": NUMBER, "complied_by_kind?": {"*?": SHARE}}
_MODEL |= {"intervals?": {"*": _interval}}
SUMMARY = optional(_MODEL, "base", "sl_cai", "rl_cai", "dpo_cai") | {"revision_curve?": [SHARE]}
SUMMARY |= optional(SHARE, "label_accuracy", "label_ece", "whole_label_accuracy", "whole_label_ece")
SUMMARY |= optional(SHARE, "silent_refusal", "flips_on_amendment")
SUMMARY |= optional(NUMBER, "labels_decided", "whole_labels_decided")
SUMMARY |= {"label_reliability?": _bins, "amendment?": {"crossed_out?": str, "comparisons?": NUMBER}}
_RATE = {"share": SHARE, "low": SHARE, "high": SHARE, "answers": NUMBER, "prompts": NUMBER}
_EVALUATED = optional(_RATE, *RATES.values()) | {"by_principle": {"*": optional(_RATE, "harmful_compliance")}}
EVALUATION = optional(_EVALUATED | {"counts": {"answers": NUMBER}}, "base", "sl_cai", "rl_cai", "dpo_cai")
EVALUATION |= {"trained_on?": NUMBER, "asked?": {"files": [str]} | optional(NUMBER, "limit", "samples", "seed")}
_KNOWN = {"read": NUMBER, "interval?": _interval} | optional(SHARE, "accuracy", "ece", "chance")
KNOWN = _KNOWN | {"file": str, "reliability?": _bins, "principles?": {"*": _KNOWN}}
KNOWN |= optional(NUMBER, "questions", "pairs", "limit") | {
    "by?": str,
    "option_mass?": {"mean": SHARE},
    "asked?": optional(str, "style", "prefix"),
}
_UNMARKED = {"principle": PRINCIPLE, "abstained": str}
_MARKED = _UNMARKED | {"mean": NUMBER}
ROLLOUT = {"rating?": {"readings": [lambda one: _UNMARKED if _has(one, "abstained") else _MARKED]}}


class _Wrong(Exception):
    """What is not as it should be: the way to it, and what it is."""


def check_form(value: Any, form: Any, where: str) -> None:
    """Raise ValueError naming `where`, a file or a line of one, and the place in it, for a value of another form."""
    try:
        _check(value, form)
    except _Wrong as wrong:
        way, said = wrong.args
        raise ValueError(f"{where}: {''.join(reversed(way)).lstrip('.') or 'the whole'} {said}") from None


def _check(value: Any, form: Any) -> None:
    if isinstance(form, dict):
        _check_table(value, form)
    elif isinstance(form, str):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _require(number and (form == NUMBER or (form == SHARE and 0 <= value <= 1)), value, form)
    elif isinstance(form, type):
        _require(isinstance(value, form), value, _WORDS[form])
    elif isinstance(form, list):
        _require(isinstance(value, list), value, "a list")
        for n, one in enumerate(value):
            _within(one, form[0], f"[{n}]")
    else:
        _check(value, form(value))


def _check_table(table: Any, form: dict[str, Any]) -> None:
    _require(isinstance(table, dict), table, "a table")
    for key, inner in form.items():
        may = key[-1] == "?"
        name = key[:-1] if may else key
        for one in table if name == "*" else (name,):
            value = table.get(one)
            if value is None and (may or one not in table):
                if not may:
                    raise _Wrong([f".{one}"], "is missing")
            elif inner is not str or type(value) is not str:  # most are texts, and there are many
                _within(value, inner, f".{one}")


def _within(value: Any, form: Any, step: str) -> None:
    try:
        _check(value, form)
    except _Wrong as wrong:
        raise _Wrong([*wrong.args[0], step], wrong.args[1]) from None


def _require(right: bool, value: Any, allowed: str) -> None:
    if not right:
        raise _Wrong([], f"= {value!r:.60} is not possible; allowed: {allowed}")
