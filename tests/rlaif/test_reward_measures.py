"""The reward model's loss with margin and centring, its calibration, many ranks, and faults seen in other trainers."""

import copy
import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.kernels.preference_loss import expected_calibration_error, preference_loss
from bylaw.model.heads import ScalarModel, fresh_head, scalar_model
from bylaw.model.packing import pack
from bylaw.model.parallel import Parallel
from bylaw.model.records import read_records
from bylaw.model.shared_prompt import Shared
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import DPOConfig, RewardConfig
from bylaw.rlaif.dpo import answer_logps
from bylaw.rlaif.pairs import Pair, split_pairs
from bylaw.rlaif.reward import measure, pair_scores, reliability, train_reward

MakeModel = Callable[..., Any]
SEED = 5


def drawn(count: int, seed: int = 0) -> list[Pair]:
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        prompt = [draw.randrange(2, 30) for _ in range(draw.randint(1, 9))]
        a, b = (prompt + [draw.randrange(2, 30) for _ in range(draw.randint(1, 8))] for _ in "ab")
        pairs.append(Pair(a, b, draw.choice([0.0, 0.3, 0.5, 0.9, 1.0]), len(prompt)))
    return pairs


def settings(**changes: Any) -> RewardConfig:
    return RewardConfig(**({"learning_rate": 1e-2, "batch_size": 8, "heldout_fraction": 0.25} | changes))


def alone(model: ScalarModel, pairs: list[Pair]) -> list[tuple[float, float]]:
    """Scores of each answer on its own."""
    with torch.no_grad():
        return [tuple(float(model(pack([ids]))[-1]) for ids in (pair.a, pair.b)) for pair in pairs]  # type: ignore[misc]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("margin", "centring"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.05), (0.8, 0.05)])
def test_the_loss_of_a_step_is_the_formula(
    make_model: MakeModel, margin: float, centring: float, tmp_path: Path
) -> None:
    pairs, model = drawn(7), scalar_model(make_model(), SEED)
    scores = alone(model, pairs)
    losses = []
    for pair, (a, b) in zip(pairs, scores, strict=True):
        p, d = pair.p_a, a - b - margin * (2 * pair.p_a - 1)
        losses.append(-p * math.log(sigma(d)) - (1 - p) * math.log(sigma(-d)) + centring * (a + b) ** 2)
    config = settings(margin=margin, centring=centring, micro_batch_tokens=30)
    measures = train_reward(model, pairs, pairs, tmp_path, config, SEED)
    assert read_records(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    plain = [
        -pair.p_a * math.log(sigma(a - b)) - (1 - pair.p_a) * math.log(sigma(b - a))
        for pair, (a, b) in zip(pairs, alone(model, pairs), strict=True)
    ]
    assert measures["heldout_loss"] == pytest.approx(sum(plain) / 7, rel=1e-5)  # whatever the training adds


def test_a_margin_drives_scores_apart_and_centring_to_a_mean_of_0(make_model: MakeModel, tmp_path: Path) -> None:
    pairs = [Pair([4, 20], [4, 21], 0.9, 1)] * 8

    def trained(name: str, **changes: float) -> tuple[float, float]:
        model = scalar_model(make_model(), SEED)
        with torch.no_grad():
            model.score.weight.add_(0.2)  # far from centred
        train_reward(model, pairs, pairs, tmp_path / name, settings(epochs=40, learning_rate=5e-3, **changes), SEED)
        ((a, b),) = alone(model, pairs[:1])
        return a - b, (a + b) / 2

    plain, far, centred = trained("plain"), trained("far", margin=1.0), trained("centred", centring=0.1)
    assert plain[0] == pytest.approx(math.log(9), abs=0.1)
    assert far[0] == pytest.approx(math.log(9) + 0.8, abs=0.1)  # margin (2p - 1) further
    assert abs(centred[1]) < 0.05 < abs(plain[1])


@pytest.mark.parametrize("name", ["margin", "centring"])
def test_margin_and_centring_below_0_are_refused(name: str) -> None:
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} = "):
            settings(**{name: value})


def test_gradients_are_those_of_answers_in_full(make_model: MakeModel) -> None:
    """The prompt is computed once, and has the gradient of both answers."""
    model, pairs = scalar_model(make_model(), SEED).double(), drawn(9)
    labels = torch.tensor([pair.p_a for pair in pairs], dtype=torch.float64)
    # The head is in float32 by design: the rest is compared to its precision.
    preference_loss(*pair_scores(model, pairs), labels.float()).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    full = pack([ids for pair in pairs for ids in (pair.a, pair.b)])
    scores = model(full)[full.last]
    preference_loss(scores[::2], scores[1::2], labels.float()).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)
    assert len(found) > 8


class Counting(ScalarModel):
    """Keeps the streams that it reads."""

    streams: list[Shared]

    def forward(self, packed: Any) -> Tensor:
        self.streams.append(packed)
        return super().forward(packed)


def test_both_answers_go_through_one_pass_and_their_prompt_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = Counting(make_model())
    model.streams, pairs = [], drawn(8)
    train_reward(model, pairs, pairs, tmp_path, settings(), SEED)
    assert len(model.streams) == 2  # a step, and the measures
    for stream in model.streams:
        assert len(stream.cu_seqlens) == 17 and stream.wanted is not None and len(stream.wanted) == 16
        assert len(stream.tokens) == sum(pair.tokens for pair in pairs)
        assert len(stream.tokens) <= sum(len(p.a) + len(p.b) - p.prompt for p in pairs)
    assert Pair([1, 2, 3], [1, 2, 4, 5], 0.5).tokens == 5 and Pair([1, 2], [1, 2], 0.5).tokens == 2


def test_reliability_by_hand() -> None:
    predicted = torch.tensor([0.05, 0.08, 0.55, 0.999, 1.0, 0.5], dtype=torch.float64)
    labels = torch.tensor([0.0, 0.3, 0.5, 1.0, 0.8, 0.7], dtype=torch.float64)
    rows = reliability(predicted, labels, 10)
    assert [(row["from"], row["pairs"]) for row in rows] == [(0.0, 2), (0.5, 2), (0.9, 2)]
    assert [row["predicted"] for row in rows] == pytest.approx([0.065, 0.525, 0.9995])
    assert [row["label"] for row in rows] == pytest.approx([0.15, 0.6, 0.9])
    ece = sum(row["pairs"] * abs(row["predicted"] - row["label"]) for row in rows) / 6
    assert float(expected_calibration_error(predicted, labels, 10)) == pytest.approx(ece)


def test_calibration_is_among_the_measures(make_model: MakeModel) -> None:
    measures = measure(scalar_model(make_model(), SEED), drawn(40), budget=60)
    rows = measures["heldout_reliability"]
    assert sum(row["pairs"] for row in rows) == 40 and len(rows) > 2
    gaps = [row["pairs"] * abs(row["predicted"] - row["label"]) for row in rows]
    assert measures["heldout_ece"] == pytest.approx(sum(gaps) / 40)


@dataclass(frozen=True)
class Threads(Parallel):
    """Ranks that are threads of one process."""

    meeting: Any = None
    parts: list[Any] = field(default_factory=list)

    def gather(self, part: Any) -> list[Any]:
        self.parts[self.data_rank] = part
        self.meeting.wait()
        return list(self.parts)


def on_ranks(count: int, work: Callable[[Parallel], Any]) -> list[Any]:
    meeting, parts, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def run(rank: int) -> None:
        results[rank] = work(Threads(data_rank=rank, data_ranks=count, meeting=meeting, parts=parts))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_measures_of_many_ranks_are_those_of_one(make_model: MakeModel) -> None:
    """Every rank makes equally many passes, and knows all scores in the pairs' order."""
    model, pairs, budget = Counting(make_model()), drawn(13), 40
    model.streams = []
    expected = measure(model, pairs, budget)
    copies = [copy.deepcopy(model) for _ in range(3)]
    found = on_ranks(3, lambda place: measure(copies[place.data_rank], pairs, budget, place))
    for measures in found:
        assert measures.keys() == expected.keys()
        for name in ("heldout_loss", "heldout_accuracy", "heldout_ece", "score_mean", "score_std"):
            assert measures[name] == pytest.approx(expected[name], rel=1e-5)
    passes = [len(copy.streams) - len(model.streams) for copy in copies]
    assert len(set(passes)) == 1 and passes[0] > 1


def test_reference_log_probs_of_many_ranks_are_those_of_one(make_model: MakeModel) -> None:
    model, pairs = make_model(), drawn(11)
    expected = answer_logps(model, pairs, 30)
    for found in on_ranks(2, lambda place: answer_logps(model, pairs, 30, place)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_one_epoch_and_a_rate_that_ends_at_0(make_model: MakeModel, tmp_path: Path) -> None:
    """arXiv 2403.17031: reward models overfit. So does DPO by default."""
    for config in (RewardConfig(), DPOConfig()):
        assert config.epochs == 1 and config.schedule == "linear"
    train_reward(scalar_model(make_model(), SEED), drawn(40), drawn(4), tmp_path, settings(), SEED)
    rates = [line["lr"] for line in read_records(tmp_path / "metrics.jsonl")]
    assert len(rates) == 5 and rates == sorted(rates, reverse=True) and rates[-1] <= rates[0] / 5


def test_the_head_is_as_wide_as_published() -> None:
    """OpenRLHF, models/model.py: 1 / (H + 1), not its root."""
    weight = fresh_head(900, SEED)
    assert float(weight.std()) == pytest.approx(901**-0.5, rel=0.1) and float(weight.std()) > 10 / 901


def test_turned_labels_teach_the_other_order(make_model: MakeModel, tmp_path: Path) -> None:
    """open-instruct, synthetic_preference_dataset.py: a verdict that was never used."""
    pairs = [Pair([4, 20, word], [4, 20, 31], 0.9, 1) for word in range(21, 29)]
    leads = []
    for turn in (False, True):
        labelled = [Pair(pair.a, pair.b, 1 - pair.p_a if turn else pair.p_a, pair.prompt) for pair in pairs]
        model = scalar_model(make_model(), SEED)
        train_reward(model, labelled, labelled, tmp_path / str(turn), settings(epochs=20), SEED)
        leads.append([a - b for a, b in alone(model, pairs)])
    assert min(leads[0]) > 0 > max(leads[1])


def record(a: list[int], b: list[int], p_a: float | None = 0.5, finish: str = "stop", **more: Any) -> dict[str, Any]:
    sides = ({"text": "w1", "ids": ids, "finish": finish} for ids in (a, b))
    said = [{"role": "user", "content": "w1 w2"}]
    return {"prompt_id": "p", "prompt": said, "a": next(sides), "b": next(sides), "p_a": p_a, "abstained": ""} | more


def both_sides(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records under enough prompts for both sides."""
    return [one | {"prompt_id": f"p-{n}"} for n in range(12) for one in records]


def test_two_answers_that_are_the_same_keep_their_label_and_teach_nothing(
    make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    """NeMo-Aligner, generate_rl_cai_dataset.py: a random other answer in their place, and errors dropped in silence."""
    twins = both_sides([record([20, 21, 0], [20, 21, 0])])
    train, heldout, counts = split_pairs(twins, tokenizer, 0.4, SEED, context=1000)
    assert counts["train_pairs"] + counts["heldout_pairs"] == 12 and counts["abstained"] == 0
    assert all(pair.a == pair.b and pair.p_a == 0.5 for pair in train + heldout)
    model = scalar_model(make_model(), SEED)
    loss = preference_loss(*pair_scores(model, train), torch.tensor([pair.p_a for pair in train]))
    assert loss.tolist() == pytest.approx([math.log(2)] * len(train))
    loss.sum().backward()
    assert all(float(p.grad.abs().max()) < 1e-6 for p in model.parameters() if p.grad is not None)
    broken = both_sides([record([20, 0], [21, 0])])
    del broken[5]["b"]
    with pytest.raises(KeyError):
        split_pairs(broken, tokenizer, 0.4, SEED, context=1000)


def test_an_unclear_verdict_is_no_label(tokenizer: Tokenizer) -> None:
    """apassuello, preference_comparison.py: unclear was taken as A."""
    known, unclear = record([20, 0], [21, 0], 0.2), record([22, 0], [23, 0], None, abstained="unclear")
    train, heldout, counts = split_pairs(both_sides([known, unclear]), tokenizer, 0.4, SEED, context=1000)
    assert counts["abstained"] == 12 and all(pair.p_a == 0.2 for pair in train + heldout)


def test_answers_that_were_cut_count_in_the_scale_of_scores(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    """AReaL issue 1351: rows without an end of text. They are scored at their own last token, as all others are."""
    cut = both_sides([record([20, 21, 22], [23], 0.7, finish="length"), record([24, 0], [25, 26, 0], 0.7)])
    train, heldout, _ = split_pairs(cut, tokenizer, 0.4, SEED, context=1000)
    pairs, model = train + heldout, scalar_model(make_model(), SEED)
    assert {ids[-1] for pair in pairs for ids in (pair.a, pair.b)} == {22, 23, tokenizer.eos_id}
    scores = [score for both in alone(model, pairs) for score in both]
    measures = measure(model, pairs, 50)
    mean = sum(scores) / len(scores)
    assert measures["score_mean"] == pytest.approx(mean, abs=1e-5)
    assert measures["score_std"] == pytest.approx(
        math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)), abs=1e-5
    )
