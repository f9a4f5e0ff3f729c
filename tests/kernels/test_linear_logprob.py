"""Log-probs and entropy from hidden states against a softmax over whole logits in float64."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.linear_logprob import linear_entropy, linear_logprob
from bylaw.kernels.sample import sample

T, H, V = 13, 6, 29
HOSTILE = [0.0, -1.0, -0.0, math.nan, -math.inf]


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(T, H, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, H, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    exponent = torch.einsum("th,vh->tv", hidden, weight) / temperature
    powers = torch.exp(exponent - exponent.detach().max())
    return powers / powers.sum(1, keepdim=True)


def one_token_of_logits(weight: Tensor) -> int:
    return 4 * weight.shape[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_values(temperature: float) -> None:
    hidden, weight, targets = inputs()
    p = probabilities(hidden, weight, temperature)
    expected = p[torch.arange(T), targets].log()
    torch.testing.assert_close(linear_logprob(hidden, weight, targets, temperature), expected, atol=1e-12, rtol=0)
    narrow = linear_logprob(hidden.float(), weight.float(), targets, temperature)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, atol=1e-5, rtol=0)
    entropy = -(p * p.log()).sum(1)
    torch.testing.assert_close(linear_entropy(hidden, weight, temperature), entropy, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 4, T, 1000])
def test_chunks_change_neither_values_nor_gradients(tokens: int, temperature: float) -> None:
    hidden, weight, targets = inputs()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    logits_bytes = tokens * one_token_of_logits(weight)
    chunked = linear_logprob(hidden, weight, targets, temperature, logits_bytes)
    expected = probabilities(hidden, weight, temperature)[torch.arange(T), targets].log()
    torch.testing.assert_close(chunked, expected, atol=1e-12, rtol=0)
    got = torch.autograd.grad((chunked * upstream).sum(), leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(linear_logprob(hidden, weight, targets, temperature, logits_bytes), chunked)
        whole = linear_entropy(hidden, weight, temperature)
        torch.testing.assert_close(linear_entropy(hidden, weight, temperature, logits_bytes), whole)


@pytest.mark.parametrize("logits_bytes", [1, 3 * 4 * V, 2**20])
def test_gradients_equal_finite_differences(logits_bytes: int) -> None:
    hidden, weight, targets = inputs()
    leaves = hidden[:4].clone().requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets[:4], 0.7, logits_bytes), leaves)


def test_chunked_logits_are_not_kept_for_the_backward_pass() -> None:
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        if x.data_ptr() != weight.data_ptr():
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        linear_logprob(hidden, weight, targets)
        assert max(kept) >= T * V, "in one chunk they are"
        kept.clear()
        linear_logprob(hidden, weight, targets, logits_bytes=one_token_of_logits(weight))
    assert sum(kept) < T * V


def test_entropy_of_known_distributions() -> None:
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    assert float(linear_entropy(hidden, weight)) == pytest.approx(math.log(8))
    weight[0] = 1000.0
    assert float(linear_entropy(hidden, weight)) == 0.0
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)  # 3/4 and 1/4
    assert float(linear_entropy(hidden, weight)) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert float(linear_entropy(hidden, weight, math.inf)) == pytest.approx(math.log(2))


def test_entropy_carries_no_gradient() -> None:
    hidden, weight, _ = inputs()
    assert not linear_entropy(hidden.requires_grad_(), weight.requires_grad_()).requires_grad


@pytest.mark.parametrize("logits_bytes", [1, 2**20])
def test_extreme_logits_stay_finite(logits_bytes: int) -> None:
    hidden, weight, targets = inputs(scale=1e4)
    leaf = hidden.float().requires_grad_()
    logprobs = linear_logprob(leaf, weight.float(), targets, logits_bytes=logits_bytes)
    logprobs.sum().backward()
    assert logprobs.isfinite().all() and leaf.grad is not None and leaf.grad.isfinite().all()
    assert linear_entropy(leaf, weight.float(), logits_bytes=logits_bytes).isfinite().all()


@pytest.mark.parametrize("temperature", [0.7, 1e-3, 1e-38])
def test_the_sampler_reports_the_same_log_prob_however_low_the_temperature(temperature: float) -> None:
    hidden, weight, _ = (x.float() if x.is_floating_point() else x for x in inputs())
    settings = torch.full((T,), temperature), torch.zeros(T, dtype=torch.int64), torch.ones(T)
    tokens, expected = sample(hidden @ weight.T, torch.linspace(0, 0.99, T), *settings)
    torch.testing.assert_close(linear_logprob(hidden, weight, tokens, temperature), expected, atol=1e-5, rtol=0)
    assert linear_entropy(hidden, weight, temperature).isfinite().all()


@pytest.mark.parametrize("temperature", HOSTILE)
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float) -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"temperature = .* above 0"):
        linear_logprob(hidden, weight, targets, temperature)
    with pytest.raises(ValueError, match=r"temperature = .* above 0"):
        linear_entropy(hidden, weight, temperature)


@pytest.mark.parametrize("logits_bytes", [1, 2**20])
def test_no_tokens(logits_bytes: int) -> None:
    hidden, weight, targets = inputs()
    leaf = weight.requires_grad_()
    logprobs = linear_logprob(hidden[:0], leaf, targets[:0], logits_bytes=logits_bytes)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()
    assert linear_entropy(hidden[:0], weight, logits_bytes=logits_bytes).shape == (0,)


def test_half_precision_gives_float32() -> None:
    hidden, weight, targets = inputs()
    half = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    expected = probabilities(hidden, weight, 1.0)[torch.arange(T), targets].log()
    torch.testing.assert_close(half.double(), expected, atol=0.1, rtol=0)
