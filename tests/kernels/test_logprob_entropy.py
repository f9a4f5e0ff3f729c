"""Log-prob and entropy from logits: the reference against plain formulas."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.logprob_entropy import logprob_entropy

T, V = 7, 11


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(T, V, dtype=torch.float64, generator=generator)
    return logits, torch.randint(V, (T,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_values(temperature: float) -> None:
    logits, targets = inputs()
    powers = (logits / temperature).exp()
    p = powers / powers.sum(1, keepdim=True)
    logprobs, entropy = logprob_entropy(logits, targets, temperature)
    torch.testing.assert_close(logprobs, p[torch.arange(T), targets].log(), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1), atol=1e-12, rtol=0)
    assert {x.dtype for x in logprob_entropy(logits.bfloat16(), targets)} == {torch.float32}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_equal_finite_differences(temperature: float) -> None:
    logits, targets = inputs()
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda x: logprob_entropy(x, targets, temperature), logits.requires_grad_())


def test_an_ignored_target_has_no_log_prob_but_an_entropy() -> None:
    logits, _ = inputs()
    logprobs, entropy = logprob_entropy(logits.requires_grad_(), torch.full((T,), -100))
    assert logprobs.tolist() == [0.0] * T and (entropy > 0).all()
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert not gradient.any()


@pytest.mark.parametrize("temperature", [1.0, 1e-38])
def test_banned_tokens_make_no_nan(temperature: float) -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    logprobs, entropy = logprob_entropy(logits, torch.tensor([0]), temperature)
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    torch.testing.assert_close(torch.cat([logprobs, entropy]).detach(), torch.tensor([-math.log(2), math.log(2)]))
    assert gradient.isfinite().all() and gradient[0, 1] == 0


def test_bad_input_is_refused() -> None:
    logits, targets = inputs()
    with pytest.raises(ValueError, match=r"logits are torch.float64 \(7,\); allowed: floating point \[T, V\]"):
        logprob_entropy(logits[:, 0], targets)
    with pytest.raises(ValueError, match=r"logits are torch.int64 \(7, 11\)"):
        logprob_entropy(logits.long(), targets)
    with pytest.raises(ValueError, match="V at least 1"):
        logprob_entropy(logits[:, :0], targets)
    with pytest.raises(ValueError, match=r"targets are torch.int64 \(6,\); allowed: torch.int64 \(7,\)"):
        logprob_entropy(logits, targets[1:])
    with pytest.raises(ValueError, match=r"targets are torch.int32"):
        logprob_entropy(logits, targets.int())
    for target in (-1, V):
        with pytest.raises(ValueError, match=rf"targets hold {target}; allowed: 0 to 10, and -100 for none"):
            logprob_entropy(logits, targets.masked_fill(targets == targets[0], target))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"temperature = .* above 0"):
            logprob_entropy(logits, targets, temperature)
