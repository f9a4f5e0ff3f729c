"""Prompts from principles, hostile text in them, and the page for people."""

import dataclasses
import subprocess
import sys

import pytest

from bylaw.constitution import (
    Constitution,
    Principle,
    Templates,
    comparison_request,
    critique_request,
    describe,
    load_constitution,
    plain_dialogue,
    revision_request,
)
from bylaw.constitution.render import conclusion, fill, placeholders

CALM = Principle(id="calm", title="Calm", statement="The assistant stays calm.", sources=("our own",))
RULES = Constitution(name="Rules", version="1", license="CC0-1.0", preamble="Read me.", principles=(CALM,))
ASK = [{"role": "user", "content": "how do i mend a fence"}]


def with_templates(**changes: str) -> Constitution:
    return dataclasses.replace(RULES, templates=Templates(**changes))


def test_requests_are_rendered_from_the_statement() -> None:
    for request in (critique_request(RULES, CALM), revision_request(RULES, CALM)):
        assert request.count("The assistant stays calm.") == 1
        assert "{" not in request
    assert critique_request(RULES, CALM) != revision_request(RULES, CALM)


def test_templates_by_hand() -> None:
    c = with_templates(critique="<{title}> {statement} {{kept}}", revision="again: {statement}", question="{title}?")
    assert critique_request(c, CALM) == "<Calm> The assistant stays calm. {kept}"
    assert revision_request(c, CALM) == "again: The assistant stays calm."
    assert "\nCalm?\n" in comparison_request(c, CALM, ASK, "x", "y")


def test_comparison_by_hand() -> None:
    c = with_templates(
        question="Better by {statement}?", comparison="{dialogue}|{question}|(A) {answer_a}|(B) {answer_b}|{title}"
    )
    talk = [{"role": "system", "content": "Be short."}, *ASK]
    assert comparison_request(c, CALM, talk, "with nails", "with glue") == (
        "System: Be short.\nHuman: how do i mend a fence|Better by The assistant stays calm.?"
        "|(A) with nails|(B) with glue|Calm"
    )


def test_own_wording_takes_the_place_of_the_templates() -> None:
    own = dataclasses.replace(
        CALM, critique="Shouting? {title}", revision="Whisper it.", comparison="Which is quieter, by {statement}"
    )
    assert critique_request(RULES, own) == "Shouting? Calm"
    assert revision_request(RULES, own) == "Whisper it."
    judge, usual = comparison_request(RULES, own, ASK, "x", "y"), comparison_request(RULES, CALM, ASK, "x", "y")
    question = "Which of the two answers keeps this principle better? The assistant stays calm."
    assert judge == usual.replace(question, "Which is quieter, by The assistant stays calm.")
    assert judge != usual


def test_default_comparison_marks_the_parts_and_treats_both_answers_alike() -> None:
    judge = comparison_request(RULES, CALM, ASK, "with nails\nand care", "with glue")
    order = [
        "<conversation>\nHuman: how do i mend a fence\n</conversation>",
        "The assistant stays calm.",
        "(A) <answer>\nwith nails\nand care\n</answer>",
        "(B) <answer>\nwith glue\n</answer>",
        "one letter",
    ]
    places = [judge.index(part) for part in order]
    assert places == sorted(places)
    swapped = comparison_request(RULES, CALM, ASK, "with glue", "with nails\nand care")
    assert swapped == judge.replace("with nails\nand care", "#").replace("with glue", "with nails\nand care").replace(
        "#", "with glue"
    )


HOSTILE = ["{statement}", "{{", "}}", "{", "}", "{question}{answer_b}", "{0} {} {nonsense}", "\\g<0> \\1 %s $x", ""]


@pytest.mark.parametrize("text", HOSTILE)
def test_braces_in_what_a_model_or_a_person_wrote_stay_as_they_are(text: str) -> None:
    c = with_templates(comparison="{dialogue}|{question}|{answer_a}|{answer_b}")
    talk = [{"role": "user", "content": f"say {text}"}]
    principle = dataclasses.replace(CALM, statement=f"Keep {text} calm.", title=text)
    assert comparison_request(c, principle, talk, text, f"{text}!") == (
        f"Human: say {text}|Which of the two answers keeps this principle better? Keep {text} calm.|{text}|{text}!"
    )
    assert f"Keep {text} calm." in critique_request(c, principle)
    assert f"Keep {text} calm." in revision_request(c, principle)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{statment}", r"\{statment\} is not known \(did you mean 'statement'\?\)\. Allowed: \{statement\}, \{title\}"),
        ("{answer_a}", r"placeholder \{answer_a\} is not known"),
        ("{}", r"placeholder \{\} is not known"),
        ("{statement!r}", "is not known"),
        ("{statement.__class__}", "is not known"),
        ("{ statement }", "is not known"),
        ("{statement", r"a brace \{ has no partner; write \{\{"),
        ("statement}", r"a brace \} has no partner; write \}\}"),
        ("{{statement}", "no partner"),
    ],
)
def test_fill_is_strict(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(template, {"statement": "s", "title": "t"})
    with pytest.raises(ValueError, match=message):
        placeholders(template, ("statement", "title"))


def test_fill_literal_braces_and_repeats() -> None:
    assert fill("{{{title}}} {title} {{title}} {{}}", {"title": "t"}) == "{t} t {title} {}"
    assert placeholders("{{{title}}} {title} {{statement}}", ("statement", "title")) == {"title"}


def test_plain_dialogue() -> None:
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi\n\nthere"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert plain_dialogue(talk) == "System: Be kind.\nHuman: hi\n\nthere\nAssistant: hello\nHuman: bye"


def test_plain_dialogue_refuses_what_is_none() -> None:
    with pytest.raises(ValueError, match="at least one message"):
        plain_dialogue([])
    with pytest.raises(ValueError, match=r"message 2 has the role 'asistant' \(did you mean 'assistant'\?\)"):
        plain_dialogue([*ASK, {"role": "asistant", "content": "x"}])


def test_describe_shows_everything_within_100_columns() -> None:
    heavy = Principle(
        id="heavy",
        title="Heavy",
        statement="The assistant " + "weighs every word " * 12 + "well.",
        sources=("Scales, volume 1", "x" * 250),
        tags=("weight", "words"),
        weight=2.5,
        stages=("comparison",),
        critique="Too light?",
        revision="Heavier.",
        comparison="Which is heavier?",
    )
    c = dataclasses.replace(RULES, principles=(CALM, heavy), preamble="One\nparagraph.\n\nAnother.")
    page = describe(c)
    assert max(map(len, page.splitlines())) <= 100
    flat = " ".join(page.split())
    for part in (
        "Rules, version 1",
        f"2 principles, licence CC0-1.0, hash {c.hash}",
        "One paragraph. Another.",
        f"calm: Calm The assistant stays calm. Sources: our own Hash: {CALM.hash} heavy: Heavy The assistant weighs",
        "Sources: Scales, volume 1; xxx",
        "Tags: weight, words Weight: 2.5 Stages: comparison Own critique: Too light? Own revision: Heavier.",
        f"Own comparison: Which is heavier? Hash: {heavy.hash}",
    ):
        assert part in flat


def test_describe_leaves_usual_weight_and_stages_out() -> None:
    page = describe(RULES)
    assert "1 principle," in page
    assert not any(word in page for word in ("Weight", "Stages", "Tags", "Own"))


@pytest.mark.parametrize("name", ["default", "village"])
def test_describe_fits_the_shipped_ones(name: str) -> None:
    c = load_constitution(name)
    page = describe(c)
    assert max(map(len, page.splitlines())) <= 100
    flat = " ".join(page.split())
    for principle in c.principles:
        assert principle.statement in flat
        assert principle.hash in flat


def test_the_room_knows_no_other_room_and_no_torch() -> None:
    script = "import sys, bylaw.constitution; print([m for m in sys.modules if m.split('.')[0] in ('bylaw', 'torch')])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rooms = {module for module in eval(result.stdout) if not module.startswith("bylaw.constitution")}
    assert rooms == {"bylaw"}


@pytest.mark.parametrize(
    ("thought", "kept"),
    [
        ("A helps.", "A helps."),
        ("A helps. the answer is : b.", "A helps."),  # as a word-level tokenizer decodes it
        ("A helps.\nTHE ANSWER  IS: (A). The answer is: B", "A helps."),
        ("Is the answer isolated? No.", "Is the answer isolated? No."),
    ],
)
def test_a_thought_is_cut_where_it_begins_to_answer(thought: str, kept: str) -> None:
    village = load_constitution("village")
    assert conclusion(village, thought) == f"let me think. {kept}\nthe answer is:"
    assert conclusion(village, "The answer is: a.") == conclusion(village) == "the answer is:"
