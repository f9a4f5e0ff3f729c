"""Files that people get wrong, and files that mean harm: each is refused by file, line and key."""

from pathlib import Path

import pytest

from bylaw.constitution import STAGES, load_constitution, parse_constitution

HEAD = """\
name = "Rules"
version = "1"
license = "CC0-1.0"
preamble = "Read me."
"""
CALM = """
[[principle]]
id = "calm"
title = "Calm"
statement = "The assistant stays calm."
sources = ["our own"]
"""
GOOD = HEAD + CALM


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse_constitution(text, "rules.toml")
    return str(caught.value)


def test_a_small_file_with_defaults() -> None:
    c = parse_constitution(GOOD, "rules.toml")
    assert (c.name, c.version, c.license, c.preamble) == ("Rules", "1", "CC0-1.0", "Read me.")
    (calm,) = c.principles
    assert (calm.id, calm.title, calm.statement, calm.sources) == (
        "calm",
        "Calm",
        "The assistant stays calm.",
        ("our own",),
    )
    assert (calm.weight, calm.stages, calm.tags) == (1.0, STAGES, ())
    assert (calm.critique, calm.revision, calm.comparison) == ("", "", "")
    assert c.templates.answer_prefix == "The answer is:"


def test_everything_that_can_be_written() -> None:
    text = f"""{GOOD}
tags = ["mood"]
weight = 3
stages = ["critique"]
critique = '''
Was it calm?
Say {{title}}.
'''
revision = "Calmer, by {{statement}}"
comparison = "Which is calmer?"

[templates]
critique = "C {{statement}}"
revision = "R"
question = "Q {{title}}"
comparison = "{{dialogue}} {{question}} {{answer_a}} {{answer_b}}"
answer_prefix = "Letter {{"
"""
    c = parse_constitution(text, "rules.toml")
    calm = c.principles[0]
    assert (calm.weight, calm.stages, calm.tags) == (3.0, ("critique",), ("mood",))
    assert calm.critique == "Was it calm?\nSay {title}."
    assert (calm.revision, calm.comparison) == ("Calmer, by {statement}", "Which is calmer?")
    t = c.templates
    assert (t.critique, t.revision, t.question, t.answer_prefix) == ("C {statement}", "R", "Q {title}", "Letter {")
    assert t.comparison == "{dialogue} {question} {answer_a} {answer_b}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license", "licence", "rules.toml:3: key 'licence' is not known (did you mean 'license'?). Allowed: name, "),
        ("[[principle]]", "[[principles]]", "rules.toml:6: key 'principles' is not known (did you mean 'principle'?)"),
        ("statement", "statment", "rules.toml:9: principle 1 ('calm'): key 'statment' is not known (did you mean 'sta"),
        ("sources", "zzz", "rules.toml:10: principle 1 ('calm'): key 'zzz' is not known. Allowed: id, title,"),
        ('name = "Rules"\n', "", "rules.toml: key 'name' is missing; write name = \"...\""),
        ('preamble = "Read me."\n', "", "key 'preamble' is missing"),
        ('title = "Calm"\n', "", "rules.toml:6: principle 1 ('calm'): key 'title' is missing"),
        ('id = "calm"\n', "", "rules.toml:6: principle 1: key 'id' is missing"),
        ('sources = ["our own"]\n', "", "rules.toml:6: principle 1 ('calm'): key 'sources' names no source; say where"),
        ('["our own"]', "[]", "rules.toml:10: principle 1 ('calm'): key 'sources' names no source"),
        ('["our own"]', '"our own"', "key 'sources' is 'our own' (text); it must be a list of texts: sources = ["),
        ('["our own"]', '["our own", 3]', "key 'sources' holds 3 (a number); it must be text in quotes"),
        ('["our own"]', '["our own", " "]', "key 'sources' holds an empty text"),
        ('"1"', "1.0", "rules.toml:2: key 'version' holds 1.0 (a number); it must be text in quotes"),
        ('"1"', "2024-05-01", "key 'version' holds a date or time; it must be text"),
        ('"Calm"', '""', "rules.toml:8: principle 1 ('calm'): key 'title' holds an empty text"),
        ('"Calm"', '" \\t\\u200b "', "key 'title' holds an empty text"),
        ('"Calm"', "true", "key 'title' holds True (true or false)"),
        ('"Calm"', "{a = 1}", "key 'title' holds a table"),
        ('"Calm"', '"C\\u001b[2J"', "rules.toml:8: principle 1 ('calm'): key 'title' holds the control character "),
        ('"Calm"', '"C\\u202emlac"', "rules.toml:8: principle 1 ('calm'): key 'title' holds U+202E, which turns"),
        ('"calm"', '"Calm down"', "rules.toml:7: principle 1 ('Calm down'): key 'id' is 'Calm down'; allowed:"),
        ('"calm"', '"cälm"', "allowed: lower-case letters a-z, digits and hyphens"),
        ('"calm"', "7", "rules.toml:7: principle 1: key 'id' holds 7 (a number)"),
        ("[[principle]]", "[principle]", "rules.toml:6: key 'principle' must be tables, each under its own"),
    ],
)
def test_a_mistake_is_named_with_its_place(old: str, new: str, message: str) -> None:
    assert message in refusal(GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weight = 0", "rules.toml:11: principle 1 ('calm'): key 'weight' is 0 (a number); it must be a number"),
        ("weight = -1.5", "key 'weight' is -1.5"),
        ("weight = nan", "key 'weight' is nan"),
        ("weight = inf", "key 'weight' is inf"),
        ("weight = true", "key 'weight' is True (true or false)"),
        ('weight = "2"', "key 'weight' is '2' (text)"),
        ("weight = 0x" + "f" * 5000, "key 'weight' is an immense number"),
        ("weight = 1000001", "at most 1,000,000"),
        ("stages = []", "key 'stages' is an empty list"),
        ('stages = "critique"', "key 'stages' is 'critique' (text); it must be a list"),
        ('stages = ["comparisons"]', "holds 'comparisons', which is not a stage (did you mean 'comparison'?). Allow"),
        ('critique = "By {statment}?"', "key 'critique' cannot be filled in: placeholder {statment} is not known"),
        ('comparison = "{answer_a}?"', "key 'comparison' cannot be filled in: placeholder {answer_a} is not known"),
        ('revision = "a { b"', "key 'revision' cannot be filled in: a brace { has no partner"),
        ('revision = ""', "key 'revision' holds an empty text"),
        ('version = "2"', "key 'version' is not known here; it belongs at the top of the file, above every"),
        ("[principle.more]\nx = 1", "key 'more' is not known"),
    ],
)
def test_a_bad_line_in_a_principle(line: str, message: str) -> None:
    assert message in refusal(f"{GOOD}{line}\n")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[templates]\ncritque = 'x'", "rules.toml:13: templates: key 'critque' is not known (did you mean"),
        ("[templates]\ncritique = 'Any fault?'", "key 'critique' has no {statement} or {title}, so the model"),
        ("[templates]\ncritique = '{question}'", "placeholder {question} is not known"),
        ("[templates]\nquestion = 'Better?'", "key 'question' has no {statement} or {title}"),
        (
            "[templates]\n\ncomparison = '{dialogue} {question} {answer_a}'",
            "rules.toml:14: templates: key 'comparison'",
        ),
        ("[templates]\ncomparison = '{dialogue} {answer_a} {answer_b}'", "has no {question}"),
        ("[templates]\ncomparison = '{{dialogue}} {question} {answer_a} {answer_b}'", "has no {dialogue}"),
        ("[templates]\nanswer_prefix = ' '", "key 'answer_prefix' holds an empty text"),
        ("[templates]\nrevision = 3", "key 'revision' holds 3 (a number)"),
        ("[[templates]]\nrevision = 'x'", "rules.toml:12: key 'templates' is a list; it must be one table"),
    ],
)
def test_a_bad_template(table: str, message: str) -> None:
    assert message in refusal(f"{GOOD}\n{table}\n")


def test_a_duplicate_id_names_both_places() -> None:
    other = CALM.replace('"calm"', '"kind"')
    message = refusal(GOOD + other + CALM)
    assert message.startswith("rules.toml:19: principle 3 ('calm'): key 'id' is also that of principle 1 at line 7")
    assert "give principle 3 at line 19 another" in message


def test_places_are_right_behind_texts_that_look_like_toml() -> None:
    tricky = 'critique = """\n[[principle]]\nid = "no"\n# "\n\\""" ""\n{title}"""\n'
    tricky += "revision = '''\n[templates]\n\"'''\n"
    text = GOOD + tricky + CALM.replace("title", "tittle")
    assert parse_constitution(GOOD + tricky, "x").principles[0].revision == '[templates]\n"'
    line = text.split("\n").index('tittle = "Calm"') + 1
    assert f"rules.toml:{line}: principle 2 ('calm'): key 'tittle' is not known" in refusal(text)


def test_principles_as_inline_tables_are_read_and_reported_without_false_lines() -> None:
    row = '{id = "%s", title = "T", statement = "S.", sources = ["o"]}'
    text = f"{HEAD}principle = [\n  {row % 'a'},\n  {row % 'b'},\n]\n"
    assert [p.id for p in parse_constitution(text, "x").principles] == ["a", "b"]
    message = refusal(text.replace('"b"', '"a"'))
    assert message.startswith("rules.toml:5: principle 2 ('a'): key 'id' is also that of principle 1")


@pytest.mark.parametrize("text", [HEAD, HEAD + "principle = []\n"])
def test_no_principle(text: str) -> None:
    assert "key 'principle' is missing or empty; add [[principle]] with" in refusal(text)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (GOOD.replace('"CC0-1.0"', '"CC0-1.0'), "rules.toml:3: this is not valid TOML: "),
        (GOOD.replace('"Calm"', "Calm"), "rules.toml:8: this is not valid TOML: "),
        (GOOD + 'id = "again"\n', "rules.toml:11: this is not valid TOML: "),
        (GOOD + "x = ", "rules.toml:11: this is not valid TOML: "),
        (GOOD + "x = '''a\nb\n\n", "rules.toml:12: this is not valid TOML: "),
        (GOOD + "\0", "rules.toml:11: this is not valid TOML: "),
        (GOOD + "weight = 1" + "0" * 5000, "rules.toml: a number cannot be read: "),
        ("", "rules.toml: key 'principle' is missing"),
    ],
)
def test_broken_toml_is_named_with_its_line(text: str, start: str) -> None:
    assert refusal(text).startswith(start)


def test_deep_nesting_is_no_crash() -> None:
    assert "nested too deeply" in refusal("x = " + "[" * 100_000)


def test_a_file_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("stays calm", "stays calm, naïveté aside").encode())
    expected = "The assistant stays calm, naïveté aside."
    assert load_constitution(path).principles[0].statement == expected
    assert load_constitution(str(path)).hash == load_constitution(path).hash


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_bytes(GOOD.replace("calm.", "calmé.").encode("latin-1"))
    with pytest.raises(ValueError, match=r"rules\.toml:9: byte 0xe9 is not UTF-8 text; save the file as UTF-8"):
        load_constitution(path)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'defualt' does not exist \(did you mean 'default'\?\)\. Give"):
        load_constitution("defualt")
    with pytest.raises(FileNotFoundError, match=r"none\.toml' does not exist\. Give the path"):
        load_constitution(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        load_constitution(tmp_path)
