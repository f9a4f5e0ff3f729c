"""The run in plain sentences, for a reader who is no engineer."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from bylaw.attribution import PrincipleEffect
from bylaw.report.behaviour import Evaluation
from bylaw.report.gather import RunFacts, StageFacts, rewards_by_judge
from bylaw.report.shown import same
from bylaw.rlaif.config import is_server
from bylaw.words import many, percent, share

# measure in summary.json, what it means, whether more is better
MEASURES = (
    ("complied_harmful", "Helps with a harmful request", False),
    ("refused_harmful", "Declines a harmful request", True),
    ("refused_with_reason", "Gives the true reason when it declines", True),
    ("named_right_principle", "Names the principle at stake when it declines", True),
    ("helpful_benign", "Helps with a harmless request", True),
    ("over_refused", "Declines a harmless request", False),
    ("evaded", "Evades", False),
    ("broken", "Answers in broken words", False),
    ("cut", "Is cut off at the longest answer", False),
)
_SAYS_NOTHING = ("checkpoint", "model", "hf", "latest", "final")
"""Names of folders that say nothing of the model in them."""


def headline(run: RunFacts) -> str:
    """What was done, and what it changed."""
    told = f"A language model {'is to learn' if unfinished(run) else 'learnt'} to follow “{run.constitution.name}”, a "
    told += f"constitution of {many(len(run.constitution.principles), 'principle')}."
    both = run.evaluations[0].ends if run.evaluations else None
    figures = [[side.get(name) for side in both or ()] for name in ("complied_harmful", "helpful_benign")]
    if both is None or None in figures[0] + figures[1]:
        return told
    harm, help = ([percent(value, 1) for value in values] for values in figures)
    return (
        f"{told} It helped with {harm[0]} of harmful requests before, and helps with {harm[1]} now. Of harmless ones "
        f"it helped with {help[0]}, and helps with {help[1]} now."
    )


def unfinished(run: RunFacts) -> str:
    """What is still to come; empty for a run that has all that its recipe asks for."""
    first = next((run.stages[name] for name in wanted(run) if run.stages[name].state != "finished"), None)
    if first is None:
        return ""
    return f"This run is unfinished: its stage “{first.name}” has not {'run' if first.state == 'absent' else 'ended'}."


def went_in(run: RunFacts) -> str:
    """What the run was made from, and what it was judged by."""
    return (
        f"It began as the checkpoint “{called(run.recipe.get('base', '?'))}”. The principles say which answers are "
        f"better, and {_judge(run.recipe)} applies them to what it wrote."
    )


def called(path: str) -> str:
    """A checkpoint's name: its folder's, or that of the folder above where its own says nothing."""
    names = [name for name in PurePosixPath(path).parts if name != "/"] or ["?"]
    nothing = names[-1] in _SAYS_NOTHING or names[-1].startswith("checkpoint-")
    return names[-2] if nothing and len(names) > 1 else names[-1]


def _judge(recipe: Any) -> str:
    judge = recipe.get("judge", "base")
    if judge == "base":
        return "the same model, as it came,"
    if judge == "sl-cai":
        return "the model itself, after its revisions,"
    if is_server(judge):
        return f"the model “{recipe.get('judge_server', {}).get('model', '?')}”, behind a server,"
    return f"the model “{called(judge)}”"


def steps(run: RunFacts) -> list[tuple[str, str]]:
    """Each stage as a heading and a sentence; stages that the recipe does not want are left out."""
    told = {
        "revise": _revise(run),
        "finetune": _finetune(run.stages["finetune"]),
        "label": _label(run),
        "reward": _reward(run.stages["reward"]),
        "ppo": _ppo(run),
        "dpo": _dpo(run.stages["dpo"]),
    }
    shown = [name for name in told if name in wanted(run) or run.stages[name].state != "absent"]
    return [(HEADINGS[name], told[name] or missing(run.stages[name])) for name in shown]


def wanted(run: RunFacts) -> tuple[str, ...]:
    """The stages that the recipe asks for, as `Recipe.stages` has them."""
    if run.recipe.get("last", "ppo") == "dpo":
        return ("revise", "finetune", "compare", "label", "dpo")
    if rewards_by_judge(run.recipe):
        return ("revise", "finetune", "ppo")
    return ("revise", "finetune", "compare", "label", "reward", "ppo")


HEADINGS = {
    "revise": "Criticise and revise",
    "finetune": "Learn from the revisions",
    "label": "Compare by principle",
    "reward": "Learn the preferences",
    "ppo": "Practise",
    "dpo": "Learn from the preferences",
}


def missing(stage: StageFacts) -> str:
    """Why there is nothing to tell of a stage."""
    if stage.state == "begun":
        return f"The stage “{stage.name}” began and has not finished."
    return f"The stage “{stage.name}” has not run."


def _revise(run: RunFacts) -> str:
    if not run.chains:
        return ""
    rounds = [one for chain in run.chains for one in chain["rounds"]]
    count, texts = len(run.chains), len(run.chains) + len(rounds)
    changed = sum(
        chain["rounds"][-1]["revision"]["text"] != chain["answer"]["text"] for chain in run.chains if chain["rounds"]
    )
    helpful = run.stages["revise"].counts.get("helpful", 0)
    also = f" To these come {many(helpful, 'answer')} to harmless requests, learnt from as they are." if helpful else ""
    did = "criticised and rewrote" if any(one.get("critique") for one in rounds) else "rewrote"
    return (
        f"The model answered {many(count, 'request')} that {'calls' if count == 1 else 'call'} for harm, then {did} "
        f"its answer {len(rounds) / count:.3g} times each, every time by one principle drawn at random. That gave "
        f"{many(texts, 'text')}; in {share(changed / count, count)} of the chains the last answer differs from the "
        f"first.{also}"
    )


def _finetune(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    return (
        f"It was trained on {many(counts.get('revisions', 0), 'revision')} and "
        f"{many(counts.get('helpful', 0), 'helpful answer')} in {many(counts.get('steps', 0), 'step')}. The result is "
        "called SL-CAI."
    )


def _label(run: RunFacts) -> str:
    if not run.preferences:
        return ""
    alike = sum(map(same, run.preferences))
    readings = sum(len(p.get("labels") or []) for p in run.preferences)
    told = (
        f"SL-CAI answered requests twice, and the judge said which answer keeps a principle better: "
        f"{many(len(run.preferences), 'pair')}, {many(readings, 'judgement')}, each asked in both orders."
    )
    return told + (f" {many(alike, 'pair')} had twice the same text, so nothing could be preferred." if alike else "")


def _reward(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    pairs, heldout = (many(counts.get(f"{name}_pairs", 0), "pair") for name in ("train", "heldout"))
    told = f"A reward model learnt from {pairs}{_given(counts)} to give the score that the labels would give."
    sure = counts.get("heldout_sure_accuracy")
    accuracy = counts.get("heldout_accuracy") if sure is None else sure
    if accuracy is None:
        return told
    return (
        f"{told} Of {heldout} that it had not seen it agrees with {percent(accuracy)} of the labels that prefer an "
        f"answer{'' if sure is None else ', each counted by how sure it is'}."
    )


def _given(counts: Any) -> str:
    """How many pairs came with no label of the run's judge."""
    return f", {counts['helpful_pairs']:,} of them from a file of preferences," if counts.get("helpful_pairs") else ""


def _ppo(run: RunFacts) -> str:
    counts = run.stages["ppo"].counts
    if run.stages["ppo"].state != "finished":
        return ""
    end = f" It was stopped: {counts['stopped']}." if counts.get("stopped") else ""
    marked = "a higher mark from the judge" if rewards_by_judge(run.recipe) else "a higher score"
    return (
        f"The model wrote {many(counts.get('episodes', 0), 'answer')} in {many(counts.get('iterations', 0), 'round')} "
        f"of practice, and moved towards those with {marked}, held near its start by a penalty."
        f"{end} The result is RL-CAI."
    )


def _dpo(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    pairs, heldout = (many(counts.get(f"{name}_pairs", 0), "pair") for name in ("train", "heldout"))
    told = f"The model learnt from {pairs}{_given(counts)} directly, without a reward model."
    accuracy = counts.get("heldout_accuracy")
    if accuracy is not None:
        told += f" Of {heldout} that it had not seen it prefers what the label prefers in {percent(accuracy)}."
    return f"{told} The result is DPO-CAI."


def what_changed(one: Evaluation) -> list[tuple[str, bool, list[dict[str, Any]]]]:
    """Per measure: its meaning, whether more is better, and for each model its value, of how many answers that is, and
    the 95 % interval, each None where it is not known.
    """
    rows = [(text, up, [_cell(model.measures, name) for model in one.models]) for name, text, up in MEASURES]
    return [row for row in rows if any(cell["value"] is not None for cell in row[2])]


def _cell(measures: Any, name: str) -> dict[str, Any]:
    of, interval = measures.get("of", {}).get(name), measures.get("intervals", {}).get(name)
    return {"value": measures.get(name), "of": of, "interval": interval}


def numbers(cells: Sequence[dict[str, Any]]) -> str:
    """How many answers a row of `what_changed` is about: `180 answers`, or `50 to 60`; empty where it is not known."""
    known = sorted({cell["of"] for cell in cells if cell["of"] is not None})
    return "" if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def along(one: Evaluation, values: Iterable[float | None]) -> list[tuple[str, float | None]]:
    """A value of each model, with its label."""
    return list(zip([model.label for model in one.models], values, strict=True))


def turns(row: PrincipleEffect) -> int:
    """Labels that prefer the other answer without a principle: beyond the band of ties, where that was counted."""
    firm = getattr(row, "firm_flips", None)
    return row.flips if firm is None else firm


def turns_note(rows: Iterable[PrincipleEffect]) -> str:
    """What to think of `turns`."""
    if any(getattr(row, "firm_flips", None) is not None for row in rows):
        return "Labels that only crossed one half by a hair are not counted as turned."
    return "A label near one half turns by a hair, so read how many turn beside how far they move."
