"""Log-prob, entropy and log-normaliser from hidden states: the reference against a softmax in float64."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.kernels.sample import sample

T, H, V = 13, 6, 29


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(T, H, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, H, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_values(temperature: float) -> None:
    hidden, weight, targets = inputs()
    powers = (torch.einsum("th,vh->tv", hidden, weight) / temperature).exp()
    p = powers / powers.sum(1, keepdim=True)
    expected = p[torch.arange(T), targets].log(), -(p * p.log()).sum(1), powers.sum(1).log()
    for got, want in zip(linear_logprob(hidden, weight, targets, temperature), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for got, want in zip(linear_logprob(hidden.float(), weight.float(), targets, temperature), expected, strict=True):
        torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 4, T, 1000])
def test_chunks_change_nothing(tokens: int) -> None:
    hidden, weight, targets = inputs()
    chunked = linear_logprob(hidden, weight, targets, 0.7, logits_bytes=tokens * 4 * V)
    for got, whole in zip(chunked, linear_logprob(hidden, weight, targets, 0.7), strict=True):
        torch.testing.assert_close(got, whole, atol=1e-13, rtol=0)


def test_known_distributions() -> None:
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.tensor([-100])
    weight = torch.zeros(8, 1, dtype=torch.float64)
    got = linear_logprob(one, weight, torch.tensor([5]))
    assert [float(x) for x in got] == pytest.approx([-math.log(8), math.log(8), math.log(8)])
    weight[0] = 1000.0
    assert [float(x) for x in linear_logprob(one, weight, none)] == [0.0, 0.0, 1000.0]
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)  # 3/4 and 1/4
    assert float(linear_logprob(one, weight, none).entropy) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert float(linear_logprob(one, weight, none, math.inf).entropy) == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0.7, 1e-3, 1e-38])
def test_the_sampler_reports_the_same_log_prob_however_low_the_temperature(temperature: float) -> None:
    hidden, weight, _ = (x.float() if x.is_floating_point() else x for x in inputs())
    settings = torch.full((T,), temperature), torch.zeros(T, dtype=torch.int64), torch.ones(T)
    tokens, expected = sample(hidden @ weight.T, torch.linspace(0, 0.99, T), *settings)
    got = linear_logprob(hidden, weight, tokens, temperature)
    torch.testing.assert_close(got.logprobs, expected, atol=1e-5, rtol=0)
    assert got.entropy.isfinite().all()


def test_half_precision_gives_float32_and_no_tokens_give_none() -> None:
    hidden, weight, targets = inputs(scale=10)
    half = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    assert {x.dtype for x in half} == {torch.float32} and all(x.isfinite().all() for x in half)
    assert {x.shape for x in linear_logprob(hidden[:0], weight, targets[:0], logits_bytes=1)} == {(0,)}


def test_bad_input_is_refused() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"shapes \(13, 6\) and \(29, 5\); allowed: \[T, H\] and \[V, H\]"):
        linear_logprob(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match="V at least 1"):
        linear_logprob(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match=r"torch.float64 and torch.float32; allowed: one"):
        linear_logprob(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match=r"targets are torch.int64 \(12,\); allowed: torch.int64 \(13,\)"):
        linear_logprob(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"targets hold 29; allowed: 0 to 28, and -100 for none"):
        linear_logprob(hidden, weight, targets + V - targets)
    with pytest.raises(ValueError, match="linear_logprob: an input requires grad"):
        linear_logprob(hidden, weight.requires_grad_(), targets)
    for temperature in (0.0, -0.0, -1.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"temperature = .* above 0"):
            linear_logprob(hidden, weight.detach(), targets, temperature)
