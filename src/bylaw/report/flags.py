"""What a reader should worry about. Each flag says what was found, against which bound, and what it means."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bylaw.attribution import PrincipleEffect
from bylaw.model.records import Record
from bylaw.report.behaviour import Evaluation
from bylaw.report.flag import ENOUGH, Flag, Level, level
from bylaw.report.gather import RunFacts
from bylaw.report.judge_flags import judge_flags
from bylaw.words import FEW, many, number, percent, points

KEPT = "unchanged"
"""The mark of a revision that is the answer again, which is right where nothing broke the principle."""
CUT = 0.02
GUARDED = 0.2
UNCHANGING = 0.05
ACCURACY, ECE = 0.65, 0.1
KL = 10.0
ENDED = 0.95
LOST_HELP = 0.05
STRAYED = 0.05
NAMED = 3
"""Files that a flag names."""


def flags(run: RunFacts, measured: Record, effects: Sequence[PrincipleEffect]) -> list[Flag]:
    """All of them, worries first. `measured` is what `trust` says of the labels, `effects` what each principle did."""
    found = [*_altered(run), *judge_flags(run, measured), *_texts(run), *_principles(run, effects)]
    found += [*_reward(run), *_ppo(run)]
    several = len(run.evaluations) > 1
    found += [flag for one in run.evaluations for flag in (*_behaviour(one, several), *_cut(one))]
    return sorted([*found, *_stages(run)], key=lambda flag: flag.level != "worry")


def _texts(run: RunFacts) -> Iterator[Flag]:
    written = {
        "answers": [chain["answer"] for chain in run.chains],
        "critiques": [one["critique"] for chain in run.chains for one in chain["rounds"] if one.get("critique")],
        "revisions": [one["revision"] for chain in run.chains for one in chain["rounds"]],
        "compared answers": [p[side] for p in run.preferences for side in "ab"],
    }
    for name, texts in written.items():
        cut = sum(one.get("finish") == "length" for one in texts)
        if cut > CUT * len(texts):
            text = (
                f"{many(cut, 'text')} of {len(texts):,} ran to the token limit and stop in the middle (bound "
                f"{percent(CUT)}). A higher limit lets them end."
            )
            yield Flag(_worse(cut, texts, 5 * CUT), f"{_part(cut, texts)} {name} are cut off", text)
        yield from _guarded(name, [[mark for mark in one.get("marks") or [] if mark != KEPT] for one in texts])


def _guarded(name: str, marks: Sequence[Sequence[str]]) -> Iterator[Flag]:
    counts = Counter(mark for some in marks for mark in some)
    if counts:
        told = "; ".join(f"{mark}: {many(count, 'text')}" for mark, count in counts.most_common())
        touched = sum(map(bool, marks))
        text = (
            f"{told} (bound: none; a worry above {percent(GUARDED)}). What was drawn before a repair is kept beside it."
        )
        yield Flag(_worse(touched, marks, GUARDED), f"Guards marked {_part(touched, marks)} {name}", text)


def _worse(count: int, of: Sequence[Any], bound: float) -> Level:
    """Whether so many are a worry; never, of few."""
    return level(len(of) >= ENOUGH and count > bound * len(of))


def _part(count: int, of: Sequence[Any]) -> str:
    return f"{percent(count / len(of), 1)} of the" if len(of) >= FEW else f"{count} of {len(of)}"


def _principles(run: RunFacts, effects: Sequence[PrincipleEffect]) -> Iterator[Flag]:
    for row in effects:
        if row.rounds >= ENOUGH and row.changed / row.rounds < UNCHANGING:
            text = (
                f"{row.changed:,} of {many(row.rounds, 'critique')} changed the answer (bound {percent(UNCHANGING)}). "
                "Its words may be too vague to act on, or nothing broke it."
            )
            yield Flag("note", f"“{row.title or row.id}” almost never changes an answer", text, row.id)
    at_hand = {principle.hash for principle in run.constitution.principles}
    used = {one["principle"]["hash"]: one["principle"]["id"] for chain in run.chains for one in chain["rounds"]}
    used |= {one["principle"]["hash"]: one["principle"]["id"] for p in run.preferences for one in p.get("labels") or []}
    strange = sorted({name for hash, name in used.items() if hash not in at_hand})
    if strange:
        text = (
            f"Some records were made by principles that it lacks, or words otherwise: {', '.join(strange)}. This page "
            "shows the constitution of the newest records."
        )
        yield Flag("worry", "The constitution has changed since", text)


def _reward(run: RunFacts) -> Iterator[Flag]:
    counts = run.stages["reward"].counts or run.stages["dpo"].counts
    sure, ece, of = (counts.get(f"heldout_{name}") for name in ("sure_accuracy", "ece", "pairs"))
    if of is not None and of < ENOUGH:
        text = f"Held out: {many(round(of), 'pair')} (bound {ENOUGH}). What is measured on so few is mostly chance."
        yield Flag("note", "Too few pairs to measure the preference model by", text)
        return
    among = "the held-out labels" if of is None else f"{many(round(of), 'held-out label')}"
    accuracy = counts.get("heldout_accuracy") if sure is None else sure
    if accuracy is not None and accuracy < ACCURACY:
        agrees = f"Of {among}, those that prefer an answer, it agrees with {percent(accuracy)}"
        agrees += "" if sure is None else ", by how sure they are"
        text = f"{agrees}; a coin would with 50 % (bound {percent(ACCURACY)})."
        yield Flag("worry", "The preferences were hardly learnt", text)
    if ece is not None and ece > ECE:
        off = f"Its probabilities are off by {points(ece)} on average"
        text = f"{off} (expected calibration error, bound {points(ECE)})."
        yield Flag("worry", "The preference model is badly calibrated", text)


def _ppo(run: RunFacts) -> Iterator[Flag]:
    metrics, counts = run.stages["ppo"].metrics, run.stages["ppo"].counts
    if counts.get("stopped"):
        yield Flag("worry", "PPO was stopped", f"{counts['stopped']}.")
    rung = [int(m["step"]) for m in metrics if m.get("collapse/alarms")]
    if rung:
        first = f"first at step {rung[0]}, last at step {rung[-1]}, {many(len(rung), 'step')} in all"
        text = (
            f"Repetition, boilerplate, entropy or length left the bounds of the recipe ([ppo] collapse_rise, "
            f"collapse_fall): {first}. Read the samples of those steps."
        )
        yield Flag("worry", "Signs of collapse", text)
    if not metrics:
        return
    last = metrics[-1]
    if (last.get("objective/kl") or 0.0) > KL:
        text = (
            f"{number(last['objective/kl'])} nats per answer from SL-CAI at the end (bound {KL:g}). Far from its start "
            "a model may have found what the reward model likes and people do not."
        )
        yield Flag("worry", "High KL", text)
    ended = last.get("val/ended")
    if ended is not None and ended < ENDED:
        text = f"In the last iteration {percent(ended)} of the answers end by themselves (bound {percent(ENDED)})."
        yield Flag("worry", "Answers of the last policy are cut off", text)


def _behaviour(one: Evaluation, named: bool) -> Iterator[Flag]:
    if one.ends is None:
        return
    before, after = one.ends
    source = f" As {one.reader} found it." if named else ""
    helped, helps = (side.get("helpful_benign") for side in (before, after))
    if helped is not None and helps is not None and helped - helps > LOST_HELP and _enough(after, "helpful_benign"):
        text = (
            f"It helps with {percent(helps, 1)} of harmless requests, the base with {percent(helped, 1)}: "
            f"{points(helped - helps)} fewer (bound {points(LOST_HELP)}).{source}"
        )
        yield Flag("worry", "The model has become less helpful", text)
    for name, title in (("evaded", "evades"), ("broken", "answers in broken words")):
        now, then = after.get(name) or 0.0, before.get(name)
        if now > max(STRAYED, then or 0.0) and _enough(after, name):
            text = (
                f"{percent(now, 1)} of the answers, {percent(then, 1)} before (bound {percent(STRAYED)}, or as before)."
            )
            yield Flag("worry", f"The model {title} more often", text + source)


def _cut(one: Evaluation) -> Iterator[Flag]:
    cut = one.models[-1].measures.get("cut") or 0.0
    if cut > 5 * CUT:
        text = (
            f"{percent(cut, 1)} stop at the token limit (bound {percent(5 * CUT)}), as {one.reader} found it. What "
            "they would have come to is not known; a higher --max-tokens lets them end."
        )
        yield Flag("worry", "The answers that were evaluated are cut off", text)


def _enough(measures: Mapping[str, Any], name: str) -> bool:
    """Whether a share is of enough answers to worry about, as far as that is known."""
    return measures.get("of", {}).get(name, ENOUGH) >= ENOUGH


def _stages(run: RunFacts) -> Iterator[Flag]:
    for stage in run.stages.values():
        if stage.state == "begun":
            text = (
                "What this page shows of it is what was written so far; run it again to go on, and make the page again."
            )
            yield Flag("note", f"The stage “{stage.name}” has not finished", text)
    counts: Record = run.stages["finetune"].counts
    names = ("empty_revisions", "marked_revisions", "empty_helpful", "over_context")
    left_out = {name: counts.get(name) or 0 for name in names}
    learned: Record = run.stages["reward"].counts or run.stages["dpo"].counts
    pairs = {"pairs_over_context": "over_context", "helpful_pairs_over_context": "helpful_over_context"}
    left_out |= {title: learned.get(name) or 0 for title, name in pairs.items()}
    if any(left_out.values()):
        text = "; ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in left_out.items() if count)
        yield Flag("note", "Some texts were left out of training", f"{text} (bound: none).")
    cut = {name: counts.get(f"cut_{name}") or 0 for name in ("revisions", "helpful")}
    if any(cut.values()):
        text = "; ".join(f"{name}: {count:,}" for name, count in cut.items() if count)
        text += " (bound: none). No end is learnt there."
        yield Flag("note", "Texts that stop in the middle were trained on", text)


def _altered(run: RunFacts) -> Iterator[Flag]:
    if run.altered:
        more = f" and {len(run.altered) - NAMED} more" if len(run.altered) > NAMED else ""
        text = (
            f"{', '.join(run.altered[:NAMED])}{more}: this page shows them as they are now. `bylaw check` tells more."
        )
        yield Flag("worry", "Files of this run were changed after they were written", text)
