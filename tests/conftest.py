"""Tiny stand-ins that the stages' tests share: a word-level tokenizer, random Llamas, a constitution, a known judge."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from small_run import process, write_run
from tokenizers import models, pre_tokenizers

from bylaw.constitution.schema import Constitution, Principle, Templates
from bylaw.model.config import ModelConfig
from bylaw.model.engine import Engine, Query
from bylaw.model.sampler import tokenizer_of
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize

WORDS = ("Human", "Assistant", ":", "A", "B", "so", "good", "bad", "check", "fix", "which", "rule", "one", "two")
MakeModel = Callable[..., Transformer]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are so small that more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run that nothing disturbed. Tests that change something make a copy."""
    folder = tmp_path_factory.mktemp("whole")
    done = process("-m", "bylaw", "run", write_run(folder))
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Words, and w0 to w19; "</s>" is 0."""
    words = ["</s>", "<unk>", *WORDS, *(f"w{n}" for n in range(20))]
    backend = tokenizers.Tokenizer(models.WordLevel({w: id for id, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>", "<unk>"])
    return Tokenizer.from_parts(backend, eos_token="</s>")


@pytest.fixture
def make_model(tokenizer: Tokenizer) -> MakeModel:
    """make_model(seed, context, width): weights large enough that the next token is far from uniform."""

    def make(seed: int = 0, context: int = 128, width: int = 16, spread: float = 0.3) -> Transformer:
        config = ModelConfig(
            family="llama",
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=width // 2,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=spread,
            eos_token_ids=tokenizer.stop_ids,
        )
        return initialize(Transformer(config), seed)

    return make


@pytest.fixture(scope="session")
def constitution() -> Constitution:
    """Two principles, the second three times as heavy, in words that the tokenizer knows."""
    templates = Templates(
        critique="check {statement}",
        revision="fix {statement}",
        question="which {statement}",
        comparison="{dialogue} {question} A {answer_a} B {answer_b}",
        answer_prefix="so :",
    )
    principles = tuple(
        Principle(id=id, title=id, statement=f"rule {id}", sources=("a test",), weight=weight)
        for id, weight in (("one", 1.0), ("two", 3.0))
    )
    return Constitution(
        name="test", version="1", license="CC0-1.0", preamble="", principles=principles, templates=templates
    )


class KnownJudge(Engine):
    """A judge that is known: it likes an option by its number of good words, and the letter A by `bias`, in nats.

    `mass` is the probability that it puts on the two letters together. `asked` keeps the prompts.
    """

    taste, bias, mass = 1.0, 0.0, 0.5
    asked: Sequence[Query] = ()

    def score(self, queries: Sequence[Query]) -> list[list[float]]:
        self.asked = [*self.asked, *queries]
        return [self._letters(list(prompt)) for prompt, _ in queries]

    def _letters(self, prompt: list[int]) -> list[float]:
        found = re.search(r" A (.*) B (.*) Assistant : so :$", tokenizer_of(self).decode(prompt))
        assert found is not None
        lead = found[1].split().count("good") - found[2].split().count("good")
        p_a = 1 / (1 + math.exp(-self.taste * lead - self.bias))
        return [math.log(self.mass * p_a), math.log(self.mass * (1 - p_a))]


@pytest.fixture
def known_judge(make_model: MakeModel, tokenizer: Tokenizer) -> KnownJudge:
    return KnownJudge(make_model(), tokenizer)
