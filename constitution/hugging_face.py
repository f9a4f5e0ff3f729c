"""Hugging Face's constitution JSON, in and out: {"constitutions": [{"critic": ..., "revision": ...}], "system_chat":
[[{"role", "content"}, ...], ...]}, where each chat is a dialogue, then a critique and a revision with their requests.
"""

import json
from collections import Counter
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
        odd = Counter(one for one in hugging_face_examples(value, path) if isinstance(one, str))
        notes.append(f"{len(chats) - odd.total()} of {len(chats)} example chats can be read as examples")
        notes += [f"{count} cannot: {reason}" for reason, count in odd.items()]
    if left := sorted(set(value) - {"constitutions", "system_chat"}):
        notes.append(f"left out: {', '.join(map(repr, left))}")
    return assemble(principles, FORM, path, notes)


def hugging_face_examples(value: dict[str, Any], path: Path) -> list[dict[str, Any] | str]:
    """The chats as {"prompt": messages, "answer", "principle", "critique", "revision", "critique_request",
    "revision_request"}; `principle` is the id whose critique request the chat uses, "" if none. For a chat that is not
    turns of user and assistant that end in a revision, why it is no example.

    ValueError where there is no list of chats.
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
    return [_odd(chat) or _example(chat, ids) for chat in chats]


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


def _odd(chat: object) -> str:
    """Why a chat is no example; "" if it is one."""
    if not isinstance(chat, list) or len(chat) < 6 or len(chat) % 2:
        shown = f"{len(chat)} turns" if isinstance(chat, list) else type(chat).__name__
        return f"a chat of {shown}, not of 6, 8, 10 or so: question, answer, request, critique, request, revision"
    try:
        for turn in chat:
            check_text(table(turn, ("role", "content"), "turn")["content"], "turn")
    except ValueError:
        return "a chat with a turn that has no text"
    fitting = all(turn["role"] == _ROLES[number % 2] for number, turn in enumerate(chat))
    return "" if fitting else "a chat whose turns are not the user's and the assistant's, one by one"


def _example(chat: list[dict[str, Any]], ids: dict[str, str]) -> dict[str, Any]:
    *prompt, answer, ask, critique, again, revision = chat
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
