"""Hugging Face's constitution JSON, in and out: {"constitutions": [{"critic": ..., "revision": ...}], "system_chat":
[[{"role", "content"}, ...], ...]}, where each chat is a dialogue, then a critique and a revision with their requests.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bylaw.constitution.draft import Imported, assemble, check_text, literal, one_line, rows, short_title, table
from bylaw.constitution.render import critique_request, revision_request
from bylaw.constitution.schema import Constitution, Principle

FORM = "Hugging Face's constitution JSON"
_ROLES = ("user", "assistant")


def read_hugging_face(value: dict[str, Any], path: Path) -> Imported:
    """The pairs of requests as principles for critiques. ValueError naming the number of the pair."""
    principles = [
        _principle(entry, number, path) for number, entry in enumerate(rows(value["constitutions"], str(path)), 1)
    ]
    notes = [
        "the pairs have no names: ids are their places in the file",
        "the file has no statements: each revision request stands as one, until somebody words it",
    ]
    if chats := value.get("system_chat"):
        notes.append(f"{len(hugging_face_examples(value, path))} of {len(chats)} example chats can be read as examples")
    if left := sorted(set(value) - {"constitutions", "system_chat"}):
        notes.append(f"left out: {', '.join(map(repr, left))}")
    return assemble(principles, FORM, path, notes)


def hugging_face_examples(value: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The chats as {"prompt": messages, "answer", "principle", "critique", "revision", "critique_request",
    "revision_request"}; `principle` is the id whose critique request the chat uses, "" if none.

    ValueError naming chat and turn for what is not turns of user and assistant that end in a revision.
    """
    chats = value.get("system_chat")
    if not chats:
        return []
    if not isinstance(chats, list):
        raise ValueError(f"{path}: system_chat is {type(chats).__name__} {chats!r:.60}; allowed: a list of chats")
    ids = {
        entry["critic"].strip(): f"critique-{number}"
        for number, entry in enumerate(rows(value["constitutions"], str(path)), 1)
        if isinstance(entry, dict) and isinstance(entry.get("critic"), str)
    }
    return [_example(chat, ids, f"{path}: chat {number}") for number, chat in enumerate(chats, 1)]


def dump_hugging_face(constitution: Constitution, chats: Sequence[Sequence[dict[str, str]]] = ()) -> str:
    """The principles that critiques use, and `chats`, in that form. ValueError when there is no such principle."""
    pairs = [
        {"critic": critique_request(constitution, p), "revision": revision_request(constitution, p)}
        for p in constitution.for_stage("critique")
    ]
    content = {"constitutions": pairs, "system_chat": [list(chat) for chat in chats]}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _principle(entry: object, number: int, path: Path) -> Principle:
    where = f"{path}: constitution {number}"
    fields = table(entry, ("critic", "revision"), where)
    critique, revision = (check_text(fields[key], f"{where}: {key}") for key in ("critic", "revision"))
    return Principle(
        id=f"critique-{number}",
        title=short_title(critique),
        statement=one_line(revision),
        sources=(f"{path.name}, constitution {number}",),
        stages=("critique",),
        critique=literal(critique),
        revision=literal(revision),
    )


def _example(chat: object, ids: dict[str, str], where: str) -> dict[str, Any]:
    turns = rows(chat, where)
    for number, turn in enumerate(turns):
        fields = table(turn, ("role", "content"), f"{where}: turn {number + 1}")
        check_text(fields["content"], f"{where}: turn {number + 1}")
        if fields["role"] != _ROLES[number % 2]:
            raise ValueError(
                f"{where}: turn {number + 1} has the role {fields['role']!r}; allowed: {_ROLES[number % 2]}"
            )
    if len(turns) < 6 or len(turns) % 2:
        raise ValueError(
            f"{where}: {len(turns)} turns; allowed: an even number from 6 (question, answer, request, critique, "
            "request, revision)"
        )
    *prompt, answer, ask, critique, again, revision = turns
    request = ask["content"].strip()
    return {
        "prompt": prompt,
        "answer": answer["content"],
        "principle": ids.get(request, ""),
        "critique": critique["content"],
        "revision": revision["content"],
        "critique_request": request,
        "revision_request": again["content"].strip(),
    }
