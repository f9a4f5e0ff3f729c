"""Prompt sets: JSONL files of prompts, dialogues, or hh-rlhf comparisons."""

import difflib
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bylaw.model.chat import check_messages
from bylaw.model.records import Record, decode_record

# hh-rlhf writes "\n\nHuman: text\n\nAssistant: text". A name inside a line ("I said Human: no") begins no turn.
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):(?!\S)")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_KEYS = ("id", "prompt", "completion", "messages", "chosen", "rejected")
_FORMS = '{"prompt": text}, {"messages": [{"role": ..., "content": ...}, ...]} or {"chosen": text, "rejected": text}'


@dataclass(frozen=True)
class Prompt:
    """A dialogue that ends with the user, and the answer that the file gives to it ("" for none)."""

    id: str
    messages: list[dict[str, str]]
    answer: str = ""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, and the hh-rlhf lines that cannot make one: (line number, reason)."""

    prompts: list[Prompt]
    skipped: list[tuple[int, str]]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def summary(self) -> str:
        """One line for a person: how many prompts, how many lines were left out, which, and why."""
        text = f"{len(self.prompts)} prompts"
        if not self.skipped:
            return text
        shown = "; ".join(f"line {line}: {reason}" for line, reason in self.skipped[:10])
        more = f"; and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
        return f"{text}, {len(self.skipped)} lines left out ({shown}{more})"


def read_prompts(path: str | Path, limit: int = 0) -> PromptSet:
    """The prompts of a JSONL file, plain or gzipped (.gz); at most the first `limit`, 0 for all.

    A line is one of
      {"prompt": text}, with the answer as "completion" if it has one; both may be lists of messages, as TRL has them,
      {"messages": [...]}, whose last turn is the answer if the assistant speaks it,
      {"chosen": text, "rejected": text} as in hh-rlhf (arXiv 2204.05862): the prompt is everything before the last
        assistant turn, the answer is how `chosen` ends ("" where that turn is empty).
    Each may have an "id" (else "<file name>-<line number>"). Other columns are not read, and blank lines are none.

    Our own two forms are strict. hh-rlhf is as people and models typed it: turns are stripped, two turns in a row of
    one speaker are joined by a blank line, and a dialogue that still makes no prompt is left out and listed in
    `skipped`.

    Raises FileNotFoundError, and ValueError naming file and line for malformed JSON, an unknown form, an empty prompt,
    a duplicate id, and naming the file if it holds no prompt.
    """
    path = Path(path)
    if limit < 0:
        raise ValueError(f"limit = {limit}; allowed: 0 (all prompts) or more")
    stem = _stem(path)
    prompts: list[Prompt] = []
    skipped: list[tuple[int, str]] = []
    lines_of: dict[str, int] = {}
    for number, line in _numbered_lines(path):
        where = f"{path}:{number}"
        record = decode_record(line, where)
        id = _read_id(record, f"{stem}-{number}", where)
        if id in lines_of:
            raise ValueError(f"{where}: id {id!r} is taken by line {lines_of[id]}; every prompt needs an id of its own")
        lines_of[id] = number
        found = _read_prompt(record, id, where)
        if isinstance(found, Prompt):
            prompts.append(found)
        else:
            skipped.append((number, found))
        if limit and len(prompts) == limit:
            break
    if not prompts:
        told = f"; {PromptSet(prompts, skipped).summary()}" if skipped else ""
        raise ValueError(f"{path}: no prompts{told}; allowed: one a line, as {_FORMS}")
    return PromptSet(prompts, skipped)


def prompt_lines(path: str | Path) -> dict[str, int]:
    """The line of each id of a prompt file, from 1. Raises as read_prompts for a line that is no JSON object."""
    path = Path(path)
    stem = _stem(path)
    lines = ((number, f"{path}:{number}", line) for number, line in _numbered_lines(path))
    return {_read_id(decode_record(line, at), f"{stem}-{number}", at): number for number, at, line in lines}


def parse_dialogue(text: str) -> list[dict[str, str]]:
    """The messages of an hh-rlhf text, each stripped; turns in a row of one speaker are joined by a blank line.

    Raises ValueError for text that does not begin with a human turn, and for an empty turn anywhere but at the end.
    """
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        raise ValueError("the text does not begin with a Human turn")
    messages: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            content = "\n\n".join(filter(None, (messages.pop()["content"], content)))
        messages.append({"role": role, "content": content})
    if messages[0]["role"] != "user":
        raise ValueError("the text does not begin with a Human turn")
    for number, message in enumerate(messages[:-1], 1):
        if not message["content"]:
            raise ValueError(f"turn {number} ({message['role']}) is empty")
    return messages


def _read_prompt(record: Record, id: str, where: str) -> Prompt | str:
    """The prompt of one line, or the reason why an hh-rlhf line makes none."""
    form = _form_of(record, where)
    if form == "chosen":
        return _read_comparison(record, id, where)
    messages = record["messages"] if form == "messages" else _read_completion(record, where)
    check_messages(messages, where, last="assistant" if "completion" in record else "")
    answered = messages[-1]["role"] == "assistant"
    return Prompt(id, messages[:-1], messages[-1]["content"]) if answered else Prompt(id, messages)


def _read_completion(record: Record, where: str) -> list[dict[str, str]]:
    """Prompt and answer, each a text, or as TRL's conversational form has them, each a list of messages."""
    turns = {"prompt": "user", "completion": "assistant"}
    given = {key: record[key] for key in turns if key in record}
    if all(isinstance(value, list) and value for value in given.values()):
        return [message for messages in given.values() for message in messages]
    for key, value in given.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key} = {value!r:.40}; allowed: text that is not empty, or messages")
    return [{"role": turns[key], "content": value} for key, value in given.items()]


def _read_comparison(record: Record, id: str, where: str) -> Prompt | str:
    dialogues = []
    for name in ("chosen", "rejected"):
        text = record[name]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name} = {text!r:.40}; allowed: a dialogue as text, beginning '\\n\\nHuman: '")
        try:
            dialogues.append(parse_dialogue(text))
        except ValueError as error:
            return f"{name}: {error}"
        if dialogues[-1][-1]["role"] != "assistant":
            return f"{name}: the text does not end with an Assistant turn"
    (*messages, answer), (*other, _) = dialogues
    if messages != other:
        return "the two texts differ before the last Assistant turn"
    return Prompt(id, messages, answer["content"])


def _form_of(record: Record, where: str) -> Literal["prompt", "messages", "chosen"]:
    for key in record:
        if key not in _KEYS and (close := difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.85)):
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {close[0]!r}?")
    if "prompt" in record and not {"messages", "chosen", "rejected"} & record.keys():
        return "prompt"
    if "messages" in record and not {"prompt", "completion", "chosen", "rejected"} & record.keys():
        return "messages"
    if {"chosen", "rejected"} <= record.keys() and not {"prompt", "completion", "messages"} & record.keys():
        return "chosen"
    raise ValueError(f"{where}: keys {sorted(record)}; allowed: exactly one of {_FORMS}")


def _stem(path: Path) -> str:
    """What the ids of lines without one begin with."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _read_id(record: Record, default: str, where: str) -> str:
    id = record.get("id", default)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise ValueError(f"{where}: id = {id!r:.40}; allowed: text or a whole number")
    return str(id)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
