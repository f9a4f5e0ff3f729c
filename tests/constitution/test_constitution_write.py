"""A constitution written as TOML reads back equal."""

import re
from dataclasses import replace

import pytest

from bylaw.constitution.load import load_constitution, parse_constitution
from bylaw.constitution.schema import Constitution, Principle, Templates
from bylaw.constitution.write import dump_constitution

ODD = [
    'says "quoted" things',
    'ends in a quote "',
    'ends in three """',
    'holds """" four and a \\ backslash, and \\" both',
    "'single' and '''three''' of them",
    "line one\nline two\n\n  line four, indented",
    'two lines\nthe last ends in ""',
    'two lines, """ inside, \\\nthe last ends in a backslash \\',
    'five """"" quotes\nin a row """"""',
    "a tab\tinside\nof two lines",
    "right-to-left \u200f mark, zero width \u200b, line separator \u2028 inside, no-break\u00a0space",
    "private \ue000 and astral \U0001f600 \U000e0041 letters",
    "[[principle]]\nid = 'not a table'  # nor a comment",
    "{{literal braces}} stay",
]


def with_text(text: str) -> Constitution:
    one = Principle(id="one", title="One", statement="Say so.", sources=('a "source"', "b\\c"), tags=("t", "u" * 90))
    two = Principle(
        id="two", title="Two", statement="Do so.", sources=("x",), weight=0.1 + 0.2, stages=("critique",), critique=text
    )
    templates = Templates(answer_prefix=text, revision=text)
    return Constitution(
        name="Odd", version="1", license="MIT", preamble=text, principles=(one, two), templates=templates
    )


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_read_back_equal(text: str):
    constitution = with_text(text)
    written = dump_constitution(constitution)
    back = parse_constitution(written, "back.toml")
    assert back == constitution
    assert back.hash == constitution.hash
    assert back.principles[1].critique == text
    assert not re.search("[\u202e\u200b\u2028]", written), "what nobody sees is written as an escape"


@pytest.mark.parametrize("name", ["default", "village"])
def test_shipped_constitutions_read_back_equal(name: str):
    constitution = load_constitution(name)
    assert parse_constitution(dump_constitution(constitution), "x").hash == constitution.hash
    assert parse_constitution(dump_constitution(constitution), "x") == constitution


def test_the_files_form():
    text = dump_constitution(with_text("plain"))
    assert 'sources = ["a \\"source\\"", "b\\\\c"]\n' in text
    assert "weight = 0.30000000000000004\n" in text
    assert text.count("weight") == 1, "a weight of 1 is not written"
    assert 'stages = ["critique"]\n' in text
    assert f'tags = ["t", "{"u" * 90}"]' not in text and f'    "{"u" * 90}",\n' in text
    assert "[templates]\ncritique = " in text, "templates that bylaw supplies are written too"


def test_what_no_file_can_hold_is_refused():
    good = with_text("plain")
    with pytest.raises(ValueError, match="its preamble would not read back the same"):
        dump_constitution(replace(good, preamble=" spaces around "))
    turned = replace(good.principles[0], stages=("comparison", "critique"))
    with pytest.raises(ValueError, match="stages of principle 'one'"):
        dump_constitution(replace(good, principles=(turned,)))
    with pytest.raises(ValueError, match="template answer_prefix"):
        dump_constitution(replace(good, templates=replace(good.templates, answer_prefix="ends in a break\n")))
    for bad, told in (("a\x1b[2Jb", "control character"), ("a\ud800b", "not valid TOML")):
        with pytest.raises(ValueError, match=told):
            dump_constitution(replace(good, preamble=bad))
