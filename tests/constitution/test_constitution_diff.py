"""What differs between two constitutions: worked by hand on four principles."""

from dataclasses import fields, replace

import pytest

from bylaw.constitution.asked import stage_hash
from bylaw.constitution.diff import describe_diff, diff, mark_words
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.schema import STAGES, Constitution, Stage, Templates

TOML = """
name = "Four"
version = "1"
license = "MIT"
preamble = "Rules."
[[principle]]
id = "calm"
title = "Calm"
statement = "Stay calm and kind."
sources = ["x"]
[[principle]]
id = "true"
title = "True"
statement = "Say only what is true."
sources = ["x"]
weight = 2
[[principle]]
id = "safe"
title = "Safe"
statement = "Help nobody to do harm."
sources = ["x"]
stages = ["critique"]
critique = "Is it safe?"
revision = "Make it safe."
[[principle]]
id = "short"
title = "Short"
statement = "Be short."
sources = ["x"]
"""
OLD = parse_constitution(TOML, "old.toml")


def changed(*edits: tuple[str, str]) -> Constitution:
    text = TOML
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_constitution(text, "new.toml")


def test_nothing():
    same = diff(OLD, OLD)
    assert not same.changes and not same.templates and not same.reordered and not same.reaches_prompts
    assert "nothing that reaches a prompt changed" in describe_diff(same)


def test_reworded():
    found = diff(OLD, changed(("Stay calm and kind.", "Stay calm and be kind to all.")))
    (change,) = found.changes
    assert (change.id, change.kind, change.fields) == ("calm", "changed", ("statement",))
    assert found.touched("critique") == found.touched("comparison") == ("calm",)
    text = describe_diff(found)
    assert "    was  Stay calm and [-kind.-]\n    now  Stay calm and {+be kind to all.+}\n" in text
    assert "0 removed, 0 added, 1 changed, 3 as before" in text


def test_words_are_marked_where_they_changed():
    assert mark_words("a b c d", "a x c d e") == ("a [-b-] c d", "a {+x+} c d {+e+}")
    assert mark_words("one\n\ntwo three", "one\n\nthree") == ("one\n\n[-two-] three", "one\n\nthree")
    assert mark_words("", "new") == ("", "{+new+}")


def test_removed_and_added_with_shares():
    without = replace(OLD, principles=OLD.principles[:1] + OLD.principles[2:])
    gone, come = diff(OLD, without), diff(without, OLD)
    assert [c.kind for c in gone.changes] == ["removed"] and [c.kind for c in come.changes] == ["added"]
    assert gone.touched("comparison") == come.touched("comparison") == ("true",)
    # Weights 1, 2, 1, 1 in critiques, and 1, 2, 1 in comparisons.
    assert gone.share("critique", "true") == (2 / 5, 0.0)
    assert come.share("comparison", "true") == (0.0, 2 / 4)
    assert "critique: 40.0% of the draws before, 0.0% now; comparison: 50.0%" in describe_diff(gone)
    assert "Say only what is true." in describe_diff(gone)


def test_reweighted_touches_no_question():
    found = diff(OLD, changed(("weight = 2", "weight = 7")))
    assert not found.touched("critique") and found.reweighted("critique") == ("true",) and found.reaches_prompts
    assert found.share("critique", "true") == (2 / 5, 7 / 10)
    text = describe_diff(found)
    assert "weight 2, now 7: critique: 40.0% of the draws before, 70.0% now; comparison: 50.0%" in text
    assert "re-weighted: true" in text and "asked as before" in text


def test_stages():
    found = diff(OLD, changed(('stages = ["critique"]\n', "")))
    assert found.changes[0].fields == ("stages",)
    assert not found.touched("critique") and found.touched("comparison") == ("safe",)
    assert found.share("comparison", "safe") == (0.0, 1 / 5)
    assert "stages critique; now critique, comparison" in describe_diff(found)


def test_own_requests():
    found = diff(OLD, changed(('critique = "Is it safe?"', 'critique = "Is it quite safe?"')))
    assert found.touched("critique") == ("safe",) and not found.touched("comparison")
    assert "own request for the critique\n    was  Is it safe?\n    now  Is it {+quite+} safe?" in describe_diff(found)
    gone = diff(OLD, changed(('revision = "Make it safe."\n', "")))
    assert "own request for the revision taken out, so that the template asks: Make it safe." in describe_diff(gone)


def test_templates_touch_who_uses_them():
    found = diff(OLD, changed(('preamble = "Rules."', 'preamble = "Rules."\ntemplates.critique = "Look: {statement}"')))
    assert found.templates == ("critique",)
    assert found.touched("critique") == ("calm", "true", "short"), "safe has a request of its own"
    assert not found.touched("comparison")
    assert "template critique, reworded" in describe_diff(found)
    prefix = replace(OLD, templates=replace(OLD.templates, answer_prefix="Better is:"))
    assert diff(OLD, prefix).touched("comparison") == ("calm", "true", "short")
    assert not diff(OLD, prefix).touched("critique")
    odd = replace(OLD, templates=replace(OLD.templates, comparison="{dialogue} {question} {{x}} {answer_a} {answer_b}"))
    assert diff(OLD, odd).touched("comparison") == ("calm", "true", "short")


@pytest.mark.parametrize(
    "edit",
    [
        ('name = "Four"', 'name = "Fore"'),
        ('title = "Calm"', 'title = "Calmness"'),
        ('title = "Safe"\nstatement = "Help nobody to do harm."\nsources = ["x"]', None),
    ],
)
def test_what_reaches_no_prompt(edit: tuple[str, str | None]):
    old, new = edit
    found = diff(OLD, changed((old, new or old.replace('"x"', '"y"'))))
    assert not found.reaches_prompts
    assert "nothing that reaches a prompt changed, nor how often" in describe_diff(found)


def test_a_title_that_a_template_shows_reaches_the_prompt():
    shows = replace(OLD, templates=replace(OLD.templates, question="{title}: {statement}"))
    new = replace(shows, principles=(replace(OLD.principles[0], title="Calmness"), *OLD.principles[1:]))
    assert diff(shows, new).touched("comparison") == ("calm",)
    assert not diff(shows, new).touched("critique")


def test_words_that_changed_together_are_marked_together():
    was, now = mark_words("Never help with harm.", "Do not give your help to harm.")
    assert (was, now) == ("[-Never-] help [-with-] harm.", "{+Do not give your+} help {+to+} harm.")
    was, now = mark_words("be kind now and then", "be very cruel now and then")
    assert (was, now) == ("be [-kind-] now and then", "be {+very cruel+} now and then")
    assert mark_words("all of it", "something else") == ("[-all of it-]", "{+something else+}")
    assert mark_words("a  b", "a  b") == ("a  b", "a  b") and mark_words("", "a") == ("", "{+a+}")


def test_order_and_a_new_name():
    turned = replace(OLD, principles=OLD.principles[::-1])
    found = diff(OLD, turned)
    assert found.reordered and not found.changes and not found.reaches_prompts
    assert "4 as before, in another order" in describe_diff(found)
    renamed = describe_diff(diff(OLD, changed(('id = "calm"', 'id = "calmness"'))))
    assert "says the same as calm, which is gone: renamed" in renamed
    assert "says the same as calmness, which is new: renamed" in renamed


@pytest.mark.parametrize("name", [f.name for f in fields(Templates)])
@pytest.mark.parametrize("stage", STAGES)
def test_templates_belong_to_the_stage_whose_hash_they_change(name: str, stage: Stage):
    own = replace(OLD.principles[0], critique="", revision="", comparison="")
    plain = replace(OLD, principles=(own,))
    new = replace(plain, templates=replace(plain.templates, **{name: f"{getattr(plain.templates, name)} More."}))
    assert bool(diff(plain, new).touched(stage)) == (stage_hash(plain, stage) != stage_hash(new, stage))
