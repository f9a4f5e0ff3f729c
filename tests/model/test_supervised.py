"""Supervised training against Transformers' loss, hand-worked schedules, and itself killed and resumed."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bylaw.model import fit, supervised
from bylaw.model.checkpoint import load_model
from bylaw.model.config import ModelConfig
from bylaw.model.optim import adamw, scheduled, update
from bylaw.model.records import read_records
from bylaw.model.settings import OptimSettings
from bylaw.model.supervised import Example, supervised_loss, train_supervised
from bylaw.model.transformer import Transformer, initialize

VOCAB = 37


def examples(count: int = 11) -> list[Example]:
    """Texts of 2 to 30 tokens with learned runs here and there; a mark on the first token, in some, teaches nothing."""
    draw = random.Random(0)
    made = []
    for n in range(count):
        ids = [draw.randrange(VOCAB) for _ in range(2 + (n * 11) % 29)]
        learned = [draw.random() < 0.4 for _ in ids[:-1]]
        made.append(Example(ids, [*learned, True]))
    return made


def tiny(tied: bool = False) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=12, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return initialize(Transformer(config), seed=0)


def train(model: Transformer, folder: Path, given: Sequence[Example] | None = None, **options: Any) -> dict[str, float]:
    plan: dict[str, Any] = {"epochs": 2, "batch_size": 4, "seed": 3, "stage": "test"}
    plan |= {name: options.pop(name) for name in list(options) if name in (*plan, "show")}
    settings: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2}
    settings |= {"save_every": 2} | options
    chosen = examples() if given is None else given
    return train_supervised(model, chosen, OptimSettings(**settings), folder=folder, **plan)


@pytest.mark.parametrize(("family", "options"), [("Llama", {}), ("Mistral", {"sliding_window": 5})])
def test_loss_and_gradient_equal_those_of_transformers(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **options,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path)
    expected = torch.zeros(())
    for example in examples():
        labels = [id if flag else -100 for id, flag in zip(example.ids, example.learned, strict=True)]
        mean = theirs(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        expected = expected + mean * sum(label != -100 for label in labels[1:])
    expected.backward()
    ours = load_model(tmp_path)
    loss = supervised_loss(ours, examples())
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
    for mine, other in (
        (ours.head_weight, theirs.lm_head.weight),
        (ours.embed.weight, theirs.model.embed_tokens.weight),
        (ours.norm.weight, theirs.model.norm.weight),
    ):
        assert mine.grad is not None and mine.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


def gradient(monkeypatch: Any, folder: Path, budget: int, tied: bool) -> Tensor:
    """The gradient that the optimiser gets in the first step, flat."""
    seen: list[Tensor] = []

    def look(model: nn.Module, *rest: Any) -> float:
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(fit, "update", look)
        train(tiny(tied), folder, batch_size=11, epochs=1, micro_batch_tokens=budget)
    return seen[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_micro_batch_budget_does_not_change_the_gradient(tmp_path: Path, monkeypatch: Any, tied: bool) -> None:
    whole = gradient(monkeypatch, tmp_path / "whole", 10**6, tied)
    assert whole.abs().max() > 0.05
    for budget in (1, 20, 60):
        pieces = gradient(monkeypatch, tmp_path / str(budget), budget, tied)
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)
    losses = [read_records(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("whole", "1", "20", "60")]
    mean = float(supervised_loss(tiny(tied), examples()).detach()) / sum(e.targets for e in examples())
    assert losses == pytest.approx([mean] * 4, abs=1e-5)


class Killed(BaseException):
    """What a kill looks like from inside: no handler runs."""


def curve(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock says."""
    records = read_records(folder / "metrics.jsonl")
    return [{name: record[name] for name in ("step", "loss", "lr", "grad_norm")} for record in records]


@pytest.mark.parametrize("kills", [(0,), (1,), (2,), (3,), (4, 5), (1, 3, 4)])
def test_killed_and_resumed_training_gives_the_same_bits(tmp_path: Path, kills: tuple[int, ...]) -> None:
    straight = tiny()
    result = train(straight, tmp_path / "straight", micro_batch_tokens=40)
    assert result["steps"] == 6  # 22 texts, 4 at a time

    def kill_at(last: int) -> Any:
        def show(step: int, steps: int) -> None:
            if step == last:
                raise Killed

        return show

    for last in kills:
        with pytest.raises(Killed):
            train(tiny(), tmp_path / "killed", micro_batch_tokens=40, show=kill_at(last))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = tiny()
    assert train(resumed, tmp_path / "killed", micro_batch_tokens=40) == result
    for one, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")


def test_a_resumed_run_does_not_do_its_first_steps_again(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    with pytest.raises(Killed):
        train(tiny(), tmp_path, show=lambda step, steps: (_ for _ in ()).throw(Killed()) if step == 4 else None)
    train(tiny(), tmp_path, show=lambda step, steps: heard.append((step, steps)))
    assert heard == [(4, 6), (5, 6)]


def test_training_learns_and_counts(tmp_path: Path) -> None:
    given = [Example([5, 6, 7, 8], [False, False, True, True]), Example([9, 6, 10], [False, False, True])]
    result = train(tiny(), tmp_path, given, epochs=30, batch_size=2, schedule="constant")
    losses = [record["loss"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert losses[0] > 2 and losses[-1] < 0.1
    assert result == {"steps": 30, "tokens": 30 * 7, "last_loss": losses[-1]}


def test_each_epoch_reads_every_example_once_in_its_own_order(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[int] = []
    real = supervised.supervised_loss

    def look(model: Transformer, batch: Sequence[Example]) -> Tensor:
        seen.extend(example.ids[0] for example in batch)
        return real(model, batch)

    monkeypatch.setattr(supervised, "supervised_loss", look)
    given = [Example([n, 1], [False, True]) for n in range(20)]
    train(tiny(), tmp_path, given, batch_size=3)
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(first), tuple(second), tuple(range(20))}) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no examples"),
        ([Example([3, 4], [False, True]), Example([3, 4], [True, False])], "example 1 has 2 tokens.* learns 0"),
        ([Example([3], [True])], "example 0 has 1 tokens.* learns 0"),
        ([Example([3, 4, 5], [False, True])], "example 0 has 3 tokens, 2 flags"),
    ],
)
def test_examples_that_teach_nothing_are_refused(tmp_path: Path, given: list[Example], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(), tmp_path / "out", given)
    assert not (tmp_path / "out").exists(), "before any work"


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.embed.weight[examples()[0].ids[0]] = torch.inf
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(FloatingPointError, match="no parameter of this model was changed"):
        train(model, tmp_path, batch_size=11)
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter)
    assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_number_is_enough(bad: float) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.tensor([0.0, bad])
    with pytest.raises(FloatingPointError, match=r"norm is (inf|nan)"):
        update(model, torch.optim.SGD(model.parameters(), lr=1.0), 0.5, 1.0)
    assert torch.equal(model.weight, before[0]) and torch.equal(model.bias, before[1])


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8]),
        ("linear", 0, [8, 40 / 6, 32 / 6, 4, 16 / 6, 8 / 6]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        ("cosine", 2, [4, 8, 8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2)]),  # 4 (1 + cos 45 degrees)
        ("cosine", 0, [8, 4 + 2 * math.sqrt(3), 6, 4, 2, 4 - 2 * math.sqrt(3)]),
        ("linear", 6, [8 / 6, 16 / 6, 4, 32 / 6, 40 / 6, 8]),
        ("linear", 16, [0.5, 1, 1.5, 2, 2.5, 3]),  # over before it is warm
    ],
)
def test_schedules_by_hand(schedule: Any, warmup: int, expected: list[float]) -> None:
    settings = OptimSettings(schedule=schedule, warmup_steps=warmup)
    assert [scheduled(settings, 8.0, step, 6) for step in range(6)] == pytest.approx(expected)


def test_the_scheduled_rate_is_the_one_that_is_used_and_logged(tmp_path: Path) -> None:
    train(tiny(), tmp_path, learning_rate=0.08, warmup_steps=2, schedule="linear")
    logged = [record["lr"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert logged == pytest.approx([0.04, 0.08, 0.08, 0.06, 0.04, 0.02])
    still = tiny()
    train(still, tmp_path / "still", learning_rate=0.0)
    for parameter, start in zip(still.parameters(), tiny().parameters(), strict=True):
        assert torch.equal(parameter, start)


def test_an_update_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert update(model, optimizer, 0.5, max_grad_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1 - 0.5 * 0.6, 2 - 0.5 * 0.8]]))
    assert model.weight.grad is None, "the next step begins from nothing"
    model.weight.grad = torch.tensor([[0.3, 0.4]])
    assert update(model, optimizer, 1.0, max_grad_norm=1.0) == pytest.approx(0.5)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.4, 1.2]]))


def test_adamw_by_hand_with_decay_on_matrices_only() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(3.0)
    optimizer = adamw(model, OptimSettings(learning_rate=0.1, weight_decay=0.5, adam_epsilon=1.0))
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([-1.0])
    optimizer.step()
    # Decay takes 0.1 * 0.5 of a matrix; the first step is lr * g / (|g| + eps).
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.95 - 0.1 * 3 / 4, -1.9]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([3.0 + 0.1 * 1 / 2]))
