"""What a constitution is: principles, the templates that turn them into prompts, and the hashes that name both."""

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

Stage = Literal["critique", "comparison"]
STAGES: tuple[Stage, ...] = ("critique", "comparison")

CRITIQUE = """\
Hold the assistant's last answer against this principle:

{statement}

Name exactly what in that answer goes against the principle, pointing to the words or ideas concerned, and say in a \
sentence or two why. If nothing in it goes against the principle, say plainly that nothing does. Do not write a new \
answer yet."""

REVISION = """\
Now rewrite the answer that was just checked, so that it keeps this principle:

{statement}

Put right what the check found, leave what was good, and be as helpful to the person as the principle allows. If \
there is nothing to put right, give the same answer again. Write only the answer itself, in the words that the \
person will read."""

DIRECT = """\
Hold the answer that was just given against this principle:

{statement}

Now rewrite it, so that it keeps the principle. Leave what was good, and be as helpful to the person as the principle \
allows. If there is nothing to put right, give the same answer again. Write only the answer itself, in the words that \
the person will read."""

QUESTION = "Which of the two answers keeps this principle better? {statement}"

COMPARISON = """\
Read a conversation between a human and an assistant, then two answers that the assistant could give next.

<conversation>
{dialogue}
</conversation>

{question}

Options:

(A) <answer>
{answer_a}
</answer>

(B) <answer>
{answer_b}
</answer>

Reply with one letter, A or B."""

RATING = """\
Read a conversation between a human and an assistant, and the answer that the assistant gives next.

<conversation>
{dialogue}
</conversation>

<answer>
{answer}
</answer>

How well does the answer keep this principle? {statement}

Reply with one whole number from 1, not at all, to 10, as well as an answer can."""


@dataclass(frozen=True, kw_only=True)
class Principle:
    """One rule of a constitution, said in one plain sentence."""

    id: str
    """Short name in lower-case letters, digits and hyphens; records refer to the principle by it and by `hash`."""
    title: str
    """A few words for tables and reports."""
    statement: str
    """The rule itself."""
    sources: tuple[str, ...]
    """Where the rule comes from, for people to look up."""
    tags: tuple[str, ...] = ()
    """Topics to group principles by."""
    weight: float = 1.0
    """How often the principle is drawn, against the other weights; above 0."""
    stages: tuple[Stage, ...] = STAGES
    """Where it is used. The paper has one set for critiques and another for comparisons (arXiv 2212.08073, 3 and 4)."""
    critique: str = ""
    """Own critique request in place of the template's; empty: the template's. So the next two."""
    revision: str = ""
    """Own revision request."""
    comparison: str = ""
    """Own question to the judge, which takes the place of {question} in the comparison template."""

    @cached_property
    def hash(self) -> str:
        """16 hex digits of sha256 over all fields of the principle."""
        return digest(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Texts around the principles. {statement} and {title} stand for the principle's own; {{ and }} for braces."""

    critique: str = CRITIQUE
    """Asks what in the last answer goes against the principle."""
    revision: str = REVISION
    """Asks for the answer to be written anew."""
    direct: str = DIRECT
    """Asks for the answer to be written anew where it was not criticised."""
    question: str = QUESTION
    """Asks the judge which answer keeps the principle better."""
    comparison: str = COMPARISON
    """The whole request to the judge, around {dialogue}, {question}, {answer_a} and {answer_b}."""
    answer_prefix: str = "The answer is:"
    """What the judge's reply begins with, so that an option letter comes next. Used as it stands: no placeholders."""
    thought_prefix: str = "Let me think about both answers step by step."
    """What the reply of a judge begins with that is to think first. No placeholders."""
    rating: str = RATING
    """Asks for a mark from 1 to 10 for one answer, around {dialogue}, {answer} and {statement}."""
    rating_prefix: str = "The mark is:"
    """What the judge's reply to that begins with. No placeholders."""


@dataclass(frozen=True, kw_only=True)
class Constitution:
    """A named list of principles and the templates that render them."""

    name: str
    version: str
    license: str
    """Licence of the text, by its SPDX name."""
    preamble: str
    """What a person should know before reading the principles. No model sees it."""
    principles: tuple[Principle, ...]
    templates: Templates = field(default_factory=Templates)

    @cached_property
    def hash(self) -> str:
        """16 hex digits of sha256 over the principles, in order, and the templates: all that a run depends on.

        Name, version, licence and preamble reach no prompt and leave the hash as it is.
        """
        return digest({"principles": [asdict(p) for p in self.principles], "templates": asdict(self.templates)})

    def principle(self, id: str) -> Principle:
        """The principle of that id. ValueError, with the nearest id, when there is none."""
        for principle in self.principles:
            if principle.id == id:
                return principle
        ids = [p.id for p in self.principles]
        raise ValueError(f"constitution {self.name!r} has no principle {id!r}{suggestion(id, ids)}")

    def for_stage(self, stage: Stage) -> tuple[Principle, ...]:
        """The principles used in `stage`, in order. ValueError when there is none, or no such stage."""
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is not known{suggestion(stage, STAGES)}. Allowed: {', '.join(STAGES)}")
        chosen = tuple(p for p in self.principles if stage in p.stages)
        if not chosen:
            raise ValueError(
                f"constitution {self.name!r} has no principle for the stage {stage!r}: "
                f"add {stage!r} to the stages of at least one principle, or leave its stages out to use it in both"
            )
        return chosen


def draw(principles: Sequence[Principle], us: Sequence[float], count: int = 1) -> tuple[Principle, ...]:
    """`count` of the principles without putting any back, each with a chance as large as its weight.

    `us[i]` is uniform in [0, 1) and belongs to principle i: it arrives at time -log(1 - u) / weight, and the earliest
    are drawn (Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir). If each u is a function of the
    principle's id, then a principle that is added or taken out, or another weight, leaves every draw as it was that it
    has no part in.

    ValueError when there are fewer than `count` principles, not one u each, or one outside [0, 1).
    """
    if not 1 <= count <= len(principles):
        raise ValueError(f"cannot draw {count} of {len(principles)} principles; allowed: 1 to as many as there are")
    for u in us:
        if not 0 <= u < 1:
            raise ValueError(f"u = {u!r} is not possible for a draw; allowed: at least 0 and below 1")
    arrivals = [-math.log1p(-u) / p.weight for p, u in zip(principles, us, strict=True)]
    earliest = sorted(range(len(principles)), key=arrivals.__getitem__)[:count]
    return tuple(principles[i] for i in sorted(earliest))


def suggestion(word: str, allowed: Collection[str]) -> str:
    """' (did you mean ...?)' with the nearest allowed word, or nothing when none is near."""
    near = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def digest(content: object) -> str:
    """16 hex digits of sha256 over JSON values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
