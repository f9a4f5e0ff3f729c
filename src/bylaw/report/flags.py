"""What a reader should worry about. Each flag says what was found, against which bound, and what it means."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bylaw.attribution import PrincipleEffect
from bylaw.model.records import Record
from bylaw.report.behaviour import ends
from bylaw.report.gather import RunFacts
from bylaw.report.words import many, number, percent, points

Level = Literal["worry", "note"]
TURNED = 0.2
SURE = 0.05
BIAS = 0.05
MASS = 0.9
SAME = 0.2
KEPT = "unchanged"
"""The mark of a revision that is the answer again, which is right where nothing broke the principle."""
CUT = 0.02
LEAN = 0.03
UNCHANGING, ENOUGH = 0.05, 20
KL = 10.0
LOST_HELP = 0.05


@dataclass(frozen=True)
class Flag:
    """A `worry` asks for a look before the model is used; a `note` is good to know."""

    level: Level
    title: str
    text: str
    principle: str = ""


def flags(run: RunFacts, measured: Record, effects: Sequence[PrincipleEffect]) -> list[Flag]:
    """All of them, worries first. `measured` is what `trust` says of the labels, `effects` what each principle did."""
    found = [*_judge(run, measured), *_labels(run, measured), *_texts(run), *_principles(run, effects)]
    found += [*_reward(run), *_ppo(run), *_behaviour(run.summary), *_stages(run)]
    return sorted(found, key=lambda flag: flag.level != "worry")


def _level(worry: bool) -> Level:
    return "worry" if worry else "note"


def _judge(run: RunFacts, measured: Record) -> Iterator[Flag]:
    bias = measured["position_bias"]["mean"] if measured["position_bias"] else 0.0
    if abs(bias) > BIAS:
        side = "first" if bias > 0 else "second"
        text = f"By {points(abs(bias))} on average (bound {points(BIAS)}). Both orders are averaged, which cancels it."
        yield Flag(_level(abs(bias) > 3 * BIAS), f"The judge leans to the answer shown {side}", text)
    unlike = [p for p in run.preferences if p["a"]["text"] != p["b"]["text"]]
    read = [one for p in unlike for one in p.get("labels", ()) if not one["abstained"] and "a_first" in one]
    turned = sum(map(_turned, read)) / len(read) if read else 0.0
    if turned > TURNED:
        text = (
            f"Shown in the other order, the judge picks the other answer in {percent(turned)} of its judgements (bound "
            f"{percent(TURNED)}; picked is what has over {percent(0.5 + SURE)}). Their labels stay near one half."
        )
        yield Flag(_level(turned > 2 * TURNED), "The order often decides", text)
    mass = measured["option_mass"]["mean"] if measured["option_mass"] else 1.0
    if mass < MASS:
        text = (
            f"On average {percent(mass)} of its probability lies on the letters A and B (bound {percent(MASS)}): it "
            "often wanted to say something else."
        )
        yield Flag("worry", "The judge often does not answer with a letter", text)


def _turned(reading: Record) -> bool:
    """Whether both orders are decided, and for the same place instead of the same answer."""
    first, second = (reading[side]["p_first"] - 0.5 for side in ("a_first", "b_first"))
    return min(abs(first), abs(second)) > SURE and (first > 0) == (second > 0)


def _labels(run: RunFacts, measured: Record) -> Iterator[Flag]:
    pairs, reasons = measured["pairs"], measured["labels"]["abstained"]
    if reasons:
        share = sum(reasons.values()) / pairs
        text = "; ".join(f"{reason}: {many(count, 'pair')}" for reason, count in reasons.items())
        yield Flag(_level(share > 0.05), f"{percent(share, 1)} of the labels abstain", f"They teach nothing. {text}.")
    same = sum(p["a"]["text"] == p["b"]["text"] for p in run.preferences) / pairs if pairs else 0.0
    if same > SAME:
        text = (
            "Two equal answers cannot be compared. A higher temperature or more varied prompts give more to learn from."
        )
        yield Flag(_level(same > 3 * SAME), f"{percent(same)} of the pairs have twice the same text", text)
    known = [p["p_a"] for p in run.preferences if p["p_a"] is not None]
    lean = sum(known) / len(known) - 0.5 if len(known) >= ENOUGH else 0.0
    if abs(lean) > LEAN:
        text = (
            f"The mean label is {percent(0.5 + lean, 1)}. Answers A and B are drawn alike, so it should be one half, "
            f"give or take {points(LEAN)}."
        )
        yield Flag("worry", f"Labels lean to answer {'A' if lean > 0 else 'B'}", text)


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
            yield Flag(
                _level(cut > 0.1 * len(texts)), f"{percent(cut / len(texts), 1)} of the {name} are cut off", text
            )
        wrong = [[mark for mark in one.get("marks", ()) if mark != KEPT] for one in texts]
        marks = Counter(mark for some in wrong for mark in some)
        if marks:
            text = "; ".join(f"{mark}: {many(count, 'text')}" for mark, count in marks.most_common())
            touched = sum(map(bool, wrong)) / len(texts)
            title = f"Guards marked {percent(touched, 1)} of the {name}"
            yield Flag(_level(touched > 0.2), title, f"{text}. What was drawn before a repair is kept beside it.")


def _principles(run: RunFacts, effects: Sequence[PrincipleEffect]) -> Iterator[Flag]:
    for row in effects:
        if row.rounds >= ENOUGH and row.changed / row.rounds < UNCHANGING:
            text = (
                f"{row.changed:,} of {many(row.rounds, 'critique')} changed the answer (bound {percent(UNCHANGING)}). "
                "Its words may be too vague to act on, or nothing broke it."
            )
            yield Flag("note", f"“{row.title}” almost never changes an answer", text, row.id)
    at_hand = {principle.hash for principle in run.constitution.principles}
    used = {one["principle"]["hash"]: one["principle"]["id"] for chain in run.chains for one in chain["rounds"]}
    used |= {one["principle"]["hash"]: one["principle"]["id"] for p in run.preferences for one in p.get("labels", [])}
    strange = sorted({name for hash, name in used.items() if hash not in at_hand})
    if strange:
        text = (
            f"Some records were made by principles that it lacks, or words otherwise: {', '.join(strange)}. This page "
            "shows the constitution of the newest records."
        )
        yield Flag("worry", "The constitution has changed since", text)


def _reward(run: RunFacts) -> Iterator[Flag]:
    counts = run.stages["reward"].counts or run.stages["dpo"].counts
    sure, ece = counts.get("heldout_sure_accuracy"), counts.get("heldout_ece")
    accuracy = counts.get("heldout_accuracy") if sure is None else sure
    if accuracy is not None and accuracy < 0.65:
        agrees = f"Of the held-out labels that prefer an answer it agrees with {percent(accuracy)}"
        agrees += "" if sure is None else ", by how sure they are"
        text = f"{agrees}; a coin would with 50 % (bound 65 %)."
        yield Flag("worry", "The preferences were hardly learnt", text)
    if ece is not None and ece > 0.1:
        text = f"Its probabilities are off by {percent(ece)} on average (expected calibration error, bound 10 %)."
        yield Flag("worry", "The preference model is badly calibrated", text)


def _ppo(run: RunFacts) -> Iterator[Flag]:
    metrics, counts = run.stages["ppo"].metrics, run.stages["ppo"].counts
    if counts.get("stopped"):
        yield Flag("worry", "PPO was stopped", f"{counts['stopped']}.")
    rung = [int(m["step"]) for m in metrics if m.get("collapse/alarms")]
    if rung:
        first = f"first at step {rung[0]}, last at step {rung[-1]}, {many(len(rung), 'step')} in all"
        text = f"Repetition, boilerplate, entropy or length left its bounds: {first}. Read the samples of those steps."
        yield Flag("worry", "Signs of collapse", text)
    if not metrics:
        return
    last = metrics[-1]
    if last.get("objective/kl", 0.0) > KL:
        text = (
            f"{number(last['objective/kl'])} nats per answer from SL-CAI at the end (bound {KL:g}). Far from its start "
            "a model may have found what the reward model likes and people do not."
        )
        yield Flag("worry", "High KL", text)
    if last.get("val/ended", 1.0) < 0.95:
        text = f"In the last iteration {percent(last['val/ended'])} of the answers end by themselves (bound 95 %)."
        yield Flag("worry", "Answers of the last policy are cut off", text)


def _behaviour(summary: Mapping[str, Any]) -> Iterator[Flag]:
    both = ends(summary)
    if both is None:
        return
    before, after = both
    lost = before.get("helpful_benign", 0.0) - after.get("helpful_benign", 0.0)
    if lost > LOST_HELP:
        text = f"It helps with {percent(lost)} fewer harmless requests than the base (bound {percent(LOST_HELP)})."
        yield Flag("worry", "The model has become less helpful", text)
    for name, title in (("evaded", "evades"), ("broken", "answers in broken words")):
        if after.get(name, 0.0) > max(0.05, before.get(name, 0.0)):
            text = f"{percent(after[name], 1)} of the answers, {percent(before.get(name), 1)} before."
            yield Flag("worry", f"The model {title} more often", text)


def _stages(run: RunFacts) -> Iterator[Flag]:
    for stage in run.stages.values():
        if stage.state == "begun":
            text = (
                "What this page shows of it is what was written so far; run it again to go on, and make the page again."
            )
            yield Flag("note", f"The stage “{stage.name}” has not finished", text)
    counts: Record = run.stages["finetune"].counts
    names = ("empty_revisions", "cut_revisions", "empty_helpful", "cut_helpful", "over_context")
    left_out = {name: counts.get(name, 0) for name in names}
    learned: Record = run.stages["reward"].counts or run.stages["dpo"].counts
    pairs = {"pairs_over_context": "over_context", "helpful_pairs_over_context": "helpful_over_context"}
    left_out |= {title: learned.get(name, 0) for title, name in pairs.items()}
    if any(left_out.values()):
        text = "; ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in left_out.items() if count)
        yield Flag("note", "Some texts were not trained on, or marked", f"{text}.")
