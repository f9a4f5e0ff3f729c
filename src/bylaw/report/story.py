"""The run in plain sentences, for a reader who is no engineer."""

from collections.abc import Mapping
from typing import Any

from bylaw.report.behaviour import ends, models
from bylaw.report.gather import RunFacts, StageFacts
from bylaw.report.words import many, percent

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
)


def went_in(run: RunFacts) -> list[str]:
    """What the run was made from."""
    recipe, principles = run.recipe, run.constitution.principles
    base = str(recipe.get("base", "?")).rstrip("/").split("/")[-1]
    hash = run.stages["revise"].manifest.get("inputs", {}).get("base", "")
    judge = "the base model itself" if recipe.get("judge", "base") == "base" else f"the model {recipe['judge']}"
    return [
        f"A language model was trained to follow “{run.constitution.name}”, a constitution of "
        f"{many(len(principles), 'principle')}. The principles say which answers are better, and a model applies them.",
        f"It began as the checkpoint “{base}”{f' (content hash {hash[:12]})' if hash else ''}. Its answers were judged "
        f"by {judge}. Everything that is drawn at random is drawn from seed {recipe.get('seed', 0)}.",
    ]


def steps(run: RunFacts) -> list[tuple[str, str]]:
    """Each stage as a heading and a sentence; stages that the recipe does not want are left out."""
    told = {
        "revise": _revise(run),
        "finetune": _finetune(run.stages["finetune"]),
        "label": _label(run),
        "reward": _reward(run.stages["reward"]),
        "ppo": _ppo(run.stages["ppo"]),
        "dpo": _dpo(run.stages["dpo"]),
    }
    shown = [name for name in told if name in wanted(run) or run.stages[name].state != "absent"]
    return [(HEADINGS[name], told[name] or missing(run.stages[name])) for name in shown]


def wanted(run: RunFacts) -> tuple[str, ...]:
    """The stages that the recipe asks for, as `Recipe.stages` has them."""
    if run.recipe.get("last", "ppo") == "dpo":
        return ("revise", "finetune", "compare", "label", "dpo")
    if run.recipe.get("ppo", {}).get("reward") == "judge":
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
    befores = [t for chain in run.chains for t in (chain["answer"], *(r["revision"] for r in chain["rounds"]))]
    changed = sum(
        chain["rounds"][-1]["revision"]["text"] != chain["answer"]["text"] for chain in run.chains if chain["rounds"]
    )
    helpful = run.stages["revise"].counts.get("helpful", 0)
    also = f" To these come {many(helpful, 'answer')} to harmless requests, learnt from as they are." if helpful else ""
    return (
        f"The model answered {many(len(run.chains), 'request')} that call for harm, then criticised and rewrote its "
        f"answer {len(rounds) / len(run.chains):.3g} times each, every time by one principle drawn at random. That "
        f"gave {many(len(befores), 'text')}; in {percent(changed / len(run.chains))} of the chains the last answer "
        f"differs from the first.{also}"
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
    same = sum(p["a"]["text"] == p["b"]["text"] for p in run.preferences)
    readings = sum(len(p.get("labels", [])) for p in run.preferences)
    return (
        f"SL-CAI answered requests twice, and the judge said which answer keeps a principle better: "
        f"{many(len(run.preferences), 'pair')}, {many(readings, 'judgement')}, each asked in both orders. "
        f"{many(same, 'pair')} had twice the same text, so nothing could be preferred."
    )


def _reward(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    sure = counts.get("heldout_sure_accuracy")
    agreed = percent(counts.get("heldout_accuracy") if sure is None else sure)
    return (
        f"A reward model learnt from {many(counts.get('train_pairs', 0), 'pair')} to give the score that the labels "
        f"would give. Of {many(counts.get('heldout_pairs', 0), 'pair')} that it had not seen it agrees with {agreed} "
        f"of the labels that prefer an answer{'' if sure is None else ', each counted by how sure it is'}."
    )


def _ppo(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    end = f" It was stopped: {counts['stopped']}." if counts.get("stopped") else ""
    return (
        f"The model wrote {many(counts.get('episodes', 0), 'answer')} in {many(counts.get('iterations', 0), 'round')} "
        "of practice, and moved towards those with a higher score, held near its start by a penalty."
        f"{end} The result is RL-CAI."
    )


def _dpo(stage: StageFacts) -> str:
    counts = stage.counts
    if stage.state != "finished":
        return ""
    return (
        f"The model learnt from {many(counts.get('train_pairs', 0), 'pair')} directly, without a reward model. On "
        f"held-out pairs it prefers the labelled answer {percent(counts.get('heldout_accuracy'))} of the time. The "
        "result is DPO-CAI."
    )


def what_changed(summary: Mapping[str, Any]) -> list[tuple[str, bool, list[tuple[str, float | None, Any]]]]:
    """Per measure: its meaning, whether more is better, and for each model its label, its value, and the 95 % interval
    where the summary has one.
    """
    rows = [
        (text, up, [(label, one.get(name), one.get("intervals", {}).get(name)) for label, one in models(summary)])
        for name, text, up in MEASURES
    ]
    return [row for row in rows if any(value is not None for _, value, _ in row[2])]


def headline(summary: Mapping[str, Any]) -> str:
    """What changed, in one sentence; empty without the figures for it."""
    both = ends(summary)
    if not both or not all({"complied_harmful", "helpful_benign"} <= side.keys() for side in both):
        return ""
    harm, help = ([percent(side[name]) for side in both] for name in ("complied_harmful", "helpful_benign"))
    return (
        f"Before, the model helped with {harm[0]} of harmful requests; now with {harm[1]}. "
        f"It helped with {help[0]} of harmless ones; now with {help[1]}."
    )
