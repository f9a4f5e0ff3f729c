"""What is asked of the engine, what it answers, and what it refuses before work starts."""

import math
from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from bylaw.model.config import ModelConfig
from bylaw.model.settings import require

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue, as token ids. `request` names its draws: the same (seed, request) gives the same text."""

    prompt: Sequence[int]
    max_tokens: int
    seed: int
    request: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Sampled tokens and the log-prob of each under the distribution that it was drawn from.

    A stop id is the last of `ids`; a stop string is cut off. `finish` is "length" when max_tokens or the context ran
    out.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


class Query(NamedTuple):
    """A prompt, and the candidates whose log-probs after it are wanted, all as token ids."""

    prompt: Sequence[int]
    candidates: Sequence[Sequence[int]]


Script = Generator[Request | Query, Any, Result]
"""Yields a Request and is sent its Completion, or a Query and is sent its list[float]; returns its result."""


@dataclass(frozen=True)
class Limits:
    """What the model and the cache can hold."""

    context: int
    vocab: int
    cache_tokens: int  # of one sequence, in whole pages
    reads_text: bool  # there is a tokenizer, so stop strings can be found

    @classmethod
    def of(cls, config: ModelConfig, cache_tokens: int, reads_text: bool) -> "Limits":
        return cls(config.max_position_embeddings, config.vocab_size, cache_tokens, reads_text)

    def span(self, request: Request) -> int:
        """Tokens of the prompt and the longest text after it."""
        return min(len(request.prompt) + request.max_tokens, self.context)

    def check(self, asked: Request | Query) -> None:
        """Raise ValueError for what cannot be done: the value, what is allowed, and what to change."""
        if isinstance(asked, Request):
            self._check_request(asked)
        elif isinstance(asked, tuple) and len(asked) == 2:
            self._check_query(*asked)
        else:
            raise ValueError(f"{asked!r:.80} was asked; allowed: a Request, or a Query of a prompt and its candidates")

    def _check_request(self, request: Request) -> None:
        length = len(request.prompt)
        if not length or request.max_tokens < 1:
            raise ValueError(
                f"a request needs a prompt and max_tokens of at least 1 each; it has {length} and {request.max_tokens}"
            )
        if length >= self.context:
            raise ValueError(f"a prompt of {length} tokens leaves no room in the context of {self.context}")
        self._check_ids("prompt", request.prompt)
        self._check_ids("stop_ids", request.stop_ids)
        for name in ("seed", "request"):
            value = getattr(request, name)
            require(-(2**63) <= value < 2**63, name, value, "-2^63 to 2^63 - 1")
        if self.span(request) > self.cache_tokens:
            raise ValueError(
                f"a prompt of {length} tokens and up to {request.max_tokens} more need a cache of {self.span(request)} "
                f"tokens; the cache holds {self.cache_tokens}: raise cache_gib, or lower max_tokens"
            )
        require(0 <= request.temperature < math.inf, "temperature", request.temperature, "0 (greedy) and finite above")
        require(request.top_k >= 0, "top_k", request.top_k, "0 (no limit) and above")
        require(0 < request.top_p <= 1, "top_p", request.top_p, "above 0 to 1 (no limit)")
        require(0 <= request.min_p <= 1, "min_p", request.min_p, "0 (no limit) to 1")
        if "" in request.stop_strings:
            raise ValueError(f"stop_strings = {request.stop_strings!r}: an empty one is in every text; leave it out")
        if request.stop_strings and not self.reads_text:
            raise ValueError(f"stop_strings = {request.stop_strings!r}, but the engine has no tokenizer: give it one")

    def _check_query(self, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> None:
        for c, candidate in enumerate(candidates):
            if not prompt or not candidate or len(prompt) + len(candidate) > self.context:
                raise ValueError(
                    f"candidate {c}: {len(prompt)} and {len(candidate)} tokens; allowed: at least one each, and at "
                    f"most the context of {self.context} together"
                )
            self._check_ids(f"candidate {c}", candidate)
        self._check_ids("prompt", prompt)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        try:
            array("q", ids)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{name}: {error}; allowed: integers from 0 to {self.vocab - 1}") from error
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab:
            bad = next(token for token in ids if not 0 <= token < self.vocab)
            raise ValueError(f"{name} holds the id {bad}; allowed: 0 to {self.vocab - 1}, the model's vocabulary")
