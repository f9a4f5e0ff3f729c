"""What a judge is asked of a pair: which principles, which examples before them, in which words, and what it may think.

All of it is a function of the seed and of the ids of pair and prompt, so that any part can be asked again.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from bylaw.constitution.examples import (
    ComparisonExample,
    Examples,
    check_shots,
    comparison_turns,
    example_id,
    longest_turns,
    pick,
)
from bylaw.constitution.render import comparison_request, conclusion
from bylaw.constitution.schema import Constitution, Principle, draw
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.records import Record
from bylaw.model.sampler import Turn, turn
from bylaw.model.settings import require
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import LabelConfig
from bylaw.rlaif.reader import Question, Reader, Thought

ORDERS = {"a_first": ("a", "b"), "b_first": ("b", "a")}
"""Which answer is option (A), and which (B)."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A reader with principles to read by, and the examples that its shots are drawn from.

    `helpful` are the ids of the harmless prompts, whose pairs `helpful_principle` judges alone, if it is set.
    """

    reader: Reader
    constitution: Constitution
    config: LabelConfig
    seed: int
    examples: Examples = field(default_factory=Examples)
    helpful: Collection[str] = frozenset()

    def check(self) -> None:
        """Raise ValueError, before any work, for settings that constitution, examples or reader cannot serve."""
        check_judging(self.constitution, self.config, self.examples)
        self.reader.check()

    def principles(self, pair: Record) -> tuple[Principle, ...]:
        """The principles to judge `pair` by: all, or one or some drawn by weight from the seed and the pair's id.

        `helpful_principle`, if it is set, judges the pairs of harmless prompts alone, and no other pairs.
        """
        config = self.config
        if config.helpful_principle and pair["prompt_id"] in self.helpful:
            return (self.constitution.principle(config.helpful_principle),)
        known = _ordinary(self.constitution, config)
        if config.principles == "all":
            return known
        us = [uniform_scalar(self.seed, request_id("label", pair["id"], one.id), 0) for one in known]
        return draw(known, us, config.some if config.principles == "some" else 1)

    def named(self, principle: Principle) -> dict[str, Any]:
        """A principle, and its weight in the pair's label. Where some were drawn, their weights were in the draw."""
        weight = 1.0 if self.config.principles == "some" else principle.weight
        return {"principle": {"id": principle.id, "hash": principle.hash}, "weight": weight}

    def shots(self, pair: Record) -> list[ComparisonExample]:
        """The examples of a prompt's pairs, in order: a function of the seed and the prompt's id."""
        return pick(self.examples.comparisons, self.config.shots, lambda *key: self._uniform(pair, *key))

    def shown(self, pair: Record) -> list[Turn]:
        """The same as turns. Both orders, all principles and all pairs of a prompt begin with them."""
        return [
            shown
            for one in self.shots(pair)
            for shown in comparison_turns(
                self.constitution, one, lambda *key: self._uniform(pair, *key), self.config.thoughts > 0
            )
        ]

    def dialogue(
        self, principle: Principle, pair: Record, order: str, shown: Sequence[Turn] | None = None
    ) -> list[Turn]:
        """The question, with the answers as options in the order `a_first` or `b_first`, after the examples: `shown`,
        where they are rendered already.
        """
        texts = (pair[side]["text"] for side in ORDERS[order])
        return [
            *(self.shown(pair) if shown is None else shown),
            turn("user", comparison_request(self.constitution, principle, pair["prompt"], *texts)),
        ]

    def question(self, dialogue: list[Turn], thought: str = "") -> Question:
        """Up to where the letter comes, after a thought if there was one."""
        return Question(dialogue, conclusion(self.constitution, thought))

    def thought(self, dialogue: list[Turn], key: Sequence[str | int]) -> Thought:
        """What the judge says before it answers, up to where it would begin to answer."""
        config, templates = self.config, self.constitution.templates
        return Thought(
            dialogue,
            templates.thought_prefix,
            ("thought", *key),
            config.max_thought_tokens,
            config.thought_temperature,
            (templates.answer_prefix,),
        )

    def drawn(self, pair: Record) -> dict[str, Any]:
        """What a preference of `pair` says of its shots; nothing without."""
        return {"shots": [example_id(one) for one in self.shots(pair)]} if self.config.shots else {}

    def provenance(self) -> dict[str, Any]:
        """What a record needs for its label to be asked for again."""
        by = {"seed": self.seed, "model": self.reader.hash, "constitution": self.constitution.hash}
        return by | ({"examples": self.examples.hash} if self.config.shots else {})

    def _uniform(self, pair: Record, example: str, position: int) -> float:
        return uniform_scalar(self.seed, request_id("label shots", pair["prompt_id"], example), position)


def _ordinary(constitution: Constitution, config: LabelConfig) -> tuple[Principle, ...]:
    """The comparison principles but the one that judges the pairs of harmless prompts, if there is one."""
    return tuple(one for one in constitution.for_stage("comparison") if one.id != config.helpful_principle)


def check_judging(constitution: Constitution, config: LabelConfig, examples: Examples) -> None:
    """Raise ValueError for settings that constitution or examples cannot serve."""
    if config.helpful_principle:
        constitution.principle(config.helpful_principle)
        ids = [principle.id for principle in constitution.for_stage("comparison")]
        require(config.helpful_principle in ids, "label.helpful_principle", config.helpful_principle, ", ".join(ids))
        allowed = "with another comparison principle beside it, which judges the other pairs"
        require(len(ids) > 1, "label.helpful_principle", config.helpful_principle, allowed)
    known = _ordinary(constitution, config)
    if config.principles == "some":
        beside = f" beside {config.helpful_principle!r}" if config.helpful_principle else ""
        allowed = f"at most the constitution's principles for comparisons{beside}, {len(known)}"
        require(config.some <= len(known), "label.some", config.some, allowed)
    check_shots(examples.comparisons, config.shots, "label.shots")


def judging_reserve(constitution: Constitution, config: LabelConfig, examples: Examples, tokenizer: Tokenizer) -> int:
    """Tokens, at most, of a question about next to nothing: examples, frame, and thought. What a judge's context must
    have room for beside dialogue and answers.
    """

    def length(shown: list[Turn], prefix: str = "") -> int:
        return len(tokenizer.prompt_ids([*shown, turn("user", "x")], prefix=prefix))

    alone, thoughts = length([]), config.thoughts > 0
    asked = [
        comparison_request(constitution, p, [turn("user", "x")], "", "") for p in constitution.for_stage("comparison")
    ]
    prefix = conclusion(constitution, "x" if thoughts else "")
    frame = max(len(tokenizer.prompt_ids([turn("user", one)], prefix=prefix)) for one in asked)
    shots = sorted(longest_turns(constitution, examples.comparisons, thoughts, lambda shown: length(shown) - alone))
    return frame + sum(shots[len(shots) - config.shots :]) + thoughts * config.max_thought_tokens
