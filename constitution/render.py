"""Principles into prompts, and a constitution into a page that a person reads."""

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence

from bylaw.constitution.schema import STAGES, Constitution, Principle, suggestion

PRINCIPLE_PLACEHOLDERS = ("statement", "title")
COMPARISON_PLACEHOLDERS = ("statement", "title", "dialogue", "question", "answer_a", "answer_b")
RATING_PLACEHOLDERS = ("statement", "title", "dialogue", "answer")

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_COLUMNS = 100


def critique_request(constitution: Constitution, principle: Principle) -> str:
    """The turn that asks what in the last answer goes against the principle."""
    return fill(principle.critique or constitution.templates.critique, _own_values(principle))


def revision_request(constitution: Constitution, principle: Principle) -> str:
    """The turn that asks for the answer to be written anew, after the critique."""
    return fill(principle.revision or constitution.templates.revision, _own_values(principle))


def direct_request(constitution: Constitution, principle: Principle) -> str:
    """The turn that asks for the answer to be written anew, without a critique before it."""
    return fill(constitution.templates.direct, _own_values(principle))


def rating_request(
    constitution: Constitution, principle: Principle, messages: Sequence[Mapping[str, str]], answer: str
) -> str:
    """The whole request to a judge for a mark from 1 to 10; its reply begins with `templates.rating_prefix`."""
    values = _own_values(principle) | {"dialogue": plain_dialogue(messages), "answer": answer}
    return fill(constitution.templates.rating, values)


def conclusion(constitution: Constitution, thought: str = "") -> str:
    """What a judge's reply begins with, up to where the letter comes: after its thought, if it has thought first.

    A thought that goes on to its own answer is cut there. The stop string that should end it is found only as it is
    spelled, and a tokenizer may decode it with other spaces.
    """
    templates = constitution.templates
    before = _before(templates.answer_prefix, thought)
    thinking = f"{templates.thought_prefix} {before}\n" if before else ""
    return thinking + templates.answer_prefix


def _before(end: str, text: str) -> str:
    """`text` up to the first place that reads as `end`, in any case and spacing; all of it where there is none."""
    pieces = re.findall(r"\w+|[^\w\s]", end)
    return re.split(r"\s*".join(map(re.escape, pieces)), text, maxsplit=1, flags=re.IGNORECASE)[0].rstrip()


def comparison_request(
    constitution: Constitution,
    principle: Principle,
    messages: Sequence[Mapping[str, str]],
    answer_a: str,
    answer_b: str,
) -> str:
    """The whole request to a judge: the dialogue, the question, and the answers as options (A) and (B).

    The judge's reply begins with `constitution.templates.answer_prefix`; the letter comes next. Answers go in
    unchanged, so one that imitates the template's marks can still confuse a weak judge.
    """
    own = _own_values(principle)
    question = fill(principle.comparison or constitution.templates.question, own)
    dialogue = plain_dialogue(messages)
    values = own | {"dialogue": dialogue, "question": question, "answer_a": answer_a, "answer_b": answer_b}
    return fill(constitution.templates.comparison, values)


def plain_dialogue(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages (`role`, `content`) as lines that begin with their speaker: 'Human: ...', 'Assistant: ...'.

    One line break between turns, not two, so that a quoted dialogue is not taken for turns of the prompt around it.
    ValueError when there is no message or a role is unknown.
    """
    if not messages:
        raise ValueError("a dialogue needs at least one message; this one has none")
    lines = []
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _SPEAKERS:
            raise ValueError(
                f"message {number} has the role {role!r}{suggestion(role, _SPEAKERS)}. Allowed: {', '.join(_SPEAKERS)}"
            )
        lines.append(f"{_SPEAKERS[role]}: {message['content']}")
    return "\n".join(lines)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put `values` in the place of their {names}, all in one pass: braces inside a value are plain text.

    {{ and }} stand for literal braces. ValueError names a placeholder that has no value, or a brace without a partner.
    """

    def replacement(mark: re.Match[str]) -> str:
        if mark[0] in ("{{", "}}"):
            return mark[0][0]
        name = mark[1]
        if name is None:
            raise ValueError(f"a brace {mark[0]} has no partner; write {mark[0] * 2} for a literal brace")
        if name not in values:
            allowed = ", ".join(f"{{{known}}}" for known in values) or "none"
            raise ValueError(f"placeholder {{{name}}} is not known{suggestion(name, values)}. Allowed: {allowed}")
        return values[name]

    return _MARK.sub(replacement, template)


def placeholders(template: str, allowed: Collection[str]) -> set[str]:
    """The names of the placeholders in `template`. ValueError, as in `fill`, when one is not allowed."""
    fill(template, dict.fromkeys(allowed, ""))
    return {mark[1] for mark in _MARK.finditer(template) if mark[1]}


def describe(constitution: Constitution) -> str:
    """The constitution as plain text of at most 100 columns: its name, licence and hash, then each principle."""
    count = len(constitution.principles)
    parts = [
        _wrap(f"{constitution.name}, version {constitution.version}"),
        _wrap(
            f"{count} principle{'s' if count != 1 else ''}, licence {constitution.license}, hash {constitution.hash}"
        ),
    ]
    for paragraph in re.split(r"\n\s*\n", constitution.preamble):
        parts += ["", _wrap(paragraph)]
    for principle in constitution.principles:
        parts += ["", _describe_principle(principle)]
    return "\n".join(parts) + "\n"


def _describe_principle(principle: Principle) -> str:
    lines = [_wrap(f"{principle.id}: {principle.title}"), _wrap(principle.statement, "    ")]
    facts = {"Sources": "; ".join(principle.sources), "Tags": ", ".join(principle.tags)}
    if principle.weight != 1:
        facts["Weight"] = f"{principle.weight:g}"
    if set(principle.stages) != set(STAGES):
        facts["Stages"] = ", ".join(principle.stages)
    facts |= {"Own critique": principle.critique, "Own revision": principle.revision}
    facts |= {"Own comparison": principle.comparison, "Hash": principle.hash}
    lines += [_wrap(f"{name}: {text}", "    ", "      ") for name, text in facts.items() if text]
    return "\n".join(lines)


def _own_values(principle: Principle) -> dict[str, str]:
    return {"statement": principle.statement, "title": principle.title}


def _wrap(text: str, first: str = "", rest: str | None = None) -> str:
    rest = first if rest is None else rest
    return textwrap.fill(text, _COLUMNS, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
