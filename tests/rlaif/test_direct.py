"""Marks from 1 to 10 as the reward: by hand, marks of several tokens, and what PPO makes of an unrated answer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from bylaw.constitution.render import rating_request
from bylaw.constitution.schema import Constitution
from bylaw.model.engine import Engine, Query
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import LabelConfig, PPOConfig
from bylaw.rlaif.direct import TOO_LITTLE, Rater, mark_ids, rating, reading
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.ppo_scores import Reward, set_scores
from bylaw.rlaif.rollout import Rollout

ONE_EACH = [[n] for n in range(20, 30)]


def test_a_mean_mark_by_hand() -> None:
    shares = [0.0001] * 10
    shares[2], shares[7] = 0.3, 0.1
    found = reading([math.log(p) for p in shares], ONE_EACH, 0.02)
    mass = 0.4 + 8 * 0.0001
    mean = (3 * 0.3 + 8 * 0.1 + 0.0001 * (55 - 11)) / mass
    assert found["mass"] == pytest.approx(mass) and found["mean"] == pytest.approx(mean)
    scored = rating([found | {"weight": 1.0}, {"weight": 3.0, "mean": 10.0, "abstained": ""}])
    assert scored["score"] == pytest.approx(((mean + 30) / 4 - 5.5) / 4.5)
    assert [rating([{"weight": 1.0, "mean": m, "abstained": ""}])["score"] for m in (1.0, 5.5, 10.0)] == [-1, 0, 1]


def test_the_one_of_a_ten_is_not_the_mark_one() -> None:
    """10 is written 1, 0: of P(1 next) = 0.5, 0.4 goes on to 10."""
    split = [[20], *ONE_EACH[1:9], [20, 19]]
    shares = [0.5, *[1e-9] * 8, 0.4]
    found = reading([math.log(p) for p in shares], split, 0.02)
    assert found["mass"] == pytest.approx(0.5) and found["mean"] == pytest.approx((1 * 0.1 + 10 * 0.4) / 0.5)


def test_what_cannot_be_read_abstains_and_has_no_vote() -> None:
    low = reading([math.log(0.001)] * 10, ONE_EACH, 0.02)
    assert (low["mean"], low["abstained"]) == (None, TOO_LITTLE)
    assert rating([low | {"weight": 1.0}])["score"] is None
    assert rating([low | {"weight": 9.0}, {"weight": 1.0, "mean": 10.0, "abstained": ""}])["score"] == 1.0
    assert reading(None, ONE_EACH, 0.02)["abstained"] == "question longer than the judge's context"
    assert reading([-2000.0] * 10, ONE_EACH, 0.0)["abstained"] == TOO_LITTLE  # nothing to divide by


def test_marks_of_this_tokenizer_or_a_clear_no(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(["</s>", "so", *"0123456789"])}))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])  # type: ignore[list-item]
    digits = Tokenizer.from_parts(backend, eos_token="</s>")
    assert mark_ids(digits, "so") == [[n + 2] for n in range(1, 10)] + [[3, 2]]
    with pytest.raises(ValueError, match="the mark 1 after 'so :' has no tokens of its own"):
        mark_ids(tokenizer, "so :")


class Marker(Engine):
    """Puts all on the mark that is the number of good words and one."""

    asked: Sequence[Query] = ()

    def score(self, queries: Sequence[Query]) -> list[list[float]]:  # type: ignore[override]
        self.asked = queries
        good = self.tokenizer.encode("good")[0]  # type: ignore[union-attr]
        return [[0.0 if m == 1 + list(q[0]).count(good) else -60.0 for m in range(1, 11)] for q in queries]


def test_a_rater_reads_dialogue_answer_and_principle(
    make_model: Callable, tokenizer: Tokenizer, constitution: Constitution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bylaw.rlaif.direct.mark_ids", lambda tokenizer, prefix: ONE_EACH)
    engine = Marker(make_model(context=256), tokenizer)
    judge: Any = Judge(reader=None, constitution=constitution, config=LabelConfig(), seed=1)  # type: ignore[arg-type]
    dialogue = [{"role": "user", "content": "w1"}]
    rater = Rater(judge=judge, engine=engine, dialogues={"p": dialogue}, policy=tokenizer)
    said = [Rollout("p", [5], tokenizer.encode(text), [], True, n) for n, text in enumerate(["good good w2", "w3"])]
    long = Rollout("p", [5], tokenizer.encode("w1 " * 250), [], True, 9)
    found = rater.rate([*said, long])
    assert [one["score"] for one in found[:2]] == pytest.approx([(3 - 5.5) / 4.5, -1.0])
    assert found[2]["score"] is None and "context" in found[2]["abstained"]
    principle = constitution.principle(found[0]["readings"][0]["principle"]["id"])
    request = rating_request(constitution, principle, dialogue, "good good w2")
    prefix = constitution.templates.rating_prefix
    assert list(engine.asked[0][0]) == tokenizer.prompt_ids([{"role": "user", "content": request}], prefix=prefix)


def test_a_judge_with_another_tokenizer_is_shown_the_words_of_the_policy(
    make_model: Callable, tokenizer: Tokenizer, constitution: Constitution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words, under other ids."""
    monkeypatch.setattr("bylaw.rlaif.direct.mark_ids", lambda tokenizer, prefix: ONE_EACH)
    ids = tokenizer.backend.get_vocab()
    words = sorted(ids, key=lambda word: -ids[word])
    backend = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>", "<unk>"])
    own = Tokenizer.from_parts(backend, eos_token="</s>")
    judge: Any = Judge(reader=None, constitution=constitution, config=LabelConfig(), seed=1)  # type: ignore[arg-type]
    engine, dialogues = Marker(make_model(context=256), own), {"p": [{"role": "user", "content": "w1"}]}
    rater = Rater(judge=judge, engine=engine, dialogues=dialogues, policy=tokenizer)
    [found] = rater.rate([Rollout("p", [5], tokenizer.encode("good good w2"), [], True, 0)])
    assert "good good w2" in own.decode(list(engine.asked[0][0])) and found["score"] == pytest.approx((3 - 5.5) / 4.5)


def test_an_answer_that_could_not_be_rated_counts_as_an_average_one() -> None:
    rollouts = [Rollout("p", [1], [2], [0.0], True, raw=[raw]) for raw in (0.5, None, -0.1)]
    reward = [Reward(None)]  # type: ignore[arg-type]
    set_scores(reward, rollouts, PPOConfig(), [])
    assert [one.score for one in rollouts] == pytest.approx([0.5, 0.2, -0.1]) and rollouts[1].raw == [None]
    for one in rollouts:
        one.raw, one.rating = [None], {"abstained": TOO_LITTLE}
    with pytest.raises(ValueError, match="could rate none of the 3 answers of this batch: too little"):
        set_scores(reward, rollouts, PPOConfig(), [])
