"""The whole model on the Triton kernels, as on a GPU, against the torch references: training, PPO and sampling.

Without a GPU the kernels run under Triton's interpreter, so the model is as small as it can be.
"""

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.model.config import ModelConfig
from bylaw.model.engine import Engine, Request
from bylaw.model.heads import scalar_model
from bylaw.model.packing import pack
from bylaw.model.supervised import Example, supervised_loss
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize
from bylaw.rlaif.rollout import Rollout, column, fill_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"windows": (7, 7)},
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """on("triton") makes every operation on the model's device take its kernel, on("reference") plain torch."""

    def choose(backend: str) -> None:
        def chosen(operation: str, asked: str, tensor: Tensor, library: bool = False) -> str:
            return backend if tensor.device.type == DEVICE else "reference"

        names = [f"bylaw.kernels.{path.stem}" for path in (Path(__file__).parents[2] / "kernels").glob("*.py")]
        for name in {*names, "bylaw.model.cache"} - {"bylaw.kernels.backend"}:
            module = importlib.import_module(name)
            if hasattr(module, "choose"):
                monkeypatch.setattr(module, "choose", chosen)

    return choose


def make(family: Any) -> Transformer:
    config = ModelConfig(
        family=family, vocab_size=37, hidden_size=18, intermediate_size=20, num_layers=2, num_heads=3, num_kv_heads=1,
        head_dim=6, max_position_embeddings=48, initializer_range=0.4, **FAMILIES[family],
    )  # fmt: skip
    return initialize(Transformer(config), 0).to(DEVICE)


def texts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(37) for _ in range(draw.randrange(2, longest))] for _ in range(count)]


def loss_and_gradients(model: Transformer) -> list[Tensor]:
    examples = [Example(ids, [False, *[i % 3 > 0 for i in range(len(ids) - 2)], True]) for ids in texts(2, 24)]
    model.zero_grad()
    loss = supervised_loss(model, examples)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family: str, on: Callable[[str], None]) -> None:
    model = make(family)
    on("reference")
    expected = loss_and_gradients(model)
    on("triton")
    got = loss_and_gradients(model)
    assert len(got) == 1 + len(list(model.parameters()))
    for ours, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, torchs, atol=2e-5 * float(torchs.abs().max()), rtol=0)


def test_the_columns_of_ppo(on: Callable[[str], None]) -> None:
    model, other = make("llama"), make("qwen2")
    columns = {}
    for backend in ("reference", "triton"):
        on(backend)
        rollouts = [Rollout(str(i), ids[:3], [*ids[3:], 1], torch.zeros(1), True) for i, ids in enumerate(texts(2, 20))]
        fill_columns(rollouts, model, other, scalar_model(model, 0), 0.7)
        columns[backend] = {name: column(rollouts, name) for name in rollouts[0].columns}
    for name, expected in columns["reference"].items():
        torch.testing.assert_close(columns["triton"][name], expected, atol=2e-5, rtol=1e-5)
    assert set(columns["triton"]) == {"logprobs", "reference", "values", "entropy"}


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_sampled_and_greedy_text(family: str, on: Callable[[str], None], tokenizer: Tokenizer) -> None:
    """Requests of several lengths join and leave a batch of two, across a border of the cache's pages."""
    engine = Engine(make(family), tokenizer, max_rows=2)
    requests = [
        Request(prompt=ids, max_tokens=tokens, seed=0, request=i, temperature=temperature, top_k=20 * (i == 2))
        for i, (ids, tokens, temperature) in enumerate(
            zip([list(range(29)), *texts(2, 16)], (6, 2, 4), (0.0, 1.0, 0.8), strict=True)
        )
    ]
    on("reference")
    expected = engine.generate(requests)
    on("triton")
    for got, wanted in zip(engine.generate(requests), expected, strict=True):
        assert got.ids == wanted.ids and got.finish == wanted.finish
        torch.testing.assert_close(got.logprobs, wanted.logprobs, atol=2e-5, rtol=0)


def test_scores_of_candidates(on: Callable[[str], None], tokenizer: Tokenizer) -> None:
    engine = Engine(make("llama"), tokenizer)
    queries = [(ids, [[3], [4], [5, 6]]) for ids in texts(2, 16)]
    on("reference")
    expected = engine.score(queries)
    on("triton")
    torch.testing.assert_close(torch.tensor(engine.score(queries)), torch.tensor(expected), atol=3e-5, rtol=0)
    assert len(pack([ids for ids, _ in queries]).tokens) > 6
