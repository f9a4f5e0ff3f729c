"""The reward model: a known taste is learned, the score is read in one place, the split keeps prompts whole."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bylaw.model.fit
from bylaw.constitution.schema import Constitution
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.kernels.preference_loss import preference_loss
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.packing import pack
from bylaw.model.records import Record, read_records
from bylaw.model.shared_prompt import Shared
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import LabelConfig, RewardConfig
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.label import label
from bylaw.rlaif.pairs import Pair, split_pairs
from bylaw.rlaif.reader import LocalReader
from bylaw.rlaif.reward import measure, pair_scores, train_reward

MakeModel = Callable[..., Any]
SEED = 5
CONTEXT = 1000


def made_pairs(tokenizer: Tokenizer, prompts: int, pairs_per_prompt: int = 1) -> list[Record]:
    """Answers of one to six words, of which some are good."""
    rng = random.Random(0)

    def answer() -> Record:
        text = " ".join(rng.choices(["good", "bad", "w2", "w3", "w4"], k=rng.randint(1, 6)))
        return {"text": text, "ids": [*tokenizer.encode(text), tokenizer.eos_id], "finish": "stop"}

    return [
        {
            "id": f"p-{n}#{i}",
            "prompt_id": f"p-{n}",
            "prompt": [{"role": "user", "content": f"w{n % 20} w{n // 20 % 20}"}],
            "a": answer(),
            "b": answer(),
            "by": {},
        }
        for n in range(prompts)
        for i in range(pairs_per_prompt)
    ]


def preferred(tokenizer: Tokenizer, prompts: int, pairs_per_prompt: int = 1) -> list[Record]:
    """Pairs with the label of who likes good words."""
    pairs = made_pairs(tokenizer, prompts, pairs_per_prompt)
    return [pair | {"p_a": 1 / (1 + math.exp(-lead(pair))), "abstained": ""} for pair in pairs]


def lead(pair: Record) -> int:
    a, b = (pair[side]["text"].split().count("good") for side in "ab")
    return a - b


def settings(**changes: Any) -> RewardConfig:
    return RewardConfig(**{"learning_rate": 1e-2, "batch_size": 8, "heldout_fraction": 0.25, "save_every": 2} | changes)


def test_the_taste_of_a_known_judge_goes_through_labels_into_the_reward_model(
    make_model: MakeModel, tokenizer: Tokenizer, known_judge: Any, constitution: Constitution, tmp_path: Path
) -> None:
    """Pairs, labels by a judge that mostly says A, split, training: every label is right, and then the order of nearly
    all held-out answers.
    """
    known_judge.bias = 2.0
    reader = LocalReader(engine=known_judge, seed=SEED, prefix=constitution.templates.answer_prefix, hash="known")
    judge = Judge(reader=reader, constitution=constitution, config=LabelConfig(), seed=SEED)
    pairs = made_pairs(tokenizer, prompts=400)
    label(judge, pairs, tmp_path / "preferences.jsonl")
    preferences = read_records(tmp_path / "preferences.jsonl")
    sides = [(one["p_a"] - 0.5, lead(one)) for one in preferences]
    assert len(sides) == len(pairs) and sum(better != 0 for _, better in sides) > 200
    assert all(said == 0 if better == 0 else said * better > 0 for said, better in sides)
    config = settings(batch_size=16, epochs=3)
    train, heldout, _ = split_pairs(preferences, tokenizer, config.heldout_fraction, SEED, CONTEXT)
    model = scalar_model(make_model(width=24), SEED)
    measures = train_reward(model, train, heldout, tmp_path, config, SEED)
    assert measures["heldout_accuracy"] > 0.97 and len(heldout) > 60
    with torch.no_grad():
        score_a, score_b = pair_scores(model, heldout)
    good = tokenizer.encode("good")[0]
    leads = torch.tensor([pair.a.count(good) - pair.b.count(good) for pair in heldout])
    decided = leads != 0
    right = (score_a - score_b > 0) == (leads > 0)  # by the words themselves, not by any label
    assert float(right[decided].float().mean()) > 0.97
    lines = read_records(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


class Scorer(ScalarModel):
    """Scores that a test sets: `given` of them, one per token of the stream, or the token itself."""

    given: torch.Tensor | None = None

    def forward(self, packed: Shared) -> torch.Tensor:
        scores = packed.tokens.float() if self.given is None else self.given
        return scores if packed.wanted is None else scores[packed.wanted]


def test_the_score_is_that_of_the_last_token_and_of_no_other(make_model: MakeModel) -> None:
    """apassuello, ppo_trainer.py: a score on every token."""
    model = Scorer(make_model())
    pairs = [Pair([9, 8, 7], [6], 1.0), Pair([5, 4], [3, 2, 1, 11], 0.0)]
    score_a, score_b = pair_scores(model, pairs)
    assert score_a.tolist() == [7, 4] and score_b.tolist() == [6, 11]
    model.given = torch.zeros(10, requires_grad=True)
    preference_loss(*pair_scores(model, pairs), torch.tensor([1.0, 0.0])).sum().backward()
    assert model.given.grad is not None
    assert model.given.grad.tolist() == [0, 0, -0.5, 0.5, 0, 0.5, 0, 0, 0, -0.5]  # -+ sigma(-d), at four ends


def test_an_answer_has_the_same_score_alone_and_in_any_company(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = scalar_model(make_model(), SEED)
    train, heldout, _ = split_pairs(preferred(tokenizer, 12), tokenizer, 0.5, SEED, CONTEXT)
    pairs = train + heldout
    with torch.no_grad():
        scores = torch.stack(pair_scores(model, pairs), dim=1).flatten()
        alone = torch.cat([model(pack([ids]))[-1:] for pair in pairs for ids in (pair.a, pair.b)])
    torch.testing.assert_close(scores, alone)


def test_pairs_of_a_prompt_stay_on_one_side_and_abstentions_on_neither(tokenizer: Tokenizer) -> None:
    preferences = preferred(tokenizer, prompts=60, pairs_per_prompt=3)
    for silent in preferences[::10]:
        silent |= {"p_a": None, "abstained": "unclear"}
    train, heldout, counts = split_pairs(preferences, tokenizer, 0.25, SEED, CONTEXT)
    assert counts == {"train_pairs": len(train), "heldout_pairs": len(heldout), "abstained": 18, "over_context": 0}
    assert len(train) + len(heldout) == 162 and 20 < len(heldout) < 65

    def prompts(pairs: list[Pair]) -> set[tuple[int, ...]]:
        return {tuple(pair.a[:6]) for pair in pairs}  # a prompt is 6 tokens

    held = {
        r["prompt_id"] for r in preferences if uniform_scalar(SEED, request_id("heldout", r["prompt_id"]), 0) < 0.25
    }
    expected = {tuple(tokenizer.prompt_ids(r["prompt"])) for r in preferences if r["prompt_id"] in held}
    assert prompts(heldout) == expected and not prompts(train) & expected
    again = split_pairs(list(reversed(preferences)), tokenizer, 0.25, SEED, CONTEXT)
    assert prompts(again[1]) == expected  # whatever the order


def test_a_pair_is_the_prompt_and_the_very_ids_of_the_answers(tokenizer: Tokenizer) -> None:
    cut = {"text": "w5", "ids": [20, 1, 21], "finish": "length"}
    stopped = {"text": "w6", "ids": [22], "finish": "stop"}  # at a stop string, which is not among the ids
    preferences = [preference | {"a": cut, "b": stopped} for preference in preferred(tokenizer, 20)]
    train, heldout, _ = split_pairs(preferences, tokenizer, 0.5, SEED, CONTEXT)
    for pair in train + heldout:
        assert pair.a[6:] == [20, 1, 21] and pair.b[6:] == [22, tokenizer.eos_id]


def test_pairs_longer_than_the_context_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    long = {"text": "w5", "ids": [20] * 11, "finish": "length"}  # 6 + 11 tokens
    preferences = preferred(tokenizer, 30)
    shorter = split_pairs(preferences, tokenizer, 0.5, SEED, context=17)
    preferences[3:3] = [one | {"id": f"{one['id']} long", side: long} for one in preferences[:2] for side in "ab"]
    assert split_pairs(preferences, tokenizer, 0.5, SEED, context=17)[2]["over_context"] == 0
    train, heldout, counts = split_pairs(preferences, tokenizer, 0.5, SEED, context=16)
    assert (train, heldout) == shorter[:2] and counts == shorter[2] | {"over_context": 4}


@pytest.mark.parametrize("silent", [False, True])
def test_an_empty_side_is_refused(tokenizer: Tokenizer, silent: bool) -> None:
    preferences = preferred(tokenizer, prompts=20 if silent else 1)
    if silent:
        preferences = [preference | {"p_a": None, "abstained": "unclear"} for preference in preferences]
    with pytest.raises(ValueError, match=r"both sides of heldout_fraction = 0.25.*\((0|20) abstained"):
        split_pairs(preferences, tokenizer, 0.25, SEED, CONTEXT)


def test_held_out_measures_by_hand(make_model: MakeModel) -> None:
    model = Scorer(make_model())
    pairs = [Pair([1, 4], [1, 3], 0.9), Pair([2, 2], [5], 0.8), Pair([7], [7], 0.2), Pair([6], [1], 0.5)]
    measures = measure(model, pairs, budget=4)
    scores = [4, 2, 7, 6, 3, 5, 7, 1]
    mean = sum(scores) / 8
    assert measures["score_mean"] == pytest.approx(mean)
    assert measures["score_std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 8))
    assert measures["heldout_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)  # a tie of scores is half right
    assert measures["heldout_sure_accuracy"] == pytest.approx((0.8 * 1 + 0.6 * 0 + 0.6 * 0.5) / (0.8 + 0.6 + 0.6))
    sigma = {d: 1 / (1 + math.exp(-d)) for d in (1, -3, 0, 5)}
    losses = [
        -(p * math.log(sigma[d]) + (1 - p) * math.log(1 - sigma[d]))
        for p, d in ((0.9, 1), (0.8, -3), (0.2, 0), (0.5, 5))
    ]
    assert measures["heldout_loss"] == pytest.approx(sum(losses) / 4)
    gaps = [abs(sigma[1] - 0.9), abs(sigma[-3] - 0.8), abs(sigma[0] - 0.2), abs(sigma[5] - 0.5)]  # a bin for each
    assert measures["heldout_ece"] == pytest.approx(sum(gaps) / 4)


def test_ties_alone_have_no_accuracy(make_model: MakeModel, tmp_path: Path) -> None:
    pairs = [Pair([1, 2], [3], 0.5)] * 3
    model = scalar_model(make_model(), SEED)
    measures = train_reward(model, pairs, pairs, tmp_path, settings(), SEED)
    assert measures["heldout_accuracy"] is measures["heldout_sure_accuracy"] is None
    assert all("accuracy" not in line for line in read_records(tmp_path / "metrics.jsonl"))


def test_a_soft_label_is_what_the_probability_comes_to(make_model: MakeModel, tmp_path: Path) -> None:
    """Two answers that are preferred 7 times in 10: the model says 0.7, not 1."""
    pairs = [Pair([4, 20], [4, 21], 0.7)] * 16
    model = scalar_model(make_model(), SEED)
    train_reward(model, pairs, pairs, tmp_path, settings(epochs=30, learning_rate=3e-3), SEED)
    with torch.no_grad():
        score_a, score_b = pair_scores(model, pairs[:1])
    assert float(torch.sigmoid(score_a - score_b)) == pytest.approx(0.7, abs=0.02)


def trained(make_model: MakeModel, tokenizer: Tokenizer, folder: Path, **changes: Any) -> tuple[ScalarModel, dict]:
    train, heldout, _ = split_pairs(preferred(tokenizer, 50), tokenizer, 0.25, SEED, CONTEXT)
    model = scalar_model(make_model(), SEED)
    return model, train_reward(model, train, heldout, folder, settings(epochs=2, **changes), SEED)


def untimed(folder: Path) -> list[Record]:
    lines = read_records(folder / "metrics.jsonl")
    assert all(line.pop("tokens_per_second") > 0 for line in lines)
    return lines


@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_killed_and_resumed_it_is_the_same_to_the_bit(
    make_model: MakeModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, killed_at: int, tmp_path: Path
) -> None:
    whole, measures = trained(make_model, tokenizer, tmp_path / "whole")
    calls, real = itertools.count(), bylaw.model.fit.update

    def dying(*arguments: Any) -> float:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(bylaw.model.fit, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(make_model, tokenizer, tmp_path / "cut")
    monkeypatch.undo()
    resumed, again = trained(make_model, tokenizer, tmp_path / "cut")
    assert again == measures
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_micro_batches_change_nothing(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole, _ = trained(make_model, tokenizer, tmp_path / "whole", adam_epsilon=1e-4)
    pieces, _ = trained(make_model, tokenizer, tmp_path / "pieces", adam_epsilon=1e-4, micro_batch_tokens=40)
    for ours, theirs in zip(pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = scalar_model(make_model(), SEED)
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    before = [parameter.clone() for parameter in model.trunk.parameters()]
    pairs = [Pair([4, 20], [4, 21], 0.7)]
    with pytest.raises(FloatingPointError, match="no parameter of this model was changed"):
        train_reward(model, pairs, pairs, tmp_path, settings(), SEED)
    assert all(torch.equal(ours, old) for ours, old in zip(model.trunk.parameters(), before, strict=True))
