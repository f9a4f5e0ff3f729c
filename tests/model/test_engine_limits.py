"""What bounds the engine: memory, the context, the vocabulary. And nothing of other weights is ever used."""

import itertools
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import torch
from naive_engine import CONTEXT, VOCAB, assert_same, cache_gib, randomise, share_prefixes, short_words, tiny_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bylaw.model.engine import Completion, Engine, Query, Request
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside it held together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.live, self.held = 0, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (storage := made.untyped_storage()).data_ptr() not in given:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self.held.get(storage.data_ptr())
        self.live += storage.nbytes() - (known[1] if known else 0)
        self.held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        if self.live > self.bytes:  # by what is known; some of it may be gone
            self.held = {at: one for at, one in self.held.items() if not one[0].expired()}
            self.live = sum(size for _, size in self.held.values())
            self.bytes = max(self.bytes, self.live)


def ids(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


def ask(prompt: Sequence[int], name: int = 0, **options: Any) -> Request:
    return Request(**({"prompt": prompt, "max_tokens": 4, "seed": 1, "request": name} | options))


@pytest.fixture
def model() -> Transformer:
    return tiny_model(6)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes are shared, and left in place, at any size: a model this tiny would share few."""
    share_prefixes(monkeypatch)


def crowd(count: int = 24) -> list[Request]:
    """Far more than a cache for two sequences holds: prompts that share pages, long texts."""
    return [ask(ids(32 * (n % 4), seed=n % 3) + ids(1 + n % 30, n), n, max_tokens=1 + 5 * n % 60) for n in range(count)]


@pytest.mark.usefixtures("eager")
def test_all_keys_and_values_stay_within_the_budget() -> None:
    """In every kind of call. The model's cache is far larger than its activations, which are measured and left out."""
    model = tiny_model(6, num_layers=8, num_kv_heads=4, head_dim=16, hidden_size=8, intermediate_size=4)
    asked = crowd(4) + [ask(ids(30, n), 50 + n, max_tokens=5) for n in range(9)]
    bound = cache_gib(model, CONTEXT) * 2**30
    with Peak() as idle, torch.no_grad():
        model(pack([max((request.prompt for request in asked), key=len)]))
    with Peak() as peak:
        engine = Engine(model, max_rows=12, cache_gib=bound / 2**30, prefill_tokens=32)
        engine.generate(asked)
        engine.score([Query(request.prompt, [[3], [4, 5]]) for request in asked[:4]])
        engine.chain([turns(n) for n in range(2)])
    assert engine.stats.preemptions + engine.stats.evictions > 0
    assert 0.5 * bound < peak.bytes < bound + idle.bytes


def turns(name: int) -> Generator[Request, Completion, None]:
    prompt = ids(40, name % 2)
    for turn in range(3):
        prompt += (yield ask(prompt, 10 * name + turn, max_tokens=9)).ids


@pytest.mark.usefixtures("eager")
def test_pages_in_use_never_exceed_the_budget_and_all_come_back(model: Transformer) -> None:
    engine = Engine(model, max_rows=9, cache_gib=cache_gib(model, 2 * CONTEXT))
    free: list[int] = []

    def look(index: int, so_far: list[int]) -> None:
        free.append(engine.memory.store.free_pages())
        engine.memory.index.check()

    expected = Engine(model).generate(crowd())
    for _ in range(2):
        assert_same(engine.generate(crowd(), on_token=look), expected)
        engine.check()
    assert min(free) >= 0 and engine.stats.preemptions > 0 and engine.stats.evictions > 0
    assert 0 < engine.stats.hit_rate < 1 and 0 < engine.stats.useful_fraction <= 1


def test_ten_thousand_requests_with_a_small_cache(model: Transformer) -> None:
    requests = [ask(ids(1 + n % 40, n % 7), n, max_tokens=1 + n % 2, temperature=0.0) for n in range(10_000)]
    engine = Engine(model, max_rows=200, cache_gib=cache_gib(model, 8 * CONTEXT))
    done = engine.generate(requests)
    assert [len(one.ids) for one in done] == [1, 2] * 5000
    expected = Engine(model).generate(requests[:280])
    assert [one.ids for one in done] == [expected[n % 280].ids for n in range(10_000)], "they repeat after 280"


def test_a_text_longer_than_a_prefill_and_one_as_long_as_the_cache(model: Transformer) -> None:
    engine = Engine(model, max_rows=4, cache_gib=cache_gib(model, CONTEXT), prefill_tokens=8)
    requests = [ask(ids(CONTEXT - 4)), ask(ids(3), 1), ask(ids(CONTEXT - 1), 2), ask(ids(1), 3, max_tokens=CONTEXT - 1)]
    assert_same(engine.generate(requests), [Engine(model).generate([request])[0] for request in requests])
    engine.check()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"prompt": []}, r"it has 0 and 4"),
    "no tokens": ({"max_tokens": 0}, r"it has 3 and 0"),
    "long": ({"prompt": [3] * CONTEXT}, rf"{CONTEXT} tokens.*context of {CONTEXT}"),
    "unknown stop": ({"stop_ids": (4, VOCAB)}, rf"stop_ids.*{VOCAB}.*0 to {VOCAB - 1}"),
    "negative stop": ({"stop_ids": (-1,)}, rf"stop_ids.*-1.*0 to {VOCAB - 1}"),
    "unknown token": ({"prompt": [3, 777]}, rf"prompt.*777.*0 to {VOCAB - 1}"),
    "negative token": ({"prompt": [-5, 3]}, rf"prompt.*-5.*0 to {VOCAB - 1}"),
    "temperature": ({"temperature": float("nan")}, r"temperature = nan.*0 \(greedy\)"),
    "top_p": ({"top_p": 1.5}, r"top_p = 1.5.*above 0 to 1"),
    "no words": ({"stop_strings": ("a",)}, r"stop_strings = \('a',\).*tokenizer"),
    "seed": ({"seed": 2**64}, rf"seed.*{2**64}"),
    "name": ({"request": -(2**63) - 1}, rf"request.*{-(2**63) - 1}"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_has_its_error_in_its_place_and_the_others_are_done(model: Transformer, case: str) -> None:
    options, message = BAD[case]
    named: dict[str, Any] = {"prompt": [3, 4, 5], **options}
    bad, good = ask(**named), [ask(ids(5 + n, n), n) for n in range(4)]
    engine = Engine(model)
    done = engine.generate([*good[:2], bad, *good[2:]], on_error="return")
    error = done.pop(2)
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=message):
        raise error
    assert_same(done, Engine(model).generate(good))
    engine.check()


def test_one_error_names_every_bad_request_before_any_work(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "forward", lambda stream: pytest.fail("work has begun"))
    requests = [ask([3]), ask([]), ask([3]), ask([3], stop_ids=(VOCAB,)), ask([3])]
    with pytest.raises(ValueError) as caught:
        Engine(model).generate(requests)
    assert all(part in str(caught.value) for part in ("request 1", "it has 0", "request 3", str(VOCAB)))
    assert not any(f"request {good}" in str(caught.value) for good in (0, 2, 4))
    with pytest.raises(ValueError, match=r"(?s)query 1.*query 2"):
        Engine(model).score([([3], [[4]]), ([], [[4]]), ([3], [[VOCAB]])])


def test_a_budget_too_small_for_one_request(model: Transformer) -> None:
    """Named with what it needs and has; what fits is done."""
    engine = Engine(model, cache_gib=cache_gib(model, 100))
    good = [ask(ids(30), 1, max_tokens=20), ask(ids(64), 2, max_tokens=32)]
    done = engine.generate([good[0], ask(ids(90), max_tokens=20), good[1]], on_error="return")
    assert_same([done[0], done[2]], Engine(model).generate(good))
    with pytest.raises(ValueError, match=r"request 1: .*110.*96.*cache_gib"):
        engine.generate([good[0], ask(ids(90), max_tokens=20)])


@pytest.mark.parametrize("gib", [0.0, -1.0, 1e-12, float("nan")])
def test_a_cache_of_no_page_is_refused(model: Transformer, gib: float) -> None:
    with pytest.raises(ValueError, match=r"cache_gib = .*allowed"):
        Engine(model, cache_gib=gib)


def test_an_unknown_way_with_errors_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="on_error = 'ignore' is not possible; allowed: raise, return"):
        Engine(model).generate([ask([1])], on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[1.5], [2**70], ["a"]])
def test_a_prompt_of_no_ids_has_its_error_in_its_place(model: Transformer, prompt: list[Any]) -> None:
    good = ask(ids(3))
    bad, done = Engine(model).generate([ask(prompt), good], on_error="return")
    assert isinstance(bad, ValueError) and "allowed: integers from 0 to" in str(bad)
    assert_same([done], Engine(model).generate([good]))


def test_a_stream_of_no_token_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match=r"prefill_tokens = 0 .*1 or more"):
        Engine(model, prefill_tokens=0)


def test_a_bad_query_has_its_error_in_its_place_and_the_others_are_done(model: Transformer) -> None:
    bad = [([], [[4]]), ([3], [[]]), ([3] * CONTEXT, [[4]]), ([3], [[4], [VOCAB]])]
    queries = [([3, 4], [[5], [6, 7]]), *bad, ([3], [[4]])]
    engine = Engine(model)
    scores = engine.score(queries, on_error="return")
    assert [isinstance(one, ValueError) for one in scores] == [False, True, True, True, True, False]
    assert_same([scores[0], scores[5]], Engine(model).score([queries[0], queries[5]]))
    assert str(CONTEXT) in str(scores[3]) and str(VOCAB) in str(scores[4]) and "candidate 1" in str(scores[4])
    engine.check()


def test_a_query_longer_than_the_cache(model: Transformer) -> None:
    """Scores keep nothing, so they need no room; a prefix that does not fit is not shared."""
    engine = Engine(model, cache_gib=cache_gib(model, 64))
    queries = [(ids(200), [[n], [4, n]]) for n in range(5)]
    assert_same(engine.score(queries), Engine(model).score(queries))
    engine.check()


class Interrupted(Exception):
    """What a caller's own function raises."""


@pytest.mark.parametrize("after", [0, 7, 60])
def test_a_listener_that_fails_leaves_the_engine_usable(model: Transformer, after: int) -> None:
    engine, heard = Engine(model, max_rows=5, cache_gib=cache_gib(model, 2 * CONTEXT)), itertools.count()

    def fail(index: int, so_far: list[int]) -> None:
        if next(heard) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        engine.generate(crowd(20), on_token=fail)
    engine.check()
    assert_same(engine.generate(crowd(20)), Engine(model).generate(crowd(20)))


@torch.no_grad()
def test_broken_weights_are_told_and_mended_ones_work(model: Transformer) -> None:
    engine = Engine(model)
    expected = engine.generate(crowd(8))
    kept = model.norm.weight.clone()
    model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        engine.generate(crowd(8))
    model.norm.weight.copy_(kept)
    engine.check()
    assert_same(engine.generate(crowd(8)), expected)


@torch.no_grad()
def set_data(model: Transformer) -> None:
    weight = model.get_parameter("blocks.0.qkv.weight")
    weight.data = weight.data * 1.5


def step(model: Transformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@torch.no_grad()
def one_number(model: Transformer) -> None:
    model.get_parameter("blocks.0.attn_norm.weight").data[5] += 3


@torch.no_grad()
def through_numpy(model: Transformer) -> None:
    model.embed.weight.numpy()[:] *= -1


@torch.no_grad()
def swapped(model: Transformer) -> None:
    """The same numbers in another place, so that no plain sum over all of them changes."""
    weight = model.get_parameter("blocks.0.qkv.weight")
    weight.data.copy_(weight.data.roll(1, 0))


@torch.no_grad()
def swapped_both_ways(model: Transformer) -> None:
    """Another place in a matrix of zeros and ones: the sums of its rows and of its columns stay what they are."""
    weight = model.get_parameter("blocks.0.out.weight")
    weight.data.copy_(weight.data.roll(2, 0))


def replaced(model: Transformer) -> None:
    norm = model.get_submodule("blocks.0.attn_norm")
    norm.weight = torch.nn.Parameter(torch.full((24,), 0.7))


CHANGES: dict[str, Callable[[Transformer], Any]] = {
    "step": step,
    "data": lambda model: model.embed.weight.data.copy_(model.embed.weight.data.flip(0)),
    "set data": set_data,
    "one number": one_number,
    "numpy": through_numpy,
    "swapped": swapped,
    "swapped both ways": swapped_both_ways,
    "replaced": replaced,
    "loaded": lambda model: model.load_state_dict(tiny_model(9).state_dict()),
    "other rotation": lambda model: model.inv_freq.mul_(0.5),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_the_weights_before_is_used(change: str) -> None:
    """Prompts whose prefix is cached, before and after: generation and scores equal a fresh engine's."""
    model = tiny_model(6)
    with torch.no_grad():
        model.get_parameter("blocks.0.out.weight").copy_(torch.eye(24))
    engine = Engine(model)
    requests = [ask([*ids(100), n], n, max_tokens=6) for n in range(6)]
    queries = [(request.prompt, [[3], [4]]) for request in requests]
    before = [engine.generate(requests), engine.score(queries)]
    seen = engine.stats.cached_tokens
    assert_same(engine.generate(requests), before[0])
    assert engine.stats.cached_tokens > seen, "else there is nothing that could be stale"
    CHANGES[change](model)
    after = engine.score(queries)
    assert_same(after, Engine(model).score(queries))
    assert_same(engine.generate(requests), Engine(model).generate(requests))
    assert max(abs(a[0] - b[0]) for a, b in zip(after, before[1], strict=True)) > 1e-3, "the change is felt"
    engine.check()


@pytest.mark.usefixtures("eager")
def test_weights_that_go_and_come_back(model: Transformer) -> None:
    engine, requests = Engine(model), [ask([*ids(100), n], n) for n in range(6)]
    first = engine.generate(requests)
    randomise(model, 1)
    assert_same(engine.generate(requests), Engine(model).generate(requests))
    randomise(model, 6)
    assert_same(engine.generate(requests), first)


def test_two_engines_and_two_models_do_not_disturb_each_other(model: Transformer) -> None:
    other, requests = tiny_model(7), [ask([*ids(100), n], n) for n in range(4)]
    one, two, three = Engine(model), Engine(model, short_words()), Engine(other)
    first = one.generate(requests)
    assert_same(two.generate(requests), first)
    assert [done.ids for done in three.generate(requests)] != [done.ids for done in first]
    assert_same(one.generate(requests), first)
