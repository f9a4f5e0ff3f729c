"""A tiny task that the tests of PPO share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.model.data import Prompt
from bylaw.model.engine import Engine
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.records import Record, read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import Models, ppo, shared_value
from bylaw.rlaif.ppo_scores import Reward

SEED = 4
TIMES = ("eps/s", "tok/s", *(f"time/{name}_fraction" for name in ("sample", "score", "columns", "update")))
PROMPTS = [Prompt(f"p-{n}", [{"role": "user", "content": f"w{n} " * (1 + n % 3)}]) for n in range(10)]


class Likes(ScalarModel):
    """A reward model that gives 1 to a text in which `token` stands, else 0."""

    token: int

    def forward(self, packed: Any) -> Tensor:
        pieces = packed.tokens.tensor_split(packed.cu_seqlens[1:-1])
        return torch.tensor([float((piece == self.token).any()) for piece in pieces])


class Task:
    """A tiny policy on tiny prompts, and a reward for saying "good"."""

    def __init__(self, make_model: Callable[..., Transformer], tokenizer: Tokenizer, value: str = "separate") -> None:
        policy = make_model()
        self.reward = Likes(make_model())
        [self.reward.token] = tokenizer.encode("good")
        own = shared_value(policy) if value == "shared" else scalar_model(policy, SEED)
        self.models = Models(policy, own, make_model(), [Reward(self.reward)])
        self.engine, self.value, self.counts = Engine(policy, tokenizer), value, {}

    def run(self, folder: Path, show: Any = None, **settings: Any) -> list[Record]:
        """Run PPO; returns the lines of metrics.jsonl."""
        small: dict[str, Any] = {"iterations": 1, "rollouts": 12, "max_tokens": 6, "minibatches": 3, "save_every": 100}
        rates: dict[str, Any] = {"learning_rate": 3e-3, "value_learning_rate": 3e-3, "missing_eos_penalty": 0.0}
        config = PPOConfig(**small | rates | {"value": self.value, "value_coef": 1.0} | settings)
        extra = {} if show is None else {"show": show}
        self.counts = ppo(self.models, self.engine, PROMPTS, folder, config, SEED, **extra)
        return read_records(folder / "metrics.jsonl")


MakeTask = Callable[..., Task]


def copied(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: Any, before: Sequence[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def untimed(folder: Path) -> list[Record]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = read_records(folder / "metrics.jsonl")
    assert all(line.pop(name) > 0 for line in lines for name in TIMES)
    return lines
