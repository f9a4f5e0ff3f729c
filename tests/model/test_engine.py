"""The engine against Transformers on the same weights, against the trainer, and against itself in other batches."""

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models

from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.philox import uniform_scalar
from bylaw.model.checkpoint import load_model
from bylaw.model.config import ModelConfig
from bylaw.model.engine import Completion, Engine, Request
from bylaw.model.packing import pack
from bylaw.model.supervised import token_states
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize

CONTEXT, VOCAB = 64, 53
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", WINDOWED),
    "qwen3": ("Qwen3", {"head_dim": 10}),
}
LENGTHS = (1, 4, 11, 30)


class Pair(NamedTuple):
    """One set of weights in Transformers and here."""

    theirs: Any
    ours: Transformer


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, options = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    config._attn_implementation = "eager"
    theirs = randomised(getattr(transformers, f"{name}ForCausalLM")(config)).eval()
    theirs.save_pretrained(folder)
    return Pair(theirs, load_model(folder))


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        family="mistral", vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=6, max_position_embeddings=CONTEXT, windows=(9, 9),
    )  # fmt: skip
    return randomised(Transformer(config))


def randomised(model: Any) -> Any:
    """Weights large enough that a token's past decides what follows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model


def engine(model: Transformer, max_rows: int = 64) -> Engine:
    """An engine that never reads or writes text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    return Engine(model, Tokenizer.from_parts(backend, eos_token="</s>"), max_rows)


def prompts(count: int, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(lengths[n % len(lengths)])] for n in range(count)]


def greedy(model: Transformer, given: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    common: dict[str, Any] = {"max_tokens": 24, "seed": 0, "request": 0, "temperature": 0.0} | options
    return [done.ids for done in engine(model).generate([Request(prompt=p, **common) for p in given])]


def their_greedy(model: Any, prompt: list[int], max_tokens: int = 24, stop: int | None = None) -> list[int]:
    model.generation_config.eos_token_id = stop
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_greedy_text_equals_that_of_transformers(pair: Pair) -> None:
    given = prompts(8)
    expected = [their_greedy(pair.theirs, prompt) for prompt in given]
    assert len({tuple(ids) for ids in expected}) > 5 and len(set(itertools.chain(*expected))) > 10, "texts too alike"
    assert greedy(pair.ours, given) == expected


def test_a_stop_id_ends_the_text_as_in_transformers(pair: Pair) -> None:
    given = prompts(4)
    stop = their_greedy(pair.theirs, given[0])[5]
    expected = [their_greedy(pair.theirs, prompt, stop=stop) for prompt in given]
    assert expected[0][-1] == stop and len(expected[0]) <= 6
    assert greedy(pair.ours, given, stop_ids=(stop,)) == expected


def test_the_window_is_felt(model: Transformer) -> None:
    """Else the test above would pass without it: text that one token beyond both layers' windows cannot change."""
    prompt = prompts(1, [30])[0]
    far, near = [9, *prompt[1:]], [*prompt[:-3], 9, *prompt[-2:]]
    assert greedy(model, [far]) == greedy(model, [prompt]) != greedy(model, [near])
    wide = Transformer(ModelConfig(**{**vars(model.config), "windows": (0, 0)}))
    wide.load_state_dict(model.state_dict())
    assert greedy(wide, [prompt]) != greedy(model, [prompt])


def mixed_requests() -> list[Request]:
    given = prompts(20, (1, 9, 3, 27, 14))
    settings: list[dict[str, Any]] = [
        {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.3}
    ]  # fmt: skip
    return [
        Request(
            prompt=prompt,
            max_tokens=1 + 5 * n % 17,
            seed=7,
            request=1000 + n,
            stop_ids=(11, 12),
            **settings[n % len(settings)],
        )
        for n, prompt in enumerate(given)
    ]


def assert_same(got: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.ids, one.finish) == (other.ids, other.finish)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone(model: Transformer) -> list[Completion]:
    return [engine(model).generate([request])[0] for request in mixed_requests()]


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_a_request_gives_the_same_tokens_alone_and_in_any_batch(
    model: Transformer, alone: list[Completion], max_rows: int
) -> None:
    assert {done.finish for done in alone} == {"stop", "length"}
    assert_same(engine(model, max_rows).generate(mixed_requests()), alone)


@pytest.mark.parametrize("max_rows", [2, 9])
def test_the_order_of_requests_does_not_matter(model: Transformer, alone: list[Completion], max_rows: int) -> None:
    order = list(range(20))
    random.Random(max_rows).shuffle(order)
    requests = mixed_requests()
    heard: dict[int, list[int]] = {}
    done = engine(model, max_rows).generate([requests[i] for i in order], on_token=heard.__setitem__)
    assert_same(done, [alone[i] for i in order])
    assert [heard[i] for i in range(20)] == [one.ids for one in done], "each token is told of"


def test_prompts_of_more_than_one_prefill(model: Transformer, alone: list[Completion]) -> None:
    assert_same(Engine(model, max_rows=6, prefill_tokens=20).generate(mixed_requests()), alone)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_gives_sampled_tokens_the_same_log_probs(pair: Pair, temperature: float) -> None:
    requests = [
        Request(prompt=prompt, max_tokens=12, seed=3, request=n, temperature=temperature)
        for n, prompt in enumerate(prompts(12))
    ]
    done = engine(pair.ours, 5).generate(requests)
    packed = pack([[*request.prompt, *one.ids] for request, one in zip(requests, done, strict=True)])
    flags = [[False] * len(r.prompt) + [True] * len(one.ids) for r, one in zip(requests, done, strict=True)]
    places = torch.tensor(list(itertools.chain(*flags))).nonzero().squeeze(-1)
    hidden, tokens = token_states(pair.ours, packed, places)
    nll = torch.ones(len(tokens))
    logprobs = linear_loss(hidden, pair.ours.head_weight, tokens, nll=nll, temperature=temperature).logprobs
    sampled = torch.tensor(list(itertools.chain(*(one.logprobs for one in done))))
    assert sampled.std() > 0.3 and len(sampled) == 144
    torch.testing.assert_close(sampled, logprobs, atol=1e-4, rtol=0)


def test_every_token_has_the_draw_of_its_request_and_position(model: Transformer) -> None:
    """Where all tokens are equally likely, a token says which number it was drawn with."""
    level = randomised(Transformer(ModelConfig(**{**vars(model.config), "vocab_size": 50})))
    with torch.no_grad():
        level.head_weight.zero_()
    names = [(5, 8), (5, 9), (6, 8), (2**62, 2**63 - 1)]
    requests = [Request(prompt=[4] * n, max_tokens=9, seed=s, request=r) for n, (s, r) in enumerate(names, 1)]
    for (seed, request), done in zip(names, engine(level, 2).generate(requests), strict=True):
        assert done.ids == [int(50 * uniform_scalar(seed, request, position)) for position in range(9)]


def test_draws_follow_the_model(model: Transformer) -> None:
    """First tokens of 3000 requests against the softmax: every frequency within five standard deviations."""
    requests = [Request(prompt=[5, 6], max_tokens=1, seed=0, request=n) for n in range(3000)]
    done = engine(model, 3000).generate(requests)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in done]), minlength=VOCAB) / 3000
    with torch.no_grad():
        p = torch.softmax(model.logits(model(pack([[5, 6]]))[-1:]), dim=1)[0]
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / 3000).sqrt()).all()


def test_the_weights_are_those_of_the_moment() -> None:
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=4, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = randomised(Transformer(config))
    live, request = engine(model), Request(prompt=[3, 4], max_tokens=8, seed=0, request=0)
    before = live.generate([request])[0]
    initialize(model, seed=1)
    after = live.generate([request])[0]
    assert_same([after], engine(model).generate([request]))
    assert after.logprobs != before.logprobs


def test_the_length_ends_at_max_tokens_and_at_the_end_of_the_context(model: Transformer) -> None:
    def lengths(prompt: int, max_tokens: int) -> tuple[int, str]:
        request = Request(prompt=[3] * prompt, max_tokens=max_tokens, seed=0, request=0)
        done = engine(model).generate([request, request])[1]
        assert len(done.logprobs) == len(done.ids)
        return len(done.ids), done.finish

    assert lengths(5, 1) == (1, "length")
    assert lengths(5, 9) == (9, "length")
    assert lengths(CONTEXT - 9, 9) == (9, "length")
    assert lengths(CONTEXT - 9, 10**9) == (9, "length")
    assert lengths(CONTEXT - 1, 50) == (1, "length")


def their_score(model: Any, prompt: Sequence[int], candidate: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *candidate]])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return sum(float(logprobs[len(prompt) - 1 + n, token]) for n, token in enumerate(candidate))


def test_scores_equal_those_of_transformers(pair: Pair) -> None:
    first, second, third, last = prompts(4, (6, 17, 1, 40))
    queries = [
        (first, [[4], [9], [30]]),
        (second, [[8, 9], [8, 10], [8], [20, 8, 9, 40]]),
        (first, [[4, 5, 6], [9]]),  # the same prompt again
        ([*first, 4], [[5], [5, 6]]),  # as far as ids go, the beginning of that one
        (third, []),
        (last, [list(range(3, 3 + CONTEXT - 40))]),  # up to the end of the context
    ]
    expected = [[their_score(pair.theirs, prompt, one) for one in candidates] for prompt, candidates in queries]
    got = engine(pair.ours).score(queries)
    assert [len(row) for row in got] == [3, 4, 2, 2, 0, 1]
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_what_candidates_and_queries_share_is_computed_once(model: Transformer, monkeypatch: Any) -> None:
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda stream: seen.append(len(stream.tokens)) or forward(stream))
    prompt = prompts(1, [10])[0]
    scores = engine(model).score([(prompt, [[4], [5]]), (prompt, [[6], [4, 5], [4, 6]]), (prompt, [[4]])])
    assert seen == [10 + 11]
    assert scores[0][0] == scores[2][0]


def test_scores_of_more_than_one_pass(model: Transformer) -> None:
    queries = [(prompt, [[4], [5, 6]]) for prompt in prompts(9)]
    expected = engine(model).score(queries)
    got = Engine(model, prefill_tokens=20).score(queries)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-5, rtol=0)


def test_no_requests(model: Transformer) -> None:
    assert engine(model).generate([]) == []
    assert engine(model).score([]) == []


@pytest.mark.parametrize(("prompt", "candidate"), [(0, 1), (1, 0), (CONTEXT, 1), (CONTEXT - 1, 2)])
def test_a_query_that_cannot_be_is_refused(model: Transformer, prompt: int, candidate: int) -> None:
    with pytest.raises(ValueError, match=f"query 1: candidate 0: {prompt} and {candidate} tokens"):
        engine(model).score([([3], [[4]]), ([3] * prompt, [[4] * candidate])])
