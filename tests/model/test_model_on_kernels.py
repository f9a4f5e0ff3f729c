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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bylaw.model.config import ModelConfig
from bylaw.model.engine import Completion, Engine, Request
from bylaw.model.engine.graphs import GraphDecoder
from bylaw.model.engine.pages import Pages
from bylaw.model.engine.slabs import Slabs
from bylaw.model.engine.store import GIB, page_bytes
from bylaw.model.heads import scalar_model
from bylaw.model.supervised import Example, supervised_loss
from bylaw.model.transformer import Transformer, initialize
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo_batch import Batch, fill_columns
from bylaw.rlaif.rollout import Rollout

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
        for name in {*names, "bylaw.model.engine.decode"} - {"bylaw.kernels.backend"}:
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
    config, columns = PPOConfig(rollouts=2, minibatches=1, temperature=0.7), {}
    for backend in ("reference", "triton"):
        on(backend)
        rollouts = [
            Rollout(str(i), ids[:3], [*ids[3:], 1], [0.0] * (len(ids) - 2), True) for i, ids in enumerate(texts(2, 20))
        ]
        batch = Batch(rollouts, model.device)
        plan = batch.minibatches(config, 0, 0, 0)
        fill_columns(batch, plan, model, other, scalar_model(model, 0), config)
        columns[backend] = batch.columns
    for name, expected in columns["reference"].items():
        torch.testing.assert_close(columns["triton"][name], expected, atol=2e-5, rtol=1e-5)
    assert set(columns["triton"]) == {"sampler", "logprobs", "reference", "values", "entropy"}


def engines(family: str, on: Callable[[str], None], rows: int) -> tuple[Engine, Engine]:
    """One that takes the kernels from now on, and one on the CPU that has taken plain torch."""
    on("reference")
    plain = Engine(make(family).cpu(), max_rows=rows)
    assert isinstance(plain.memory.store, Slabs)
    on("triton")
    model = make(family)
    page_gib = page_bytes(model) / GIB
    engine = Engine(model, max_rows=rows, cache_gib=12.5 * page_gib)
    assert isinstance(engine.memory.store, Pages)
    return engine, plain


def plain_answers(engine: Engine, on: Callable[[str], None], method: str, asked: Any) -> Any:
    """On a CPU the backends are switched for the while; on a GPU this engine's device tells."""
    on("reference")
    answers = getattr(engine, method)(asked)
    on("triton")
    return answers


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.ids == other.ids and one.finish == other.finish
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=0)


def requests(*settings: tuple[list[int], int, float], top_k: int = 0) -> list[Request]:
    """Of (prompt, max_tokens, temperature)."""
    return [
        Request(prompt=ids, max_tokens=tokens, seed=0, request=i, temperature=temperature, top_k=top_k)
        for i, (ids, tokens, temperature) in enumerate(settings)
    ]


def test_sampled_and_greedy_text(on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One joins when another leaves; a page that two begin with stays in its place, and is read once for both."""
    engine, plain = engines("mistral", on, 2)
    monkeypatch.setattr("bylaw.model.engine.page_streams.COMMON_TOKENS", 16)
    start = list(range(32))
    asked = requests(([*start, 9], 3, 0.0), ([*start, 3], 2, 1.0), ([7, 8], 2, 0.8), top_k=20)
    assert_same(engine.generate(asked), plain_answers(plain, on, "generate", asked))
    assert engine.stats.cached_tokens >= 32


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: what they were given, not what gave it; a read by the host is an error.

    Played, each is done again on the same memory; what an earlier one made new stands in for what it made then.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.played = work, 0
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a wait"
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor of host data"
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """What one of several uses of a size does: the first of them records."""
        if not self.steps:
            with self:
                self.work()
            return
        made: dict[int, Tensor] = {}
        for func, args, kwargs, out in self.steps:
            now = func(*tree_map_only(Tensor, lambda x: made.get(id(x), x), args), **kwargs)  # noqa: B023
            pairs = zip(tree_leaves(out), tree_leaves(now), strict=True)
            made |= {id(old): new for old, new in pairs if isinstance(old, Tensor)}
        self.played += 1


@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for graphs where there are none")
def test_a_step_needs_nothing_of_the_host_but_what_is_in_its_buffers(on: Callable[[str], None]) -> None:
    """Rows join and leave while what was recorded once is played again and again."""
    engine, plain = engines("qwen3", on, 3)
    store = engine.memory.store
    assert isinstance(store, Pages)
    engine.late = 1
    tapes: list[Tape] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        tapes.append(Tape(work))
        return tapes[-1].play

    engine.memory.decoder = GraphDecoder(engine.model, store, 3, lambda: capture)
    asked = requests(([3, 4], 9, 0.0), ([5], 5, 1.0), ([6, 7, 8], 9, 0.8), ([9], 3, 1.0))
    assert_same(engine.generate(asked), plain_answers(plain, on, "generate", asked))
    assert sum(tape.played for tape in tapes) >= 4


def test_scores_of_candidates(on: Callable[[str], None]) -> None:
    engine, plain = engines("llama", on, 4)
    queries = [(ids, [[3], [4], [5, 6]]) for ids in texts(2, 16)]
    expected = plain_answers(plain, on, "score", queries)
    torch.testing.assert_close(torch.tensor(engine.score(queries)), torch.tensor(expected), atol=3e-5, rtol=0)
