"""TRL's forms of preference data, to and from our records: what people bring from elsewhere, and take there.

    preference         {"prompt", "chosen", "rejected"}; without a prompt, chosen and rejected hold the whole dialogue
    unpaired           {"prompt", "completion", "label": true or false}
    prompt-completion  {"prompt", "completion"}

Each value is text ("standard") or a list of messages {"role", "content"} ("conversational"). A text that begins
"Human:" is read as a dialogue in the form of hh-rlhf, any other prompt as one turn of a user.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bylaw.model.chat import check_messages
from bylaw.model.data import parse_dialogue
from bylaw.model.records import Record, decode_record, written_lines
from bylaw.model.sampler import Dialogue, Turn, turn

_READ = ("prompt", "chosen", "rejected", "completion", "label", "p_chosen", "id")
_LONG = 12  # characters of a prompt that no answer begins with by chance
_FORMS = '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"} or {"prompt", "completion", "label"}'


@dataclass
class Counted:
    """Records made from a file or of a run, how many things were left out by reason, columns nobody read, and how many
    things were taken otherwise than they stand.
    """

    records: list[Record] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{len(self.records)} records"]
        parts += [f"{count} left out: {reason}" for reason, count in sorted(self.left_out.items())]
        parts += [f"{count} {what}" for what, count in sorted(self.changed.items())]
        if self.unread:
            parts.append(f"columns not read: {', '.join(sorted(self.unread))}")
        return "; ".join(parts)


def read_preferences(path: Path, p_chosen: float | None = None) -> Counted:
    """The rows of a TRL file as preference records in which a is the chosen answer, with no labels of ours.

    `p_chosen` is the probability that the chosen one is better; None takes the row's own "p_chosen", as our exports
    have it, else 1. Unpaired rows of one prompt are paired, good with bad, in their order, and a pair is as sure as the
    mean of both. A record has its row's own "id", with a number if it stands twice. Records of one prompt share a
    prompt_id, so that none of them is trained on while another is held out.

    ValueError naming file and line for rows of another form, and naming the file when it gives no record. What has the
    right form and makes no pair of answers is left out and counted.
    """
    if p_chosen is not None and not 0.5 <= p_chosen <= 1:
        raise ValueError(f"p_chosen = {p_chosen}; allowed: 0.5 to 1, the probability that the chosen answer is better")
    made = _Making(path, Counted())
    found, unpaired = made.found, dict[str, tuple[list[_Side], list[_Side]]]()
    for number, line in written_lines(path):
        where = f"{path}:{number}"
        row = decode_record(line, where)
        found.unread.update(key for key in row if key not in _READ)
        if {"completion", "label"} <= row.keys():
            side = _read_unpaired(row, where, number)
            unpaired.setdefault(_key(side.prompt), ([], []))[not row["label"]].append(side)
            continue
        sides = _read_pair(row, where, found)
        if isinstance(sides, str):
            found.left_out[sides] += 1
            continue
        prompt, chosen, rejected = sides
        p = _probability(row, where) if p_chosen is None else p_chosen
        made.add(_Side(prompt, chosen, number, _id(row, where)), rejected, p)
    _pair_up(made, unpaired.values(), p_chosen)
    if not found.records:
        raise ValueError(f"{path}: no preference in it; {found.summary()}. Allowed rows: {_FORMS}")
    return found


def preference_rows(preferences: Sequence[Record], text: bool = False) -> Counted:
    """Our preferences as TRL rows: chosen is the more probable answer, "p_chosen" how probable, "principles" the ids
    that were asked about. Abstentions, exact ties and pairs of one text are left out and counted.

    `text` writes the standard form, a dialogue as hh-rlhf writes it, which cannot hold every prompt.
    """
    rows = Counted()
    for one in preferences:
        if reason := _no_preference(one) or (text and _no_text(one["prompt"])):
            rows.left_out[reason] += 1
            continue
        chosen, rejected, p = ("a", "b", one["p_a"]) if one["p_a"] > 0.5 else ("b", "a", 1 - one["p_a"])
        principles = [label["principle"]["id"] for label in one["labels"]]
        answers = (one[chosen]["text"], one[rejected]["text"])
        sides = {"chosen": answers[0], "rejected": answers[1]}
        row = _as_text(one, sides) if text else _as_messages(one, sides)
        rows.records.append(row | {"p_chosen": p, "principles": principles})
    return rows


def unpaired_rows(preferences: Sequence[Record]) -> Counted:
    """Our preferences as TRL's unpaired rows, two of each: the more probable answer is labelled true, the other false,
    and "p_chosen" is how probable that is. Left out is what `preference_rows` leaves out.
    """
    pairs = preference_rows(preferences)
    kept = ("id", "prompt", "p_chosen")
    pairs.records = [
        {key: row[key] for key in kept} | {"completion": row[name], "label": name == "chosen"}
        for row in pairs.records
        for name in ("chosen", "rejected")
    ]
    return pairs


def revision_rows(chains: Sequence[Record]) -> Counted:
    """Our chains as TRL preferences: the last revision is chosen, the first answer rejected, "principles" are the
    rounds'. Chains without a round, with an empty text or in which nothing changed are left out and counted.
    """
    rows = Counted()
    for chain in chains:
        first, last = chain["answer"]["text"], chain["rounds"][-1]["revision"]["text"] if chain["rounds"] else ""
        if reason := _unusable(first, last):
            rows.left_out["chains without a revision" if not chain["rounds"] else reason] += 1
            continue
        principles = [one["principle"]["id"] for one in chain["rounds"]]
        rows.records.append(_as_messages(chain, {"chosen": last, "rejected": first}) | {"principles": principles})
    return rows


def completion_rows(chains: Sequence[Record]) -> Counted:
    """Our chains as prompt-completion rows: the completion is the last revision, or the answer of a chain without."""
    rows = Counted()
    for chain in chains:
        said = [chain["answer"], *(one["revision"] for one in chain["rounds"])]
        if not said[-1]["text"].strip():
            rows.left_out["an empty answer"] += 1
            continue
        principles = [one["principle"]["id"] for one in chain["rounds"]]
        rows.records.append(_as_messages(chain, {"completion": said[-1]["text"]}) | {"principles": principles})
    return rows


@dataclass(frozen=True)
class _Side:
    """A prompt with one answer, from one line, and the id that the row has, if it has one."""

    prompt: list[Turn]
    answer: str
    line: int
    id: str
    p: float = 1.0
    """How probable it is that an unpaired row's label is right."""


@dataclass
class _Making:
    """Records of a file, each with an id of its own, and with one prompt_id for each prompt."""

    path: Path
    found: Counted
    prompts: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def add(self, chosen: _Side, rejected: str, p: float, **by: int) -> None:
        id = self._unique(chosen.id or f"{self.path.name.removesuffix('.jsonl')}-{chosen.line}")
        a, b = ({"text": text, "ids": [], "finish": "given"} for text in (chosen.answer, rejected))
        record = {"id": id, "prompt_id": self.prompts.setdefault(_key(chosen.prompt), id), "prompt": chosen.prompt}
        record |= {"a": a, "b": b, "p_a": p, "abstained": "", "labels": []}
        self.found.records.append(record | {"by": {"source": self.path.name, "line": chosen.line} | by})

    def _unique(self, id: str) -> str:
        number, free = 1, id
        while free in self.taken:
            number += 1
            free = f"{id}-{number}"
        self.taken.add(free)
        self.found.changed.update(["ids stood before, and got a number"] if free != id else [])
        return free


def _id(row: Record, where: str) -> str:
    """The row's own id, "" for none."""
    id = row.get("id")
    if id is None:
        return ""
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise ValueError(f"{where}: id = {id!r:.40}; allowed: text or a whole number")
    return str(id)


def _read_pair(row: Record, where: str, found: Counted) -> tuple[list[Turn], str, str] | str:
    """Prompt, chosen and rejected answer; or why the row makes no pair."""
    if not {"chosen", "rejected"} <= row.keys():
        raise ValueError(f"{where}: keys {sorted(row)}; allowed: {_FORMS}")
    kinds = {type(row["chosen"]), type(row["rejected"])}
    if kinds == {str}:
        sides = _text_sides(row, where, found)
    elif kinds == {list}:
        sides = _message_sides(row, where)
    else:
        shown = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{where}: chosen and rejected are {shown}; allowed: both text, or both lists of messages")
    if isinstance(sides, str):
        return sides
    prompt, chosen, rejected = sides
    if reason := _unusable(chosen, rejected):
        return reason
    check_messages(prompt, f"{where}: prompt", last="user")
    return prompt, chosen.strip(), rejected.strip()


def _text_sides(row: Record, where: str, found: Counted) -> tuple[list[Turn], str, str] | str:
    if "prompt" in row:
        return _prompted(_prompt(row["prompt"], where), row, found)
    dialogues = []
    for name in ("chosen", "rejected"):
        try:
            dialogues.append(parse_dialogue(row[name]))
        except ValueError as error:
            raise ValueError(
                f"{where}: {name}: {error}; without a prompt, both texts must be dialogues that begin 'Human:', so "
                "that the last turn is the answer. Give the prompt in a column of its own"
            ) from None
    return _common(*dialogues)


def _prompted(prompt: list[Turn], row: Record, found: Counted) -> tuple[list[Turn], str, str] | str:
    """The answers without the prompt, where both repeat it in front."""
    chosen, rejected = (_behind(prompt, row["prompt"], row[name]) for name in ("chosen", "rejected"))
    if chosen is None and rejected is None:
        return prompt, row["chosen"], row["rejected"]
    if chosen is None or rejected is None:
        return "one answer repeats the prompt, and the other does not"
    found.changed["pairs of answers that repeat the prompt: it was cut off"] += 1
    return prompt, chosen, rejected


def _behind(prompt: Dialogue, given: object, text: str) -> str | None:
    """The answer in a text that repeats its prompt in front, as a dialogue or as it is given; None for other texts. A
    short prompt may stand in front of an answer by chance, as "Hi" does.
    """
    with suppress(ValueError):
        *before, last = parse_dialogue(text)
        if last["role"] == "assistant" and before == [turn(m["role"], m["content"].strip()) for m in prompt]:
            return last["content"]
    head = given.strip() if isinstance(given, str) else ""
    repeated = len(head) >= _LONG and text.lstrip().startswith(head)
    return text.lstrip().removeprefix(head) if repeated else None


def _message_sides(row: Record, where: str) -> tuple[list[Turn], str, str] | str:
    chosen, rejected = (_messages(row[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    if "prompt" not in row:
        return _common(chosen, rejected)
    prompt = _prompt(row["prompt"], where)
    if len(chosen) > 1 and len(rejected) > 1:  # many files repeat the prompt in front of both answers
        found = _common(chosen, rejected)
        if isinstance(found, tuple) and prompt not in (found[0], found[0][: len(prompt)]):
            raise ValueError(
                f"{where}: chosen and rejected hold a whole dialogue, but it does not begin with the prompt"
            )
        return found
    if len(chosen) != 1 or len(rejected) != 1 or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return "the answer is more than one turn of the assistant"
    return prompt, chosen[0]["content"], rejected[0]["content"]


def _common(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], str, str] | str:
    """Two dialogues cut where they part: the turns that both have, and the one turn of the assistant after them."""
    if chosen == rejected:
        return "both answers are the same"
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    ends = chosen[same:], rejected[same:]
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends) or not same:
        return "the dialogues part before the last turn of the assistant"
    return chosen[:same], ends[0][0]["content"], ends[1][0]["content"]


def _prompt(value: object, where: str) -> list[Turn]:
    if isinstance(value, list):
        return _messages(value, f"{where}: prompt")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: prompt = {value!r:.60}; allowed: text that is not empty, or a list of messages")
    if not value.lstrip().startswith("Human:"):
        return [turn("user", value)]
    try:
        messages = parse_dialogue(value)
    except ValueError as error:
        raise ValueError(f"{where}: prompt: {error}") from None
    return messages[:-1] if messages[-1] == turn("assistant", "") else messages


def _messages(value: object, where: str) -> list[Turn]:
    """Messages with just role and content, as text."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {value!r:.60}; allowed: a list of at least one {{role, content}}")
    for number, message in enumerate(value, 1):
        good = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"{where}: message {number} is {message!r:.60}; allowed: role system, user or assistant, and content"
            )
    return [turn(message["role"], message["content"]) for message in value]


def _read_unpaired(row: Record, where: str, line: int) -> _Side:
    if not isinstance(row["label"], bool):
        raise ValueError(f"{where}: label = {row['label']!r:.40}; allowed: true or false")
    if "prompt" not in row:
        raise ValueError(f"{where}: keys {sorted(row)}; allowed: {_FORMS}")
    prompt, completion = _prompt(row["prompt"], where), row["completion"]
    check_messages(prompt, f"{where}: prompt", last="user")
    if isinstance(completion, list):
        messages = _messages(completion, f"{where}: completion")
        completion = messages[0]["content"] if [m["role"] for m in messages] == ["assistant"] else ""
    if not isinstance(completion, str) or not completion.strip():
        raise ValueError(
            f"{where}: completion = {row['completion']!r:.60}; allowed: one answer, as text or as a message"
        )
    return _Side(prompt, completion.strip(), line, _id(row, where), _probability(row, where))


def _pair_up(made: _Making, unpaired: Iterable[tuple[list[_Side], list[_Side]]], p: float | None) -> None:
    for good, bad in unpaired:
        for chosen, rejected in zip(good, bad, strict=False):  # counted below
            if reason := _unusable(chosen.answer, rejected.answer):
                made.found.left_out[reason] += 1
            else:
                sure = (chosen.p + rejected.p) / 2 if p is None else p
                made.add(chosen, rejected.answer, sure, rejected_line=rejected.line)
        if alone := abs(len(good) - len(bad)):
            made.found.left_out["an unpaired answer without one of the other label to the same prompt"] += alone


def _probability(row: Record, where: str) -> float:
    p = row.get("p_chosen", 1.0)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.5 <= p <= 1:
        raise ValueError(f"{where}: p_chosen = {p!r:.40}; allowed: a number from 0.5 to 1")
    return float(p)


def _no_preference(preference: Record) -> str:
    if preference["abstained"]:
        return "abstained"
    reason = _unusable(preference["a"]["text"], preference["b"]["text"])
    return reason or ("an exact tie" if preference["p_a"] == 0.5 else "")


def _no_text(prompt: Dialogue) -> str:
    """Why a prompt cannot be text: a reader would take it for another dialogue."""
    try:
        if _prompt(_hh_prompt(prompt), "") == [turn(m["role"], m["content"].strip()) for m in prompt]:
            return ""
    except ValueError:
        pass
    return "a prompt that only messages can hold (a system message, or a speaker's name within a turn)"


def _unusable(chosen: str, rejected: str) -> str:
    """Why two answers make no pair; "" if they do."""
    if not chosen.strip() or not rejected.strip():
        return "an empty answer"
    return "both answers are the same" if chosen.strip() == rejected.strip() else ""


def _as_messages(record: Record, answers: dict[str, str]) -> Record:
    sides = {name: [turn("assistant", text)] for name, text in answers.items()}
    return {"id": record["id"], "prompt": record["prompt"], **sides}


def _as_text(record: Record, answers: dict[str, str]) -> Record:
    sides = {name: f" {text}" for name, text in answers.items()}
    return {"id": record["id"], "prompt": _hh_prompt(record["prompt"]), **sides}


def _hh_prompt(messages: Dialogue) -> str:
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"


def _key(prompt: Iterable[dict[str, Any]]) -> str:
    return repr([(message["role"], message["content"]) for message in prompt])
