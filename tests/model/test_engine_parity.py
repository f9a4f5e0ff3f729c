"""The engine's texts over prompts of many pages: those of Transformers, and the same in every way to come by them."""

import random
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_engine import CONTEXT, VOCAB, assert_same, cache_gib, share_prefixes, short_words, tiny_model
from test_parity import CASES, hf_model

from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.model.checkpoint import load_model
from bylaw.model.engine import Completion, Engine, Query, Request
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer

# Around the ends of pages of 16, 32 and 64 tokens, and between.
LENGTHS = (1, 2, 16, 31, 32, 33, 63, 64, 65, 127, 300, 699, 700)
SHARED = (0, 0, 0, 1, 16, 31, 32, 33, 64, 65, 127, 0, 640)  # of each, how many tokens begin the longest one too
LONG = 1024  # tokens of context
NEW = 8
WINDOWS = {  # that end inside a page, with it, and beyond the next
    f"mistral-window-{size}": ("mistral", {"sliding_window": size}) for size in (32, 45, 130)
}


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes are shared, and left where they are, from a page on: models this tiny would copy them."""
    share_prefixes(monkeypatch)


def long_prompts(vocab: int = 97) -> list[list[int]]:
    draw = random.Random(0)
    longest = [draw.randrange(3, vocab) for _ in range(max(LENGTHS))]
    return [
        longest[:shared] + [draw.randrange(3, vocab) for _ in range(length - shared)]
        for length, shared in zip(LENGTHS, SHARED, strict=True)
    ]


def deep_and_long(options: dict[str, Any]) -> dict[str, Any]:
    """The same options for 2 layers and `LONG` tokens. Yarn's two ways to say its factor agree, as in test_parity."""
    changed: dict[str, Any] = {"max_position_embeddings": LONG, "num_hidden_layers": 2}
    if "layer_types" in options:
        changed["layer_types"] = options["layer_types"][:2]
    scaling = options.get("rope_scaling") or {}
    if scaling.get("rope_type") == "yarn":
        original = round(LONG / scaling["factor"])
        changed["rope_scaling"] = scaling | {"original_max_position_embeddings": original}
    return options | changed


@torch.no_grad()
def their_text(model: Any, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    # Asked to keep the last 1 - 1 tokens, their cache keeps all.
    use_cache = getattr(model.config, "sliding_window", None) != 1
    common = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **common)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", [*CASES, *WINDOWS])
def test_greedy_text_equals_that_of_transformers_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice on one engine: the second time, what the prompts share is in its cache. Then with prefixes copied."""
    family, options = (CASES | WINDOWS)[case]
    theirs = hf_model(family, deep_and_long(options))
    theirs.save_pretrained(tmp_path)
    given = long_prompts()
    expected = [their_text(theirs, prompt) for prompt in given]
    assert len({tuple(ids) for ids in expected}) > len(given) / 2, "texts too alike"
    engine = Engine(load_model(tmp_path))
    requests = [Request(prompt=prompt, max_tokens=NEW, seed=0, request=0, temperature=0.0) for prompt in given]
    for _ in range(2):
        assert [done.ids for done in engine.generate(requests)] == expected
    share_prefixes(monkeypatch, in_place=False)
    assert [done.ids for done in engine.generate(requests)] == expected


def shared_prompts(count: int) -> list[list[int]]:
    """Prompts that begin alike for none to four pages of 32, some to the end; every eighth is one again."""
    draw = random.Random(1)
    common = [draw.randrange(2, VOCAB) for _ in range(160)]
    found: list[list[int]] = []
    for n in range(count):
        shared = draw.choice((0, 31, 32, 33, 64, 96, 100, 128))
        tail = [draw.randrange(2, VOCAB) for _ in range(draw.choice((0, 1, 5, 32, 40)))]
        found.append(found[n // 2] if n % 8 == 7 else common[:shared] + (tail or common[shared : shared + 1]))
    return found


SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
)  # fmt: skip


def mixed_requests(count: int = 64) -> list[Request]:
    return [
        Request(
            prompt=prompt,
            max_tokens=40 if n % 16 == 5 else 1 + n % 13,
            seed=5,
            request=2**40 + n,
            stop_ids=(7, 20, 33),
            **SETTINGS[n % 7],
        )
        for n, prompt in enumerate(shared_prompts(count))
    ]


@pytest.fixture(scope="module", params=["full", "windows"])
def model(request: pytest.FixtureRequest) -> Transformer:
    windowed: dict[str, Any] = {"family": "qwen3", "qk_norm": True, "windows": (40, 0), "num_kv_heads": 4}
    return tiny_model(3, **(windowed if request.param == "windows" else {}))


@pytest.fixture(scope="module")
def alone(model: Transformer) -> list[Completion]:
    done = [Engine(model).generate([request])[0] for request in mixed_requests()]
    assert {one.finish for one in done} == {"stop", "length"} and len({tuple(one.ids) for one in done}) > 45
    return done


def test_a_request_gives_the_same_alone_in_a_batch_and_with_its_prefix_cached(
    model: Transformer, alone: list[Completion]
) -> None:
    engine = Engine(model)
    assert_same(engine.generate(mixed_requests()), alone)
    before = engine.stats.cached_tokens
    assert_same(engine.generate(mixed_requests()), alone)
    assert engine.stats.cached_tokens > before


@pytest.mark.parametrize("options", [{"max_rows": 1}, {"max_rows": 3}, {"prefill_tokens": 20}])
def test_a_request_gives_the_same_among_few_rows_and_in_short_streams(
    model: Transformer, alone: list[Completion], options: dict[str, Any]
) -> None:
    assert_same(Engine(model, **options).generate(mixed_requests()[:24]), alone[:24])


def test_a_request_that_was_preempted_gives_the_same(model: Transformer, alone: list[Completion]) -> None:
    engine = Engine(model, max_rows=16, cache_gib=cache_gib(model, 2 * CONTEXT))
    assert_same(engine.generate(mixed_requests()), alone)
    assert engine.stats.preemptions > 0


def test_the_order_of_requests_does_not_matter(model: Transformer, alone: list[Completion]) -> None:
    order = random.Random(3).sample(range(64), 64)
    requests = mixed_requests()
    done = Engine(model, max_rows=9).generate([requests[n] for n in order])
    assert_same(done, [alone[n] for n in order])


def trainer_logprobs(model: Transformer, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Of each (prompt, continuation), the continuation's log-probs in one packed pass."""
    packed = pack([[*prompt, *ids] for prompt, ids in texts])
    ends = packed.cu_seqlens[1:].tolist()
    places = [place for end, (_, ids) in zip(ends, texts, strict=True) for place in range(end - len(ids), end)]
    hidden, targets = model(packed)[torch.tensor(places) - 1], packed.tokens[places]
    logprobs = linear_logprob(hidden, model.head_weight, targets).logprobs.tolist()
    cuts = accumulate((len(ids) for _, ids in texts), initial=0)
    return [logprobs[start:end] for start, end in pairwise(cuts)]


@torch.no_grad()
def test_log_probs_are_those_of_the_trainer(model: Transformer) -> None:
    """Sampled in a batch, sampled with the prefix cached, and scored, each within 1e-4 a token."""
    requests = [Request(prompt=prompt, max_tokens=16, seed=2, request=n) for n, prompt in enumerate(shared_prompts(24))]
    engine = Engine(model, max_rows=10)
    for _ in range(2):
        done = engine.generate(requests)
        expected = trainer_logprobs(model, [(r.prompt, one.ids) for r, one in zip(requests, done, strict=True)])
        torch.testing.assert_close(
            torch.tensor(list(chain(*(one.logprobs for one in done)))), torch.tensor(list(chain(*expected))),
            atol=1e-4, rtol=0,
        )  # fmt: skip
    queries = [Query(r.prompt, [one.ids[:3], one.ids[:1], [9]]) for r, one in zip(requests, done, strict=True)]
    sums = [[sum(logprobs[:3]), logprobs[0]] for logprobs in expected]
    for asked in (engine, Engine(model, prefill_tokens=50)):
        assert_same([scores[:2] for scores in asked.score(queries)], sums, atol=1e-4)


def test_scores_are_the_same_alone_together_and_cached(model: Transformer) -> None:
    draw = random.Random(4)
    queries = [
        Query(prompt, [[draw.randrange(VOCAB) for _ in range(draw.choice((1, 1, 2, 33)))] for _ in range(n % 4)])
        for n, prompt in enumerate(shared_prompts(40))
    ]
    expected = [Engine(model).score([query])[0] for query in queries]
    warm = Engine(model)
    warm.generate(mixed_requests())
    for engine in (warm, Engine(model, max_rows=2, prefill_tokens=64), Engine(model)):
        assert_same(engine.score(queries), expected, atol=1e-4)


def test_a_model_of_16_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of an attention are merged in float32 there, too: scores move by what rounding the weights moves."""
    share_prefixes(monkeypatch)
    queries = [Query(prompt, [[3], [4, 5]]) for prompt in shared_prompts(12)]
    expected = torch.tensor(Engine(tiny_model(3)).score(queries))
    engine = Engine(tiny_model(3).to(torch.bfloat16))
    assert torch.tensor(engine.score(queries)).sub(expected).abs().mean() < 0.08  # of about 8
    done = engine.generate([Request(prompt=query.prompt, max_tokens=4, seed=0, request=0) for query in queries])
    assert engine.stats.cached_tokens > 0 and all(len(one.ids) == 4 for one in done)


def test_what_prompts_share_is_computed_once_in_a_batch_and_not_again_in_the_next(model: Transformer) -> None:
    """32 requests with 128 common tokens and one own, then 32 others: far below 64 x 129 tokens of prefill."""
    common = [(5 * n + 3) % VOCAB for n in range(128)]
    engine = Engine(model)
    for call in range(2):
        requests = [Request(prompt=[*common, n], max_tokens=2, seed=call, request=n) for n in range(32)]
        done = engine.generate(requests)
        assert_same(done, [Engine(model).generate([request])[0] for request in requests])
    assert engine.stats.prompt_tokens == 64 * 129
    assert engine.stats.prefill_tokens <= 128 + 64 * 33
    assert 0.5 < engine.stats.hit_rate <= 1


def test_stop_strings_end_a_text_at_the_same_token_in_a_batch(model: Transformer) -> None:
    words = short_words()
    requests = [
        Request(prompt=prompt, max_tokens=16, seed=8, request=n, stop_strings=("gag", "bc"))
        for n, prompt in enumerate(shared_prompts(12))
    ]
    expected = [Engine(model, words).generate([request])[0] for request in requests]
    assert {one.finish for one in expected} == {"stop", "length"}
    assert_same(Engine(model, words, max_rows=5).generate(requests), expected)
