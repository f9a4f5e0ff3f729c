"""Examples beside a constitution: read and checked, drawn anew for each prompt, rendered as turns."""

import dataclasses
from pathlib import Path

import pytest

from bylaw.constitution.examples import (
    before,
    beside,
    comparison_turns,
    example_id,
    load_examples,
    longest_turns,
    parse_examples,
    pick,
    revision_turns,
)
from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution

TEXT = """
[[revision]]
prompt = "w1"
answer = "bad w2"
principle = "one"
critique = "w2 bad"
revision = "good"

[[comparison]]
prompt = "w3"
principle = ["two", "A rule in own words."]
a = "good w4"
b = "bad w5"
better = "a"
reasons = "{a} beats {b}"
"""


def test_a_revision_is_rendered_with_the_constitutions_own_requests(constitution: Constitution) -> None:
    [example] = parse_examples(TEXT, "x.toml", constitution).revisions
    said = [(turn["role"], turn["content"]) for turn in revision_turns(constitution, example)]
    critique = [("user", "check rule one"), ("assistant", "w2 bad")]
    revision = [("user", "fix rule one"), ("assistant", "good")]
    assert said == [("user", "w1"), ("assistant", "bad w2"), *critique, *revision]
    direct = revision_turns(constitution, example, critiques=False)
    assert len(direct) == 4 and "rule one" in direct[2]["content"] and direct[3]["content"] == "good"


def test_a_prompt_may_be_a_dialogue(constitution: Constitution) -> None:
    talk = '"Human: w7\\n\\nAssistant: w8\\n\\nHuman: w9"'
    text = TEXT.replace('"w1"', talk).replace('"w3"', talk)
    found = parse_examples(text, "x.toml", constitution)
    said = [(turn["role"], turn["content"]) for turn in revision_turns(constitution, found.revisions[0])]
    assert said[:4] == [("user", "w7"), ("assistant", "w8"), ("user", "w9"), ("assistant", "bad w2")]
    question, _ = comparison_turns(constitution, found.comparisons[0], lambda id, position: 0.0)
    assert question["content"].startswith("Human: w7\nAssistant: w8\nHuman: w9 which")


@pytest.mark.parametrize("u_principle,rule", [(0.49, "rule two"), (0.5, "A rule in own words.")])
@pytest.mark.parametrize("u_order,options,letter", [(0.4, "A good w4 B bad w5", "A"), (0.6, "A bad w5 B good w4", "B")])
def test_a_comparisons_principle_and_order_are_drawn(
    constitution: Constitution, u_principle: float, rule: str, u_order: float, options: str, letter: str
) -> None:
    [example] = parse_examples(TEXT, "x.toml", constitution).comparisons

    def uniform(id: str, position: int) -> float:
        return {1: u_principle, 2: u_order}[position]

    question, answer = comparison_turns(constitution, example, uniform)
    assert question["content"] == f"Human: w3 which {rule} {options}"
    assert answer["content"] == f"so : {letter}"
    thinking = comparison_turns(constitution, example, uniform, thoughts=True)[1]["content"]
    reasons = {"A": "A beats B", "B": "B beats A"}[letter]
    assert thinking == f"{constitution.templates.thought_prefix} {reasons}\nso : {letter}"


def test_which_and_in_which_order_is_drawn_and_one_less_leaves_the_rest(constitution: Constitution) -> None:
    [first] = parse_examples(TEXT, "x.toml", constitution).revisions
    five = [dataclasses.replace(first, prompt=f"w{n}") for n in range(5)]
    draws = {example_id(one): (7 * n + 3) % 5 / 5 for n, one in enumerate(five)}  # 3, 0, 2, 4, 1 fifths

    def uniform(id: str, position: int) -> float:
        return draws[id]

    assert [one.prompt for one in pick(five, 3, uniform)] == ["w1", "w4", "w2"]
    assert [one.prompt for one in pick([*five[:4]], 3, uniform)] == ["w1", "w2", "w0"]
    assert pick(five, 0, uniform) == []


def test_they_stand_before_the_dialogue_and_behind_its_system_message() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    shot = {"role": "user", "content": "shot"}
    assert before([shot], [user]) == [shot, user]
    assert before([shot], [system, user]) == [system, shot, user]


@pytest.mark.parametrize(
    "old,new,message",
    [
        ('"one"', '"onw"', r"x.toml:5: revision 1: key 'principle' is 'onw'.*did you mean 'one'"),
        (
            '"w1"',
            '"Human: w1\\n\\nAssistant: w2"',
            r"x.toml:3: revision 1: key 'prompt' begins 'Human:' .*must end with",
        ),
        ('"w3"', '"Human:"', r"comparison 1: key 'prompt' begins 'Human:' as a dialogue does, but .* is empty"),
        ('better = "a"', 'better = "A"', r"comparison 1: key 'better' is 'A'; allowed: \"a\" or \"b\""),
        ('critique = "w2 bad"\n', "", r"revision 1: key 'critique' is missing"),
        ("critique =", "critic =", r"x.toml:6: .*'critic' is not known.*'critique'"),
        ("{a} beats", "{c} beats", r"'reasons' cannot be filled in: placeholder \{c\}"),
        ("[[comparison]]", "[[comparisons]]", r"'comparisons' is not known"),
    ],
)
def test_a_mistake_is_named(constitution: Constitution, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_examples(TEXT.replace(old, new), "x.toml", constitution)


def test_a_missing_file_says_what_to_do(constitution: Constitution, tmp_path: Path) -> None:
    assert beside(tmp_path / "mine.toml") == tmp_path / "mine.examples.toml"
    with pytest.raises(FileNotFoundError, match="shots = 0"):
        load_examples(tmp_path / "mine.examples.toml", constitution)


def test_those_that_come_with_bylaw_go_with_the_default_constitution() -> None:
    default = load_constitution("default")
    examples = load_examples(beside("default"), default)
    assert len(examples.revisions) == len(examples.comparisons) == 5
    assert {one.better for one in examples.comparisons} == {"a", "b"}
    lengths = longest_turns(default, examples.comparisons, True, lambda turns: sum(len(t["content"]) for t in turns))
    assert len(lengths) == 5 and max(lengths) < 3000
    with pytest.raises(FileNotFoundError, match=r"'default\.examples' does not exist"):
        load_constitution("default.examples")
