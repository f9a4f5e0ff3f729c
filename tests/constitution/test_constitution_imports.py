"""Constitutions of other forms, in files written by hand in their structures, and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bylaw.constitution.examples import parse_examples
from bylaw.constitution.foreign_examples import dump_examples
from bylaw.constitution.hugging_face import dump_hugging_face
from bylaw.constitution.imports import import_constitution, import_examples
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.released import dump_comparisons, dump_critiques
from bylaw.constitution.released_texts import dump_chains, read_chains
from bylaw.constitution.render import comparison_request, critique_request, revision_request
from bylaw.constitution.schema import Constitution
from bylaw.constitution.write import dump_constitution

CRITIQUES = {
    "polite0": {
        "prompt": ["\n\nCritiqueRequest: Say where the answer is rude, {braces} and all.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Make the answer polite.\n\nRevision:",
    },
    "polite1": {
        "prompt": ["\n\nCritiqueRequest: Does it shout?\n\nIf so, where?\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Write it without shouting.\n\nRevision:",
    },
}
COMPARISONS = ["\nWhich answer is calmer? Options:", "\nChoose the kinder {one}. Options:"]
CHAT = [
    {"role": "user", "content": "What is a weir?"},
    {"role": "assistant", "content": "Look it up yourself."},
    {"role": "user", "content": "Say where the answer is rude."},
    {"role": "assistant", "content": "It sends the person away."},
    {"role": "user", "content": "Make the answer polite."},
    {"role": "assistant", "content": "A low dam across a river."},
]
HUGGING_FACE = {
    "constitutions": [
        {"critic": "Say where the answer is rude.", "revision": "Make the answer polite."},
        {"critic": "Is it {long}?", "revision": "Shorten it."},
    ],
    "system_chat": [CHAT],
}
CHAIN = {
    "comparison_dataset": "ours",
    "rl_prompt": "\n\nHuman: Hello.\n\nAssistant: Good day.\n\nHuman: What is a weir?\n\nAssistant:",
    "initial_response": [{"sample": " Look it up yourself."}],
    "cst": [
        {
            "cst_key": key,
            "cst_value": CRITIQUES[key],
            "critique": {"sample": f" {key} says that it is rude."},
            "revision": {"sample": f" A low dam, by {key}."},
        }
        for key in ("polite1", "polite0", "polite1")
    ],
}
FEW_SHOT = (
    "\n\nHuman: {question}\n\nAssistant: Look it up.\n\nCritiqueRequest: Is it rude?\n\nCritique: It is.\n\n"
    "RevisionRequest: Make it polite.\n\nRevision: A low dam.\n\nHuman:"
)
THOUGHT = (
    "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\nH: What is a weir?\n\n"
    "{}\n (A) [[[Look it up.]]]\n (B) [[[A low dam.]]]\n\nAssistant: Let's think step by step: (A) sends {him} away; "
    "so option B is better.\n\nHuman:\nSo the answer is: (B)"
)


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def imported(folder: Path, name: str, content: Any) -> Constitution:
    """Read, and then through TOML, as the command does it."""
    constitution = import_constitution([write(folder, name, content)]).constitution
    back = parse_constitution(dump_constitution(constitution), "back")
    assert back == constitution
    return back


def test_released_critiques_round_trip(tmp_path: Path):
    constitution = imported(tmp_path, "CritiqueRevisionInstructions.json", CRITIQUES)
    assert [p.id for p in constitution.principles] == ["polite0", "polite1"]
    assert all(p.stages == ("critique",) and p.sources for p in constitution.principles)
    first = constitution.principles[0]
    assert critique_request(constitution, first) == "Say where the answer is rude, {braces} and all."
    assert revision_request(constitution, first) == first.statement == "Make the answer polite."
    assert json.loads(dump_critiques(constitution)) == CRITIQUES


def test_released_comparisons_round_trip(tmp_path: Path):
    constitution = imported(tmp_path, "RLMadisonInstructions.json", COMPARISONS)
    assert [p.id for p in constitution.principles] == ["comparison-1", "comparison-2"]
    request = comparison_request(constitution, constitution.principles[1], [{"role": "user", "content": "x"}], "1", "2")
    assert "Choose the kinder {one}.\n" in request
    assert json.loads(dump_comparisons(constitution)) == COMPARISONS


def test_both_files_make_one_constitution(tmp_path: Path):
    paths = [write(tmp_path, "critiques.json", CRITIQUES), write(tmp_path, "questions.json", COMPARISONS)]
    found = import_constitution(paths)
    assert len(found.constitution.for_stage("critique")) == len(found.constitution.for_stage("comparison")) == 2
    assert json.loads(dump_critiques(found.constitution)) == CRITIQUES
    assert json.loads(dump_comparisons(found.constitution)) == COMPARISONS
    assert sum("NOASSERTION" in note for note in found.notes) == 1
    twice = import_constitution([paths[0], paths[0]])
    assert [p.id for p in twice.constitution.principles] == ["polite0", "polite1", "polite0-2", "polite1-2"]
    assert any("2 ids stood in more than one file" in note for note in twice.notes)


def test_hugging_face_round_trip(tmp_path: Path):
    constitution = imported(tmp_path, "constitution.json", HUGGING_FACE)
    assert [p.id for p in constitution.principles] == ["critique-1", "critique-2"]
    assert critique_request(constitution, constitution.principles[1]) == "Is it {long}?"
    assert json.loads(dump_hugging_face(constitution, [CHAT])) == HUGGING_FACE
    own = write(tmp_path, "own.json", dump_critiques(constitution))
    assert [p.critique for p in import_constitution([own]).constitution.principles] == [
        p.critique for p in constitution.principles
    ]


def test_chains_round_trip(tmp_path: Path):
    path = write(tmp_path, "OURS_SLMADISON.jsonl", json.dumps(CHAIN) + "\n\n" + json.dumps(CHAIN) + "\n")
    chains, found = read_chains(path)
    assert [chain["id"] for chain in chains] == ["OURS_SLMADISON-1", "OURS_SLMADISON-3"]
    assert [m["role"] for m in chains[0]["prompt"]] == ["user", "assistant", "user"]
    assert chains[0]["answer"] == {"text": "Look it up yourself.", "ids": [], "finish": "given"}
    assert [one["principle"]["id"] for one in chains[0]["rounds"]] == ["polite1", "polite0", "polite1"]
    assert chains[0]["rounds"][1]["principle"]["hash"] == found.constitution.principle("polite0").hash
    assert [json.loads(line) for line in dump_chains(chains, found.constitution).splitlines()] == [CHAIN, CHAIN]
    other = imported(tmp_path, "other.json", {"polite0": CRITIQUES["polite1"], "polite1": CRITIQUES["polite0"]})
    with pytest.raises(ValueError, match="'OURS_SLMADISON-1', round 1: principle 'polite1' has the hash"):
        dump_chains(chains, other)


def test_few_shot_examples(tmp_path: Path):
    constitution = imported(tmp_path, "c.json", CRITIQUES)
    questions = import_constitution([write(tmp_path, "q.json", COMPARISONS)]).constitution
    more = "What is a dam?\n\nAssistant: A wall.\n\nHuman: And a weir?"
    texts = [FEW_SHOT.replace("{question}", q) for q in ("What is a weir?", more)]
    kind, examples = import_examples(write(tmp_path, "CritiqueRevisionFewShotPrompts.json", texts))
    assert (kind, len(examples)) == ("critique", 2)
    assert examples[1]["prompt"][2] == {"role": "user", "content": "And a weir?"}
    text, notes = dump_examples(kind, examples, constitution)
    (example,) = parse_examples(text, "x", constitution).revisions
    assert (example.prompt, example.answer, example.revision) == ("What is a weir?", "Look it up.", "A low dam.")
    assert (example.principle, example.critique) == ("Make it polite.", "It is.")
    assert notes[0] == "1 with a prompt of several turns left out"

    pair = {"prompt": "\n\nHuman: What is a weir?\n\nAssistant:", "corrects": ["A low dam."], "incorrects": ["No."]}
    kind, examples = import_examples(write(tmp_path, "few.json", [pair, {"prompt": THOUGHT}]))
    text, notes = dump_examples(kind, examples, questions)
    plain, thought = parse_examples(text, "x", questions).comparisons
    assert (plain.a, plain.b, plain.better, plain.principle) == (
        "A low dam.",
        "No.",
        "a",
        ("comparison-1", "comparison-2"),
    )
    assert plain.reasons == "Answer {a} keeps the principle better than answer {b} does."
    assert thought.reasons == "({a}) sends {{him}} away; so option {b} is better."
    assert (thought.a, thought.b, thought.better, thought.prompt) == (
        "Look it up.",
        "A low dam.",
        "b",
        "What is a weir?",
    )
    assert any(note.startswith("1 without reasons") for note in notes)


def test_chats_are_examples_by_the_principle_that_they_use(tmp_path: Path):
    kind, (example,) = import_examples(write(tmp_path, "constitution.json", HUGGING_FACE))
    assert (kind, example["principle"], example["answer"]) == ("critique", "critique-1", "Look it up yourself.")


def test_numbered_text(tmp_path: Path):
    text = (
        "The rules of the house.\nKept since 1999.\n\n1. Be kind,\n   always.\n2) Say what is true.\n\n"
        "   Even when it is hard.\n\nSigned by all.\nIn May.\n\n(3) Say what is true.\r\n"
    )
    found = import_constitution([write(tmp_path, "rules.txt", text)])
    constitution = found.constitution
    assert [p.statement for p in constitution.principles] == [
        "Be kind, always.",
        "Say what is true. Even when it is hard.",
        "Say what is true.",
    ]
    assert [p.id for p in constitution.principles] == ["be-kind-always", "say-what-is-true-even", "say-what-is-true"]
    assert constitution.principles[1].sources == ("rules.txt, line 6",)
    assert constitution.preamble == "The rules of the house.\nKept since 1999."
    assert found.notes[0] == "2 lines between and below the numbers left out: lines 10, 11"


MARKDOWN = """\
# House rules

Kept by *everyone*.

## Kindness

Be **kind** to people
and to [animals](https://example.org).

## Truth

Some words on truth.

- **Facts:** say what is `true`.
- Doubt: say when you are not sure,
  and why.

  - even to yourself
1. Do not shout.

| a | table |
|---|-------|

```
code = "is no rule"
```

## Kindness

First paragraph.

Second_paragraph_here, with 2 * 3 * 4.

## Empty
"""


def test_markdown(tmp_path: Path):
    found = import_constitution([write(tmp_path, "house.md", MARKDOWN)])
    constitution = found.constitution
    assert (constitution.name, constitution.preamble) == ("House rules", "Kept by *everyone*.")
    assert [(p.id, p.title, p.statement, p.tags) for p in constitution.principles] == [
        ("kindness", "Kindness", "Be kind to people and to animals.", ()),
        ("facts", "Facts", "say what is true.", ("truth",)),
        (
            "doubt-say-when-you-are",
            "Doubt: say when you are not sure ...",
            "Doubt: say when you are not sure, and why.",
            ("truth",),
        ),
        ("even-to-yourself", "even to yourself", "even to yourself", ("truth",)),
        ("do-not-shout", "Do not shout", "Do not shout.", ("truth",)),
        ("first-paragraph", "First paragraph", "First paragraph.", ("kindness",)),
        (
            "second-paragraph-here-with-2",
            "Second_paragraph_here, with 2 * 3 * 4",
            "Second_paragraph_here, with 2 * 3 * 4.",
            ("kindness",),
        ),
    ]
    assert found.notes[:2] == (
        "5 lines of tables, quotes, code and rules left out: lines 21, 22, 24, 25, 26",
        "1 paragraphs beside items left out: line 12",
    )
    assert parse_constitution(dump_constitution(constitution), "x") == constitution


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("- Be kind.\n- Be true.\n", ["Be kind.", "Be true."]),
        ("Be kind.\n\nBe true.\n", ["Be kind.", "Be true."]),
        ("# Rules\n\nRead them.\n\n* Be kind.\n* Be kind.\n", ["Be kind.", "Be kind."]),
        ("# Be kind\n\nAlways.\n\n# Be true\n\nMostly.\n", ["Always.", "Mostly."]),
        ("# Rules\n\nBe kind.\n\nBe true.\n", ["Be kind.", "Be true."]),
        ("- **Never** lie.\n- **Do not** harm. **Ever:** no.\n", ["Never lie.", "Do not harm. Ever: no."]),
        ("- **Truth** - be true.\n- __Care__: be kind.\n- **Hope.** Be glad.\n", ["be true.", "be kind.", "Be glad."]),
        ("---\nby: us\n---\n# Rules\n\nRead.\n\n## A\n\nBe kind.\n\n## B\n\nBe true.\n", ["Be kind.", "Be true."]),
    ],
)
def test_small_markdown(tmp_path: Path, text: str, statements: list[str]):
    constitution = imported(tmp_path, "rules.md", text)
    assert [p.statement for p in constitution.principles] == statements
    assert len({p.id for p in constitution.principles}) == len(statements)


def lacking(key: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in CHAIN.items() if k != key} | changes


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", "{", r"x\.json: not JSON"),
        ("x.json", "", r"x\.json: not JSON"),
        ("x.json", "[" * 100_000, r"x\.json: n"),
        ("x.json", "{}", r"x\.json: no constitution in a form"),
        ("x.json", "[]", r"x\.json: no constitution in a form"),
        ("x.json", "3", r"x\.json: no constitution in a form"),
        ("x.json", '{"a": {"prompt": NaN}}', r"x\.json: not JSON \(NaN"),
        ("x.json", '{"a": {"prompt": ["x"], "prompt": ["y"]}}', r"x\.json: not JSON \(key 'prompt' stands twice"),
        ("x.json", {"a": {"prompt": ["CritiqueRequest: x"]}}, r"x\.json: a: key 'edit_request' is missing"),
        ("x.json", {"a": 3}, r"x\.json: a: int 3; allowed: an object with prompt, edit_request"),
        (
            "x.json",
            {"a": {"prompt": [], "edit_request": ""}},
            r"x\.json: a: prompt: a list of 0; allowed: a list of one",
        ),
        (
            "x.json",
            {"a": {"prompt": ["Hm."], "edit_request": ""}},
            r"a: prompt: begins 'Hm\.'; allowed: .*CritiqueRequest:",
        ),
        (
            "x.json",
            {"a": {"prompt": ["CritiqueRequest: \n\nCritique:"], "edit_request": ""}},
            r"a: prompt: an empty text",
        ),
        ("x.json", ["Which?", 4], r"x\.json: item 2: int 4; allowed: text"),
        ("x.json", ["Which \u001b[2J? Options:"], r"x\.json: item 1: holds the control character"),
        ("x.json", '["half \\ud800 a letter"]', r"x\.json: item 1: holds the control character"),
        ("x.json", [FEW_SHOT], r"x\.json: these are few-shot examples"),
        ("x.json", {"constitutions": []}, r"x\.json: an empty list"),
        ("x.json", {"constitutions": [{"critic": "a"}]}, r"x\.json: constitution 1: key 'revision' is missing"),
        (
            "x.json",
            HUGGING_FACE | {"system_chat": [CHAT[:4]]},
            r"x\.json: chat 1: 4 turns; allowed: an even number from 6",
        ),
        ("x.json", HUGGING_FACE | {"system_chat": [CHAT[1:]]}, r"x\.json: chat 1: turn 1 has the role 'assistant'"),
        ("x.txt", "No numbers here.", r"x\.txt: no line is numbered"),
        ("x.txt", "", r"x\.txt: an empty text"),
        ("x.txt", "1. Ring the bell: \a", r"x\.txt: holds the control character"),
        ("x.md", "# Only a title\n", r"x\.md: no principle found in it, read as Markdown"),
        ("x.md", "- ****\n", r"x\.md"),
        ("x.jsonl", "", r"x\.jsonl: no line in it"),
        ("x.jsonl", [], r"x\.jsonl:1: list \[\]; allowed: an object with rl_prompt"),
        ("x.jsonl", lacking("cst"), r"x\.jsonl:1: key 'cst' is missing"),
        ("x.jsonl", lacking("", rl_prompt="Hello."), r"x\.jsonl:1: rl_prompt: the dialogue begins 'Hello\.'"),
        (
            "x.jsonl",
            lacking("", rl_prompt="Human: a\n\nAssistant: b"),
            r"rl_prompt: the dialogue must end with the human",
        ),
        ("x.jsonl", lacking("", cst=[{"cst_key": "k"}]), r"x\.jsonl:1: cst 1: key 'cst_value' is missing"),
        (
            "x.jsonl",
            lacking("", cst=[CHAIN["cst"][0] | {"cst_key": "A b"}]),
            r"cst 1: cst_key = 'A b'; allowed as an id",
        ),
        (
            "x.jsonl",
            lacking("", cst=[CHAIN["cst"][0], CHAIN["cst"][0] | {"cst_value": CRITIQUES["polite0"]}]),
            r"x\.jsonl:1: cst 2: cst_key 'polite1' has other requests here",
        ),
    ],
)
def test_hostile_files_are_refused_by_file_and_place(tmp_path: Path, name: str, content: Any, told: str):
    with pytest.raises(ValueError, match=told):
        import_constitution([write(tmp_path, name, content)])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([FEW_SHOT, "Human: a"], r"x\.json: item 2: is not a dialogue with CritiqueRequest"),
        ([{"prompt": "Human: a\n\nAssistant:", "corrects": [], "incorrects": ["b"]}], r"item 1: corrects: a list of 0"),
        ([{"prompt": "Human: a\n\nAssistant:", "corrects": ["b"]}], r"item 1: key 'incorrects' is missing"),
        ([{"prompt": THOUGHT[:-3]}], r"item 1: prompt is neither with corrects"),
        ([{"prompt": THOUGHT}, {"promt": THOUGHT}], r"item 2: key 'prompt' is missing"),
        ({"constitutions": [], "system_chat": []}, r"no example in it"),
        ({"constitutions": [], "system_chat": None}, r"no example in it"),
        ({"constitutions": [], "system_chat": 5}, r"x\.json: system_chat is int 5; allowed: a list"),
        ({"constitutions": None, "system_chat": [[]]}, r"x\.json: NoneType None; allowed: a list"),
        (CRITIQUES, r"not a file of examples"),
    ],
)
def test_hostile_examples_are_refused_by_file_and_place(tmp_path: Path, content: Any, told: str):
    with pytest.raises(ValueError, match=told):
        import_examples(write(tmp_path, "x.json", content))


def test_what_is_no_text_at_all(tmp_path: Path):
    path = tmp_path / "x.md"
    path.write_bytes(b"- caf\xe9\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: byte 5 is not UTF-8")):
        import_constitution([path])
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        import_constitution([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match="no file to import"):
        import_constitution([])
