"""What the training benchmark trains, and on what: functions of a seed, so that each process draws the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bylaw.benchmarks.training_config import Sizes, Way
from bylaw.kernels.philox import permutation
from bylaw.model.checkpoint import save_model, save_reward
from bylaw.model.config import ModelConfig
from bylaw.model.heads import scalar_model
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer, initialize

Item = TypeVar("Item")
PAD, EOS, FIRST = 0, 1, 2  # ordinary tokens begin at FIRST
NEVER = -10.0  # times about 9: the logit of padding, which no side may draw
CONTEXT = 2048
SHAPES = {
    "tiny": ModelConfig(
        family="llama", vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, max_position_embeddings=CONTEXT, eos_token_ids=(EOS,), pad_token_id=PAD,
        initializer_range=0.06,
    ),
    "llama-5m": ModelConfig(
        family="llama", vocab_size=8192, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4,
        num_kv_heads=4, head_dim=64, max_position_embeddings=CONTEXT, eos_token_ids=(EOS,), pad_token_id=PAD,
    ),
    "qwen2-1.5b": ModelConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, max_position_embeddings=4096, attention_bias=True, tie_word_embeddings=True,
        eos_token_ids=(EOS,), pad_token_id=PAD,
    ),
}  # fmt: skip


class PairIds(NamedTuple):
    """Token ids of a prompt and of two answers to it, the better first."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Episode(NamedTuple):
    """Token ids of a prompt and a response, and whether the response ended by itself."""

    prompt: list[int]
    response: list[int]
    ended: bool


def lengths(count: int, of: tuple[float, int], seed: int) -> list[int]:
    """`count` lengths in random order: evenly spaced quantiles of an exponential that is cut off at the longest.

    Every draw has the same lengths, so that no side has luck; only their order depends on the seed.
    """
    mean, longest = of
    scale = _scale(mean, longest)
    quantiles = [min(longest, max(1, round(-scale * math.log(1 - (i + 0.5) / count)))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [quantiles[i] for i in order.tolist()]


def _scale(mean: float, longest: int) -> float:
    """The scale s of an exponential whose mean, cut off at `longest`, is s (1 - exp(-longest / s)) = `mean`."""
    low, high = mean, 1000.0 * longest
    for _ in range(100):
        middle = (low + high) / 2
        short = middle * -math.expm1(-longest / middle) < mean
        low, high = (middle, high) if short else (low, middle)
    return low


def texts(sizes: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Random ordinary tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(FIRST, vocab_size, (n,), generator=generator).tolist() for n in sizes]


def examples(sizes: Sizes, vocab_size: int, seed: int) -> list[list[int]]:
    """Texts of two tokens or more for supervised training: each learns at least one."""
    drawn = [max(2, n) for n in lengths(sizes.examples, sizes.example, seed)]
    return texts(drawn, vocab_size, seed)


def ordered(sizes: Sizes, vocab_size: int, seed: int, way: Way) -> list[list[int]]:
    """The texts of `examples` in the order in which the peer takes them: that of train_supervised with this seed, or
    sorted.
    """
    drawn = as_shuffled(examples(sizes, vocab_size, seed), seed)
    return sorted(drawn, key=len, reverse=True) if way.sort else drawn


def as_shuffled(items: list[Item], seed: int) -> list[Item]:
    """`items` in the order in which our trainers take them, for a side that does not shuffle."""
    return [items[int(i)] for i in permutation(seed, len(items), 0)]


def pairs(sizes: Sizes, vocab_size: int, seed: int) -> list[PairIds]:
    """Prompts with two answers each."""
    prompts = texts(lengths(sizes.pairs, sizes.prompt, seed), vocab_size, seed)
    drawn = lengths(2 * sizes.pairs, sizes.answer, seed + 1)
    answers = texts(drawn, vocab_size, seed + 1)
    return [PairIds(*three) for three in zip(prompts, answers[::2], answers[1::2], strict=True)]


def questions(sizes: Sizes, vocab_size: int, seed: int) -> list[list[int]]:
    """The prompts of one PPO iteration."""
    return texts(lengths(sizes.episodes, sizes.question, seed), vocab_size, seed)


def episodes(sizes: Sizes, vocab_size: int, seed: int) -> list[Episode]:
    """Prompts with responses, for both sides to learn from the very same: those at the longest did not end."""
    longest = sizes.response[1]
    responses = texts(lengths(sizes.episodes, sizes.response, seed + 1), vocab_size, seed + 1)
    asked = questions(sizes, vocab_size, seed)
    return [
        Episode(prompt, said if len(said) == longest else [*said[:-1], EOS], len(said) < longest)
        for prompt, said in zip(asked, responses, strict=True)
    ]


def restorer(*models: nn.Module) -> Callable[[], None]:
    """A function that gives the models the weights back that they have now."""
    kept = [[parameter.detach().clone() for parameter in model.parameters()] for model in models]

    @torch.no_grad()
    def restore() -> None:
        for model, weights in zip(models, kept, strict=True):
            model.zero_grad(set_to_none=True)
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)

    return restore


def filled(sizes: list[int], rows: int) -> float:
    """Which share of the places is text, where each `rows` texts in turn are padded to their longest."""
    batches = [sizes[start : start + rows] for start in range(0, len(sizes), rows)]
    return sum(sizes) / sum(len(batch) * max(batch) for batch in batches)


def write_models(folder: Path, shape: str, sizes: Sizes) -> None:
    """The folders policy, reference (near it), value and reward, from fixed seeds, for both sides to read."""
    policy = ending(initialize(Transformer(SHAPES[shape]), seed=0), sizes)
    save_model(policy, folder / "policy")
    save_reward(scalar_model(policy, seed=1), folder / "value")
    save_model(moved(policy), folder / "reference")
    save_reward(scalar_model(initialize(Transformer(SHAPES[shape]), seed=2), seed=3), folder / "reward")


@torch.no_grad()
def ending(model: Transformer, sizes: Sizes) -> Transformer:
    """Let `model`, which is changed, end a text at each token with the chance that gives responses their mean length.

    Coordinate 0 of the stream is the same for all tokens, and only the logits of end and padding read it.
    """
    assert model.lm_head is not None
    head = model.lm_head.weight
    model.embed.weight[:, 0], head[:, 0] = 1.0, 0.0
    head[PAD], head[EOS] = 0.0, 0.0
    head[PAD, 0] = NEVER
    hidden = model(pack(texts([64], len(head), 0), model.device))  # [64, H]
    others = model.logits(hidden)[:, FIRST:].logsumexp(-1).mean()
    chance = 1 / _scale(*sizes.response)
    head[EOS, 0] = (others + math.log(chance / (1 - chance))) / hidden[:, 0].mean()
    return model


@torch.no_grad()
def moved(model: Transformer) -> Transformer:
    """`model`, which is changed, a little away from itself: so that there is a KL to compare."""
    assert model.lm_head is not None
    noise: Tensor = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(4))
    noise[:FIRST], noise[:, 0] = 0.0, 0.0
    model.lm_head.weight += 0.01 * noise
    return model
