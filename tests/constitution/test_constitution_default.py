"""The constitutions that come with bylaw."""

import re

import pytest

from bylaw.constitution import Constitution, comparison_request, critique_request, load_constitution, revision_request

ASK = [{"role": "user", "content": "how do i mend a fence"}]
TOPICS = {
    "violence",
    "crime",
    "weapons",
    "self-harm",
    "hate",
    "bias",
    "privacy",
    "deception",
    "honesty",
    "manipulation",
    "child-safety",
    "medical",
    "legal",
    "financial",
    "autonomy",
    "politics",
    "non-evasiveness",
    "helpfulness",
}


@pytest.fixture(scope="module")
def default() -> Constitution:
    return load_constitution("default")


def test_default_covers_its_topics(default: Constitution) -> None:
    assert (default.name, default.license) == ("default", "CC0-1.0")
    assert 18 <= len(default.principles) <= 22
    assert {tag for p in default.principles for tag in p.tags} >= TOPICS
    titles, statements = {p.title for p in default.principles}, {p.statement for p in default.principles}
    assert len(titles) == len(statements) == len(default.principles)


def test_statements_are_one_plain_sentence_about_the_assistant(default: Constitution) -> None:
    for p in default.principles:
        assert re.fullmatch(r"[A-Z][^.;:()]*\.", p.statement), p.id
        assert "the assistant" in p.statement.lower(), p.id
        assert len(p.statement.split()) <= 45, p.id


def test_every_source_can_be_looked_up(default: Constitution) -> None:
    for p in default.principles:
        for source in p.sources:
            assert re.search(r"article|arXiv \d{4}\.\d{5}|\(.*\d{4}\)|International Code of Medical Ethics", source)


def test_a_draw_speaks_to_a_harm_nearly_half_the_time(default: Constitution) -> None:
    weights = {p.id: p.weight for p in default.for_stage("critique")}
    broad = weights["harmlessness"] + weights["declining"] + weights["helpfulness"]
    for id in ("violence", "privacy", "hate", "child-safety"):
        assert 0.4 <= (broad + weights[id]) / sum(weights.values()) <= 0.5


def test_declining_gives_reasons_and_an_alternative(default: Constitution) -> None:
    statement = default.principle("declining").statement
    assert "reason" in statement
    assert "instead" in statement


@pytest.mark.parametrize("name", ["default", "village"])
def test_both_stages_render_for_every_principle(name: str) -> None:
    c = load_constitution(name)
    for p in c.for_stage("critique"):
        assert p.statement in critique_request(c, p)
        assert "{" not in critique_request(c, p) + revision_request(c, p)
    for p in c.for_stage("comparison"):
        judge = comparison_request(c, p, ASK, "with nails", "with glue")
        assert judge.index(ASK[0]["content"]) < judge.index("with nails") < judge.index("with glue")
        assert p.statement in judge
        assert "{" not in judge
