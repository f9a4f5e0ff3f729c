"""AI labels: a judge whose taste is known, in both orders; by hand; and what is done with what cannot be read."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from bylaw.constitution.schema import Constitution, Principle
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.engine import Engine, Query
from bylaw.model.packing import pack
from bylaw.model.records import Record, read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import LabelConfig
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.label import label
from bylaw.rlaif.reader import LocalReader

SEED = 11
TOO_LITTLE = "too little probability on the option letters"
TOO_LONG = "question longer than the judge's context"


def pair(id: str, a: str, b: str, prompt: str = "w1") -> Record:
    talk = [{"role": "user", "content": prompt}]
    return {"id": id, "prompt_id": id, "prompt": talk, "a": {"text": a}, "b": {"text": b}, "by": {"seed": 1}}


PAIRS = [pair("worse", "w2 bad", "w3 good"), pair("better", "good w4", "w5"), pair("same", "w6 good", "w6 good")]


@pytest.fixture
def judge_with(constitution: Constitution) -> Callable[..., Judge]:
    def make(engine: Engine, **settings: Any) -> Judge:
        config = LabelConfig(**{"pairs_per_chunk": 2, **settings})
        reader = LocalReader(engine=engine, seed=SEED, prefix=constitution.templates.answer_prefix, hash="abc")
        return Judge(reader=reader, constitution=constitution, config=config, seed=SEED)

    return make


def labelled(judge: Judge, pairs: Sequence[Record], folder: Path) -> tuple[list[Record], dict[str, Any]]:
    counts = label(judge, pairs, folder / "preferences.jsonl")
    return read_records(folder / "preferences.jsonl"), counts


def prompt_ids(judge: Judge, tokenizer: Tokenizer, principle: Principle, one: Record, order: str) -> list[int]:
    question = judge.question(judge.dialogue(principle, one, order))
    return tokenizer.prompt_ids(question.messages, prefix=question.prefix)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class FixedJudge(Engine):
    """Answers with the probabilities of A and B that it was given, query by query."""

    def __init__(self, model: Any, tokenizer: Tokenizer | None, letters: list[tuple[float, float]]) -> None:
        super().__init__(model, tokenizer)
        self.letters = letters

    def score(self, queries: Sequence[Query]) -> list[list[float]]:
        said, self.letters = self.letters[: len(queries)], self.letters[len(queries) :]
        return [[math.log(p) for p in two] for two in said]


def test_a_label_by_hand(judge_with: Callable[..., Judge], known_judge: Engine, tmp_path: Path) -> None:
    fixed = FixedJudge(known_judge.model, known_judge.tokenizer, [(0.4, 0.1), (0.3, 0.2)])
    [preference], counts = labelled(judge_with(fixed), PAIRS[:1], tmp_path)
    [one] = preference["labels"]
    assert one["a_first"]["p_first"] == pytest.approx(0.8) and one["b_first"]["p_first"] == pytest.approx(0.6)
    assert one["a_first"]["logprob_A"] == math.log(0.4) and one["b_first"]["logprob_B"] == math.log(0.2)
    assert preference["p_a"] == one["p_a"] == pytest.approx((0.8 + 1 - 0.6) / 2)
    assert one["position_bias"] == pytest.approx((0.8 + 0.6) / 2 - 0.5)
    assert one["a_first"]["mass"] == one["b_first"]["mass"] == pytest.approx(0.5)
    assert preference["abstained"] == one["abstained"] == ""
    assert counts.pop("abstained") == {}
    assert counts == pytest.approx({"labels": 1, "same_text": 0, "option_mass": 0.5, "position_bias": 0.2})
    assert {key: preference[key] for key in ("id", "prompt_id", "prompt", "a", "b")} == {
        key: PAIRS[0][key] for key in ("id", "prompt_id", "prompt", "a", "b")
    }


def test_letters_far_too_unlikely_for_exp_are_still_compared(
    judge_with: Callable[..., Judge], known_judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(known_judge, "score", lambda queries: [[-900.0, -901.0], [-2000.0, -1000.0]])
    [preference], _ = labelled(judge_with(known_judge, min_option_mass=0.0), PAIRS[:1], tmp_path)
    assert preference["p_a"] == pytest.approx((sigmoid(1) + 1) / 2)


def test_both_orders_recover_the_truth_from_a_judge_that_mostly_says_a(
    judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path
) -> None:
    known_judge.bias = 3.0  # with one good word more, B still loses: 3 against 1
    preferences, counts = labelled(judge_with(known_judge), PAIRS, tmp_path)
    assert all(
        one[order]["p_first"] > 0.85 for p in preferences for one in p["labels"] for order in ("a_first", "b_first")
    )
    truth = [(sigmoid(3 - 1) + 1 - sigmoid(3 + 1)) / 2, (sigmoid(3 + 1) + 1 - sigmoid(3 - 1)) / 2, 0.5]
    assert [p["p_a"] for p in preferences] == pytest.approx(truth)
    assert preferences[0]["p_a"] < 0.5 < preferences[1]["p_a"]
    bias = (sigmoid(3 + 1) + sigmoid(3 - 1)) / 2 - 0.5
    assert counts["position_bias"] == pytest.approx((2 * bias + sigmoid(3) - 0.5) / 3)
    known_judge.bias = -3.0
    _, counts = labelled(judge_with(known_judge), PAIRS, tmp_path / "b")
    assert counts["position_bias"] < -0.4


def test_the_judge_is_asked_in_both_orders_with_the_principle_and_before_the_letter(
    judge_with: Callable[..., Judge], known_judge: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    judge = judge_with(known_judge)
    [preference], _ = labelled(judge, PAIRS[:1], tmp_path)
    [one] = preference["labels"]
    question = f"Human : Human : w1 which rule {one['principle']['id']}"
    letters = [tokenizer.encode("A"), tokenizer.encode("B")]
    assert [(tokenizer.decode(list(prompt)), candidates) for prompt, candidates in known_judge.asked] == [
        (f"{question} A w2 bad B w3 good Assistant : so :", letters),
        (f"{question} A w3 good B w2 bad Assistant : so :", letters),
    ]
    principle = judge.constitution.principle(one["principle"]["id"])
    assert one["principle"] == {"id": principle.id, "hash": principle.hash} and one["weight"] == principle.weight
    by = {"seed": SEED, "model": "abc", "constitution": judge.constitution.hash, "pairs_by": {"seed": 1}}
    assert preference["by"] == by


def test_the_real_engine_gives_the_probabilities_of_the_letters(
    judge_with: Callable[..., Judge], make_model: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = Engine(make_model(spread=0.1), tokenizer)  # near to uniform, so that the letters have a share
    judge = judge_with(engine)
    [preference], _ = labelled(judge, PAIRS[:1], tmp_path)
    [one] = preference["labels"]
    principle = judge.constitution.principle(one["principle"]["id"])
    sides = []
    for order in ("a_first", "b_first"):
        with torch.no_grad():
            hidden = engine.model(pack([prompt_ids(judge, tokenizer, principle, PAIRS[0], order)]))
            probabilities = torch.softmax(engine.model.logits(hidden[-1]).double(), dim=-1)
        p_a, p_b = (float(probabilities[tokenizer.encode(letter)[0]]) for letter in "AB")
        sides.append(p_a / (p_a + p_b))
    assert preference["p_a"] == pytest.approx((sides[0] + 1 - sides[1]) / 2, abs=1e-6)
    assert preference["p_a"] != pytest.approx(0.5, abs=1e-6)


# What other pipelines did with a verdict: each of these would have gone wrong there.


def test_the_verdict_is_used(judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path) -> None:
    """open-instruct, synthetic_preference_dataset.py: an impossible guard, and the first answer always won."""
    known_judge.taste = 2.0
    preferences, _ = labelled(judge_with(known_judge), PAIRS, tmp_path)
    known_judge.taste = -2.0
    mirrored, _ = labelled(judge_with(known_judge), PAIRS, tmp_path / "b")
    assert [p["p_a"] for p in preferences] == pytest.approx([sigmoid(-2), sigmoid(2), 0.5])
    assert [p["p_a"] for p in mirrored] == pytest.approx([sigmoid(2), sigmoid(-2), 0.5])


def test_a_tie_is_a_half_and_counted_and_no_pair_is_made_up(
    judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path
) -> None:
    """NeMo-Aligner, generate_rl_cai_dataset.py: two equal answers became a random pair with a sure label."""
    known_judge.bias = 2.0
    ties = [pair("same", "w1 good", "w1 good"), pair("equal", "good w2", "w3 good")]
    preferences, counts = labelled(judge_with(known_judge), ties, tmp_path)
    assert [p["p_a"] for p in preferences] == [0.5, 0.5]
    assert [(p["a"], p["b"]) for p in preferences] == [(p["a"], p["b"]) for p in ties]
    assert counts["same_text"] == 1 and counts["labels"] == 2


def test_a_judge_that_fails_stops_the_stage(
    judge_with: Callable[..., Judge], known_judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NeMo-Aligner again: exceptions were dropped in silence, and their pairs with them."""

    def fail(queries: Sequence[Query]) -> list[list[float]]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(known_judge, "score", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        label(judge_with(known_judge), PAIRS, tmp_path / "preferences.jsonl")
    assert (tmp_path / "preferences.jsonl").read_bytes() == b""
    monkeypatch.undo()
    assert labelled(judge_with(known_judge), PAIRS, tmp_path)[1]["labels"] == 3


def test_an_unclear_verdict_abstains_and_is_no_vote_for_a(
    judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path
) -> None:
    """apassuello, preference_comparison.py: what could not be parsed was 'A'."""
    known_judge.mass, known_judge.bias = 0.01, 5.0
    preferences, counts = labelled(judge_with(known_judge), PAIRS, tmp_path)
    assert [(p["p_a"], p["abstained"]) for p in preferences] == [(None, TOO_LITTLE)] * 3
    assert counts == {"labels": 0, "abstained": {TOO_LITTLE: 3}, "same_text": 1}
    assert all(
        one["a_first"]["mass"] == pytest.approx(0.01) for p in preferences for one in p["labels"]
    )  # kept to read
    known_judge.mass = 0.021
    assert labelled(judge_with(known_judge), PAIRS, tmp_path / "b")[1]["labels"] == 3


def test_one_unclear_order_is_enough_to_abstain(
    judge_with: Callable[..., Judge], known_judge: Engine, tmp_path: Path
) -> None:
    fixed = FixedJudge(known_judge.model, known_judge.tokenizer, [(0.5, 0.4), (0.01, 0.001)])
    [preference], _ = labelled(judge_with(fixed), PAIRS[:1], tmp_path)
    assert (preference["p_a"], preference["abstained"]) == (None, TOO_LITTLE)


def test_a_question_longer_than_the_context_abstains_and_the_others_are_labelled(
    judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path
) -> None:
    judge = judge_with(known_judge)
    blank = pair("x", "", "")
    frame = len(prompt_ids(judge, known_judge.tokenizer, judge.constitution.principles[0], blank, "a_first"))
    fits, long = (pair(str(n), "good", "w2 " * (n - 1)) for n in (127 - frame, 128 - frame))  # and one for the letter
    preferences, counts = labelled(judge, [fits, long, PAIRS[0]], tmp_path)
    assert [p["abstained"] for p in preferences] == ["", TOO_LONG, ""]
    assert preferences[1]["p_a"] is None
    assert counts["labels"] == 2 and counts["abstained"] == {TOO_LONG: 1}
    assert len(known_judge.asked) == 4


def test_a_tokenizer_without_a_token_for_each_letter_is_refused_before_any_work(
    judge_with: Callable[..., Judge], make_model: Callable, known_judge: Any, tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "A": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    known_judge.tokenizer = Tokenizer.from_parts(backend, eos_token="</s>")
    with pytest.raises(ValueError, match=r"option ' B' is 1 tokens \['<unk>'\]; allowed: one known token"):
        label(judge_with(known_judge), PAIRS, tmp_path / "preferences.jsonl")
    assert not known_judge.asked and not list(tmp_path.iterdir())


def test_one_principle_is_drawn_for_each_pair_by_weight(
    judge_with: Callable[..., Judge], known_judge: Any, tmp_path: Path
) -> None:
    judge = judge_with(known_judge)

    def drawn(id: str) -> str:
        one, two = (uniform_scalar(SEED, request_id("label", id, name), 0) for name in ("one", "two"))
        return "one" if math.log(1 - one) / 1 > math.log(1 - two) / 3 else "two"

    ids = [f"p-{n}#0" for n in range(1000)]
    chosen = [[p.id for p in judge.principles(pair(id, "", ""))] for id in ids]
    assert chosen == [[drawn(id)] for id in ids]
    assert 200 < chosen.count(["one"]) < 300
    preferences, _ = labelled(judge, PAIRS, tmp_path)
    assert [p["labels"][0]["principle"]["id"] for p in preferences] == [drawn(p["id"]) for p in PAIRS]


def test_all_principles_are_averaged_by_weight_over_those_that_were_read(
    judge_with: Callable[..., Judge], known_judge: Engine, tmp_path: Path
) -> None:
    """By hand. Principle one (weight 1) says 0.8 in both orders, two (weight 3) says 0.4."""
    one, two = [(0.4, 0.1), (0.1, 0.4)], [(0.2, 0.3), (0.3, 0.2)]
    unclear = [(0.01, 0.001)] * 2
    cases = {"both": one + two, "one": one + unclear, "none": unclear * 2}
    found = {}
    for name, letters in cases.items():
        fixed = FixedJudge(known_judge.model, known_judge.tokenizer, list(letters))
        [preference], _ = labelled(judge_with(fixed, principles="all"), PAIRS[:1], tmp_path / name)
        assert [label["principle"]["id"] for label in preference["labels"]] == ["one", "two"]
        found[name] = (preference["p_a"], preference["abstained"])
    assert found["both"] == (pytest.approx((1 * 0.8 + 3 * 0.4) / 4), "")
    assert found["one"] == (pytest.approx(0.8), "")  # an abstention has no weight
    assert found["none"] == (None, TOO_LITTLE)


def test_only_principles_of_the_comparison_stage_judge(
    judge_with: Callable[..., Judge], known_judge: Engine, constitution: Constitution
) -> None:
    one, _ = constitution.principles
    other = Principle(id="two", title="two", statement="rule two", sources=("x",), stages=("critique",))
    split = dataclasses.replace(constitution, principles=(one, other))
    for which in ("one", "all"):
        judge = dataclasses.replace(judge_with(known_judge, principles=which), constitution=split)
        assert {p.id for n in range(20) for p in judge.principles(pair(str(n), "", ""))} == {"one"}


@pytest.mark.parametrize("principles", ["one", "all"])
def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(
    judge_with: Callable[..., Judge], make_model: Callable, tokenizer: Tokenizer, principles: str, tmp_path: Path
) -> None:
    judge = judge_with(Engine(make_model(), tokenizer), principles=principles, min_option_mass=0.0)
    path = tmp_path / "preferences.jsonl"
    counts = label(judge, PAIRS, path)
    whole = path.read_bytes()
    for cut in (*range(0, len(whole), 331), len(whole) - 1, len(whole), whole.index(b"\n"), whole.index(b"\n") + 1):
        path.write_bytes(whole[:cut])
        assert label(judge, PAIRS, path) == counts
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"


def test_what_an_earlier_chunk_has_cached_changes_no_bit(
    judge_with: Callable[..., Judge], make_model: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A run killed between two chunks goes on with an empty cache. Sums over a cached beginning add up otherwise."""
    prompt = " ".join(f"w{n % 20}" for n in range(70))
    starts = [f"w{n} good " * 20 for n in range(4)]  # both answers of a pair begin alike, so its two orders share more
    pairs = [pair(str(n), start + "w2", start + "w3", prompt) for n, start in enumerate(starts)]

    def make() -> Judge:
        engine = Engine(make_model(spread=0.1, context=256), tokenizer)
        return judge_with(engine, pairs_per_chunk=1, min_option_mass=0.0)

    path = tmp_path / "preferences.jsonl"
    label(make(), pairs, path)
    whole = path.read_bytes()
    for n in range(1, 4):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:n]))
        label(make(), pairs, path)
        assert path.read_bytes() == whole
