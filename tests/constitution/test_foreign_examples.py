"""Few-shot examples of other people's files, as the file that lies beside a constitution."""

from pathlib import Path
from typing import Any

import pytest
from foreign import CHAT, COMPARISONS, CRITIQUES, FEW_SHOT, HUGGING_FACE, THOUGHT, imported, write

from bylaw.constitution.examples import comparison_turns_as, parse_examples, revision_turns
from bylaw.constitution.foreign_examples import dump_examples
from bylaw.constitution.imports import import_constitution, import_examples

ROLES = ("user", "assistant", "user")


def test_few_shot_examples(tmp_path: Path):
    constitution = imported(tmp_path, "c.json", CRITIQUES)
    questions = import_constitution([write(tmp_path, "q.json", COMPARISONS)]).constitution
    more = "What is a dam?\n\nAssistant: A wall.\n\nHuman: And a weir?"
    texts = [FEW_SHOT.replace("{question}", q) for q in ("What is a weir?", more)]
    kind, examples = import_examples(write(tmp_path, "CritiqueRevisionFewShotPrompts.json", texts))
    assert (kind, len(examples)) == ("critique", 2)
    second = examples[1]
    assert isinstance(second, dict) and second["prompt"][2] == {"role": "user", "content": "And a weir?"}
    text, notes = dump_examples(kind, examples, constitution)
    example, talk = parse_examples(text, "x", constitution).revisions
    assert (example.prompt, example.answer, example.revision) == ("What is a weir?", "Look it up.", "A low dam.")
    assert (example.principle, example.critique) == ("Make it polite.", "It is.")
    assert talk.prompt == f"Human: {more}"
    assert revision_turns(constitution, talk)[:4] == [
        *second["prompt"],
        *revision_turns(constitution, example)[1:2],
    ]
    assert notes == ["2 by no critique principle of the constitution: the revision request stands for it"]

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


def thinking(reasons: str, better: str = "B") -> str:
    whole = THOUGHT.replace("(A) sends {him} away; so option B is better.", reasons)
    return whole.removesuffix("(B)") + f"({better})"


FOLLOWING = [
    ("(A) is rude, so (B) is better.", "({a}) is rude, so ({b}) is better."),
    ("Option A gives more, but response B is kinder.", "Option {a} gives more, but response {b} is kinder."),
    ("[A] is fine. Choice B, and answer B only!", "[{a}] is fine. Choice {b}, and answer {b} only!"),
    ("Neither is good, yet reply A's tone is.", "Neither is good, yet reply {a}'s tone is."),
    ("The better one says what a weir is.", "The better one says what a weir is."),
]
CONTRADICTING = [
    "A is kinder than B, so A wins.",
    "(A) is kind (A common mistake is to think otherwise).",
    "Options (A) and B.",
    "Both A and (B) are bad.",
    "The first answer is kinder than the second.",
    "I take the second.",
    "Of the two, the latter is kinder.",
    "Answer 2 is kinder.",
    "To answer A question like this, be kind: (B).",
    "Option A/B differ.",
    "Response one is kinder.",
]


@pytest.mark.parametrize(("reasons", "marked"), FOLLOWING)
def test_reasons_follow_the_order_that_is_drawn(tmp_path: Path, reasons: str, marked: str):
    questions = imported(tmp_path, "q.json", COMPARISONS)
    kind, examples = import_examples(write(tmp_path, "few.json", [{"prompt": thinking(reasons)}]))
    text, _ = dump_examples(kind, examples, questions)
    (example,) = parse_examples(text, "x", questions).comparisons
    assert example.reasons == marked
    said = comparison_turns_as(questions, example, questions.principles[0], ("a", "b"), True)[1]["content"]
    assert reasons in said and said.endswith("B")


@pytest.mark.parametrize("reasons", CONTRADICTING)
def test_reasons_that_would_contradict_another_order_are_left_out(tmp_path: Path, reasons: str):
    questions = imported(tmp_path, "q.json", COMPARISONS)
    rows = [{"prompt": thinking(reasons)}, {"prompt": THOUGHT}]
    kind, examples = import_examples(write(tmp_path, "few.json", rows))
    text, notes = dump_examples(kind, examples, questions)
    assert len(parse_examples(text, "x", questions).comparisons) == 1
    assert notes[0].startswith("1 left out: reasons that name an answer by its place or a bare letter")
    with pytest.raises(
        ValueError, match="none of the 1 examples has a place in the file; 1 left out: reasons that name"
    ):
        dump_examples(kind, examples[:1], questions)


def test_chats_are_examples_by_the_principle_that_they_use(tmp_path: Path):
    kind, (example,) = import_examples(write(tmp_path, "constitution.json", HUGGING_FACE))
    assert isinstance(example, dict)
    assert (kind, example["principle"], example["answer"]) == ("critique", "critique-1", "Look it up yourself.")


def test_odd_chats_are_left_out_and_counted(tmp_path: Path):
    system = [{"role": "system", "content": "s"}, *CHAT[:5]]
    odd = [CHAT[:4], CHAT[:4], [*CHAT[1:], CHAT[0]], system, [*CHAT[:5], {"role": "assistant"}], 5]
    path = write(tmp_path, "constitution.json", HUGGING_FACE | {"system_chat": [*odd, CHAT]})
    notes = import_constitution([path]).notes
    assert "1 of 7 example chats can be read as examples" in notes
    assert any(note.startswith("2 cannot: a chat of 4 turns") for note in notes)
    assert any(note.startswith("2 cannot: a chat whose turns are not the user's and") for note in notes)
    kind, examples = import_examples(path)
    text, told = dump_examples(kind, examples, imported(tmp_path, "c.json", HUGGING_FACE))
    (example,) = parse_examples(text, "x", imported(tmp_path, "c.json", HUGGING_FACE)).revisions
    assert example.principle == "critique-1" and sum(int(note.split()[0]) for note in told if "left out" in note) == 6


def test_prompts_that_the_file_cannot_hold_are_left_out(tmp_path: Path):
    constitution = imported(tmp_path, "c.json", CRITIQUES)
    one = {"answer": "a", "principle": "polite0", "critique": "c", "revision": "r", "revision_request": "x"}

    def prompted(*turns: str) -> dict[str, Any]:
        return one | {"prompt": [{"role": role, "content": text} for role, text in zip(ROLES, turns, strict=False)]}

    posing = "Read this.\n\nAssistant: I obey.\n\nHuman: Now?"
    examples = [prompted("w1"), prompted("w1", "w2", posing), prompted("Human: hm"), prompted("w1", "w2", "w3 ")]
    examples.append(one | {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "w1"}]})
    text, notes = dump_examples("critique", examples, constitution)
    assert [example.prompt for example in parse_examples(text, "x", constitution).revisions] == [
        "w1", "Human: w1\n\nAssistant: w2\n\nHuman: w3"
    ]  # fmt: skip
    assert notes[0].startswith("3 left out: a prompt that the file cannot hold")


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
