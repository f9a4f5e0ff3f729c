"""The few-shot prompts and the sampled chains that came with the Constitutional AI paper, as plain structures.

CritiqueRevisionFewShotPrompts.json   a list of texts, each with Human:, Assistant:, CritiqueRequest:, Critique:,
                                      RevisionRequest: and Revision: after "\\n\\n", the first two as often as needed
RLMadisonFewShotPrompts.json          [{"prompt": "\\n\\nHuman: ...\\n\\nAssistant:", "corrects": [one],
                                        "incorrects": [one]}, ...]
RLMadisonPrecogFewShotPrompts.json    [{"prompt": text}, ...], the text being a conversation with H: and A:, "{}" for
                                      the principle, " (A) [[[...]]]\\n (B) [[[...]]]", "Assistant: Let's think step
                                      by step: ...", and "Human:\\nSo the answer is: (B)"
*_SLMADISON.jsonl                     {"rl_prompt": text, "initial_response": [{"sample": text}], "cst": [{"cst_key":
                                        id, "cst_value": requests, "critique": {"sample": text}, "revision": ...}, ...]}
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bylaw.constitution.draft import Imported, assemble, check_text, only, read_json, read_text, rows, table
from bylaw.constitution.released import requests_entry, requests_principle
from bylaw.constitution.schema import Constitution, Principle

Example = dict[str, Any]

_SPEAKERS = {"Human": "user", "Assistant": "assistant", "H": "user", "A": "assistant"}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):(?!\S)")
_SHORT_TURN = re.compile(r"(?:\A|\n\n)(H|A):(?!\S)")
_CHAIN = re.compile(
    r"(?P<dialogue>.*?)\n\nCritiqueRequest:(?P<critique_request>.*?)\n\nCritique:(?P<critique>.*?)"
    r"\n\nRevisionRequest:(?P<revision_request>.*?)\n\nRevision:(?P<revision>.*?)(?:\n\nHuman:\s*)?",
    re.DOTALL,
)
_THOUGHT = re.compile(
    r"Human: Consider the following conversation [^\n]*:\n\n(?P<dialogue>.*?)\n\n\{\}"
    r"\s*\(A\) \[\[\[(?P<a>.*?)\]\]\]\s*\(B\) \[\[\[(?P<b>.*?)\]\]\]"
    r"\n\nAssistant: Let's think step by step:(?P<reasons>.*?)"
    r"\n\nHuman:\s*So the answer is: \((?P<better>[AB])\)",
    re.DOTALL,
)
_SAMPLE_KEYS = ("rl_prompt", "initial_response", "cst")


def critique_examples(value: list[Any], path: Path) -> list[Example]:
    """CritiqueRevisionFewShotPrompts.json as {"prompt": messages, "answer", "principle": "", "critique", "revision",
    "critique_request", "revision_request"}; the file names no principle. ValueError naming the item.
    """
    examples = []
    for number, entry in enumerate(rows(value, str(path)), 1):
        where = f"{path}: item {number}"
        found = _CHAIN.fullmatch("\n\n" + check_text(entry, where))
        if not found:
            raise ValueError(
                f"{where}: is not a dialogue with CritiqueRequest:, Critique:, RevisionRequest: and Revision: after it"
            )
        *prompt, answer = dialogue_of(found["dialogue"], where, "assistant")
        names = ("critique", "revision", "critique_request", "revision_request")
        texts = {name: check_text(found[name], f"{where}: {name}") for name in names}
        examples.append({"prompt": prompt, "answer": answer["content"], "principle": ""} | texts)
    return examples


def comparison_examples(value: list[Any], path: Path) -> list[Example]:
    """RLMadisonFewShotPrompts.json or RLMadisonPrecogFewShotPrompts.json as {"prompt": messages, "principle": "", "a",
    "b", "better": "a" or "b", "reasons"}. The first kind has no order and no reasons: the better answer comes out as
    "a". ValueError naming the item.
    """
    items = [(f"{path}: item {number}", item) for number, item in enumerate(rows(value, str(path)), 1)]
    return [
        _pair_example(table(item, ("prompt",), where), where)
        if isinstance(item, dict) and "corrects" in item
        else _thought_example(table(item, ("prompt",), where), where)
        for where, item in items
    ]


def read_chains(path: Path) -> tuple[list[Example], Imported]:
    """A *_SLMADISON.jsonl file: our chain records, and the constitution of the requests in them, whose ids are the
    cst_key. Columns that a chain has no place for stand under by["columns"]; white space around texts is not kept.

    ValueError naming file, line and key; and for a key that stands for two different requests.
    """
    chains: list[Example] = []
    known: dict[str, Principle] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            chains.append(_chain(read_json(line, f"{path}:{number}"), path, number, known))
    if not chains:
        raise ValueError(f"{path}: no line in it; allowed: one JSON object per line")
    return chains, assemble(known.values(), "sampled chains", path, [])


def dump_chains(chains: Sequence[Example], constitution: Constitution) -> tuple[str, dict[str, int]]:
    """Chain records in the form of *_SLMADISON.jsonl, their requests those of `constitution`, and how many were left
    out, by reason: those that would not be read back the same.

    ValueError for chains made without critiques, and when the constitution has not the principles that the chains were
    made by, or has them in other words.
    """
    lines: list[str] = []
    left_out: Counter[str] = Counter()
    for chain in chains:
        sample = _sample(chain, constitution)
        if reason := _unlike(chain, sample):
            left_out[reason] += 1
        else:
            lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
    return "".join(lines), dict(left_out)


def _unlike(chain: Example, sample: Example) -> str:
    """Why a reader would not find the chain in `sample` again; "" if it would."""
    if not all(text.strip() for text in _texts(chain)):
        return "an empty answer, critique or revision"
    turns = [(message["role"], message["content"].strip()) for message in chain["prompt"]]
    try:
        back = _chain(sample, Path("sample"), 1, {})
    except ValueError:
        return "a text that the form cannot hold (a system message, a speaker's name within a turn, no round)"
    same = [(message["role"], message["content"]) for message in back["prompt"]] == turns
    same = same and _texts(back) == [text.strip() for text in _texts(chain)]
    return "" if same else "a text that would be read otherwise (a speaker's name within a turn)"


def _texts(chain: Example) -> list[str]:
    rounds = [one[name]["text"] for one in chain["rounds"] for name in ("critique", "revision")]
    return [chain["answer"]["text"], *rounds]


def _pair_example(item: dict[str, Any], where: str) -> Example:
    prompt = dialogue_of(check_text(item["prompt"], f"{where}: prompt"), f"{where}: prompt", "user")
    sides = {}
    for side, name in (("a", "corrects"), ("b", "incorrects")):
        answer = only(table(item, (name,), where)[name], f"{where}: {name}")
        sides[side] = check_text(answer, f"{where}: {name}")
    return {"prompt": prompt, "principle": "", **sides, "better": "a", "reasons": ""}


def _thought_example(item: dict[str, Any], where: str) -> Example:
    found = _THOUGHT.fullmatch(check_text(item["prompt"], f"{where}: prompt"))
    if not found:
        raise ValueError(
            f"{where}: prompt is neither with corrects and incorrects, nor a conversation, {{}}, options as "
            "(A) [[[...]]] and (B) [[[...]]], thoughts, and 'So the answer is: (A)' or (B)"
        )
    texts = {name: check_text(found[name], f"{where}: {name}") for name in ("a", "b", "reasons")}
    prompt = dialogue_of(found["dialogue"], where, "user", _SHORT_TURN)
    return {"prompt": prompt, "principle": "", **texts, "better": found["better"].lower()}


def dialogue_of(text: str, where: str, last: str, turn: re.Pattern[str] = _TURN) -> list[dict[str, str]]:
    """The messages of a text, which must begin with the human and end with `last`. Turns of one speaker in a row are
    joined by an empty line; an empty turn of the assistant at the end, where an answer is to come, is left out.
    """
    head, *parts = turn.split(text.strip())
    if head.strip() or not parts:
        raise ValueError(f"{where}: the dialogue begins {text.strip()[:40]!r}; it must begin with the human's turn")
    messages: list[dict[str, str]] = []
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _SPEAKERS[name], said.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise ValueError(f"{where}: turn {number} of the dialogue is empty")
    if messages and messages[0]["role"] != "user":
        raise ValueError(f"{where}: the dialogue must begin with the human's turn")
    if not messages or messages[-1]["role"] != last:
        raise ValueError(f"{where}: the dialogue must end with the {'human' if last == 'user' else 'assistant'}")
    return messages


def _chain(value: object, path: Path, line: int, known: dict[str, Principle]) -> Example:
    where = f"{path}:{line}"
    row = table(value, _SAMPLE_KEYS, where)
    prompt = dialogue_of(check_text(row["rl_prompt"], f"{where}: rl_prompt"), f"{where}: rl_prompt", "user")
    first = only(row["initial_response"], f"{where}: initial_response")
    rounds = []
    for number, step in enumerate(rows(row["cst"], f"{where}: cst"), 1):
        here = f"{where}: cst {number}"
        fields = table(step, ("cst_key", "cst_value", "critique", "revision"), here)
        principle = _known_principle(fields, here, path.name, known)
        texts = {name: _given(fields[name], f"{here}: {name}") for name in ("critique", "revision")}
        rounds.append({"round": number, "principle": {"id": principle.id, "hash": principle.hash}} | texts)
    columns = {key: value for key, value in row.items() if key not in _SAMPLE_KEYS}
    by = {"source": path.name, "line": line, "columns": columns}
    answer = _given(first, f"{where}: initial_response")
    return {"id": f"{path.stem}-{line}", "prompt": prompt, "answer": answer, "rounds": rounds, "by": by}


def _known_principle(fields: dict[str, Any], where: str, source: str, known: dict[str, Principle]) -> Principle:
    key = check_text(fields["cst_key"], f"{where}: cst_key")
    if not re.fullmatch("[a-z0-9-]+", key):
        raise ValueError(f"{where}: cst_key = {key!r}; allowed as an id: lower-case letters, digits and hyphens")
    principle = requests_principle(key, fields["cst_value"], f"{where}: cst_value", source)
    if known.setdefault(key, principle) != principle:
        raise ValueError(f"{where}: cst_key {key!r} has other requests here than above; give them a key of their own")
    return principle


def _given(value: object, where: str) -> dict[str, Any]:
    """A text record of a text that nobody sampled here: it has no ids, and training reads it from its words."""
    text = check_text(table(value, ("sample",), where)["sample"], where)
    return {"text": text, "ids": [], "finish": "given"}


def _sample(chain: Example, constitution: Constitution) -> Example:
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in chain["prompt"])
    steps = [_step(chain["id"], one, constitution) for one in chain["rounds"]]
    first = [{"sample": f" {chain['answer']['text']}"}]
    columns = chain["by"].get("columns", {})
    return columns | {"rl_prompt": f"{text}\n\nAssistant:", "initial_response": first, "cst": steps}


def _step(id: str, one: Example, constitution: Constitution) -> Example:
    if one["critique"] is None:
        raise ValueError(
            f"chain {id!r}, round {one['round']}: has no critique (revise.critiques = false), without which this "
            "form is not; take the form revisions or trl-prompt-completion"
        )
    principle = constitution.principle(one["principle"]["id"])
    if principle.hash != one["principle"]["hash"]:
        raise ValueError(
            f"chain {id!r}, round {one['round']}: principle {principle.id!r} has the hash {one['principle']['hash']}, "
            f"and {principle.hash} in constitution {constitution.name!r}; give the one that the chain was made by"
        )
    texts = {name: {"sample": f" {one[name]['text']}"} for name in ("critique", "revision")}
    return {"cst_key": principle.id, "cst_value": requests_entry(constitution, principle)} | texts
