"""The sampling engine: batched decoding with a KV cache over the trainer's own parameters.

Rows join and leave the batch at any step. A row's tokens come from counter-based draws keyed by (seed, request,
position), so they do not depend on which other rows share its batch, and there is no generator state to save.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Literal

import torch
from torch import Tensor

from bylaw.kernels.attention import attention
from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.kernels.philox import uniform
from bylaw.kernels.sample import sample
from bylaw.model.cache import Cache, make_cache
from bylaw.model.packing import Packed, pack, token_batches
from bylaw.model.settings import require
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Rotary, Transformer

PREFILL_TOKENS = 8192

Query = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt, and the candidates whose log-probs after it are wanted."""


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


@dataclass
class _Row:
    index: int
    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Prefill:
    """New prompts as a packed stream, whose keys and values are kept."""

    packed: Packed
    cache: Cache
    places: Tensor  # of each token in the cache

    @property
    def tokens(self) -> Tensor:
        return self.packed.tokens

    @property
    def positions(self) -> Tensor:
        return self.packed.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        q, k = self.cache.write(layer, q, k, v, rotary, self.places)
        return attention(q, k, v, self.packed.layout, window)


@dataclass(frozen=True)
class _Step:
    """The newest token of each running row."""

    tokens: Tensor  # [n]
    positions: Tensor  # [n]
    cache: Cache
    places: Tensor  # of each token in the cache
    lengths: Tensor  # [n] int32: what each row has with it
    longest: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor:
        q, _ = self.cache.write(layer, q, k, v, rotary, self.places)
        return self.cache.attend(layer, q, self.lengths, self.longest, window)


class Engine:
    """Generates and scores with `model` as it is at the call: no copy of weights, nothing kept between calls."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, max_rows: int = 64) -> None:
        """`max_rows` requests run together; raises ValueError if that is below 1."""
        require(max_rows >= 1, "max_rows", max_rows, "1 or more")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], on_finish: Callable[[int], None] = lambda index: None
    ) -> list[Completion]:
        """Continue each prompt; completions in the caller's order. `on_finish` hears each index as it is done.

        Raises ValueError for an empty prompt, one that leaves no room in the context, max_tokens below 1, a
        sampling setting out of range, or an empty stop string; and for logits that are NaN or infinite.
        """
        for request in requests:
            self._check(request)
        done: list[Completion | None] = [None] * len(requests)
        waiting = deque(_Row(i, request) for i, request in enumerate(requests))
        cache = make_cache(self.model, min(self.max_rows, len(requests)), max(map(self._span, requests), default=0))
        running: list[_Row] = []
        while waiting or running:
            hidden = self._advance(running, waiting, cache)
            self._draw(running, hidden)
            for slot in reversed(range(len(running))):
                completion = self._finished(running[slot])
                if completion is not None:
                    done[running[slot].index] = completion
                    on_finish(running[slot].index)
                    _release(running, slot, cache)
        return [completion for completion in done if completion is not None]

    @torch.no_grad()
    def score(self, queries: Sequence[Query]) -> list[list[float]]:
        """For each (prompt, candidates), each candidate's log-prob after the prompt: summed, at temperature 1.

        Candidates that differ only in their last token share one pass, and so do queries with the same prompt. Raises
        ValueError for an empty prompt or candidate, and for one that does not fit the context.
        """
        scores = [[0.0] * len(candidates) for _, candidates in queries]
        users: dict[
            tuple[tuple[int, ...], int], list[tuple[int, int]]
        ] = {}  # (ids, of them prompt) -> (query, candidate)
        for q, (prompt, candidates) in enumerate(queries):
            for c, candidate in enumerate(candidates):
                self._check_query(q, c, len(prompt), len(candidate))
                users.setdefault(((*prompt, *candidate[:-1]), len(prompt)), []).append((q, c))
        streams = list(users)
        for batch in token_batches([len(ids) for ids, _ in streams], PREFILL_TOKENS):
            chosen = [streams[i] for i in batch]
            # Each stream's own tokens after its prompt, then the last token of each of its users.
            lasts = [[queries[q][1][c][-1] for q, c in users[stream]] for stream in chosen]
            for stream, logprobs in zip(chosen, self._next_logprobs(chosen, lasts), strict=True):
                body = len(stream[0]) - stream[1]
                for (q, c), last in zip(users[stream], logprobs[body:], strict=True):
                    scores[q][c] = sum(logprobs[:body]) + last
        return scores

    def _next_logprobs(self, streams: list[tuple[tuple[int, ...], int]], lasts: list[list[int]]) -> list[list[float]]:
        """Per stream (ids, of them prompt), log-probs of its tokens after the prompt, and of each last after them."""
        packed = pack([ids for ids, _ in streams], self.model.device)
        places: list[int] = []
        tokens: list[int] = []
        ends = accumulate(len(ids) for ids, _ in streams)
        for (ids, start), last, end in zip(streams, lasts, ends, strict=True):
            places += [*range(end - len(ids) + start - 1, end - 1), *[end - 1] * len(last)]
            tokens += [*ids[start:], *last]
        hidden = self.model(packed)[torch.tensor(places).to(self.model.device)]
        targets = torch.tensor(tokens).to(self.model.device)
        logprobs = iter(linear_logprob(hidden, self.model.head_weight, targets).logprobs.tolist())
        counts = [len(ids) - start + len(last) for (ids, start), last in zip(streams, lasts, strict=True)]
        return [list(islice(logprobs, count)) for count in counts]

    def _check_query(self, query: int, candidate: int, prompt: int, length: int) -> None:
        context = self.model.config.max_position_embeddings
        if not prompt or not length or prompt + length > context:
            raise ValueError(
                f"query {query}, candidate {candidate}: {prompt} and {length} tokens; allowed: at least one each, and "
                f"at most the context of {context} together"
            )

    def _span(self, request: Request) -> int:
        return min(len(request.prompt) + request.max_tokens, self.model.config.max_position_embeddings)

    def _check(self, request: Request) -> None:
        context = self.model.config.max_position_embeddings
        if not len(request.prompt) or request.max_tokens < 1:
            found = f"{len(request.prompt)} and {request.max_tokens}"
            raise ValueError(f"a request needs a prompt and max_tokens of at least 1 each; it has {found}")
        if len(request.prompt) >= context:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens leaves no room in the context of {context}")
        require(0 <= request.temperature < math.inf, "temperature", request.temperature, "0 (greedy) and finite above")
        require(request.top_k >= 0, "top_k", request.top_k, "0 (no limit) and above")
        require(0 < request.top_p <= 1, "top_p", request.top_p, "above 0 to 1 (no limit)")
        require(0 <= request.min_p <= 1, "min_p", request.min_p, "0 (no limit) to 1")
        if "" in request.stop_strings:
            raise ValueError(f"stop_strings = {request.stop_strings!r}: an empty one is in every text; leave it out")

    def _advance(self, running: list[_Row], waiting: deque[_Row], cache: Cache) -> Tensor:
        """Hidden states [n, H] to draw each running row's next token from; new rows join when it is worth it."""
        rows = cache.rows
        hidden = self._decode(running, cache) if running else None
        # A prefill for every single free row would cost more than it brings: wait until an eighth of the batch is free.
        if not waiting or (running and rows - len(running) < max(1, rows // 8)):
            assert hidden is not None
            return hidden
        joining = [waiting.popleft() for _ in range(min(rows - len(running), len(waiting)))]
        pieces = [] if hidden is None else [hidden]
        for batch in token_batches([len(row.request.prompt) for row in joining], PREFILL_TOKENS):
            pieces.append(self._prefill([joining[i] for i in batch], len(running), cache))
            running.extend(joining[i] for i in batch)
        return torch.cat(pieces)

    def _prefill(self, joining: list[_Row], first_row: int, cache: Cache) -> Tensor:
        packed = pack([row.request.prompt for row in joining], self.model.device)
        slots = torch.arange(first_row, first_row + len(joining), device=self.model.device)
        # Told its length, a GPU need not be waited for.
        rows = slots.repeat_interleave(packed.cu_seqlens.diff(), output_size=len(packed.tokens))
        hidden = self.model(_Prefill(packed, cache, cache.places(rows, packed.positions)))
        return hidden[packed.last]

    def _decode(self, running: list[_Row], cache: Cache) -> Tensor:
        device = self.model.device
        tokens = torch.tensor([row.ids[-1] for row in running], device=device)
        newest = [len(row.request.prompt) + len(row.ids) - 1 for row in running]
        positions = torch.tensor(newest, device=device)
        places = cache.places(torch.arange(len(running), device=device), positions)
        return self.model(_Step(tokens, positions, cache, places, (positions + 1).int(), max(newest) + 1))

    def _draw(self, running: list[_Row], hidden: Tensor) -> None:
        asked = [row.request for row in running]
        keys = torch.tensor([(r.seed, r.request, len(row.ids)) for r, row in zip(asked, running, strict=True)])
        uniforms = uniform(keys[:, 0], keys[:, 1], keys[:, 2])
        temperature = torch.tensor([r.temperature for r in asked])
        top_k, top_p = torch.tensor([r.top_k for r in asked]), torch.tensor([r.top_p for r in asked])
        min_p, device = torch.tensor([r.min_p for r in asked]), self.model.device
        settings = (x.to(device) for x in (uniforms, temperature, top_k, top_p, min_p))
        tokens, logprobs = sample(self.model.logits(hidden), *settings)
        for row, token, logprob in zip(running, tokens.tolist(), logprobs.tolist(), strict=True):
            if token < 0:  # how the kernel reports it; the reference has raised by itself
                name = row.request.request
                raise ValueError(f"request {name}: its logits are not finite; the model's output is broken")
            row.ids.append(token)
            row.logprobs.append(logprob)

    def _finished(self, row: _Row) -> Completion | None:
        request, ids = row.request, row.ids
        if ids[-1] in request.stop_ids:
            return Completion(ids=ids, logprobs=row.logprobs, finish="stop")
        if request.stop_strings and (keep := self._before_stop(ids, request.stop_strings)) is not None:
            return Completion(ids=ids[:keep], logprobs=row.logprobs[:keep], finish="stop")
        if (
            len(ids) >= request.max_tokens
            or len(request.prompt) + len(ids) >= self.model.config.max_position_embeddings
        ):
            return Completion(ids=ids, logprobs=row.logprobs, finish="length")
        return None

    def _before_stop(self, ids: list[int], stop_strings: tuple[str, ...]) -> int | None:
        """How many tokens stand before the first stop string (one that runs into it does not); None without one."""
        # A token holds at least one byte, so the string's bytes bound how many tokens it can end in.
        tail, text = self._read_tail(ids[-max(len(stop.encode()) for stop in stop_strings) - 8 :])
        starts = [text.index(stop) for stop in stop_strings if stop in text]
        if not starts:
            return None
        keep = len(tail) - 1
        while keep and len(self.tokenizer.decode(tail[:keep])) > min(starts):
            keep -= 1
        return len(ids) - len(tail) + keep

    def _read_tail(self, tail: list[int], spare: int = 3) -> tuple[list[int], str]:
        """The tail and its text, from the first character that begins in it: up to 3 tokens may hold the rest of one.

        A byte-fallback decoder reads bytes that follow each other as one, so that half a character spoils them all.
        """
        text = self.tokenizer.decode(tail)
        if spare and text.startswith("\ufffd"):
            return self._read_tail(tail[1:], spare - 1)
        return tail, text


def _release(running: list[_Row], slot: int, cache: Cache) -> None:
    """Free a row: the last running row takes its place."""
    last = len(running) - 1
    if slot != last:
        cache.move(last, slot)
        running[slot] = running[last]
    running.pop()
