"""What a finished stage came to, in a line that a person reads. Its manifest has all of it."""

from collections.abc import Mapping
from typing import Any

from bylaw.words import duration, many, number, percent

NARROW = "\u202f"  # the space of the report's numbers, which many terminals have no glyph for


def stage_line(manifest: Mapping[str, Any]) -> str:
    """One line: what was made, what was left out and why, and how long it took."""
    name, counts = manifest["stage"], manifest["counts"]
    parts = [part for part in _TOLD[name](counts) if part] if name in _TOLD else []
    line = f"{name}: {', '.join(parts) or 'done'}, in {duration(manifest['seconds'])}"
    return line.replace(NARROW, " ")


def next_commands(out: object) -> str:
    """What to do with a finished run."""
    return f"Read what happened: bylaw report {out}. Is it sound: bylaw check {out}. Talk to it: bylaw chat {out}"


def _revise(counts: Mapping[str, Any]) -> list[str]:
    marks = {f"{kind} {mark}": count for kind, some in counts["marks"].items() for mark, count in some.items()}
    guards = [f"{mark}: {count:,}" for mark, count in marks.items() if mark != "revision unchanged"]
    return [
        f"{many(counts['chains'], 'chain')} of {many(counts['rounds'], 'round')}",
        many(counts["helpful"], "helpful answer"),
        f"guards marked {'; '.join(guards)}" if guards else "",
    ]


def _finetune(counts: Mapping[str, Any]) -> list[str]:
    return [
        f"{many(counts['revisions'], 'revision')} and {many(counts['helpful'], 'helpful answer')} in "
        f"{many(counts['steps'], 'step')}",
        f"last loss {number(counts['last_loss'])}",
        *_left(counts, "empty_revisions", "marked_revisions", "empty_helpful", "over_context"),
    ]


def _compare(counts: Mapping[str, Any]) -> list[str]:
    return [many(counts["pairs"], "pair")]


def _label(counts: Mapping[str, Any]) -> list[str]:
    reasons = [f"{reason}: {count:,}" for reason, count in counts["abstained"].items()]
    silent = sum(counts["abstained"].values())
    return [
        many(counts["labels"], "label"),
        f"{silent:,} abstained ({'; '.join(reasons)}; `bylaw trust` tells more)" if reasons else "",
        f"{counts['same_text']:,} of twice the same text" if counts["same_text"] else "",
    ]


def _learnt(counts: Mapping[str, Any]) -> list[str]:
    sure = counts.get("heldout_sure_accuracy")
    share = counts.get("heldout_accuracy") if sure is None else sure
    weighed = "" if sure is None else ", each weighed by how sure it is"
    told = f": it agrees with {percent(share)} of their labels{weighed}" if share is not None else ", none decided"
    return [
        f"{many(counts['train_pairs'], 'pair')} in {many(counts['steps'], 'step')}",
        f"{counts['heldout_pairs']:,} held out{told}",
        *_left(counts, "abstained", "over_context", "helpful_over_context", "helpful_pairs_missing"),
    ]


def _ppo(counts: Mapping[str, Any]) -> list[str]:
    last = {"objective/scores": "score", "objective/kl": "KL per answer"}
    return [
        f"{many(counts['episodes'], 'episode')} in {many(counts['iterations'], 'iteration')}",
        *(f"{word} {number(counts[name])} at the end" for name, word in last.items() if counts.get(name) is not None),
        f"stopped: {counts['stopped']}" if counts.get("stopped") else "",
    ]


def _left(counts: Mapping[str, Any], *names: str) -> list[str]:
    return [f"{name.replace('_', ' ')}: {counts[name]:,}" for name in names if counts.get(name)]


_TOLD = {
    "revise": _revise,
    "finetune": _finetune,
    "compare": _compare,
    "label": _label,
    "reward": _learnt,
    "dpo": _learnt,
    "ppo": _ppo,
}
