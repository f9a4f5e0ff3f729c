"""Constitutions that people wrote as numbered text or as Markdown."""

from pathlib import Path

import pytest
from foreign import imported, write

from bylaw.constitution.imports import import_constitution
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.write import dump_constitution


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
            "Doubt: say when you are not sure, and why. even to yourself",
            ("truth",),
        ),
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
        "5 lines of tables, quotes, code, rules and front matter left out: lines 21, 22, 24, 25, 26",
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
        ("- Be kind:\n  - to people\n  - to animals\n- Be true\n", ["Be kind: to people; to animals", "Be true"]),
        (
            "- Be kind\n    1. always,\n    2. and to all\n       - of them\n1. Be true\n",
            ["Be kind; always, and to all; of them", "Be true"],
        ),
        (" - Be kind.\n - Be true.\n", ["Be kind.", "Be true."]),
        ("Read:\n  * Be kind.\n  * Be true.\n", ["Be kind.", "Be true."]),
        ("- [ ] Be kind.\n- [x] Be [true].\n", ["Be kind.", "Be [true]."]),
        ("House rules\n===\n\nKindness\n--------\n\nBe kind.\n\nTruth\n--\n- Be true.\n", ["Be kind.", "Be true."]),
        ("- Be kind.\n---\n- Be true.\n", ["Be kind.", "Be true."]),  # a rule: no paragraph stands above it
        ("---\nby: us\n---\n# Rules\n\nRead.\n\n## A\n\nBe kind.\n\n## B\n\nBe true.\n", ["Be kind.", "Be true."]),
    ],
)
def test_small_markdown(tmp_path: Path, text: str, statements: list[str]):
    constitution = imported(tmp_path, "rules.md", text)
    assert [p.statement for p in constitution.principles] == statements
    assert len({p.id for p in constitution.principles}) == len(statements)


def test_underlined_headings_are_headings(tmp_path: Path):
    text = "My\nlaw\n======\n\nOf all.\n\nHonesty\n-------\n\n- Do not lie.\n- Tell the *truth*.\n"
    constitution = imported(tmp_path, "x.md", text)
    assert (constitution.name, constitution.preamble) == ("My law", "Of all.")
    assert [(p.statement, p.tags) for p in constitution.principles] == [
        ("Do not lie.", ("honesty",)), ("Tell the truth.", ("honesty",))
    ]  # fmt: skip


def test_front_matter_is_told_and_is_no_preamble(tmp_path: Path):
    found = import_constitution([write(tmp_path, "x.md", "---\nby: us\n---\n# Rules\n\n- Be kind.\n")])
    assert "by: us" not in found.constitution.preamble
    assert found.notes[0] == "3 lines of tables, quotes, code, rules and front matter left out: lines 1, 2, 3"
