"""Examples that were read from other people's files, as the TOML that lies beside a constitution."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bylaw.constitution.draft import literal, one_line
from bylaw.constitution.schema import Constitution, Stage
from bylaw.constitution.write import toml_lines

_NO_REASONS = "Answer {%s} keeps the principle better than answer {%s} does."
_LETTER = re.compile(r"(?<![A-Za-z])(\(|[Oo]ption |[Aa]nswer |[Rr]esponse )([AB])(?![A-Za-z])")


def dump_examples(kind: Stage, examples: Sequence[dict[str, Any]], constitution: Constitution) -> tuple[str, list[str]]:
    """TOML for `load_examples`, and notes on what was left out or made up.

    An example of a critique is by the principle that it names, or by its revision request in place of one. A comparison
    names none, so it stands for every comparison principle of `constitution`. Examples whose prompt is more than one
    turn have no place in the file.

    ValueError when none is left.
    """
    short = [one for one in examples if [message["role"] for message in one["prompt"]] == ["user"]]
    if not short:
        raise ValueError(f"none of the {len(examples)} examples has a prompt of one turn, which is what the file holds")
    told: Counter[str] = Counter({"with a prompt of several turns left out": len(examples) - len(short)})
    if kind == "critique":
        ids = {p.id for p in constitution.principles if "critique" in p.stages}
        told["by no critique principle of the constitution: the revision request stands for it"] = sum(
            one["principle"] not in ids for one in short
        )
        tables = ["[[revision]]\n" + toml_lines(_revision(one, ids)) for one in short]
    else:
        all_ids = tuple(p.id for p in constitution.for_stage("comparison"))
        told["without reasons: a plain sentence stands for them"] = sum(not one["reasons"] for one in short)
        told[f"taken to hold by all {len(all_ids)} comparison principles: take out where one does not"] = len(short)
        tables = ["[[comparison]]\n" + toml_lines(_comparison(one, all_ids)) for one in short]
    return "\n".join(tables), [f"{count} {what}" for what, count in told.items() if count]


def _revision(one: dict[str, Any], ids: set[str]) -> dict[str, str]:
    named = one["principle"] if one["principle"] in ids else one_line(one["revision_request"])
    texts = {key: one[key] for key in ("answer", "critique", "revision")}
    return {"prompt": one["prompt"][0]["content"], "principle": named} | texts


def _comparison(one: dict[str, Any], ids: tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    named: str | tuple[str, ...] = ids[0] if len(ids) == 1 else ids
    other = {"a": "b", "b": "a"}[one["better"]]
    reasons = _letters(one["reasons"]) if one["reasons"] else _NO_REASONS % (one["better"], other)
    texts = {key: one[key] for key in ("a", "b", "better")}
    return {"prompt": one["prompt"][0]["content"], "principle": named} | texts | {"reasons": reasons}


def _letters(reasons: str) -> str:
    """Where the reasons name an option by its letter, the mark for whichever letter it will have."""
    return _LETTER.sub(lambda found: f"{found[1]}{{{found[2].lower()}}}", literal(reasons))
