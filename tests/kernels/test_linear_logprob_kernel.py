"""The fused head kernels against float64 and against torch in the same dtype."""

import math

import pytest
import torch
from precision import DEVICE, DTYPES, assert_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import linear_logprob as module
from bylaw.kernels.linear_logprob import LogProbs, linear_logprob, reference

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Inputs:
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    targets[1::5] = -100
    return random(tokens, size, dtype=dtype), random(vocabulary, size, seed=1, dtype=dtype), targets.to(DEVICE)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 0.7) -> LogProbs:
    return linear_logprob(hidden, weight, targets, temperature, backend="triton")


def assert_equal(got: LogProbs, expected: LogProbs) -> None:
    for name, x, y in zip(LogProbs._fields, got, expected, strict=True):
        assert torch.equal(x, y), name


# A size of 24 is read by descriptors, others by pointers.
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 24, 65), (33, 19, 31), (16, 63, 17), (0, 8, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(*shape, dtype)
    for temperature in (1.0, 0.7):
        exact = reference(hidden.double(), weight.double(), targets, temperature)
        columns = ours(hidden, weight, targets, temperature), reference(hidden, weight, targets, temperature), exact
        for name, got, torchs, true in zip(LogProbs._fields, *columns, strict=True):
            assert_as_good(got, torchs, true, name)


def test_float64() -> None:
    hidden, weight, targets = inputs(5, 9, 40, torch.float64)
    for got, expected in zip(ours(hidden, weight, targets), reference(hidden, weight, targets, 0.7), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_descriptors_and_pointers_agree_to_the_bit() -> None:
    hidden, weight, targets = inputs(18, 24, 40)
    apart = torch.cat([hidden, hidden[:, :1]], dim=1)[:, :24]  # rows of 25 floats: not 16 bytes from each other
    assert module._misaligned(apart) and not module._misaligned(hidden)
    assert_equal(ours(apart, weight, targets), ours(hidden, weight, targets))


def test_a_token_stands_alone_and_two_runs_are_equal() -> None:
    hidden, weight, targets = inputs(33, 24, 40)
    together = ours(hidden, weight, targets)
    assert_equal(ours(hidden, weight, targets), together)
    for rows in (slice(0, 1), slice(20, 33)):
        assert_equal(ours(hidden[rows], weight, targets[rows]), LogProbs(*(x[rows] for x in together)))


def test_input_that_is_not_contiguous() -> None:
    hidden, weight, targets = inputs(5, 16, 20)
    expected = ours(hidden, weight, targets)
    assert_equal(ours(hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2]), expected)
    assert_equal(ours(hidden, weight.repeat(1, 2)[:, 16:], targets), expected)


def test_log_probs_never_rise_above_0() -> None:
    hidden, weight, _ = inputs(16, 16, 40)
    sure = (hidden @ weight.T).argmax(1)
    for scale in (1.0, 1e4):
        got = ours(scale * hidden, weight, sure)
        assert (got.logprobs <= 0).all() and (got.entropy >= 0).all() and got.log_normalizer.isfinite().all()


def test_all_ignored() -> None:
    hidden, weight, targets = inputs(3, 16, 20)
    got, expected = ours(hidden, weight, torch.full_like(targets, -100)), ours(hidden, weight, targets)
    assert not got.logprobs.any() and torch.equal(got.entropy, expected.entropy)


def test_a_target_outside_the_vocabulary_shows() -> None:
    hidden, weight, _ = inputs(4, 16, 20)  # 20 to 31 are places in the last tile, but no tokens
    targets = torch.tensor([20, -1, 19, 2**32], device=DEVICE)
    assert module._launch(hidden, weight, targets, 1.0)[0].isnan().tolist() == [True, True, False, True]


@pytest.mark.filterwarnings("ignore:overflow")  # in numpy under the interpreter
@pytest.mark.parametrize("temperature", [math.inf, 1e-20, 1e-40])
def test_extreme_temperatures(temperature: float) -> None:
    hidden, weight, _ = inputs(3, 16, 40)
    targets = (hidden @ weight.T).argmax(1)
    got, expected = ours(hidden, weight, targets, temperature), reference(hidden, weight, targets, temperature)
    torch.testing.assert_close(got[:2], expected[:2])


def test_the_operation_is_registered_in_order() -> None:
    assert_op(module._launch, *inputs(2, 8, 5), 0.7)


def test_under_torch_compile() -> None:
    hidden, weight, targets = inputs(3, 16, 20)
    assert_equal(compiled(ours)(hidden, weight, targets), ours(hidden, weight, targets))


def test_the_backend_is_checked() -> None:
    with pytest.raises(ValueError, match="linear_logprob: backend = 'fast'; allowed"):
        linear_logprob(*inputs(3, 16, 20), backend="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 896, 151936), (300, 4096, 151936), (2049, 2048, 128256), (64, 3584, 256000)])
def test_production_shapes(shape: tuple[int, int, int]) -> None:
    tokens, size, vocabulary = shape
    hidden = torch.randn(tokens, size, dtype=torch.bfloat16, device=DEVICE) / 16
    weight = torch.randn(vocabulary, size, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.arange(tokens, device=DEVICE) * (vocabulary // tokens)
    exact = reference(hidden.double(), weight.double(), targets, 0.7)
    columns = ours(hidden, weight, targets), reference(hidden, weight, targets, 0.7), exact
    for name, got, torchs, true in zip(LogProbs._fields, *columns, strict=True):
        assert_as_good(got, torchs, true, name)
