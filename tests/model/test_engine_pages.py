"""The cache on pages, and decoding as graphs do it: on the CPU, over the references, against the cache on slabs."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from naive_engine import CONTEXT, VOCAB, assert_same, cache_gib, short_words, tiny_model
from test_engine_property import Mix, script

from bylaw.model.engine import Completion, Engine, Request
from bylaw.model.engine.graphs import LEAST_WIDTH, GraphDecoder, row_buckets, table_widths
from bylaw.model.engine.page_streams import common_segment
from bylaw.model.engine.pages import Pages, Pool
from bylaw.model.engine.prefix import PAGE, Segment
from bylaw.model.engine.slabs import Slabs
from bylaw.model.lora import active_adapter, adapter_parameters, add_adapter, use_adapter
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.transformer import Transformer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SEEDS = range(4)
WINDOWED: dict[str, Any] = {"family": "qwen3", "qk_norm": True, "windows": (0, 40)}
SHAPES: tuple[dict[str, Any], ...] = ({}, {"windows": (33, 33)}, {"family": "llama", "num_kv_heads": 4}, WINDOWED)
MODES = [(False, 0), (False, 1), (True, 0), (True, 1)]  # as graphs do it; results read so many steps late
Work = Callable[[], None]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from now on keep pages; a common prefix of one page is read apart, and graphs begin at two."""
    monkeypatch.setattr("bylaw.model.engine.decode.choose", lambda operation, backend, tensor: "triton")
    monkeypatch.setattr("bylaw.model.engine.page_streams.COMMON_TOKENS", PAGE)
    monkeypatch.setattr("bylaw.model.engine.graphs.LEAST_WIDTH", 2)


class Captures:
    """Stands in for CUDA graphs: a capture does nothing yet, and a replay does the same work over the same buffers."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.made += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def paged(
    model: Transformer, rows: int = 16, graphs: bool = False, late: int = 0, tokens: int = 100 * PAGE, **options: Any
) -> tuple[Engine, Captures]:
    engine, captures = Engine(model, short_words(), rows, cache_gib=cache_gib(model, tokens), **options), Captures()
    assert isinstance(engine.memory.store, Pages)
    engine.late = late
    if graphs:
        engine.memory.decoder = GraphDecoder(model, engine.memory.store, rows, lambda: captures)
    return engine, captures


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Checks after every token that each page is free, or in one row or segment."""

    def check(index: int, ids: list[int]) -> None:
        engine.memory.index.check()
        engine.memory.store.check(len(engine.memory.store.bases), engine.memory.index.segments())  # type: ignore[attr-defined]

    done = engine.generate(requests, on_token=check)
    engine.check()
    return done


def on_slabs(model: Transformer, rows: int = 16) -> Engine:
    engine = Engine(model, short_words(), rows)
    engine.memory.store = Slabs(model, engine.memory.store.pages, rows)
    engine.memory.index.discard = engine.memory.store.discard
    engine.memory.decoder.store = engine.memory.store  # type: ignore[attr-defined]
    return engine


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_mix_says_what_it_says_on_slabs(seed: int, pages: None) -> None:
    mix, model = Mix(seed), tiny_model(seed, **SHAPES[seed % len(SHAPES)])
    requests = [*mix.requests(), *mix.requests()]
    queries = [mix.query() for _ in range(5)]
    names = [mix.draw.randrange(10**9) for _ in range(4)]
    slabs = on_slabs(model)
    expected, scores = slabs.generate(requests), slabs.score(queries)
    said = slabs.chain([script(name, seed) for name in names])
    for graphs, late in (MODES[seed], MODES[-1]):
        rows, tokens = mix.draw.choice((2, 5, 16)), mix.draw.choice((1, 1.5, 3, 20)) * CONTEXT
        engine, captures = paged(model, rows, graphs, late, int(tokens), prefill_tokens=mix.draw.choice((50, 8192)))
        assert_same(generate(engine, requests), expected)
        assert_same(engine.score(queries), scores)
        engine.check()
        for one, other in zip(engine.chain([script(name, seed) for name in names]), said, strict=True):
            assert_same(one, other)
        engine.check()
        assert not graphs or captures.replayed > captures.made > 0


def alike(count: int, prompt: int, common: int, max_tokens: int, **options: Any) -> list[Request]:
    """Prompts of `prompt` tokens with the first `common` in common."""
    draw = random.Random(count + prompt)
    start = [draw.randrange(VOCAB) for _ in range(common)]
    tails = [[draw.randrange(VOCAB) for _ in range(prompt - common)] for _ in range(count)]
    names = range(count)
    return [
        Request(prompt=[*start, *tail], max_tokens=max_tokens, seed=1, request=name, **options)
        for name, tail in zip(names, tails, strict=True)
    ]


@pytest.mark.parametrize("common", [3 * PAGE, 2 * PAGE + 6, 2 * PAGE])
def test_samples_of_one_prompt_share_all_but_its_last_page(common: int, pages: None) -> None:
    """Each has its own copy of the page that they all go on in."""
    model = tiny_model()
    requests = alike(5, common, common, 8)
    engine, _ = paged(model)
    assert_same(generate(engine, requests), on_slabs(model).generate(requests))
    assert engine.stats.prefill_tokens == common
    shared = (common - 1) // PAGE
    assert [segment.pages for segment in engine.memory.index.segments()] == [shared]
    assert engine.memory.store.free_pages() == engine.memory.store.pages - shared


@pytest.mark.parametrize("shape", [{}, WINDOWED, {"windows": (12, 12)}])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_common_prefix_wherever_its_pages_are(shape: dict[str, Any], scattered: bool, pages: None) -> None:
    model = tiny_model(**shape)
    common = 3 * PAGE
    requests = alike(6, common + 5, common, 12)  # out of a window of 12 while they grow
    engine, _ = paged(model)
    if scattered:  # every second page is taken
        engine.memory.store.pool._take(range(0, 100, 2))  # type: ignore[attr-defined]
    done = engine.generate(requests)
    assert_same(done, on_slabs(model).generate(requests))
    (segment,) = engine.memory.index.segments()
    step = 2 if scattered else 1
    assert sorted(abs(a - b) for a, b in zip(segment.kept, segment.kept[1:], strict=False)) == [step, step]
    paths = [((segment, common),)] * 6
    assert common_segment(paths) == (None if scattered else (slice(0, 3), common))


def test_when_rows_read_their_first_segment_once(pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * PAGE
    first, second = (Segment((), [0] * size, [b""] * 3, kept=[4, 5, 6]) for _ in range(2))
    longer, shorter, other = ((first, size), (second, PAGE)), ((first, size),), ((second, size),)
    assert common_segment([longer, shorter]) == (slice(4, 7), size)
    assert common_segment([longer]) is None, "alone"
    assert common_segment([longer, other]) is None
    assert common_segment([longer, ()]) is None and common_segment([(), ()]) is None
    assert common_segment([((first, PAGE),), shorter]) is None, "a part of it"
    monkeypatch.setattr("bylaw.model.engine.page_streams.COMMON_TOKENS", size + 1)
    assert common_segment([longer, shorter]) is None, "too short"


@pytest.mark.parametrize(("graphs", "late"), MODES[::3])
def test_rows_that_grow_beyond_the_budget_are_put_back(graphs: bool, late: int, pages: None) -> None:
    model = tiny_model(1)
    requests = alike(4, PAGE // 2, 0, 5 * PAGE // 2)
    engine, captures = paged(model, 4, graphs, late, tokens=5 * PAGE)
    assert_same(generate(engine, requests), on_slabs(model).generate(requests))
    assert engine.stats.preemptions > 0 and (captures.replayed > 0) == graphs
    assert engine.memory.store.free_pages() == 5 - sum(s.pages for s in engine.memory.index.segments())


def test_graphs_are_captured_at_their_second_use_and_dropped_with_the_weights(pages: None) -> None:
    model = tiny_model(2)
    requests = alike(3, 9, 0, 12)
    engine, captures = paged(model, 4, graphs=True)
    first = engine.generate(requests)
    assert captures.made == 1 and captures.replayed == 12 - 1 - 1, "one size, prefilled, then warmed up"
    assert_same(engine.generate(requests), first)
    assert captures.made == 1 and captures.replayed == 10 + 11
    with torch.no_grad():
        model.norm.weight.mul_(1.5)  # in place: the graphs read the new weights
    assert engine.generate(requests)[0].logprobs != first[0].logprobs
    assert captures.made == 1
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach() / 1.5)
    assert_same(engine.generate(requests), first)
    assert captures.made == 2


@pytest.mark.parametrize("graphs", [False, True])
def test_a_graph_is_of_one_adapter(graphs: bool, pages: None) -> None:
    class Frozen(Captures):
        """As on a GPU: what a graph runs is fixed when it is captured."""

        def __call__(self, work: Work) -> Work:
            replay, name = super().__call__(work), active_adapter(model)

            def again() -> None:
                with use_adapter(model, name):
                    replay()

            return again

    model, requests = tiny_model(2), alike(3, 9, 0, 12)
    for seed, name in enumerate(("policy", "value")):
        add_adapter(model, name, LoraSettings(rank=2), seed)
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    engine, captures = paged(model, 4)
    if graphs:
        captures = Frozen()
        store: Any = engine.memory.store
        engine.memory.decoder = GraphDecoder(model, store, 4, lambda: captures)
    for name in ("policy", "value", None, "policy", "value", None):
        with use_adapter(model, name):
            assert_same(engine.generate(requests), on_slabs(model).generate(requests))
    assert captures.made == 3 * graphs


def test_parameters_that_move_are_not_captured(pages: None) -> None:
    """As shards that are put together anew at every call."""
    model, requests = tiny_model(2), alike(3, 9, 0, 12)
    engine, captures = paged(model, 4, graphs=True)
    begin = engine.memory.decoder.begin
    engine.memory.decoder.begin = lambda graphs: begin(False)  # type: ignore[method-assign]
    for _ in range(2):
        assert_same(engine.generate(requests), on_slabs(model).generate(requests))
    assert captures.made == 0


def test_sizes_of_graphs() -> None:
    assert row_buckets(1) == [1] and row_buckets(4) == [1, 2, 4] and row_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert row_buckets(24)[-3:] == [8, 16, 24]
    assert table_widths(5) == [5] and table_widths(4 * LEAST_WIDTH) == [LEAST_WIDTH, 2 * LEAST_WIDTH, 4 * LEAST_WIDTH]
    assert table_widths(LEAST_WIDTH + 6) == [LEAST_WIDTH, LEAST_WIDTH + 6]


def test_pages_are_taken_together_where_they_can_be() -> None:
    pool = Pool(8)
    assert pool.run(3) == [0, 1, 2] and pool.single() == 7
    pool.give_back([1])
    assert pool.run(3) == [3, 4, 5] and pool.free == 2
    assert sorted(pool.run(2)) == [1, 6] and pool.free == 0
    with pytest.raises(AssertionError, match="no page is free"):
        pool.single()
    pool.give_back([7])
    with pytest.raises(AssertionError, match="page 7 is free already"):
        pool.give_back([7])


@pytest.mark.parametrize("fault", ["lost", "twice", "table"])
def test_the_checker_finds_a_fault(fault: str, pages: None) -> None:
    engine, _ = paged(tiny_model(), tokens=30 * PAGE)
    store = engine.memory.store
    assert isinstance(store, Pages)
    assert store.reserve([PAGE + 8], [PAGE + 8])
    store.open(0, ())
    store.check(1, [])
    if fault == "lost":
        store.own[0].pop()
    elif fault == "twice":
        store.pool.give_back(store.own[0][:1])
    else:
        store.flush()
        store.table[0, 1] = 0
    with pytest.raises(AssertionError):
        store.check(1, [])


def gpu_engine(**options: Any) -> Engine:
    model = tiny_model(3, hidden_size=64, head_dim=16, **WINDOWED).to("cuda", torch.bfloat16)
    return Engine(model, None, 16, cache_gib=0.01, **options)


@needs_gpu
def test_captured_graphs_say_what_single_launches_say() -> None:
    requests = alike(20, 50, 40, 60, top_p=0.9)
    plain, graphs = gpu_engine(graphs=False).generate(requests), gpu_engine()
    for _ in range(3):  # warmed up, captured, replayed from the start
        done = graphs.generate(requests)
        same = sum(one.ids == other.ids for one, other in zip(done, plain, strict=True))
        assert same >= 15, "batches of other sizes round differently"
    replays = graphs.memory.decoder._replays  # type: ignore[attr-defined]
    assert any(replay is not None for replay in replays.values())
    graphs.check()


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_of_decoding_never_waits_for_the_gpu(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from bylaw.model.engine.run import Run

    engine, requests = gpu_engine(graphs=graphs), alike(20, 50, 40, 60)
    for _ in range(2):
        engine.generate(requests)
    decode, steps = Run._decode, []

    def watched(run: Run) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(run)

    monkeypatch.setattr(Run, "_decode", watched)
    engine.generate(requests)
    assert len(steps) >= 60
