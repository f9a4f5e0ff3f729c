"""DPO against the formula in float64 on answers one by one, a planted taste, and itself killed and resumed."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bylaw.model.fit
from bylaw.model.checkpoint import save_model
from bylaw.model.config import ModelConfig
from bylaw.model.packing import pack
from bylaw.model.records import Record, read_records
from bylaw.model.transformer import Transformer, initialize
from bylaw.rlaif.config import DPOConfig
from bylaw.rlaif.dpo import answer_logps, measure, preference, train_dpo, with_reference
from bylaw.rlaif.pairs import Pair

VOCAB, GOOD, SEED = 23, 7, 5
NAMES = ("chosen", "rejected", "accuracies", "margins")


def made(seed: int = 0) -> Transformer:
    config = ModelConfig(
        family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.3, attention_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    return initialize(Transformer(config), seed)


def drawn(count: int) -> list[Pair]:
    """Odd lengths, soft labels, ties, an answer of one token, one that is how the other begins, and twins."""
    draw = random.Random(1)
    pairs = [Pair([3, 4, 5], [3, 4, 5, 6], 0.3, 2), Pair([3, 4, 5], [3, 4, 5], 0.5, 1), Pair([9, 1], [9, 2], 1.0, 1)]
    while len(pairs) < count:
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
        a, b = (prompt + [draw.randrange(VOCAB) for _ in range(draw.randint(1, 12))] for _ in "ab")
        pairs.append(Pair(a, b, draw.choice([0.0, 0.2, 0.5, 0.8, 0.9]), len(prompt)))
    return pairs


def logp(model: Transformer, ids: list[int], prompt: int) -> Tensor:
    """Of an answer, alone and unpacked, from the whole table of log-probs."""
    table = torch.log_softmax(model(pack([ids])) @ model.head_weight.T, dim=-1)
    return torch.stack([table[place - 1, ids[place]] for place in range(prompt, len(ids))]).sum()


def by_hand(model: Transformer, references: list[tuple[float, float]], pairs: list[Pair], beta: float) -> Tensor:
    """The mean loss per pair, from sigmoids and logarithms."""
    losses = []
    for pair, (reference_a, reference_b) in zip(pairs, references, strict=True):
        reward_a, reward_b = (
            beta * (logp(model, ids, pair.prompt) - reference)
            for ids, reference in ((pair.a, reference_a), (pair.b, reference_b))
        )
        p = torch.sigmoid(reward_a - reward_b)
        losses.append(-(pair.p_a * p.log() + (1 - pair.p_a) * (1 - p).log()))
    return torch.stack(losses).mean()


def settings(**changes: Any) -> DPOConfig:
    return DPOConfig(**({"learning_rate": 1e-3, "batch_size": 8, "beta": 0.5, "save_every": 2} | changes))


def test_log_probs_of_answers_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, pairs = made(), drawn(9)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = answer_logps(model, pairs, budget=40)
    for pair, both in zip(pairs, found, strict=True):
        for ids, ours in zip((pair.a, pair.b), both, strict=True):
            with torch.no_grad():
                table = torch.log_softmax(theirs(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
            expected = sum(float(table[place - 1, ids[place]]) for place in range(pair.prompt, len(ids)))
            assert ours == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("budget", [30, 10**6])
def test_loss_and_gradient_of_a_step_are_the_formula(budget: int) -> None:
    model, pairs = made().double(), drawn(13)
    references = answer_logps(made(seed=1).double(), pairs, budget)
    expected = by_hand(model, references, pairs, 0.5)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    items = with_reference(made(seed=1).double(), pairs, budget)
    assert [item[1:] for item in items] == references
    found = preference(model, items, 0.5)
    (found.loss / len(items)).backward()
    assert float(found.loss.detach()) / 13 == pytest.approx(float(expected.detach()), abs=1e-12)
    assert max(float(grad.abs().max()) for grad in wanted.values()) > 1e-2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-12, rtol=1e-9)


def test_before_any_step_the_model_is_its_own_reference() -> None:
    """Every reward is 0 and every loss log 2, whatever the label, and the slope is by how far it is from a half."""
    model, pairs = made(), drawn(10)
    items = with_reference(model, pairs, 50)
    loss = preference(model, items, 0.1).loss
    assert float(loss.detach()) == pytest.approx(10 * math.log(2), abs=1e-5)
    measures = measure(model, items, 50, 0.1)
    assert measures["heldout_margin"] == pytest.approx(0, abs=1e-6)


def test_a_tie_is_pulled_to_equal_rewards() -> None:
    """A pair of p = 0.5 is trained on: its gradient is 0 where both rewards are equal, and only there."""
    model, tie = made().double(), [Pair([3, 1, 2], [3, 4], 0.5, 1)]
    preference(model, with_reference(model, tie, 50), 1.0).loss.backward()
    assert all(float(p.grad.abs().max()) < 1e-12 for p in model.parameters() if p.grad is not None)
    preference(model, with_reference(made(seed=1).double(), tie, 50), 1.0).loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-3


def planted(count: int, seed: int) -> list[Pair]:
    """Whoever says GOOD is better, by a judge that is sure nine times in ten. Which side says it is drawn."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        prompt = [draw.randrange(10, VOCAB) for _ in range(draw.randint(2, 5))]
        good, bad = ([*(draw.randrange(10, VOCAB) for _ in range(draw.randint(1, 4))), word] for word in (GOOD, 8))
        sides = (good, bad, 0.9) if draw.random() < 0.5 else (bad, good, 0.1)
        pairs.append(Pair(prompt + sides[0], prompt + sides[1], sides[2], len(prompt)))
    return pairs


def test_a_planted_taste_is_learned_and_its_measures_say_so(tmp_path: Path) -> None:
    model, config = made(), settings(epochs=2, batch_size=16, learning_rate=5e-3)
    before = answer_logps(model, planted(40, 1), 400)
    measures = train_dpo(model, planted(200, 0), planted(40, 1), tmp_path, config, SEED)
    assert measures["heldout_accuracy"] > 0.95 and measures["heldout_margin"] > 1
    assert measures["heldout_loss"] < 0.5 and measures["steps"] == 25
    rewards = 0.5 * (torch.tensor(answer_logps(model, planted(40, 1), 400)) - torch.tensor(before))
    lead = torch.tensor([1.0 if pair.p_a > 0.5 else -1.0 for pair in planted(40, 1)]) * (rewards[:, 0] - rewards[:, 1])
    assert measures["heldout_margin"] == pytest.approx(float(lead.mean()), abs=1e-4)
    lines = read_records(tmp_path / "metrics.jsonl")
    wanted = {f"rewards/{name}" for name in NAMES} | {"logps/chosen", "logps/rejected", "loss"}
    assert all(wanted <= line.keys() for line in lines)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["rewards/margins"] > 0.5 and lines[-1]["rewards/accuracies"] > 0.9
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)


def test_other_labels_teach_the_other_taste(tmp_path: Path) -> None:
    """open-instruct, synthetic_preference_dataset.py: a verdict that was never used."""
    turned = [Pair(pair.a, pair.b, 1 - pair.p_a, pair.prompt) for pair in planted(120, 0)]
    model, heldout = made(), planted(40, 1)
    measures = train_dpo(model, turned, heldout, tmp_path, settings(learning_rate=5e-3), SEED)
    assert measures["heldout_accuracy"] < 0.2 and measures["heldout_margin"] < -0.5


def test_step_metrics_by_hand(tmp_path: Path) -> None:
    """Of one step that holds all pairs; ties count in the loss alone."""
    pairs, model = drawn(9), made()
    train_dpo(model, pairs, pairs, tmp_path, settings(epochs=2, batch_size=9, learning_rate=1e-2), SEED)
    line = read_records(tmp_path / "metrics.jsonl")[1]
    start, moved = made(), made()
    references = answer_logps(start, pairs, 500)
    folder = tmp_path / "again"
    train_dpo(moved, pairs, pairs, folder, settings(batch_size=9, learning_rate=1e-2, schedule="constant"), SEED)
    now = answer_logps(moved, pairs, 500)
    decided = [i for i, pair in enumerate(pairs) if pair.p_a != 0.5]
    assert 0 < len(decided) < 9
    better = [pairs[i].p_a < 0.5 for i in decided]  # 1: b is the chosen one
    chosen = [now[i][side] for i, side in zip(decided, better, strict=True)]
    rejected = [now[i][not side] for i, side in zip(decided, better, strict=True)]
    reward = [0.5 * (now[i][side] - references[i][side]) for i, side in zip(decided, better, strict=True)]
    other = [0.5 * (now[i][not side] - references[i][not side]) for i, side in zip(decided, better, strict=True)]
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(reward, other, strict=True)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert line["logps/chosen"] == pytest.approx(mean(chosen), abs=1e-4)
    assert line["logps/rejected"] == pytest.approx(mean(rejected), abs=1e-4)
    assert line["rewards/chosen"] == pytest.approx(mean(reward), abs=1e-4)
    assert line["rewards/rejected"] == pytest.approx(mean(other), abs=1e-4)
    assert line["rewards/accuracies"] == pytest.approx(mean(right))
    assert line["loss"] == pytest.approx(float(by_hand(moved, references, pairs, 0.5).detach()), abs=1e-5)


def test_ties_alone_have_no_margin(tmp_path: Path) -> None:
    pairs = [Pair([1, 2], [1, 3], 0.5, 1)] * 3
    measures = train_dpo(made(), pairs, pairs, tmp_path, settings(), SEED)
    assert measures["heldout_accuracy"] is None and measures["heldout_margin"] is None
    assert all("rewards/margins" not in line for line in read_records(tmp_path / "metrics.jsonl"))


def trained(folder: Path, **changes: Any) -> tuple[Transformer, dict[str, Any]]:
    model = made()
    return model, train_dpo(model, drawn(30), drawn(12), folder, settings(epochs=2, **changes), SEED)


def untimed(folder: Path) -> list[Record]:
    lines = read_records(folder / "metrics.jsonl")
    assert all(line.pop("tokens_per_second") > 0 for line in lines)
    return lines


@pytest.mark.parametrize("killed_at", [0, 3, 7])
def test_killed_and_resumed_it_is_the_same_to_the_bit(
    killed_at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, measures = trained(tmp_path / "whole")
    calls, real = itertools.count(), bylaw.model.fit.update

    def dying(*arguments: Any) -> float:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(bylaw.model.fit, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut")
    monkeypatch.undo()
    resumed, again = trained(tmp_path / "cut")
    assert again == measures
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", adam_epsilon=1e-4)
    pieces, _ = trained(tmp_path / "pieces", adam_epsilon=1e-4, micro_batch_tokens=40)
    for ours, theirs in zip(pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "pair", [Pair([1, 2], [1, 3], 0.5), Pair([1, 2], [1], 0.5, 1), Pair([1, 2, 3], [1, 4, 3], 0.5, 2)]
)
def test_a_pair_without_prompt_or_answer_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pair 1 has a prompt of"):
        train_dpo(made(), [drawn(1)[0], pair], drawn(1), tmp_path, settings(), SEED)
    assert not (tmp_path / "metrics.jsonl").exists()
