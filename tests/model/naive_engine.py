"""A sampling engine with no cache and no batch, and the tiny models that it and the real one are driven with.

Every request stands alone, and every new token costs a packed forward over all that came before it.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from bylaw.kernels.philox import uniform_scalar
from bylaw.kernels.sample import sample
from bylaw.model.config import ModelConfig
from bylaw.model.engine import Completion, Query, Request
from bylaw.model.engine.slabs import Slabs
from bylaw.model.packing import pack
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer

VOCAB, CONTEXT = 53, 256
LETTERS = "abcdefg"
Script = Generator[Any, Any, Any]


class NaiveEngine:
    """The interface of `Engine`, without its checks: it takes good requests only."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    @torch.no_grad()
    def score(self, queries: Iterable[Query]) -> list[list[float]]:
        return [[self._score(prompt, candidate) for candidate in candidates] for prompt, candidates in queries]

    def chain(self, scripts: Sequence[Script]) -> list[Any]:
        """One script after the other."""
        return [self._play(script) for script in scripts]

    def _play(self, script: Script) -> Any:
        answer: Any = None
        while True:
            try:
                asked = script.send(answer)
            except StopIteration as end:
                return end.value
            answer = self.generate([asked])[0] if isinstance(asked, Request) else self.score([asked])[0]

    def _score(self, prompt: Sequence[int], candidate: Sequence[int]) -> float:
        packed = pack([[*prompt, *candidate]])
        logprobs = self.model.logits(self.model(packed)).double().log_softmax(dim=-1)
        return sum(float(logprobs[place, id]) for place, id in enumerate(candidate, len(prompt) - 1))

    def _complete(self, request: Request) -> Completion:
        ids: list[int] = []
        logprobs: list[float] = []
        while True:
            id, logprob = self._draw(request, ids)
            ids.append(id)
            logprobs.append(logprob)
            if id in request.stop_ids:
                return Completion(ids=ids, logprobs=logprobs, finish="stop")
            if (keep := self._before_stop(ids, request.stop_strings)) is not None:
                return Completion(ids=ids[:keep], logprobs=logprobs[:keep], finish="stop")
            if len(ids) == request.max_tokens or len(request.prompt) + len(ids) == self._context:
                return Completion(ids=ids, logprobs=logprobs, finish="length")

    def _draw(self, request: Request, ids: Sequence[int]) -> tuple[int, float]:
        logits = self.model.logits(self.model(pack([[*request.prompt, *ids]]))[-1:])
        uniform = torch.tensor([uniform_scalar(request.seed, request.request, len(ids))])
        temperature, top_k = torch.tensor([request.temperature]), torch.tensor([request.top_k])
        top_p, min_p = torch.tensor([request.top_p]), torch.tensor([request.min_p])
        token, logprob = sample(logits, uniform, temperature, top_k, top_p, min_p, backend="reference")
        return int(token), float(logprob)

    def _before_stop(self, ids: list[int], stops: tuple[str, ...]) -> int | None:
        """How many tokens stand before the first stop string, none of them part of it; None without one."""
        text = self.tokenizer.decode(ids)
        starts = [text.index(stop) for stop in stops if stop in text]
        if not starts:
            return None
        return max(n for n in range(len(ids)) if len(self.tokenizer.decode(ids[:n])) <= min(starts))

    @property
    def _context(self) -> int:
        return self.model.config.max_position_embeddings


def tiny_model(seed: int = 0, **options: Any) -> Transformer:
    """Two layers with weights large enough that a token's past decides what follows."""
    config: dict[str, Any] = {
        "family": "mistral", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    return randomise(Transformer(ModelConfig(**(config | options))), seed)


@torch.no_grad()
def randomise(model: Transformer, seed: int) -> Transformer:
    """Other weights, written into the same memory."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.4 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model


def share_prefixes(monkeypatch: pytest.MonkeyPatch, in_place: bool = True) -> None:
    """Prefixes are shared from a page on, and left where they are, or copied: for models this tiny it never pays."""
    monkeypatch.setattr(Slabs, "worth", lambda self, users, tokens: users > 1)
    monkeypatch.setattr(Slabs, "in_place", lambda self, users, tokens: in_place)


def cache_gib(model: Transformer, tokens: float) -> float:
    """What the keys and values of so many tokens take."""
    config = model.config
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens
    return numbers * model.embed.weight.element_size() / 2**30


def short_words() -> Tokenizer:
    """Letters and pairs of letters, `VOCAB` tokens in all; ids 0 and 1 are special and read as no text."""
    pieces = [*LETTERS, *(a + b for a in LETTERS for b in LETTERS)][: VOCAB - 2]
    vocabulary = {piece: id for id, piece in enumerate(["<unk>", "</s>", *pieces])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_parts(backend, eos_token="</s>")


def assert_same(got: Sequence[Any], expected: Sequence[Any], atol: float = 1e-4) -> None:
    """Same ids and finish of each completion, log-probs within `atol`; a list of scores likewise."""
    assert len(got) == len(expected)
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        if isinstance(other, Completion):
            assert isinstance(one, Completion), f"{n}: {one!r}"
            assert (one.ids, one.finish) == (other.ids, other.finish), f"completion {n}"
            one, other = one.logprobs, other.logprobs
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=atol, rtol=0)
