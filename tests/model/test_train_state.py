"""Training checkpoints: what goes in comes out to the bit, and a kill at any instant leaves one that is whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bylaw.model import train_state
from bylaw.model.optim import adamw
from bylaw.model.settings import OptimSettings
from bylaw.model.train_state import Checkpoints, Learner

SETTINGS = OptimSettings(learning_rate=0.1, weight_decay=0.01)


class Trainer:
    """A model and its optimiser; `train` takes steps on gradients that its own step number decides."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False))
        self.optimizer = adamw(self.model, SETTINGS)
        self.learners = {"model": Learner(self.model, self.optimizer)}
        self.done = 0

    def train(self, steps: int) -> "Trainer":
        for _ in range(steps):
            x = torch.sin(torch.arange(12.0) * (self.done + 1)).view(4, 3)
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
        return self

    def save(self, folder: Path, **progress: Any) -> "Trainer":
        with Checkpoints(folder, self.learners) as checkpoints:
            checkpoints.save({"step": self.done, **progress})
        return self

    def load(self, folder: Path) -> dict[str, Any] | None:
        progress = Checkpoints(folder, self.learners).load()
        self.done = progress["step"] if progress else 0
        return progress


def assert_same(one: Trainer, other: Trainer) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight = Trainer(0).train(7)
    Trainer(0).train(4).save(tmp_path, kl_coef=0.1 + 0.2)
    resumed = Trainer(1)  # what it was made with is overwritten
    assert resumed.load(tmp_path) == {"step": 4, "kl_coef": 0.1 + 0.2}
    assert_same(resumed.train(3), straight)


def test_without_its_moments_training_would_go_elsewhere(tmp_path: Path) -> None:
    """The test above tells something: a fresh optimiser on the same parameters ends elsewhere."""
    Trainer(0).train(4).save(tmp_path)
    fresh = Trainer(1)
    fresh.load(tmp_path)
    fresh.optimizer.state.clear()
    with pytest.raises(AssertionError):
        assert_same(fresh.train(3), Trainer(0).train(7))


def test_several_models_keep_apart(tmp_path: Path) -> None:
    policy, value = Trainer(0).train(3), Trainer(1).train(3)
    both = Checkpoints(tmp_path, {"policy": policy.learners["model"], "value": value.learners["model"]})
    both.save({"step": 3})
    both.wait()
    again, other = Trainer(5), Trainer(6)
    Checkpoints(tmp_path, {"policy": again.learners["model"], "value": other.learners["model"]}).load()
    again.done = other.done = 3
    assert_same(again.train(2), policy.train(2))
    assert_same(other.train(2), value.train(2))


def test_there_may_be_no_state(tmp_path: Path) -> None:
    untouched, trainer = Trainer(0), Trainer(0)
    assert trainer.load(tmp_path / "state") is None
    assert_same(trainer, untouched)


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    Trainer(0).save(tmp_path)
    resumed = Trainer(1)
    assert resumed.load(tmp_path) == {"step": 0}
    assert_same(resumed.train(2), Trainer(0).train(2))


def test_only_the_newest_state_is_kept_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    trainer = Trainer(0)
    for _ in range(3):
        trainer.train(2).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-6"]
    assert {path.suffix for path in (tmp_path / "step-6").iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / "latest.json").read_text()) == {"state": "step-6"}


class Killed(BaseException):
    """What a kill looks like from inside: no handler runs."""


@pytest.mark.parametrize("call", ["_quiet", "os.replace", "write_atomic", "shutil.rmtree"])
def test_a_kill_while_saving_leaves_the_old_or_the_new_state(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    trainer = Trainer(0).train(2).save(tmp_path).train(2)

    def kill(*args: Any, **options: Any) -> None:
        if call != "shutil.rmtree" or not options:  # not the clearing away before the save
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"{train_state.__name__}.{call}", kill)
        trainer.save(tmp_path)
    resumed = Trainer(1)
    resumed.load(tmp_path)
    assert resumed.done == (4 if call == "shutil.rmtree" else 2)
    assert_same(resumed, Trainer(0).train(resumed.done))
    trainer.save(tmp_path)  # and the next save is not in the way of what the kill left
    assert Trainer(2).load(tmp_path) == {"step": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-4"]
