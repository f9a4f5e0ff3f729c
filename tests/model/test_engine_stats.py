"""Statistics: every prompt token was found or computed, and seconds are where the work was."""

import random
import time
from collections.abc import Generator
from typing import Any

import pytest
from naive_engine import CONTEXT, VOCAB, cache_gib, share_prefixes, tiny_model

from bylaw.model.engine import Engine, Request
from bylaw.model.engine.draws import Drawn
from bylaw.model.engine.jobs import Row
from bylaw.model.engine.run import Run


def ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


def ask(prompt: list[int], name: int, max_tokens: int) -> Request:
    return Request(prompt=prompt, max_tokens=max_tokens, seed=3, request=name)


def turns(name: int) -> Generator[Request, Any, None]:
    prompt = [*ids(70, 1), name]
    for turn in range(3):
        done = yield ask(prompt, 10 * name + turn, 8)
        prompt = [*prompt, *done.ids, *ids(20, turn)]


def test_prompt_tokens_are_found_or_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a turn whose row is preempted before it begins: what the row had is lost."""
    share_prefixes(monkeypatch)
    model, lost, again = tiny_model(4), [], Row.again
    monkeypatch.setattr(Row, "again", lambda row: (lost.append(row.parked), again(row)))
    engine = Engine(model, max_rows=8, cache_gib=cache_gib(model, 1.5 * CONTEXT))
    engine.chain([turns(name) for name in range(8)])
    stats = engine.stats
    assert sum(lost) > 0 and len(lost) == stats.preemptions
    assert stats.prompt_tokens == stats.cached_tokens + stats.prefill_tokens


@pytest.mark.parametrize("late", [0, 1])
def test_the_wait_for_a_draw_counts_where_it_was_drawn(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's work is under way when it is launched: nearly all of its time is this wait."""
    engine, lists = Engine(tiny_model(4)), Drawn.lists
    engine.late = late
    monkeypatch.setattr(Drawn, "lists", lambda drawn: (time.sleep(0.02), lists(drawn))[1])
    engine.generate([ask(ids(5, n), n, max_tokens=1) for n in range(3)])
    assert engine.stats.prefill_seconds > 0.02 > engine.stats.decode_seconds
    assert engine.stats.decode_rate == 0, "a prompt gives the first token by itself"
    engine.generate([ask(ids(5, n), n, max_tokens=11) for n in range(3)])
    assert engine.stats.decode_seconds > 10 * 0.02
    assert 0 < engine.stats.decode_rate < 30 / (10 * 0.02)


def test_a_full_cache_is_not_asked_again_before_a_text_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried, plan = tiny_model(4), [], Run._plan
    monkeypatch.setattr(Run, "_plan", lambda run, free: (tried.append(free), plan(run, free))[1])
    engine = Engine(model, max_rows=64, cache_gib=cache_gib(model, 2 * CONTEXT))
    engine.generate([ask(ids(30, n), n, max_tokens=60) for n in range(30)])
    assert len(tried) < 30 + 2 * (30 + engine.stats.preemptions) < engine.stats.row_steps / 8
