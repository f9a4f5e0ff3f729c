"""Pairs of answers: two draws of their own, which anybody can make again, and what a killed run leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bylaw.kernels.philox import request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine, Request
from bylaw.model.records import read_records
from bylaw.model.sampler import Sampler
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.compare import compare
from bylaw.rlaif.config import CompareConfig

SEED = 3
PROMPTS = [Prompt(f"p-{n}", [{"role": "user", "content": f"w{n} w1"}]) for n in range(3)]


def settings(**changes: float) -> CompareConfig:
    return CompareConfig(**{"max_tokens": 8, "prompts_per_chunk": 2} | changes)  # type: ignore[arg-type]


@pytest.fixture
def make_sampler(make_model: Callable, tokenizer: Tokenizer) -> Callable[[CompareConfig], Sampler]:
    def make(config: CompareConfig) -> Sampler:
        return Sampler(engine=Engine(make_model(), tokenizer), settings=config, seed=SEED, model_hash="abc")

    return make


def test_a_pair_holds_two_draws_that_can_be_made_again(
    make_sampler: Callable[[CompareConfig], Sampler], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = settings(temperature=0.8, pairs_per_prompt=2)
    sampler = make_sampler(config)
    assert compare(sampler, PROMPTS, tmp_path / "pairs.jsonl", config) == {"pairs": 6}
    pairs = read_records(tmp_path / "pairs.jsonl")
    assert [(p["id"], p["prompt_id"]) for p in pairs] == [(f"p-{n}#{i}", f"p-{n}") for n in range(3) for i in (0, 1)]
    for pair in pairs:
        assert pair["prompt"] == next(p.messages for p in PROMPTS if p.id == pair["prompt_id"])
        for side in "ab":
            key = request_id("pair", pair["prompt_id"], int(pair["id"][-1]), side)
            prompt = tokenizer.prompt_ids(pair["prompt"])
            again = Request(
                prompt=prompt, max_tokens=8, seed=SEED, request=key, temperature=0.8, stop_ids=tokenizer.stop_ids
            )
            assert pair[side]["ids"] == sampler.engine.generate([again])[0].ids  # alone, not in the pairs' batch
    texts = [pair[side]["text"] for pair in pairs for side in "ab"]
    assert len(set(texts)) == len(texts)  # four draws for each prompt, all different


def test_greedy_draws_are_the_same_and_are_kept_as_they_are(
    make_sampler: Callable[[CompareConfig], Sampler], tmp_path: Path
) -> None:
    config = settings(temperature=0.0)
    compare(make_sampler(config), PROMPTS, tmp_path / "pairs.jsonl", config)
    assert all(pair["a"] == pair["b"] for pair in read_records(tmp_path / "pairs.jsonl"))


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(
    make_sampler: Callable[[CompareConfig], Sampler], tmp_path: Path
) -> None:
    config, path = settings(pairs_per_prompt=2, prompts_per_chunk=4), tmp_path / "pairs.jsonl"
    sampler = make_sampler(config)
    compare(sampler, PROMPTS, path, config)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, *range(7, len(whole), 499), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:cut])
        compare(sampler, PROMPTS, path, config)
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"


def test_a_prompt_that_leaves_too_little_context_is_refused_before_any_work(
    make_sampler: Callable[[CompareConfig], Sampler], tmp_path: Path
) -> None:
    fits, long = (Prompt(f"p-{n}", [{"role": "user", "content": "w1 " * n}]) for n in (116, 117))
    config = settings()
    with pytest.raises(ValueError, match="'p-117' has 121 tokens"):
        compare(make_sampler(config), [fits, long], tmp_path / "pairs.jsonl", config)
    assert not list(tmp_path.iterdir())
    assert compare(make_sampler(config), [fits], tmp_path / "pairs.jsonl", config) == {"pairs": 1}
