"""`bylaw amend RUN NEW.toml`: what an amended constitution would change in a finished run, and the run made by it.

Comparisons that the change touches are labelled anew, and no others; the labels that flipped are listed with their
texts; and what would change before them is told from the draws, without any model. All of it stands in
RUN/amendments/HASH. With an output folder the run is then made again from the first stage that the change reaches.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bylaw.branch import branch
from bylaw.constitution.diff import Diff, describe_diff, diff
from bylaw.constitution.examples import beside
from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution, Stage
from bylaw.constitution.write import dump_constitution
from bylaw.inputs import Run
from bylaw.judges import judge_reader
from bylaw.ledger import Ledger
from bylaw.model.records import Record, encode_record, read_object, read_records, sha256_file, write_atomic
from bylaw.pipeline import run_pipeline
from bylaw.recipe import AmendConfig, Recipe
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.relabel import flips, relabel
from bylaw.runs import is_begun
from bylaw.sl_cai.revise import drawn_principle
from bylaw.sums import write_sums

SHOWN = 10
PREFERENCES, FLIPS, OF = "preferences.jsonl", "flips.jsonl", "of.json"


def amend(folder: Path, new: str, config: AmendConfig) -> dict[str, Any]:
    """Compare, relabel, list and estimate; write it all to the run, print it, and retrain if asked; returns the facts.

    Raises ValueError for a run whose labels are not finished, were made by other constitutions than it keeps or are not
    those that an earlier call began with, and FileNotFoundError as `load_constitution` does.
    """
    ledger = Ledger(folder)
    amended, labelled = load_constitution(new), _labelled(ledger)
    old = _constitution_of(ledger, labelled)
    there = folder / "amendments" / amended.hash
    kept = ledger.constitution_path(amended.hash)
    if not kept.exists():  # an equal one may stand there
        write_atomic(kept, dump_constitution(amended))
    changes = diff(old, amended)
    _begin(there, sha256_file(folder / "label" / PREFERENCES))
    before, after = _judges(ledger, old, kept)
    found = relabel(before, after, labelled, there / PREFERENCES)
    flipped = flips(labelled, read_records(there / PREFERENCES))
    facts = {"from": old.hash, "to": amended.hash, "first_stage": first_stage(changes)} | found
    facts |= {"flips": len(flipped), "chains": _chains(ledger, old, amended), "by_principle": _leans(flipped)}
    write_atomic(there / FLIPS, "".join(encode_record(one, FLIPS).decode() for one in flipped))
    write_atomic(there / "amendment.json", json.dumps(facts, indent=2) + "\n")
    write_sums(folder, f"amendments/{amended.hash}", f"constitutions/{kept.name}")
    print(json.dumps(facts, indent=2) if config.json else describe(changes, facts, flipped, there))
    if config.out:
        _remake(ledger, config.out, there, facts["first_stage"])
    return facts


def first_stage(changes: Diff) -> str | None:
    """The first stage of a run whose output an amendment can change; None if it reaches no prompt and no draw."""
    reached: tuple[tuple[Stage, str], ...] = (("critique", "revise"), ("comparison", "label"))
    for stage, name in reached:
        if changes.old.stage_hash(stage) != changes.new.stage_hash(stage):
            return name
    return None


def describe(changes: Diff, facts: dict[str, Any], flipped: Sequence[Record], there: Path) -> str:
    """As a person reads it: the change, what it reaches, and the labels that flipped, those that moved most first."""
    chains = facts["chains"]
    lines = [
        describe_diff(changes),
        f"comparisons: {facts['comparisons']}, of them {facts['touched']} touched and {facts['asked']} asked anew "
        f"({facts['questions']} questions, each in both orders)",
        f"labels that flipped: {facts['flips']} of {facts['comparisons']}",
        f"critiques: {chains['rounds']} of {chains['of']} rounds, in {chains['chains']} chains, would follow another "
        "principle, or the same in other words",
        f"first stage to be made again: {facts['first_stage'] or 'none'}",
        "",
    ]
    lines += [_describe_flip(one) for one in sorted(flipped, key=_moved, reverse=True)[:SHOWN]]
    rest = len(flipped) - SHOWN
    more = f"{rest} more, which moved less: {there / FLIPS}" if rest > 0 else f"Kept in {there}"
    return "\n".join([*lines, more])


def _describe_flip(flip: Record) -> str:
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


def _moved(flip: Record) -> float:
    """How far the label moved; one that began or ceased to abstain comes first."""
    before, after = flip["before"]["p_a"], flip["after"]["p_a"]
    return 1.0 if None in (before, after) else abs(after - before)


def _said(one: Record) -> str:
    return one["side"] if one["p_a"] is None else f"{one['side']} (p(a) {one['p_a']:.4f})"


def _line(text: str) -> str:
    """On one line of a terminal, which no model text may steer."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _labelled(ledger: Ledger) -> list[Record]:
    if "label" not in ledger.manifests:
        raise ValueError(f"{ledger.run}: its stage label is not finished; run `bylaw label` with its recipe first")
    return list(ledger.preferences.values())


def _begin(there: Path, labels: str) -> None:
    """Note the hash of the labels that are amended. ValueError where others were, and some of theirs are kept."""
    if (there / PREFERENCES).exists() and (
        not (there / OF).exists() or read_object(there / OF).get("labels") != labels
    ):
        raise ValueError(f"{there} was made of other labels than the run has now; delete it to make it anew")
    write_atomic(there / OF, json.dumps({"labels": labels}) + "\n")


def _recipe(ledger: Ledger) -> Recipe:
    """The run's recipe, for where the folder lies now. The examples beside its constitution are named: none lie beside
    those that a run keeps.
    """
    recipe = ledger.recipe
    shots = recipe.label.shots or recipe.revise.shots
    examples = recipe.examples or (str(beside(recipe.constitution)) if shots else "")
    return replace(recipe, out=ledger.run, examples=examples)


def _constitution_of(ledger: Ledger, labelled: Sequence[Record]) -> Constitution:
    hashes = {one["by"]["constitution"] for one in labelled}
    if len(hashes) != 1 or not hashes <= ledger.constitutions.keys():
        raise ValueError(
            f"{ledger.run}: its labels are by the constitutions {sorted(hashes)}, and it keeps "
            f"{sorted(ledger.constitutions)}; allowed: labels by one constitution that stands in constitutions/"
        )
    return ledger.constitutions[hashes.pop()]


def _judges(ledger: Ledger, old: Constitution, new: Path) -> tuple[Judge, Judge]:
    """The judge of the run's labels, and the same one with the amended constitution."""
    recipe = _recipe(ledger)
    runs = [Run(replace(recipe, constitution=str(path))) for path in (ledger.constitution_path(old.hash), new)]
    reader = judge_reader(runs[0])
    before = runs[0].judge(reader)
    after = runs[1].constitution
    if after.templates.answer_prefix != old.templates.answer_prefix:  # another token may come next
        reader = judge_reader(runs[1])
    return before, replace(before, constitution=after, reader=reader)


def _chains(ledger: Ledger, old: Constitution, new: Constitution) -> dict[str, int]:
    """How many rounds of critique would be drawn otherwise, or say something else, and in how many chains."""
    seed, touched, chains = ledger.recipe.seed, 0, 0
    reworded = set(diff(old, new).touched("critique"))
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


def _remake(ledger: Ledger, out: Path, there: Path, first: str | None) -> None:
    """A run by the amended constitution: stages that it does not reach are copied, and so are the labels if all before
    them is.
    """
    if first is None:
        raise ValueError("the amendment reaches no prompt and no draw: there is nothing to make again")
    recipe = _recipe(ledger)
    branch(ledger.run, out, recipe.stages[: recipe.stages.index(first)])
    if first == "label" and not is_begun(out / "label"):
        (out / "label").mkdir(parents=True, exist_ok=True)
        shutil.copy2(there / PREFERENCES, out / "label" / PREFERENCES)
    run_pipeline(replace(recipe, out=out, constitution=str(ledger.constitution_path(there.name).absolute())))
