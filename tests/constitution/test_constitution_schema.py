"""Hashes, the weighted draw, and looking principles up."""

import dataclasses
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from bylaw.constitution import Constitution, Principle, Templates, draw, parse_constitution
from bylaw.constitution.asked import stage_hash


def principle(id: str = "calm", **changes: object) -> Principle:
    fields: dict = {"title": "Calm", "statement": "The assistant stays calm.", "sources": ("our own",)} | changes
    return Principle(id=id, **fields)


def constitution(*principles: Principle, **changes: object) -> Constitution:
    fields: dict = {"name": "n", "version": "1", "license": "CC0-1.0", "preamble": "p"} | changes
    return Constitution(principles=principles, **fields)


PLAIN = """
name = "House rules"
version = "1"
license = "CC0-1.0"
preamble = "For the house."

[[principle]]
id = "calm"
title = "Calm"
statement = "The assistant stays calm."
sources = ["our own", "the neighbours"]
weight = 2

[[principle]]
id = "kind"
title = "Kindness"
statement = "The assistant is kind to everybody."
sources = ["our own"]
"""

# The same constitution: comments, other quotes, other key order, wrapped lines, defaults spelled out, CRLF.
REWRITTEN = """\
# a comment with [[principle]] and "quotes"
version = '1'   # another
preamble = '''
For the house.
'''
license = "CC0-1.0"
name = "House  rules"

[[ principle ]]
weight = 2.0
sources = [
  "our own",  # first
  "the   neighbours",
]
statement = \"\"\"
The assistant
    stays calm.\"\"\"
"id" = "calm"
title = "C\\u0061lm"
stages = ["comparison", "critique"]

[[principle]]
sources = ["our own"]
title = "Kindness"
tags = []
id = "kind"
statement = "The assistant is kind to everybody."
weight = 1

[templates]
answer_prefix = "The answer is:"
""".replace("\n", "\r\n")


def test_hash_is_stable_under_rewriting_of_the_file() -> None:
    plain, rewritten = parse_constitution(PLAIN, "a"), parse_constitution(REWRITTEN, "b")
    assert plain == rewritten
    assert plain.hash == rewritten.hash
    assert [p.hash for p in plain.principles] == [p.hash for p in rewritten.principles]
    assert len(plain.hash) == 16
    assert set(plain.hash) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stays calm.", "stays quiet."),
        ('"Calm"', '"Calmness"'),
        ('id = "calm"', 'id = "calmer"'),
        ("weight = 2", "weight = 3"),
        ("weight = 2", 'stages = ["critique"]\nweight = 2'),
        ("weight = 2", 'tags = ["mood"]\nweight = 2'),
        ("weight = 2", 'critique = "Was it calm?"\nweight = 2'),
        ("weight = 2", 'revision = "Calmer!"\nweight = 2'),
        ("weight = 2", 'comparison = "Which is calmer?"\nweight = 2'),
        ("the neighbours", "the neighbors"),
    ],
)
def test_one_changed_word_changes_the_principle_and_the_whole(old: str, new: str) -> None:
    before, after = parse_constitution(PLAIN, "a"), parse_constitution(PLAIN.replace(old, new, 1), "a")
    assert before.principles[0].hash != after.principles[0].hash
    assert before.principles[1].hash == after.principles[1].hash
    assert before.hash != after.hash


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Templates)])
def test_every_template_is_in_the_whole_hash(name: str) -> None:
    templates = dataclasses.replace(Templates(), **{name: getattr(Templates(), name) + " Please."})
    before, after = constitution(principle()), constitution(principle(), templates=templates)
    assert before.hash != after.hash
    assert before.principles[0].hash == after.principles[0].hash


def test_order_changes_the_whole_hash_but_what_only_people_read_does_not() -> None:
    a, b = principle("a"), principle("b")
    assert constitution(a, b).hash != constitution(b, a).hash  # a draw falls on another principle
    assert constitution(a).hash == constitution(a, name="m", version="2", license="MIT", preamble="q").hash


def test_draw_by_hand() -> None:
    """Arrivals -log(1 - u) / weight: a at log 2 / 1 = 0.69, b at log 4 / 2 and a little, c at log 10 / 5 = 0.46."""
    three = [principle("a"), principle("b", weight=2.0), principle("c", weight=5.0)]
    us = [0.5, 0.7501, 0.9]
    assert [[p.id for p in draw(three, us, count)] for count in (1, 2, 3)] == [["c"], ["a", "c"], ["a", "b", "c"]]


def test_draw_shares_are_the_weights() -> None:
    """Without putting back: b is second with 1/8 * 2/7 + 5/8 * 2/3, so among the first two with 0.25 + 0.4524."""
    three, rng, n = [principle("a"), principle("b", weight=2.0), principle("c", weight=5.0)], random.Random(0), 20_000
    drawn = [[rng.random() for _ in three] for _ in range(n)]
    first = Counter(draw(three, us)[0].id for us in drawn)
    assert {id: round(count / n, 2) for id, count in first.items()} == {"a": 0.12, "b": 0.25, "c": 0.63}
    assert abs(sum(three[1] in draw(three, us, 2) for us in drawn) / n - 0.7024) < 0.01


def test_a_draw_changes_only_where_it_had_part() -> None:
    """Taking a principle out moves the draws that had it, and no other; so does adding it."""
    rng, four = random.Random(1), [principle(id, weight=w) for id, w in zip("abcd", (1, 2, 5, 1), strict=True)]
    for _ in range(500):
        us = [rng.random() for _ in four]
        before, after = draw(four, us, 2), draw(four[:1] + four[2:], us[:1] + us[2:], 2)
        assert (before == after) == (four[1] not in before)
        assert not {p.id for p in before} - {p.id for p in after} - {"b"}


def test_stage_hash_knows_what_reaches_its_prompts() -> None:
    plain = constitution(principle("a"), principle("b", stages=("comparison",)))
    same = ("sources", ("elsewhere",)), ("tags", ("t",))
    for field, value in same:
        changed = constitution(principle("a", **{field: value}), plain.principles[1])
        assert changed.hash != plain.hash
        assert stage_hash(changed, "critique") == stage_hash(plain, "critique")
    reworded = constitution(principle("a"), principle("b", stages=("comparison",), statement="Other."))
    assert stage_hash(reworded, "critique") == stage_hash(plain, "critique")
    assert stage_hash(reworded, "comparison") != stage_hash(plain, "comparison")
    retold = replace(plain, templates=Templates(direct="{statement}"))
    assert stage_hash(retold, "critique") != stage_hash(plain, "critique")
    assert stage_hash(retold, "comparison") == stage_hash(plain, "comparison")
    used = ("critique", "revision")
    assert stage_hash(retold, "critique", used) == stage_hash(plain, "critique", used) != stage_hash(plain, "critique")


def test_what_changes_no_prompt_and_no_draw_leaves_the_stage_hash() -> None:
    plain = constitution(principle("a", weight=1.0), principle("b", weight=3.0))
    retitled = constitution(principle("a", weight=1.0, title="Other"), plain.principles[1])
    thrice = constitution(principle("a", weight=3.0), principle("b", weight=9.0))
    for one in (retitled, thrice, constitution(*plain.principles[::-1])):
        assert one.hash != plain.hash and stage_hash(one, "comparison") == stage_hash(plain, "comparison")
    shows = Templates(question="{title}: {statement}")
    first, second = (stage_hash(replace(one, templates=shows), "comparison") for one in (plain, retitled))
    assert first != second
    twice = constitution(principle("a", weight=2.0), plain.principles[1])
    assert stage_hash(twice, "comparison") != stage_hash(plain, "comparison")
    renamed = constitution(principle("c", weight=1.0), plain.principles[1])
    assert stage_hash(renamed, "comparison") != stage_hash(plain, "comparison")  # draws are keyed by ids


@pytest.mark.parametrize("u", [1.0, -0.001, math.nan, math.inf])
def test_draw_refuses_what_is_no_uniform(u: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        draw([principle()], [u])


def test_draw_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="1 of 0"):
        draw([], [])


def test_stages_choose_principles_in_order() -> None:
    both = principle("both")
    critique, comparison = principle("x", stages=("critique",)), principle("y", stages=("comparison",))
    c = constitution(critique, both, comparison)
    assert c.for_stage("critique") == (critique, both)
    assert c.for_stage("comparison") == (both, comparison)


def test_an_empty_or_unknown_stage_is_an_error() -> None:
    c = constitution(principle(stages=("critique",)), name="lonely")
    with pytest.raises(ValueError, match=r"'lonely' has no principle for the stage 'comparison': add"):
        c.for_stage("comparison")
    with pytest.raises(
        ValueError, match=r"'critque' is not known \(did you mean 'critique'\?\)\. Allowed: critique, comparison"
    ):
        c.for_stage("critque")  # type: ignore[arg-type]


def test_principle_by_id() -> None:
    c = constitution(principle("calm"), principle("kind"))
    assert c.principle("kind").id == "kind"
    with pytest.raises(ValueError, match=r"'n' has no principle 'clam' \(did you mean 'calm'\?\)"):
        c.principle("clam")
