"""What a run's training stages learned of each record, and when: their own rules and order, worked out again."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from bylaw.ledger import Ledger
from bylaw.model.fit import batches_of
from bylaw.model.records import Record
from bylaw.model.supervised import Example
from bylaw.rlaif.pairs import is_heldout, pair_of
from bylaw.sl_cai.finetune import helpful_examples, revision_examples

Key = tuple[str, str, int]  # "round" or "helpful", prompt id, number
Fate = dict[str, Any]


def supervised(ledger: Ledger) -> dict[Key, Fate]:
    """Of each revision and helpful sample: the steps of supervised training that learned it, or why none did."""
    manifest = ledger.manifests.get("finetune")
    if manifest is None:
        return {}
    fates: dict[Key, Fate] = {}
    order: list[Key] = []
    for key, examples, counts in _examples(ledger):
        left_out = _left_out(ledger, examples, counts)
        fates[key] = {"left_out": left_out} if left_out else {"cut": any(counts.get(name) for name in _CUT)}
        order += [] if left_out else [key]
    counted = manifest["counts"]
    _check(manifest, "examples", len(order), counted["revisions"] + counted["helpful"] - counted["over_context"])
    for key, steps in zip(order, _steps(manifest, len(order)), strict=True):
        fates[key]["steps"] = steps
    return fates


def preferred(ledger: Ledger, stage: str) -> dict[str, Fate]:
    """Of each preference, by id: whether `stage` (reward or dpo) trained on it, at which steps, or measured with it."""
    manifest = ledger.manifests.get(stage)
    if manifest is None:
        return {}
    fraction, seed, counted = manifest["config"]["heldout_fraction"], manifest["seed"], manifest["counts"]
    fates = {id: _side(one, fraction, seed) for id, one in ledger.preferences.items()}
    if counted.get("over_context"):  # else no text need be tokenised
        fates |= {id: {"use": "left out", "reason": _over(ledger)} for id in _over_context(ledger)}
    trained = [fate for fate in fates.values() if fate["use"] == "trained on"]
    _check(manifest, "pairs", len(trained), counted["train_pairs"] - counted.get("helpful_pairs", 0))
    # Pairs that were mixed in from a file come after these.
    for fate, steps in zip(trained, _steps(manifest, counted["train_pairs"])[: len(trained)], strict=True):
        fate["steps"] = steps
    return fates


def mixed_in(ledger: Ledger, stage: str) -> dict[str, Fate]:
    """Of each preference that a file gave to `stage`, by id: the steps that trained on it. `ledger` is of that part."""
    manifest = ledger.manifests.get(stage)
    if manifest is None:
        return {}
    given, counted = list(ledger.preferences), manifest["counts"]
    _check(manifest, "pairs from elsewhere", len(given), counted["helpful_pairs"])
    steps = _steps(manifest, counted["train_pairs"])[counted["train_pairs"] - len(given) :]
    return {id: {"use": "trained on", "steps": of} for id, of in zip(given, steps, strict=True)}


def _over_context(ledger: Ledger) -> list[str]:
    labelled = [one for one in ledger.preferences.values() if not one["abstained"]]
    return [one["id"] for one in labelled if pair_of(one, ledger.tokenizer).longest > ledger.context]


_CUT = ("cut_revisions", "cut_helpful")
_KEPT = ("revisions", "helpful", *_CUT)
_REASONS = {
    "empty_revisions": "the revision is empty",
    "empty_helpful": "the answer is empty",
    "marked_revisions": "it bears a mark that finetune.leave_out names",
}


def _examples(ledger: Ledger) -> list[tuple[Key, list[Example], dict[str, int]]]:
    """What supervised training makes of each record, one by one, in its order."""
    made = []
    leave_out = ledger.manifests["finetune"]["config"].get("leave_out", ())
    for id, chain in ledger.chains.items():
        for step in chain["rounds"]:
            key = ("round", id, step["round"])
            made.append((key, *revision_examples([chain | {"rounds": [step]}], ledger.tokenizer, leave_out)))
    for (id, number), sample in ledger.helpful.items():
        made.append((("helpful", id, number), *helpful_examples([sample], ledger.tokenizer)))
    return made


def _left_out(ledger: Ledger, examples: list[Example], counts: Mapping[str, int]) -> str:
    """Why a record is not learned; "" if it is."""
    if not examples:
        names = [name for name, count in counts.items() if count and name not in _KEPT]
        return ", ".join(_REASONS.get(name, name) for name in names)
    over = any(len(example.ids) > ledger.context for example in examples)
    return _over(ledger) if over else ""


def _over(ledger: Ledger) -> str:
    return f"longer than the model's context of {ledger.context} tokens"


def _side(preference: Record, fraction: float, seed: int) -> Fate:
    if preference["abstained"]:
        return {"use": "left out", "reason": f"the label abstained: {preference['abstained']}"}
    return {"use": "held out" if is_heldout(preference["prompt_id"], fraction, seed) else "trained on"}


def _steps(manifest: Record, count: int) -> list[list[dict[str, int]]]:
    """For each of `count` items: epoch (from 1) and optimiser step (as metrics.jsonl counts, from 0) of every visit."""
    config = manifest["config"]
    visits: dict[int, list[int]] = defaultdict(list)
    for step, batch in enumerate(batches_of(count, config["epochs"], config["batch_size"], manifest["seed"])):
        for item in batch:
            visits[item].append(step)
    return [[{"epoch": n, "step": step} for n, step in enumerate(visits[item], 1)] for item in range(count)]


def _check(manifest: Record, what: str, found: int, counted: int) -> None:
    """The rules of now must be those that the stage went by: else the steps would be another's."""
    if found != counted:
        raise ValueError(
            f"stage {manifest['stage']} learned from {counted} {what}, but its records make {found} now: they were "
            "changed (`bylaw check` says which), or an older bylaw made the run"
        )
