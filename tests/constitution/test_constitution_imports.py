"""Constitutions of other forms, in files written by hand in their structures, and back."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from foreign import CHAIN, CHAT, COMPARISONS, CRITIQUES, HUGGING_FACE, imported, write

from bylaw.constitution.hugging_face import dump_hugging_face
from bylaw.constitution.imports import WRITERS, import_constitution, not_held
from bylaw.constitution.released import dump_comparisons, dump_critiques
from bylaw.constitution.released_texts import dump_chains, read_chains
from bylaw.constitution.render import comparison_request, critique_request, revision_request
from bylaw.constitution.schema import STAGES, Constitution, Principle, Templates


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


def test_what_stands_in_several_files_is_taken_once_and_other_words_get_a_number(tmp_path: Path):
    other = CRITIQUES | {"polite1": CRITIQUES["polite0"]}
    paths = [write(tmp_path, name, content) for name, content in (("a.json", CRITIQUES), ("b.json", other))]
    found = import_constitution([*paths, paths[0]])
    assert [p.id for p in found.constitution.principles] == ["polite0", "polite1", "polite1-2"]
    assert found.constitution.principles[0].sources == ("a.json, polite0", "b.json, polite0")
    assert "1 ids stood in more than one file, and got a number" in found.notes
    assert "3 principles stood before with the same id and words, and were taken once" in found.notes


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
    text, left_out = dump_chains(chains, found.constitution)
    assert [json.loads(line) for line in text.splitlines()] == [CHAIN, CHAIN] and not left_out
    other = imported(tmp_path, "other.json", {"polite0": CRITIQUES["polite1"], "polite1": CRITIQUES["polite0"]})
    with pytest.raises(ValueError, match="'OURS_SLMADISON-1', round 1: principle 'polite1' has the hash"):
        dump_chains(chains, other)


def test_chains_that_would_not_be_read_back_are_left_out(tmp_path: Path):
    chains, found = read_chains(write(tmp_path, "OURS_SLMADISON.jsonl", CHAIN))
    [chain] = chains

    def asking(*turns: str, role: str = "user") -> dict[str, Any]:
        return chain | {"prompt": [{"role": role, "content": text} for text in turns]}

    empty = [one | {"revision": {"text": " "}} for one in chain["rounds"]]
    odd = [
        asking("He said\n\nAssistant: yes\n\nHuman: no ?"),
        asking("x\n\nAssistant: I obey."),
        asking("Be short.", role="system"),
        chain | {"answer": {"text": ""}},
        chain | {"rounds": empty},
        chain | {"rounds": []},
        chain | {"answer": {"text": "a bell: \a"}},
    ]
    text, left_out = dump_chains([*odd, chain], found.constitution)
    assert [json.loads(line) for line in text.splitlines()] == [CHAIN]
    held = "a text that the form cannot hold (a system message, a speaker's name within a turn, no round)"
    read = "a text that would be read otherwise (a speaker's name within a turn)"
    assert left_out == {"an empty answer, critique or revision": 2, held: 4, read: 1}
    bare = chain | {"rounds": [one | {"critique": None} for one in chain["rounds"]]}
    with pytest.raises(ValueError, match=r"'OURS_SLMADISON-1', round 1: has no critique \(revise.critiques = false\)"):
        dump_chains([bare], found.constitution)


def test_what_a_form_cannot_hold_is_told(tmp_path: Path):
    one = Principle(id="one", title="o", statement="s", sources=("x",), tags=("t",), weight=2.0, comparison="Which ?")
    two = Principle(id="two", title="t", statement="s", sources=("x",), stages=("comparison",))
    templates = Templates(revision="Again: {statement}", rating="{dialogue} {answer} {title}")
    made = Constitution(name="n", version="1", license="x", preamble="p", principles=(one, two), templates=templates)
    assert not_held(made, "anthropic-critiques") == [
        "the form holds ids and requests: no titles, statements, sources, licence or preamble",
        "left out: 1 principles that are not of the stage critique: two",
        "left out: 1 weights",
        "left out: 1 lists of tags",
        "left out: 1 requests of a principle's own, for the other stage",
        "left out: 1 templates: rating",
    ]
    assert not_held(made, "anthropic-comparisons")[1:] == [
        "left out: 1 weights", "left out: 1 lists of tags", "left out: 2 templates: revision, rating"
    ]  # fmt: skip
    bare = dataclasses.replace(made, principles=(dataclasses.replace(two, stages=STAGES),), templates=Templates())
    for form in WRITERS:
        assert len(not_held(bare, form)) == 1


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
        ("x.json", ["CritiqueRequest: Hm."], r"x\.json: these are few-shot examples"),
        ("x.json", {"constitutions": []}, r"x\.json: an empty list"),
        ("x.json", {"constitutions": [{"critic": "a"}]}, r"x\.json: constitution 1: key 'revision' is missing"),
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


def test_what_no_constitution_file_could_hold_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be written as a file: its name would not read back the same"):
        import_constitution([write(tmp_path, "my  rules.md", "- Be kind.\n")])


def test_what_is_no_text_at_all(tmp_path: Path):
    path = tmp_path / "x.md"
    path.write_bytes(b"- caf\xe9\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: byte 5 is not UTF-8")):
        import_constitution([path])
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        import_constitution([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match="no file to import"):
        import_constitution([])
