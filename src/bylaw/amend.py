"""`bylaw amend RUN NEW.toml`: what an amended constitution would change in a finished run, and the run made by it.

Comparisons that the change touches are labelled anew, and no others; the labels that flipped are listed with their
texts; and what would change before them is told from the draws, without any model. All of it stands in
RUN/amendments/HASH. With an output folder the run is then made again from the first stage that the change reaches.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bylaw.branch import branch
from bylaw.constitution.asked import stage_hash
from bylaw.constitution.diff import Diff, describe_diff, diff
from bylaw.constitution.examples import load_examples
from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution, Stage
from bylaw.constitution.write import dump_constitution
from bylaw.inputs import Run
from bylaw.judges import judge_reader
from bylaw.layout import AMENDMENT, AMENDMENTS
from bylaw.ledger import Ledger
from bylaw.lock import only_one
from bylaw.model.records import Record, encode_record, read_object, read_records, sha256_file, write_atomic
from bylaw.pipeline import run_pipeline
from bylaw.recipe import EVERY_STAGE, AmendConfig, Recipe, asked_at
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.relabel import MOVED, check_relabel, flips, moved, movement, relabel
from bylaw.rlaif.trust import TIE
from bylaw.runs import is_begun
from bylaw.sl_cai.revise import drawn_principle
from bylaw.sums import write_sums
from bylaw.told import next_commands
from bylaw.words import printable

SHOWN = 10
PREFERENCES, FLIPS, OF = "preferences.jsonl", "flips.jsonl", "of.json"


def amend(folder: Path, new: str, config: AmendConfig) -> dict[str, Any]:
    """Compare, relabel, list and estimate; write it all to the run, print it, and retrain if asked; returns the facts.

    Raises, before it writes anything, ValueError for a run whose labels are not finished, were made by other
    constitutions than it keeps or are not those that an earlier call began with, for an amended constitution that a
    stage or the examples cannot go by, and for a run to be made anew that would be the old one; FileNotFoundError as
    `load_constitution` does.
    """
    ledger = Ledger(folder)
    amended, labelled = load_constitution(new), _labelled(ledger)
    changes, recipes = diff(_constitution_of(ledger, labelled), amended), _recipes(ledger, new, config)
    first = first_stage(changes, recipes[0], _other_examples(recipes, changes))
    if config.out and first is None:
        raise ValueError("the amendment reaches no prompt and no draw: there is nothing to make again")
    before, after = _judges(recipes)
    check_relabel(before, after, labelled)
    with only_one(folder):
        facts, shown = _relabelled(ledger, changes, before, after, labelled, first)
    there = folder / AMENDMENTS / amended.hash
    print(json.dumps(facts, indent=2) if config.json else printable(describe(changes, facts, shown, there)))
    if config.out:
        _remake(recipes[1], config.out, there, ledger.constitution_path(amended.hash), first)
        print(f"The run by the amended constitution: {config.out}. {next_commands(config.out)}")
    return facts


def _relabelled(
    ledger: Ledger, changes: Diff, before: Judge, after: Judge, labelled: Sequence[Record], first: str | None
) -> tuple[dict[str, Any], list[Record]]:
    """Write the amendment's folder; its facts, and the labels that flipped or moved."""
    folder, amended = ledger.run, changes.new
    there = folder / AMENDMENTS / amended.hash
    shown = {"examples": after.examples.hash} if after.config.shots else {}
    _begin(there, {"labels": sha256_file(folder / "label" / PREFERENCES)} | shown)
    kept = ledger.constitution_path(amended.hash)
    found = relabel(before, after, labelled, there / PREFERENCES)
    if not kept.exists():  # an equal one may stand there
        write_atomic(kept, dump_constitution(amended))
    facts = {"from": changes.old.hash, "to": amended.hash, "first_stage": first} | found
    facts |= _tell(ledger, changes, labelled, there)
    write_atomic(there / AMENDMENT, json.dumps(facts, indent=2) + "\n")
    write_sums(folder, f"{AMENDMENTS}/{amended.hash}", f"constitutions/{kept.name}")
    return facts, moved(labelled, read_records(there / PREFERENCES))


def first_stage(changes: Diff, recipe: Recipe, other_examples: Collection[Stage] = ()) -> str | None:
    """The first stage of a run by `recipe` whose output an amendment can change; None if it reaches no prompt and no
    draw. `other_examples`: where other examples are shown than before.
    """
    for name in [one for one in recipe.stages if one in ("revise", "label")]:
        stage, used = asked_at(recipe, name)
        old, new = (stage_hash(one, stage, used) for one in (changes.old, changes.new))
        if old != new or stage in other_examples:
            return name
    return None


def describe(changes: Diff, facts: dict[str, Any], shown: Sequence[Record], there: Path) -> str:
    """As a person reads it: the change, what it reaches, and the labels that flipped by more than a tie, or moved, the
    furthest first.
    """
    chains, change = facts["chains"], facts["mean_change"]
    lines = [
        describe_diff(changes),
        f"comparisons: {facts['comparisons']}, of them {facts['touched']} touched and {facts['asked']} asked anew "
        f"({facts['questions']} questions, each in both orders)",
        f"labels that flipped: {facts['flips']} of {facts['comparisons']}, of them {facts['firm_flips']} from one side "
        f"to the other by more than a tie ({TIE:g}); labels that moved by {MOVED:g} or more: {facts['moved']}; mean "
        f"change {'none' if change is None else format(change, '.4f')}",
        f"critiques: {chains['rounds']} of {chains['of']} rounds, in {chains['chains']} chains, would follow another "
        "principle, or the same in other words",
        f"first stage to be made again: {facts['first_stage'] or 'none'}",
        "",
    ]
    lines += ["the labels that moved furthest:", ""] if shown else []
    lines += [_describe_move(one) for one in shown[:SHOWN]]
    rest = len(shown) - SHOWN
    more = f"{rest} more, which moved less. " if rest > 0 else ""
    more += f"Every flip: {there / FLIPS}; every label: {there / PREFERENCES}"
    return "\n".join([*lines, more])


def _describe_move(flip: Record) -> str:
    before, after = flip["before"], flip["after"]
    return "\n".join(
        [
            f"{_line(flip['id'])}: {_said(before)} -> {_said(after)}",
            f"  prompt  {_line(flip['prompt'][-1]['content'])}",
            f"  a       {_line(flip['a'])}",
            f"  b       {_line(flip['b'])}",
            "",
        ]
    )


def _said(one: Record) -> str:
    return one["side"] if one["p_a"] is None else f"{one['side']} (p(a) {one['p_a']:.4f})"


def _line(text: str) -> str:
    """On one line of a terminal."""
    return " ".join(text.split())[:200]


def _labelled(ledger: Ledger) -> list[Record]:
    if "label" not in ledger.manifests:
        raise ValueError(f"{ledger.run}: its stage label is not finished; run `bylaw label` with its recipe first")
    return list(ledger.preferences.values())


def _begin(there: Path, of: dict[str, str]) -> None:
    """Note the hashes of the labels that are amended and of the examples shown. ValueError where there were others, and
    some of what was made of them is kept.
    """
    if (there / PREFERENCES).exists() and (not (there / OF).exists() or read_object(there / OF) != of):
        raise ValueError(
            f"{there} was made of other labels or examples than the run has now; delete it to make it anew"
        )
    write_atomic(there / OF, json.dumps(of) + "\n")


def _recipes(ledger: Ledger, new: str, config: AmendConfig) -> tuple[Recipe, Recipe]:
    """The run's recipe as it was made, and the one to amend it by. ValueError for an output folder that is the run's
    own.
    """
    if config.out and config.out.resolve() == ledger.run.resolve():
        raise ValueError(f"out = {config.out} is the run itself; allowed: another folder, for the run made anew")
    before = ledger.as_made_on(config.base)
    return before, replace(before, constitution=new, examples=config.examples or before.examples)


def _other_examples(recipes: tuple[Recipe, Recipe], changes: Diff) -> list[Stage]:
    """The stages that show examples, if the two recipes have different ones. ValueError, before any work, for a file
    whose examples go by a principle that is no more.
    """
    shots: dict[Stage, int] = {"critique": recipes[0].revise.shots, "comparison": recipes[0].label.shots}
    if not any(shots.values()):
        return []
    old = load_examples(recipes[0].examples, changes.old).hash
    try:
        new = load_examples(recipes[1].examples, changes.new).hash
    except ValueError as error:
        raise ValueError(f"{error}; examples for the amended constitution are given as --examples FILE") from None
    return [stage for stage, count in shots.items() if count and old != new]


def _constitution_of(ledger: Ledger, labelled: Sequence[Record]) -> Constitution:
    hashes = {one["by"]["constitution"] for one in labelled}
    if len(hashes) != 1 or not hashes <= ledger.constitutions.keys():
        raise ValueError(
            f"{ledger.run}: its labels are by the constitutions {sorted(hashes)}, and it keeps "
            f"{sorted(ledger.constitutions)}; allowed: labels by one constitution that stands in constitutions/"
        )
    return ledger.constitutions[hashes.pop()]


def _judges(recipes: tuple[Recipe, Recipe]) -> tuple[Judge, Judge]:
    """The judge of the run's labels, and the same one with the amended constitution."""
    runs = [Run(one) for one in recipes]
    reader = judge_reader(runs[0])
    before, after = runs[0].judge(reader), runs[1].constitution
    if after.templates.answer_prefix != before.constitution.templates.answer_prefix:  # another token may come next
        reader = judge_reader(runs[1])
    return before, replace(before, constitution=after, examples=runs[1].examples, reader=reader)


def _tell(ledger: Ledger, changes: Diff, labelled: Sequence[Record], there: Path) -> dict[str, Any]:
    """What the new labels come to; the flips are written."""
    after = read_records(there / PREFERENCES)
    flipped = flips(labelled, after)
    facts = {"flips": len(flipped)} | movement(labelled, after)
    facts |= {"chains": _chains(ledger, changes), "by_principle": _leans(flipped)}
    write_atomic(there / FLIPS, "".join(encode_record(one, FLIPS).decode() for one in flipped))
    return facts


def _chains(ledger: Ledger, changes: Diff) -> dict[str, int]:
    """How many rounds of critique would be drawn otherwise, or say something else, and in how many chains."""
    new, seed, touched, chains = changes.new, ledger.recipe.seed, 0, 0
    reworded = set(changes.touched(*asked_at(ledger.recipe, "revise")))
    for chain in ledger.chains.values():
        count = 0
        for round in chain["rounds"]:
            now = drawn_principle(new, seed, chain["id"], round["round"]).id
            count += now != round["principle"]["id"] or now in reworded
        touched, chains = touched + count, chains + bool(count)
    return {"rounds": touched, "of": sum(len(c["rounds"]) for c in ledger.chains.values()), "chains": chains}


def _leans(flipped: Sequence[Record]) -> dict[str, int]:
    """Of the flips, by principle: where its own reading is another than it was, or is gone, or is new."""
    counts: dict[str, int] = {}
    for one in flipped:
        before, after = one["before"]["labels"], one["after"]["labels"]
        for id in sorted(before.keys() | after.keys()):
            counts[id] = counts.get(id, 0) + (before.get(id) != after.get(id))
    return {id: count for id, count in counts.items() if count}


def _remake(recipe: Recipe, out: Path, there: Path, constitution: Path, first: str | None) -> None:
    """A run by the amended constitution: stages that it does not reach are copied, and so are the labels if all before
    them is.
    """
    assert first is not None
    ahead = EVERY_STAGE[: EVERY_STAGE.index(first)]
    with only_one(out):
        branch(recipe.out, out, [name for name in recipe.stages if name in ahead])
        if first == "label" and not is_begun(out / "label"):
            (out / "label").mkdir(parents=True, exist_ok=True)
            shutil.copy2(there / PREFERENCES, out / "label" / PREFERENCES)
    run_pipeline(replace(recipe, out=out, constitution=str(constitution.absolute())), recipe.stages)
