"""Examples of critiques, revisions and comparisons: data beside a constitution, for models that need to be shown.

A model that was never taught to follow instructions confuses a critique with a revision, or the two speakers; a few
examples in the same form as the requests keep it from that (arXiv 2212.08073, section 3.2). Base models want 3 to 5.
They stand before the dialogue as earlier turns, rendered by the constitution's own templates. Which ones, and in which
order, is drawn anew for each prompt, so that no example leans on all of the data.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bylaw.constitution.load import ID, Section, Table, decode, parse_toml, sections_of
from bylaw.constitution.released_texts import dialogue_of
from bylaw.constitution.render import (
    comparison_request,
    conclusion,
    critique_request,
    direct_request,
    fill,
    revision_request,
)
from bylaw.constitution.schema import Constitution, Principle, Stage, suggestion

Uniform = Callable[[str, int], float]
"""A draw in [0, 1) for an example's id and a position: a function of the prompt that the examples are drawn for."""
Turns = list[dict[str, str]]
LETTERS = ("A", "B")


@dataclass(frozen=True, kw_only=True)
class RevisionExample:
    """A prompt, an answer that a principle finds fault with (or not), the critique that says so, and the revision."""

    prompt: str
    """What a person says; or a dialogue that ends with it, as "Human: ...", "Assistant: ...", an empty line between."""
    answer: str
    principle: str
    """A principle's id, or a principle in own words."""
    critique: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class ComparisonExample:
    """A prompt, two answers, and which of them keeps a principle better."""

    prompt: str
    """As in `RevisionExample`."""
    principle: tuple[str, ...]
    """Ids of principles, or principles in own words, by each of which `better` is right; one of them is drawn."""
    a: str
    b: str
    better: str
    """`a` or `b`."""
    reasons: str
    """What a judge that thinks first says; {a} and {b} stand for the letters of the two answers."""


Example = TypeVar("Example", RevisionExample, ComparisonExample)


def example_id(example: RevisionExample | ComparisonExample) -> str:
    """16 hex digits of sha256 over the example; records name it by them."""
    return _digest(asdict(example))


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one file, in its order."""

    revisions: tuple[RevisionExample, ...] = ()
    comparisons: tuple[ComparisonExample, ...] = ()

    @cached_property
    def hash(self) -> str:
        """16 hex digits of sha256 over the examples, in order."""
        return _digest(asdict(self))


def beside(path_or_name: str | Path) -> Path:
    """The examples file that lies beside a constitution: NAME.examples.toml for NAME.toml, or for a name that comes
    with bylaw.
    """
    shipped = {file.stem: file for file in Path(__file__).parent.glob("*.toml")}
    return shipped.get(str(path_or_name), Path(path_or_name)).with_suffix(".examples.toml")


def load_examples(path: str | Path, constitution: Constitution) -> Examples:
    """Read and check the examples that go with `constitution`.

    FileNotFoundError when there is no such file; ValueError, with file, line and key, for whatever else is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file of examples; write one beside the constitution (constitution/default.examples.toml "
            "shows how), name one as `examples` in the recipe, or set shots = 0"
        )
    return parse_examples(decode(path.read_bytes(), str(path)), str(path), constitution)


def parse_examples(text: str, source: str, constitution: Constitution) -> Examples:
    """Check examples given as TOML text; `source` is the file name for messages. ValueError as above."""
    values, sections = parse_toml(text, source), sections_of(text)
    top = Table(values, source, sections[0])
    top.refuse_unknown(("revision", "comparison"))
    return Examples(
        revisions=tuple(_revision(table, constitution) for table in _tables(top, "revision", sections)),
        comparisons=tuple(_comparison(table, constitution) for table in _tables(top, "comparison", sections)),
    )


def check_shots(examples: Sequence[RevisionExample] | Sequence[ComparisonExample], shots: int, setting: str) -> None:
    """Raise ValueError for more shots than there are examples."""
    if shots > len(examples):
        raise ValueError(
            f"{setting} = {shots}, but there are {len(examples)} examples of the kind; allowed: at most as many"
        )


def pick(examples: Sequence[Example], count: int, uniform: Uniform) -> list[Example]:
    """`count` of the examples in the order drawn. One more or less in the file leaves the order of the others."""
    return sorted(examples, key=lambda example: (uniform(example_id(example), 0), example_id(example)))[:count]


def revision_turns(constitution: Constitution, example: RevisionExample, critiques: bool = True) -> Turns:
    """The example as turns: prompt and answer, the request and the critique, the request and the revision."""
    principle = _principle(constitution, example.principle)
    dialogue = [*prompt_turns(example.prompt), _assistant(example.answer)]
    if not critiques:
        return [*dialogue, _user(direct_request(constitution, principle)), _assistant(example.revision)]
    dialogue += [_user(critique_request(constitution, principle)), _assistant(example.critique)]
    return [*dialogue, _user(revision_request(constitution, principle)), _assistant(example.revision)]


def comparison_turns(
    constitution: Constitution, example: ComparisonExample, uniform: Uniform, thoughts: bool = False
) -> Turns:
    """The example as a question to the judge and its answer, after its reasons if `thoughts`. Drawn are the principle,
    and which answer is option (A): else the letters of a file's examples could teach a liking for one.
    """
    key = example_id(example)
    named = example.principle[int(uniform(key, 1) * len(example.principle))]
    order = ("a", "b") if uniform(key, 2) < 0.5 else ("b", "a")
    return comparison_turns_as(constitution, example, _principle(constitution, named), order, thoughts)


def comparison_turns_as(
    constitution: Constitution, example: ComparisonExample, principle: Principle, order: Sequence[str], thoughts: bool
) -> Turns:
    """The same by this principle, with the answers in this order."""
    letters = dict(zip(order, LETTERS, strict=True))
    answers = [getattr(example, side) for side in order]
    question = comparison_request(constitution, principle, prompt_turns(example.prompt), *answers)
    reply = conclusion(constitution, fill(example.reasons, letters) if thoughts else "")
    return [_user(question), _assistant(f"{reply} {letters[example.better]}")]


def prompt_turns(prompt: str) -> Turns:
    """The turns of an example's prompt. ValueError for one that begins "Human:" and is no dialogue up to the person."""
    return dialogue_of(prompt, "the prompt", "user") if prompt.startswith("Human:") else [_user(prompt)]


def longest_turns(
    constitution: Constitution, examples: Sequence[ComparisonExample], thoughts: bool, length: Callable[[Turns], int]
) -> list[int]:
    """Of each example, the length of the longest turns that it can be drawn as."""
    return [
        max(
            length(comparison_turns_as(constitution, one, _principle(constitution, named), order, thoughts))
            for named in one.principle
            for order in (("a", "b"), ("b", "a"))
        )
        for one in examples
    ]


def before(shots: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The dialogue with `shots` in front; behind its system message, if it has one."""
    system = int(bool(shots) and messages[0]["role"] == "system")
    return [*messages[:system], *shots, *messages[system:]]


def _tables(top: Table, key: str, sections: Sequence[Section]) -> list[Table]:
    items = top.values.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise top.error(key, f"must be tables, each under its own [[{key}]] in double brackets")
    places = [section for section in sections if section.name == key]
    if len(places) != len(items):  # written as inline tables, which have no header to point at
        places = [Section(line=top.place.key_lines.get(key, 0)) for _ in items]
    return [
        Table(item, top.source, place, f"{key} {number}: ")
        for number, (item, place) in enumerate(zip(items, places, strict=True), 1)
    ]


def _revision(table: Table, constitution: Constitution) -> RevisionExample:
    names = [field.name for field in fields(RevisionExample)]
    table.refuse_unknown(names)
    example = RevisionExample(**{name: table.text(name) for name in names})
    _check_prompt(table, example.prompt)
    _check_principle(table, example.principle, constitution, "critique")
    return example


def _comparison(table: Table, constitution: Constitution) -> ComparisonExample:
    table.refuse_unknown([field.name for field in fields(ComparisonExample)])
    texts = {name: table.text(name) for name in ("prompt", "a", "b", "better")}
    _check_prompt(table, texts["prompt"])
    if texts["better"] not in ("a", "b"):
        raise table.error("better", f'is {texts["better"]!r:.80}; allowed: "a" or "b"')
    listed = isinstance(table.values.get("principle"), list)
    principles = table.texts("principle") if listed else (table.text("principle"),)
    if not principles:
        raise table.error("principle", "is an empty list; name at least one principle")
    for named in principles:
        _check_principle(table, named, constitution, "comparison")
    return ComparisonExample(**texts, principle=principles, reasons=table.template("reasons", ("a", "b")))


def _check_prompt(table: Table, prompt: str) -> None:
    try:
        prompt_turns(prompt)
    except ValueError as error:
        raise table.error("prompt", f"begins 'Human:' as a dialogue does, but {error}") from None


def _check_principle(table: Table, named: str, constitution: Constitution, stage: Stage) -> None:
    """One of another stage is refused: its text would reach prompts that `stage_hash` leaves out."""
    ids = [principle.id for principle in constitution.principles if stage in principle.stages]
    if ID.fullmatch(named) and named not in ids:
        raise table.error(
            "principle",
            f"is {named!r}, which is no {stage} principle of the constitution {constitution.name!r}"
            f"{suggestion(named, ids)}; name one, or write a principle in a sentence of your own",
        )


def _principle(constitution: Constitution, named: str) -> Principle:
    if ID.fullmatch(named):
        return constitution.principle(named)
    return Principle(id="own", title=named, statement=named, sources=("the examples",))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
