"""The workloads of the engine benchmark, as the engine's requests, queries and scripts; both sides take the same ones.

Random token ids stand for text: neither side can know what they mean, and each draw is another text of the same form.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from bylaw.benchmarks.engine_config import Sizes
from bylaw.model.engine import Completion, Query, Request, Script

Turn = tuple[list[int], list[int]]
"""A prompt and what was generated after it."""
Chain = Script[list[Turn]]
Draw = Callable[[int], list[int]]
"""So many random token ids."""


class Side(Protocol):
    """What is measured: the engine, or a peer behind its interface."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def score(self, queries: Sequence[Query]) -> list[list[float]]: ...

    def chain(self, scripts: Sequence[Chain]) -> list[Any]: ...


@dataclass(frozen=True)
class Work:
    """One draw of a workload. `useful` counts what was asked for, in `unit`s; `shared` is the common prefix of a group
    of consecutive items, in tokens.
    """

    unit: Literal["tokens", "chains", "labels"]
    useful: int
    requests: Sequence[Request] = ()
    queries: Sequence[Query] = ()
    scripts: Sequence[Callable[[], Chain]] = ()
    shared: int = 0

    def run(self, side: Side) -> list[list[Turn]] | list[list[float]]:
        """Per request or chain its turns; per query its log-probs."""
        if self.queries:
            return side.score(self.queries)
        if self.scripts:
            return side.chain([script() for script in self.scripts])
        done = side.generate(self.requests)
        return [[(list(asked.prompt), one.ids)] for asked, one in zip(self.requests, done, strict=True)]


def draw(name: str, sizes: Sizes, vocab: int, seed: int) -> Work:
    """One draw of the workload of that name, the same for the same seed."""
    source = random.Random(f"{name} {seed}")

    def tokens(count: int) -> list[int]:
        return [source.randrange(vocab) for _ in range(count)]

    return MAKERS[name.split(",")[0]](sizes, tokens, source)  # the rows by hand are the same work


def greedy(prompt: Sequence[int], new: int) -> Request:
    """A request for exactly so many tokens, each the likeliest."""
    return Request(prompt=prompt, max_tokens=new, seed=0, request=0, temperature=0.0)


def _text(requests: list[Request], shared: int = 0) -> Work:
    return Work("tokens", sum(request.max_tokens for request in requests), requests=requests, shared=shared)


def _equal(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    return _text([greedy(tokens(sizes.prompt), sizes.new) for _ in range(sizes.requests)])


def _varied(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    """Prompts and new tokens in even steps over their range, each in an order of its own: any draw is as much work."""
    prompts, news = (_spread(*sizes.varied, sizes.varied_requests, source) for _ in range(2))
    return _text([greedy(tokens(prompt), new) for prompt, new in zip(prompts, news, strict=True)])


def _spread(least: int, most: int, count: int, source: random.Random) -> list[int]:
    steps = [least + round(i * (most - least) / max(1, count - 1)) for i in range(count)]
    source.shuffle(steps)
    return steps


def _prefix(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    prefix = tokens(sizes.prefix)
    requests = [greedy(prefix + tokens(sizes.prompt), sizes.new) for _ in range(sizes.requests)]
    return _text(requests, len(prefix))


def _decode(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    """64 rows without anything in common, whose steps of decoding all read a long cache."""
    prompt = sizes.decode_context - sizes.decode_new
    return _text([greedy(tokens(prompt), sizes.decode_new) for _ in range(sizes.requests)])


def _chains(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    """Critique and revision as in sl_cai: a round sees the question and the answer of the round before it.

    The answer is asked for as it is; a critique stands after five examples (the paper, section 3.1), and a revision
    after those and the critique.
    """
    shots = tokens(sizes.shots)
    asks = [(tokens(sizes.ask), tokens(sizes.ask)) for _ in range(sizes.principles)]

    def chain() -> Callable[[], Chain]:
        question, rounds = tokens(sizes.question), source.choices(asks, k=sizes.rounds)
        lengths = _spread(*sizes.said, 1 + 2 * sizes.rounds, source)
        return lambda: critique_revision(shots, question, rounds, lengths)

    return Work("chains", sizes.chains, scripts=[chain() for _ in range(sizes.chains)], shared=len(shots))


def critique_revision(
    shots: list[int], question: list[int], rounds: Sequence[tuple[list[int], list[int]]], lengths: Sequence[int]
) -> Chain:
    """One chain: answer, then for each round's two asks a critique and a revision. Returns all turns."""
    length = iter(lengths)
    done = yield greedy(question, next(length))
    turns = [(question, done.ids)]
    for critique_ask, revision_ask in rounds:
        prompt = [*shots, *question, *turns[-1][1], *critique_ask]
        for following in (revision_ask, None):
            done = yield greedy(prompt, next(length))
            turns.append((prompt, done.ids))
            prompt = [*prompt, *done.ids, *(following or [])]
    return turns


def _labels(sizes: Sizes, tokens: Draw, source: random.Random) -> Work:
    """Comparisons in the order of the default template: examples, dialogue, principle, both answers, then a letter."""
    letters, frame = [tokens(1), tokens(1)], tokens(sizes.frame)
    principles = [tokens(length) for length in _spread(*sizes.principle, sizes.principles, source)]
    queries = [query for _ in range(sizes.pairs) for query in _pair(sizes, tokens, source, principles, frame, letters)]
    return Work("labels", len(queries), queries=queries, shared=sizes.shots + sizes.dialogue)


def _pair(
    sizes: Sizes,
    tokens: Draw,
    source: random.Random,
    principles: Sequence[list[int]],
    frame: list[int],
    letters: list[list[int]],
) -> Iterator[Query]:
    """One pair by every principle, in both orders, under examples drawn once for the pair."""
    opening = tokens(sizes.shots) + tokens(sizes.dialogue)
    a, b = (tokens(source.randint(*sizes.said)) for _ in range(2))
    middle = len(frame) // 2
    for principle in principles:
        for first, second in ((a, b), (b, a)):
            yield Query([*opening, *principle, *first, *frame[:middle], *second, *frame[middle:]], letters)


MAKERS: dict[str, Callable[[Sizes, Draw, random.Random], Work]] = {
    "equal": _equal,
    "varied": _varied,
    "prefix": _prefix,
    "chains": _chains,
    "labels": _labels,
    "decode at 2k context": _decode,
    "graphs against eager": _equal,
}
