"""What a judge is asked beside the bare question: examples, thoughts, several principles; and what is made of it."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bylaw.constitution.examples import ComparisonExample, Examples
from bylaw.constitution.schema import Constitution, Principle
from bylaw.model.engine import Engine
from bylaw.model.records import Record, read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import LabelConfig
from bylaw.rlaif.judge import Judge, judging_reserve
from bylaw.rlaif.label import NO_THOUGHT, TOO_LITTLE, label, preferences
from bylaw.rlaif.reader import FILTERED, LocalReader, Question, Reading, Thought
from bylaw.trace import Tracer
from bylaw.trace_text import describe

PAIRS = [
    {"id": f"p-{p}#{n}", "prompt_id": f"p-{p}", "prompt": [{"role": "user", "content": "w1"}],
     "a": {"text": "good w2"}, "b": {"text": "w3"}, "by": {}}
    for p in range(8) for n in range(2)
]  # fmt: skip
SHOTS = tuple(
    ComparisonExample(prompt=f"w{n}", principle=("one", "two"), a="good", b="bad", better="a", reasons="{a} good")
    for n in (7, 8, 9)
)


@dataclasses.dataclass
class Scripted:
    """Answers each question with what `answer` makes of it, and thinks "so w<number>"."""

    answer: Callable[[Question], tuple[float, float] | None]
    hash: str = "scripted"
    asked: list[Question] = dataclasses.field(default_factory=list)
    thought: list[Thought] = dataclasses.field(default_factory=list)
    calls: list[int] = dataclasses.field(default_factory=list)

    def check(self) -> None: ...

    def forget(self) -> None: ...

    def read(self, asked: Sequence[Question]) -> list[Reading]:
        self.asked += asked
        self.calls.append(len(asked))
        found = [self.answer(one) for one in asked]
        return [Reading((math.log(p[0]), math.log(p[1]))) if p else Reading(None, "server said no") for p in found]

    def think(self, asked: Sequence[Thought]) -> list[dict[str, Any]]:
        self.thought += asked
        return [{"text": f"so w{one.key[-1]}", "ids": [1], "finish": "stop"} for one in asked]


def judge_of(reader: Any, constitution: Constitution, **settings: Any) -> Judge:
    config = LabelConfig(**settings)
    return Judge(reader=reader, constitution=constitution, config=config, seed=3, examples=Examples(comparisons=SHOTS))


def a_is_first(question: Question) -> bool:
    text = question.messages[-1]["content"]
    return text.index("good w2") < text.index("w3")


def test_both_orders_take_a_planted_position_bias_out_exactly(constitution: Constitution, tmp_path: Path) -> None:
    """A judge that gives the first option 0.3 more than it thinks that it is worth."""
    for bias in (0.0, 0.3, -0.3):
        reader = Scripted(lambda q, bias=bias: (p := (0.6 if a_is_first(q) else 0.4) + bias, 1 - p))
        counts = label(judge_of(reader, constitution), PAIRS, tmp_path / f"{bias}.jsonl")
        assert [p["p_a"] for p in read_records(tmp_path / f"{bias}.jsonl")] == pytest.approx(
            [0.6] * len(PAIRS), abs=1e-12
        )
        assert counts["position_bias"] == pytest.approx(bias, abs=1e-12)
        assert reader.calls == [2 * len(PAIRS)]  # all in one call


def test_thoughts_are_averaged_in_both_orders_then_clamped_and_the_unclamped_value_kept(
    constitution: Constitution,
) -> None:
    """By hand: A has 0.9 and 0.7 after the two thoughts where a is first, 0.2 and 0.4 where b is."""
    said = {(True, "w0"): 0.9, (True, "w1"): 0.7, (False, "w0"): 0.2, (False, "w1"): 0.4}
    prefixes = {f"so w{n}": f"w{n}" for n in range(2)}

    def answer(question: Question) -> tuple[float, float]:
        thought = next(short for text, short in prefixes.items() if text in question.prefix)
        p = said[a_is_first(question), thought]
        return p, 1 - p

    for clamp, expected in ((0.4, 0.6), (0.2, 0.75), (0.0, 0.75)):
        reader = Scripted(answer)
        [preference] = preferences(judge_of(reader, constitution, thoughts=2, clamp=clamp), PAIRS[:1])
        [one] = preference["labels"]
        assert preference["unclamped"] == one["p_a"] == pytest.approx((0.8 + 1 - 0.3) / 2)
        assert preference["p_a"] == pytest.approx(expected) and "unclamped" not in one
        assert one["a_first"]["p_first"] == pytest.approx(0.8) and one["b_first"]["p_first"] == pytest.approx(0.3)
        assert math.exp(one["a_first"]["logprob_A"]) == pytest.approx(0.8)
        assert [side["p_first"] for side in one["b_first_each"]] == pytest.approx([0.2, 0.4])
        assert [t["text"] for t in one["thoughts"]["a_first"]] == ["so w0", "so w1"]
        assert one["position_bias"] == pytest.approx((0.8 + 0.3) / 2 - 0.5)
        templates = constitution.templates
        assert reader.asked[0].prefix == f"{templates.thought_prefix} so w0\nso :"
        assert len({t.key for t in reader.thought}) == 4 and reader.thought[0].stop == ("so :",)


@pytest.mark.parametrize(
    ("values", "clamped"), [((0.9, 0.3), 0.45), ((0.99, 0.61), 0.6), ((0.02, 0.5), 0.4), ((0.7, 0.4), 0.475)]
)
def test_only_the_whole_label_is_clamped(
    values: tuple[float, float], clamped: float, constitution: Constitution, tmp_path: Path
) -> None:
    """By hand: weights 1 and 3. Each principle keeps what it says, and what is clamped is their mean."""
    says = dict(zip(("rule one", "rule two"), values, strict=True))

    def answer(question: Question) -> tuple[float, float]:
        p = next(p for rule, p in says.items() if rule in question.messages[-1]["content"])
        return (p, 1 - p) if a_is_first(question) else (1 - p, p)

    judge = judge_of(Scripted(answer), constitution, principles="all", thoughts=1)
    counts = label(judge, PAIRS[:1], tmp_path / "a.jsonl")
    [preference] = read_records(tmp_path / "a.jsonl")
    mean = (values[0] + 3 * values[1]) / 4
    assert [one["p_a"] for one in preference["labels"]] == pytest.approx(values)
    assert preference["unclamped"] == pytest.approx(mean) and preference["p_a"] == pytest.approx(clamped)
    assert counts["clamped"] == (not 0.4 <= mean <= 0.6)
    written = {side: preference[side] | {"finish": "stop"} for side in "ab"} | {"labels": []}
    ledger: Any = SimpleNamespace(preferences={preference["id"]: preference}, manifests={}, part="")
    traced = Tracer(ledger)._pair(preference | written)
    text = describe({"prompt": {"id": "p", "messages": []}, "pairs": [traced]})
    assert f"p(a is better) = {clamped:.4f} ({mean:.4f} before the clamp)" in text


def test_without_thoughts_nothing_is_clamped_or_said_to_be(constitution: Constitution) -> None:
    reader = Scripted(lambda question: (0.9, 0.1) if a_is_first(question) else (0.1, 0.9))
    [preference] = preferences(judge_of(reader, constitution), PAIRS[:1])
    assert preference["p_a"] == pytest.approx(0.9) and "unclamped" not in preference


@pytest.mark.parametrize(
    ("thought", "why"),
    [
        ({"text": "", "finish": "length"}, NO_THOUGHT),
        ({"text": "", "finish": "stop"}, NO_THOUGHT),
        ({"text": "So: A", "finish": "stop"}, NO_THOUGHT),  # an answer at once
        ({"text": "", "finish": "content_filter"}, FILTERED),
        ({"text": "well, then", "finish": "content_filter"}, FILTERED),
        ({"text": "well, then", "finish": "length"}, ""),
    ],
)
def test_what_stands_on_no_thought_abstains(
    thought: dict[str, str], why: str, constitution: Constitution, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Scripted(lambda question: (0.7, 0.3))
    monkeypatch.setattr(reader, "think", lambda asked: [thought | {"ids": []} for _ in asked])
    [preference] = preferences(judge_of(reader, constitution, thoughts=1), PAIRS[:1])
    assert preference["abstained"] == why and (preference["p_a"] is None) == bool(why)


def test_a_reading_with_a_bound_says_so_and_so_does_a_mean_of_thoughts(constitution: Constitution) -> None:
    @dataclasses.dataclass
    class Bounding(Scripted):
        def read(self, asked: Sequence[Question]) -> list[Reading]:
            readings = super().read(asked)
            bounded = [a_is_first(one) and "so w1" in one.prefix for one in asked] if self.thought else [True, False]
            return [dataclasses.replace(r, bounded=b) for r, b in zip(readings, bounded, strict=True)]

    for thoughts in (0, 2):
        judge = judge_of(Bounding(lambda question: (0.7, 0.3)), constitution, thoughts=thoughts)
        [one] = preferences(judge, PAIRS[:1])[0]["labels"]
        assert one["a_first"]["bounded"] is True and "bounded" not in one["b_first"]
    assert ["bounded" in side for side in one["a_first_each"]] == [False, True]


def test_each_chunk_begins_with_nothing_kept_from_the_one_before(constitution: Constitution, tmp_path: Path) -> None:
    calls = []

    class Noting(Scripted):
        def forget(self) -> None:
            calls.append("forget")

        def read(self, asked: Sequence[Question]) -> list[Reading]:
            calls.append(f"read {len(asked)}")
            return super().read(asked)

    judge = judge_of(Noting(lambda question: (0.5, 0.5)), constitution, pairs_per_chunk=3)
    label(judge, PAIRS[:5], tmp_path / "a.jsonl")
    assert calls == ["forget", "read 6", "forget", "read 4"]


def test_a_thought_that_gives_no_letter_has_no_part_and_a_side_without_any_abstains(
    constitution: Constitution, tmp_path: Path
) -> None:
    def half_dead(question: Question) -> tuple[float, float]:
        return (0.8, 0.2) if "so w0" in question.prefix else (0.001, 0.001)

    counts = label(judge_of(Scripted(half_dead), constitution, thoughts=2), PAIRS[:1], tmp_path / "a.jsonl")
    [preference] = read_records(tmp_path / "a.jsonl")
    assert preference["labels"][0]["a_first"]["p_first"] == pytest.approx(0.8) and preference["p_a"] == 0.5
    assert (counts["thoughts"], counts["unread_thoughts"], counts["clamped"]) == (4, 2, 0)
    reader = Scripted(lambda question: (0.8, 0.2) if a_is_first(question) else (0.001, 0.001))
    [preference] = preferences(judge_of(reader, constitution, thoughts=2), PAIRS[:1])
    assert (preference["p_a"], preference["abstained"]) == (None, TOO_LITTLE)


def test_a_reader_that_gives_nothing_abstains_with_its_reason(constitution: Constitution, tmp_path: Path) -> None:
    counts = label(judge_of(Scripted(lambda question: None), constitution), PAIRS, tmp_path / "a.jsonl")
    assert counts["abstained"] == {"server said no": len(PAIRS)} and counts["labels"] == 0


def test_shots_are_the_same_for_all_of_a_prompt_and_drawn_anew_for_another(
    constitution: Constitution, tokenizer: Tokenizer
) -> None:
    reader = Scripted(lambda question: (0.5, 0.5))
    judge = judge_of(reader, constitution, shots=2, principles="all")
    found = preferences(judge, PAIRS)
    shown = [tuple(turn["content"] for turn in question.messages[:-1]) for question in reader.asked]
    assert all(len(turns) == 4 for turns in shown)
    by_prompt = [set(shown[8 * n : 8 * n + 8]) for n in range(8)]  # two pairs, two principles, two orders
    assert all(len(one) == 1 for one in by_prompt) and len(set(shown)) >= 4
    letters = {turns[n] for turns in shown for n in (1, 3)}
    assert letters == {"so : A", "so : B"}  # which answer is A is drawn
    assert all(p["by"]["examples"] == judge.examples.hash and len(p["shots"]) == 2 for p in found)
    reserve = judging_reserve(constitution, judge.config, judge.examples, tokenizer)
    longest = max(len(tokenizer.prompt_ids(q.messages, prefix=q.prefix)) for q in reader.asked)
    assert longest - len(tokenizer.encode("good w2 w3")) <= reserve <= longest


def test_what_is_the_same_for_a_prompts_questions_is_made_once(
    constitution: Constitution, tokenizer: Tokenizer, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples are rendered once for each prompt, principles drawn once for each pair, and what questions begin with is
    encoded once for all eight, or twice, where another prompt's begin so too.
    """
    made: Counter[str] = Counter()

    def counting(name: str) -> None:
        method = getattr(Judge, name)
        monkeypatch.setattr(Judge, name, lambda self, pair: (made.update([name]), method(self, pair))[1])

    counting("shown")
    counting("principles")

    class Counting:
        encode_special_tokens = False

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            made.update([text])
            return tokenizer.backend.encode(text, add_special_tokens=add_special_tokens)

    own = Tokenizer.from_parts(tokenizer.backend, eos_token="</s>")
    engine = Engine(make_model(context=256), own)
    reader = LocalReader(engine=engine, seed=3, prefix="so :", hash="x")
    judge = judge_of(reader, constitution, shots=3, principles="all", min_option_mass=0.0)
    expected = preferences(judge, PAIRS)
    made.clear()
    monkeypatch.setattr(own, "backend", Counting())
    monkeypatch.setattr(own, "_kept", {})
    monkeypatch.setattr(LocalReader, "_option_ids", lambda self: tokenizer.option_ids((" A", " B"), after="so :"))
    assert preferences(judge, PAIRS) == expected
    assert (made.pop("shown"), made.pop("principles")) == (8, 16)
    assert max(made.values()) <= 2, made.most_common(3)


def test_some_principles_are_drawn_without_replacement_and_weigh_the_same(constitution: Constitution) -> None:
    three = (*constitution.principles, Principle(id="three", title="x", statement="rule x", sources=("x",), weight=9.0))
    wide = dataclasses.replace(constitution, principles=three)
    values = {"rule one": 0.9, "rule two": 0.5, "rule x": 0.1}

    def answer(question: Question) -> tuple[float, float]:
        p = next(p for rule, p in values.items() if rule in question.messages[-1]["content"])
        return (p, 1 - p) if a_is_first(question) else (1 - p, p)

    found = preferences(judge_of(Scripted(answer), wide, principles="some", some=2), PAIRS)
    kinds = {tuple(one["principle"]["id"] for one in p["labels"]) for p in found}
    assert all(len(set(ids)) == 2 for ids in kinds) and len(kinds) > 1
    means = {"one": 0.9, "two": 0.5, "three": 0.1}
    for p in found:
        ids = [one["principle"]["id"] for one in p["labels"]]
        assert p["p_a"] == pytest.approx(sum(means[id] for id in ids) / 2)
    with pytest.raises(ValueError, match=r"label.some = 4 is not possible; allowed: at most"):
        judge_of(Scripted(answer), wide, principles="some").check()


def test_a_helpfulness_principle_judges_the_pairs_of_helpful_prompts_alone(constitution: Constitution) -> None:
    judge = judge_of(None, constitution, principles="all", helpful_principle="one")
    judge = dataclasses.replace(judge, helpful=frozenset({"p-0"}))

    def ids(pair: Record) -> list[str]:
        return [principle.id for principle in judge.principles(pair)]

    assert ids(PAIRS[0]) == ["one"] and ids(PAIRS[2]) == ["two"]
    drawn = dataclasses.replace(judge, config=dataclasses.replace(judge.config, principles="one"))
    assert {drawn.principles(pair)[0].id for pair in PAIRS[2:]} == {"two"}


def test_helpfulness_principles_that_cannot_be(constitution: Constitution) -> None:
    one, two = constitution.principles
    for stages, settings, said in (
        (("critique", "comparison"), {"helpful_principle": "onee"}, "has no principle 'onee'"),
        (("critique",), {"helpful_principle": "two"}, "label.helpful_principle = 'two' is not possible; allowed: one"),
        (("critique",), {"helpful_principle": "one"}, "'one' is not possible; allowed: with another comparison"),
        (
            ("comparison",),
            {"helpful_principle": "one", "principles": "some", "some": 2},
            r"label.some = 2 .*at most the constitution's principles for comparisons beside 'one', 1",
        ),
    ):
        split = dataclasses.replace(constitution, principles=(one, dataclasses.replace(two, stages=stages)))
        with pytest.raises(ValueError, match=said):
            judge_of(Scripted(lambda q: None), split, **settings).check()


def test_kept_readings_are_not_asked_for(constitution: Constitution) -> None:
    reader = Scripted(lambda question: (0.7, 0.3) if a_is_first(question) else (0.3, 0.7))
    judge = judge_of(reader, constitution, principles="all")
    whole = preferences(judge, PAIRS[:2])
    kept = {PAIRS[0]["id"]: {"one": whole[0]["labels"][0]}}
    reader.calls = []
    assert preferences(judge, PAIRS[:2], kept) == whole and reader.calls == [6]
