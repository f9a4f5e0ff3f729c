"""Scripts: what is said in turns is what the same requests give alone, and a turn computes only what is new in it."""

import random
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from naive_engine import CONTEXT, VOCAB, assert_same, cache_gib, share_prefixes, tiny_model

from bylaw.model.engine import Completion, Engine, Query, Request
from bylaw.model.transformer import Transformer

Told = list[Completion]
Script = Generator[Any, Any, Any]


@pytest.fixture(params=["full in place", "full copied", "window in place"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Rows that leave a shared prefix where it is, or copy it: a model this tiny would always copy."""
    share_prefixes(monkeypatch, in_place="copied" not in request.param)
    return tiny_model(4, windows=(37, 37) if "window" in request.param else ())


@pytest.fixture
def plain() -> Transformer:
    return tiny_model(4)


def ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


def ask(prompt: Sequence[int], name: int, max_tokens: int = 8) -> Request:
    return Request(prompt=prompt, max_tokens=max_tokens, seed=3, request=name, stop_ids=(9,))


COMMON = ids(70, seed=1)


def revise(name: int, rounds: int, asked: list[Request] | None = None, extra: int = 20) -> Script:
    """A prompt, then its text and something more, again and again."""
    prompt, said = [*COMMON, *ids(name % 7, name)], []
    for turn in range(rounds):
        request = ask(prompt, 100 * name + turn)
        if asked is not None:
            asked.append(request)
        done = yield request
        said.append(done)
        prompt = [*prompt, *done.ids, *ids(extra, name + turn)]
    return said


def alone(model: Transformer, asked: Sequence[Request]) -> Told:
    return [Engine(model).generate([request])[0] for request in asked]


def test_turns_are_what_their_requests_give_alone(model: Transformer) -> None:
    asked: list[list[Request]] = [[] for _ in range(6)]
    engine = Engine(model)
    told = engine.chain([revise(n, 1 + n % 3, asked[n]) for n in range(6)])
    assert [len(said) for said in told] == [1, 2, 3] * 2, "results in the scripts' order"
    for said, requests in zip(told, asked, strict=True):
        assert_same(said, alone(model, requests))
    for max_rows in (1, 3):
        again = Engine(model, max_rows=max_rows).chain([revise(n, 1 + n % 3) for n in range(6)])
        for said, expected in zip(again, told, strict=True):
            assert_same(said, expected)
    engine.check()


def test_a_turn_computes_only_what_is_new(model: Transformer) -> None:
    engine = Engine(model)
    said = engine.chain([revise(5, 4)])[0]
    turns = [len(COMMON) + 5, *(1 + 20 for _ in said[1:])]  # the last sampled token was never run
    assert engine.stats.prefill_tokens <= sum(turns)
    assert engine.stats.generated_tokens == sum(len(done.ids) for done in said)


def test_scripts_go_on_after_a_preemption(model: Transformer) -> None:
    asked: list[list[Request]] = [[] for _ in range(8)]
    engine = Engine(model, max_rows=8, cache_gib=cache_gib(model, 1.5 * CONTEXT))
    told = engine.chain([revise(n, 3, asked[n]) for n in range(8)])
    assert engine.stats.preemptions > 0
    for said, requests in zip(told, asked, strict=True):
        assert_same(said, alone(model, requests))
    engine.check()


REWINDS = {  # of (prompt, what was said) to the next prompt; the ends of pages of 32 lie at 64 and 96
    "the same again": lambda prompt, said: prompt,
    "all of it and no more": lambda prompt, said: [*prompt, *said],
    "one token less": lambda prompt, said: [*prompt, *said][:-1],
    "the prompt without its end": lambda prompt, said: prompt[:-1],
    "a page": lambda prompt, said: prompt[:64],
    "a page and one": lambda prompt, said: prompt[:65],
    "within a page": lambda prompt, said: [*prompt[:40], 5, 6, 7],
    "one token": lambda prompt, said: prompt[:1],
    "nothing in common": lambda prompt, said: [(token + 1) % VOCAB for token in prompt],
    "another last token": lambda prompt, said: [*prompt, *said[:-1], (said[-1] + 1) % VOCAB],
    "another first token": lambda prompt, said: [(prompt[0] + 1) % VOCAB, *prompt[1:], *said],
    "beyond a page": lambda prompt, said: [*prompt, *said, *prompt[:60]],
}


@pytest.mark.parametrize("length", [64, 70])
def test_a_next_prompt_may_be_any(model: Transformer, length: int) -> None:
    """All kinds at once, twice in a row each, in rows that others of the same beginning run beside."""
    asked: list[Request] = []

    def rewinding(name: int, kind: str) -> Script:
        prompt, said = ids(length, seed=2), []
        for turn in range(3):
            asked.append(ask(prompt, 10 * name + turn, max_tokens=6))
            said.append((asked[-1].request, (yield asked[-1])))
            prompt = REWINDS[kind](prompt, said[-1][1].ids) or [4]
        return said

    engine = Engine(model, max_rows=7)
    told = engine.chain([rewinding(name, kind) for name, kind in enumerate(REWINDS)])
    got = dict(pair for said in told for pair in said)
    assert_same([got[request.request] for request in asked], alone(model, asked))
    engine.check()


def test_a_script_may_ask_for_scores_between_its_texts(model: Transformer) -> None:
    def judged(name: int) -> Script:
        prompt = [*COMMON, name]
        done = yield ask(prompt, name)
        first = yield Query([*prompt, *done.ids], [[4], [5], [4, 6]])
        second = yield ([*prompt, *done.ids], [[5]])  # a plain tuple
        none = yield Query(prompt, [])
        again = yield ask([*prompt, *done.ids, 8], name + 50)
        return done, first, second, none, again

    engine = Engine(model, max_rows=3)
    for name, (done, first, second, none, again) in enumerate(engine.chain([judged(n) for n in range(6)])):
        prompt = [*COMMON, name]
        whole = [*prompt, *done.ids]
        assert_same([done, again], alone(model, [ask(prompt, name), ask([*whole, 8], name + 50)]))
        assert_same([first], Engine(model).score([(whole, [[4], [5], [4, 6]])]))
        assert second[0] == pytest.approx(first[1], abs=1e-4)
        assert none == []


def test_scripts_that_ask_nothing_once_or_never_end_differently(plain: Transformer) -> None:
    def silent() -> Script:
        return "nothing"
        yield

    engine = Engine(plain)
    assert engine.chain([]) == []
    assert engine.chain([silent()]) == ["nothing"]
    told = engine.chain([silent(), revise(1, 1), silent()])
    assert (told[0], told[2]) == ("nothing", "nothing") and len(told[1]) == 1


def test_a_script_may_ask_nothing_many_times(plain: Transformer) -> None:
    def patient() -> Script:
        answers = []
        for _ in range(3000):  # beyond Python's depth of calls
            answers.append((yield Query([], [])))
        return answers, (yield ask([3], 1))

    answers, done = Engine(plain).chain([patient()])[0]
    assert answers == [[]] * 3000
    assert_same([done], alone(plain, [ask([3], 1)]))


BAD: dict[str, Any] = {
    "too long": Request(prompt=[3] * CONTEXT, max_tokens=1, seed=0, request=0),
    "empty": Request(prompt=[], max_tokens=1, seed=0, request=0),
    "unknown stop": Request(prompt=[3], max_tokens=1, seed=0, request=0, stop_ids=(VOCAB,)),
    "query": Query([3], [[]]),
    "nothing": None,
    "a number": 5,
    "a prompt": [3, 4],
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_is_thrown_into_its_script(plain: Transformer, bad: str) -> None:
    def mends(name: int) -> Script:
        done = yield ask([*COMMON, name], name)
        with pytest.raises(ValueError):
            yield BAD[bad]
        return done, (yield ask([*COMMON, *done.ids, 7], name + 50))

    engine = Engine(plain, max_rows=3)
    told = engine.chain([mends(1), revise(2, 3), mends(3)])
    for name in (1, 3):
        done, after = told[0 if name == 1 else 2]
        requests = [ask([*COMMON, name], name), ask([*COMMON, *done.ids, 7], name + 50)]
        assert_same([done, after], alone(plain, requests))
    assert_same(told[1], Engine(plain).chain([revise(2, 3)])[0])
    engine.check()


@pytest.mark.parametrize("first", [True, False])
def test_a_script_that_does_not_catch_it_raises_when_the_others_are_done(plain: Transformer, first: bool) -> None:
    ended: list[int] = []

    def fails() -> Script:
        if not first:
            yield ask(COMMON, 1)
        yield BAD["too long"]

    def ends(name: int) -> Script:
        said = yield from revise(name, 3)
        ended.append(name)
        return said

    engine = Engine(plain, max_rows=2)
    with pytest.raises(ValueError, match=f"{CONTEXT}"):
        engine.chain([ends(1), fails(), ends(2), ends(3)])
    assert sorted(ended) == [1, 2, 3]
    engine.check()
    assert_same(engine.chain([revise(1, 2)])[0], Engine(plain).chain([revise(1, 2)])[0])


@pytest.mark.parametrize("call", ["generate", "score", "chain", "forget"])
def test_a_call_in_the_middle_of_another_is_refused(plain: Transformer, call: str) -> None:
    """It would stand in the other's rows; a thread's call comes in the middle just so."""
    engine = Engine(plain)
    calls = {
        "generate": lambda: engine.generate([ask([3], 9)]),
        "score": lambda: engine.score([Query([3], [[4]])]),
        "chain": lambda: engine.chain([revise(1, 1)]),
        "forget": engine.forget,
    }

    def meddles() -> Script:
        done = yield ask(COMMON, 1)
        with pytest.raises(RuntimeError, match="in the middle of a call"):
            calls[call]()
        return done, (yield ask([*COMMON, *done.ids, 7], 2))

    (done, after), said = engine.chain([meddles(), revise(2, 3)])
    assert_same([done, after], alone(plain, [ask(COMMON, 1), ask([*COMMON, *done.ids, 7], 2)]))
    assert_same(said, Engine(plain).chain([revise(2, 3)])[0])
    calls[call]()
    engine.check()


class Interrupted(Exception):
    """Something of the caller's own."""


def test_an_error_of_a_script_leaves_the_engine_usable(plain: Transformer) -> None:
    def breaks() -> Script:
        yield ask(COMMON, 1)
        raise Interrupted

    engine = Engine(plain)
    expected = engine.chain([revise(2, 3)])[0]
    with pytest.raises(Interrupted):
        engine.chain([revise(2, 3), breaks(), revise(3, 3)])
    engine.check()
    assert_same(engine.chain([revise(2, 3)])[0], expected)


@torch.no_grad()
def test_scripts_read_the_weights_of_the_moment() -> None:
    model = tiny_model(4)
    engine = Engine(model)
    before = engine.chain([revise(2, 3)])[0]
    model.embed.weight.data.mul_(-1)
    after = engine.chain([revise(2, 3)])[0]
    assert_same(after, Engine(model).chain([revise(2, 3)])[0])
    assert [done.ids for done in before] != [done.ids for done in after]
