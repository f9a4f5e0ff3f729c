"""Examples that were read from other people's files, as the TOML that lies beside a constitution."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bylaw.constitution.draft import literal, one_line
from bylaw.constitution.examples import prompt_turns
from bylaw.constitution.schema import Constitution, Stage
from bylaw.constitution.write import toml_lines

_NO_REASONS = "Answer {%s} keeps the principle better than answer {%s} does."
# An option named by its letter: (A), [A] and "option A", but not "to answer A question".
_MARK = re.compile(
    r"([(\[])([AB])(?=[)\]])|((?<![Tt]o )\b(?:[Oo]ption|[Aa]nswer|[Rr]esponse|[Rr]eply|[Cc]hoice) )([AB])(?![\w-])"
)
# What would name an answer by its letter or its place all the same.
_LEFT = re.compile(
    r"\b[AB]\b|(?i:\bthe (?:first|second)\b|\b(?:former|latter)\b"
    r"|\b(?:first|second|1st|2nd) (?:answer|response|reply|option|choice|one|assistant)\b"
    r"|\b(?:answer|response|reply|option|choice|assistant) (?:[12]|one|two)\b)"
)


def dump_examples(
    kind: Stage, examples: Sequence[dict[str, Any] | str], constitution: Constitution
) -> tuple[str, list[str]]:
    """TOML for `load_examples`, and notes on what was left out or made up.

    An example of a critique is by the principle that it names, or by its revision request in place of one. A comparison
    names none, so it stands for every comparison principle of `constitution`. Which answer is (A) is drawn anew each
    time, so that reasons must name the answers by marks that follow: those that would not are left out. So is what is
    no example, but why it is none.

    ValueError when none is left.
    """
    faults = [_fault(one) for one in examples]
    kept: list[Any] = [one for one, fault in zip(examples, faults, strict=True) if not fault]
    told = Counter({f"left out: {fault}": faults.count(fault) for fault in faults if fault})
    if not kept:
        raise ValueError(f"none of the {len(examples)} examples has a place in the file; {'; '.join(_notes(told))}")
    if kind == "critique":
        ids = {p.id for p in constitution.principles if "critique" in p.stages}
        told["by no critique principle of the constitution: the revision request stands for it"] = sum(
            one["principle"] not in ids for one in kept
        )
        tables = ["[[revision]]\n" + toml_lines(_revision(one, ids)) for one in kept]
    else:
        all_ids = tuple(p.id for p in constitution.for_stage("comparison"))
        told["without reasons: a plain sentence stands for them"] = sum(not one["reasons"] for one in kept)
        told[f"taken to hold by all {len(all_ids)} comparison principles: take out where one does not"] = len(kept)
        tables = ["[[comparison]]\n" + toml_lines(_comparison(one, all_ids)) for one in kept]
    return "\n".join(tables), _notes(told)


def _notes(told: Counter[str]) -> list[str]:
    return [f"{count} {what}" for what, count in told.items() if count]


def _fault(one: dict[str, Any] | str) -> str:
    """Why an example has no place in the file; "" if it has one."""
    if isinstance(one, str):
        return one
    turns = [{"role": message["role"], "content": message["content"].strip()} for message in one["prompt"]]
    try:
        held = prompt_turns(_prompt(turns)) == turns
    except (ValueError, KeyError):
        held = False
    if not held:
        return "a prompt that the file cannot hold (a system message, a speaker's name within a turn)"
    if _LEFT.search(_letters(one.get("reasons", ""))):
        return "reasons that name an answer by its place or a bare letter, which would not follow the order drawn"
    return ""


def _prompt(messages: Sequence[dict[str, str]]) -> str:
    """One turn as it stands, several as a dialogue."""
    if len(messages) == 1:
        return messages[0]["content"].strip()
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[message['role']]}: {message['content'].strip()}" for message in messages)


def _revision(one: dict[str, Any], ids: set[str]) -> dict[str, str]:
    named = one["principle"] if one["principle"] in ids else one_line(one["revision_request"])
    texts = {key: one[key] for key in ("answer", "critique", "revision")}
    return {"prompt": _prompt(one["prompt"]), "principle": named} | texts


def _comparison(one: dict[str, Any], ids: tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    named: str | tuple[str, ...] = ids[0] if len(ids) == 1 else ids
    other = {"a": "b", "b": "a"}[one["better"]]
    reasons = _letters(one["reasons"]) if one["reasons"] else _NO_REASONS % (one["better"], other)
    texts = {key: one[key] for key in ("a", "b", "better")}
    return {"prompt": _prompt(one["prompt"]), "principle": named} | texts | {"reasons": reasons}


def _letters(reasons: str) -> str:
    """Where the reasons name an option by its letter, the mark for whichever letter it will have."""
    return _MARK.sub(lambda at: f"{at[1] or at[3]}{{{(at[2] or at[4]).lower()}}}", literal(reasons))
