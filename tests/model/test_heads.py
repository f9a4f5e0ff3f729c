"""The scalar head against a product by hand, and that a reward model shares nothing with the policy it starts from."""

import pytest
import torch

from bylaw.model.config import ModelConfig
from bylaw.model.heads import scalar_model
from bylaw.model.packing import pack
from bylaw.model.transformer import HEAD_ROWS, Transformer, initialize

TEXTS = [[3, 4, 5, 6, 7], [8], [9, 3, 3]]


def policy(tied: bool = False, hidden: int = 16) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=31, hidden_size=hidden, intermediate_size=12, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=hidden // 4, max_position_embeddings=64, tie_word_embeddings=tied,
        initializer_range=0.3,
    )  # fmt: skip
    return initialize(Transformer(config), seed=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_score_is_hidden_state_times_head(tied: bool) -> None:
    source = policy(tied)
    model, packed = scalar_model(source, seed=1), pack(TEXTS)
    scores = model(packed)
    assert scores.shape == (9,) and scores.dtype == torch.float32
    expected = (source(packed).double() * model.score.weight.double()[0]).sum(1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)
    assert scores.std() > 0.1


def test_a_sequence_is_scored_the_same_alone() -> None:
    model, packed = scalar_model(policy(), seed=1), pack(TEXTS)
    alone = torch.cat([model(pack([ids]))[-1:] for ids in TEXTS])
    torch.testing.assert_close(model(packed)[packed.last], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_has_its_own_memory_and_no_vocabulary_head(tied: bool) -> None:
    source = policy(tied)
    before = {name: parameter.detach().clone() for name, parameter in source.named_parameters()}
    model = scalar_model(source, seed=1)
    assert {"lm_head.weight", *dict(model.trunk.named_parameters())} == {"lm_head.weight", *before}
    assert model.trunk.lm_head is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, before[name])
    assert tied or source.lm_head is not None


def test_the_head_is_drawn_from_its_seed_with_the_published_spread() -> None:
    source = policy(hidden=400)
    weight = scalar_model(source, seed=1).score.weight
    assert torch.equal(weight, scalar_model(source, seed=1).score.weight)
    assert not torch.equal(weight, scalar_model(source, seed=2).score.weight)
    spread = 401**-0.5
    assert float(weight.detach().std()) == pytest.approx(spread, rel=0.15)
    assert abs(float(weight.detach().mean())) < 4 * spread / 20


def test_gradients_reach_trunk_and_head() -> None:
    model = scalar_model(policy(), seed=1)
    model(pack(TEXTS)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def narrowed(model: torch.nn.Module) -> None:
    """Parameters to bfloat16; the rotary frequencies stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def test_scores_of_a_16_bit_trunk_are_not_rounded() -> None:
    model, packed = scalar_model(policy(), 0), pack(TEXTS)
    exact = model(packed)
    narrowed(model.trunk)
    scores = model(packed)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact, atol=0.1, rtol=0.1)


def test_sampled_logits_of_a_16_bit_model_are_not_rounded() -> None:
    model = policy()
    narrowed(model)
    with torch.no_grad():
        hidden = model(pack(TEXTS))
        logits = model.logits(hidden)
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.head_weight.float().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_logits_of_a_head_that_is_larger_than_a_piece(rows: int) -> None:
    config = ModelConfig(
        family="llama", vocab_size=2 * HEAD_ROWS + 7, hidden_size=8, intermediate_size=4, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=4, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    model = initialize(Transformer(config), seed=0)
    hidden = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    expected = hidden.double() @ model.head_weight.detach().double().T
    with torch.no_grad():
        logits = model.logits(hidden)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(hidden).double(), expected, atol=1e-5, rtol=0)
