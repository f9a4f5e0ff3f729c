"""The files that came with the Constitutional AI paper (arXiv 2212.08073): requests in and out.

    CritiqueRevisionInstructions.json  {"harmful0": {"prompt": ["\\n\\nCritiqueRequest: ...\\n\\nCritique:"],
                                                     "edit_request": "\\n\\nRevisionRequest: ...\\n\\nRevision:"}, ...}
    RLMadisonInstructions.json         ["\\n... Options:", ...]

They hold requests, and no sentence that says the rule. A request for a revision says best what an answer should be, so
it stands as the statement too; a question about two answers is its own statement. The few-shot prompts and samples of
the release are read in `released_texts`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bylaw.constitution.draft import (
    Imported,
    assemble,
    check_text,
    literal,
    one_line,
    only,
    rows,
    short_title,
    slug,
    table,
)
from bylaw.constitution.render import critique_request, fill, revision_request
from bylaw.constitution.schema import Constitution, Principle

CRITIQUES, COMPARISONS = "critique and revision requests", "comparison questions"
_CRITIQUE = re.compile(r"CritiqueRequest:(.*?)(?:\n\s*Critique:)?", re.DOTALL)
_REVISION = re.compile(r"RevisionRequest:(.*?)(?:\n\s*Revision:)?", re.DOTALL)
_OPTIONS = re.compile(r"(.*?)(?:\bOptions:)?", re.DOTALL)


def read_critiques(value: Mapping[str, Any], path: Path) -> Imported:
    """CritiqueRevisionInstructions.json. A key is the principle's id, if it may be one. ValueError naming the key."""
    principles, remade = [], 0
    for key, entry in value.items():
        principle = requests_principle(key, entry, f"{path}: {key}", path.name)
        remade += principle.id != key
        principles.append(principle)
    notes = ["the file has no statements: each revision request stands as one, until somebody words it"]
    if remade:
        notes.append(f"{remade} keys could not be ids (lower-case letters, digits, hyphens), and were changed")
    return assemble(principles, CRITIQUES, path, notes)


def requests_principle(key: str, entry: object, where: str, source: str) -> Principle:
    """The principle of one {"prompt": [...], "edit_request": ...}. ValueError naming `where`."""
    fields = table(entry, ("prompt", "edit_request"), where)
    critique = _inside(_CRITIQUE, only(fields["prompt"], f"{where}: prompt"), f"{where}: prompt")
    revision = _inside(_REVISION, fields["edit_request"], f"{where}: edit_request")
    return Principle(
        id=key if re.fullmatch("[a-z0-9-]+", key) else slug(key),
        title=short_title(critique),
        statement=one_line(revision),
        sources=(f"{source}, {one_line(key)}",),
        stages=("critique",),
        critique=literal(critique),
        revision=literal(revision),
    )


def read_comparisons(value: list[Any], path: Path) -> Imported:
    """RLMadisonInstructions.json: questions about two answers, which have no names. ValueError naming the number."""
    principles = []
    for number, entry in enumerate(rows(value, str(path)), 1):
        question = _inside(_OPTIONS, entry, f"{path}: item {number}")
        principles.append(
            Principle(
                id=f"comparison-{number}",
                title=short_title(question),
                statement=one_line(question),
                sources=(f"{path.name}, item {number}",),
                stages=("comparison",),
                comparison=literal(question),
            )
        )
    return assemble(principles, COMPARISONS, path, ["the questions have no names: ids are their places in the file"])


def dump_critiques(constitution: Constitution) -> str:
    """CritiqueRevisionInstructions.json of the principles that critiques use. ValueError when there is none."""
    requests = {p.id: requests_entry(constitution, p) for p in constitution.for_stage("critique")}
    return json.dumps(requests, ensure_ascii=False, indent=1) + "\n"


def requests_entry(constitution: Constitution, principle: Principle) -> dict[str, Any]:
    """One {"prompt": [...], "edit_request": ...}."""
    critique, revision = critique_request(constitution, principle), revision_request(constitution, principle)
    return {
        "prompt": [f"\n\nCritiqueRequest: {critique}\n\nCritique:"],
        "edit_request": f"\n\nRevisionRequest: {revision}\n\nRevision:",
    }


def dump_comparisons(constitution: Constitution) -> str:
    """RLMadisonInstructions.json of the principles that comparisons use. ValueError when there is none."""
    used = constitution.for_stage("comparison")
    own = constitution.templates.question
    questions = [fill(p.comparison or own, {"statement": p.statement, "title": p.title}) for p in used]
    return json.dumps([f"\n{question} Options:" for question in questions], ensure_ascii=False, indent=1) + "\n"


def _inside(form: re.Pattern[str], value: object, where: str) -> str:
    """What stands between the marks of a request. ValueError naming `where` when the mark in front is not there."""
    text = check_text(value, where)
    found = form.fullmatch(text)
    if not found:
        raise ValueError(f"{where}: begins {text[:40]!r}; allowed: a text that begins {form.pattern.split(':')[0]}:")
    return check_text(found[1], where)
