"""The loop of SFT, reward model and DPO: what its settings do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bylaw.kernels.policy_loss import Stats
from bylaw.model.config import ModelConfig
from bylaw.model.fit import fit
from bylaw.model.records import read_records
from bylaw.model.settings import OptimSettings
from bylaw.model.step import Objective
from bylaw.model.supervised import Example, train_supervised
from bylaw.model.transformer import Transformer, initialize


def squares(model: nn.Linear) -> Callable[[list[float]], Objective[float]]:
    """The mean squared error of the model's weight from the items."""

    def objective(batch: list[float]) -> Objective[float]:
        def part(run: list[float]) -> tuple[Tensor, Stats]:
            return (model.weight - torch.tensor(run)).square().sum() / len(batch), {"items": torch.tensor(len(run))}

        return part

    return objective


def run(folder: Path, **settings: object) -> tuple[nn.Linear, list[dict[str, float]]]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optim = OptimSettings(**settings)  # type: ignore[arg-type]
    items = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    fit(
        model, items, lambda item: 1, squares(model), optim, epochs=1, batch_size=2, seed=0, folder=folder,
        stage="t", measure=lambda stats: {"items": float(stats["items"])},
    )  # type: ignore[arg-type]  # fmt: skip
    return model, read_records(folder / "metrics.jsonl")


def test_the_rate_follows_its_schedule(tmp_path: Path) -> None:
    _, lines = run(tmp_path, learning_rate=0.3, schedule="linear")
    assert [line["lr"] for line in lines] == pytest.approx([0.3, 0.2, 0.1])
    assert [line["items"] for line in lines] == [2, 2, 2]


def test_the_gradient_is_clipped_and_its_norm_told(tmp_path: Path) -> None:
    """Adam's first step is the learning rate whatever the gradient, so the norm is what tells."""
    model, lines = run(tmp_path, learning_rate=0.25, max_grad_norm=1e-3, micro_batch_tokens=1)
    first = lines[0]["grad_norm"]
    assert first in (2 * 1.5, 2 * 2.5, 2 * 3.5, 2 * 4.5, 2 * 5.5, 2 * 2, 2 * 3, 2 * 4, 2 * 5)
    assert 0.5 < model.weight.item() <= 0.75 + 1e-6


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path, save_every=1, keep_checkpoints=2)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["latest.json", "step-1", "step-2"]
    run(tmp_path / "one", save_every=1)
    assert sorted(path.name for path in (tmp_path / "one" / "state").iterdir()) == ["latest.json", "step-2"]


def test_blocks_are_prepared_as_the_settings_say(tmp_path: Path) -> None:
    config = ModelConfig(
        family="llama", vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=4, max_position_embeddings=16,
    )  # fmt: skip
    examples = [Example([1, 2, 3], [False, True, True])]
    for kind, wanted in (("full", True), ("none", False)):
        model = initialize(Transformer(config), 0)
        settings = OptimSettings(activation_checkpointing=kind)  # type: ignore[arg-type]
        train_supervised(model, examples, settings, epochs=1, batch_size=1, seed=0, folder=tmp_path / kind, stage="t")
        assert (model.blocks[0].prepared is not None) is wanted
