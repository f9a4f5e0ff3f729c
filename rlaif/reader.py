"""What a judge is asked, what it answers, and a judge that is a model on this machine.

Labels ask through `Reader` alone, so that a checkpoint here and one behind a server (rlaif/remote.py) are one thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bylaw.kernels.philox import request_id
from bylaw.model.engine import Engine, Request
from bylaw.model.sampler import Turn, text_record, tokenizer_of

OPTIONS = (" A", " B")
TOO_LONG = "question longer than the judge's context"
FILTERED = "refused by the server's content filter"
CENSORED = "content_filter"
"""The `finish` of a thought that a server's content filter refused or cut."""


@dataclass(frozen=True)
class Question:
    """A dialogue that ends with the user, few-shot turns before it, and what begins the reply: a letter comes next."""

    messages: Sequence[Turn]
    prefix: str


@dataclass(frozen=True)
class Reading:
    """The log-probs (nats) of the letters A and B, or None and the reason `why` there are none.

    `bounded`: the server did not list one of the two, and the smallest log-prob that it did list stands for it, which
    is no less than the true one.
    """

    logprobs: tuple[float, float] | None
    why: str = ""
    bounded: bool = False


@dataclass(frozen=True)
class Thought:
    """A reply to go on with, at most `limit` tokens after `prefix`. `key` names the draw, and `stop` ends it, too."""

    messages: Sequence[Turn]
    prefix: str
    key: tuple[str | int, ...]
    limit: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


class Reader(Protocol):
    """A judge that can be asked. `hash` names it in records and manifests."""

    @property
    def hash(self) -> str: ...

    def check(self) -> None:
        """Raise ValueError, before any work, for a judge that cannot be read."""
        ...

    def forget(self) -> None:
        """Begin a chunk: what was asked before must change no bit of what comes."""
        ...

    def read(self, asked: Sequence[Question]) -> list[Reading]:
        """One reading for each question, in order."""
        ...

    def think(self, asked: Sequence[Thought]) -> list[dict[str, Any]]:
        """One text record (`text`, `ids`, `finish`) for each thought, in order, without the prefix."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalReader:
    """A model on this machine. `hash` is its checkpoint's; `prefix` is what the option letters follow."""

    engine: Engine
    seed: int
    prefix: str
    hash: str

    def check(self) -> None:
        """Raise ValueError for a tokenizer that has no single token for an option letter."""
        self._option_ids()

    def forget(self) -> None:
        self.engine.forget()

    def read(self, asked: Sequence[Question]) -> list[Reading]:
        """One pass over all questions: those that begin alike share their beginning. One too long is not asked."""
        tokenizer, candidates = tokenizer_of(self.engine), [[token] for token in self._option_ids()]
        prompts = [tokenizer.prompt_ids(one.messages, prefix=one.prefix) for one in asked]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < self._context]
        scores = self.engine.score([(prompts[i], candidates) for i in fitting])
        read = {i: Reading((a, b)) for i, (a, b) in zip(fitting, scores, strict=True)}
        return [read.get(i, Reading(None, TOO_LONG)) for i in range(len(prompts))]

    def think(self, asked: Sequence[Thought]) -> list[dict[str, Any]]:
        """As `Reader.think`. Where the context has no room for a token the text is empty, and its end "length"."""
        tokenizer = tokenizer_of(self.engine)
        requests = [self._request(one) for one in asked]
        fitting = [i for i, request in enumerate(requests) if len(request.prompt) < self._context]
        completions = self.engine.generate([requests[i] for i in fitting])
        said = {i: text_record(one, tokenizer) for i, one in zip(fitting, completions, strict=True)}
        return [said.get(i, {"text": "", "ids": [], "finish": "length"}) for i in range(len(requests))]

    def _request(self, thought: Thought) -> Request:
        tokenizer = tokenizer_of(self.engine)
        return Request(
            prompt=tokenizer.prompt_ids(thought.messages, prefix=thought.prefix),
            max_tokens=thought.limit,
            seed=self.seed,
            request=request_id(*thought.key),
            temperature=thought.temperature,
            stop_ids=tokenizer.stop_ids,
            stop_strings=(*tokenizer.stop_strings, *thought.stop),
        )

    def _option_ids(self) -> list[int]:
        return tokenizer_of(self.engine).option_ids(OPTIONS, after=self.prefix)

    @property
    def _context(self) -> int:
        return self.engine.model.config.max_position_embeddings
