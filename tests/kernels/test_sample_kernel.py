"""The sampling kernels against a plain computation in float64, and where a draw on a GPU can go wrong."""

import math
from itertools import accumulate

import pytest
import torch
from precision import DEVICE, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels.sample import sample
from bylaw.kernels.sample_kernel import sample_rows

NINF, LAST = float("-inf"), 1 - 2.0**-24
Limits = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
NONE: Limits = (1.0, 0, 1.0, 0.0)
ROWS: list[Limits] = [
    *(NONE, (0.7, 0, 1.0, 0.0), (0.0, 3, 0.5, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.3, 10, 0.9, 0.0)),
    *((1.0, 0, 1.0, 0.1), (2.0, 40, 0.7, 0.2), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 1.0)),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(logits: Tensor, uniforms: Tensor, limits: list[Limits], backend: str = "triton") -> tuple[Tensor, Tensor]:
    """`sample`, on whatever device, with each row's own limits."""
    temperature, top_k, top_p, min_p = (torch.tensor(column, device=DEVICE) for column in zip(*limits, strict=True))
    settings = (temperature.float(), top_k.long(), top_p.float(), min_p.float())
    tokens, logprobs = sample(logits.to(DEVICE), uniforms.to(DEVICE), *settings, backend=backend)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    return tokens.cpu(), logprobs.cpu()


def kept(logits: Tensor, limits: Limits) -> dict[int, float]:
    """The tokens that may be drawn from one row, by index, and their probabilities, by sorting, in float64."""
    temperature, top_k, top_p, min_p = limits
    row = logits.double().tolist()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[: top_k or None]
    weights = [math.exp((row[i] - row[order[0]]) / temperature) for i in order]
    total, chosen = sum(weights), {}
    for index, weight, after in zip(order, weights, accumulate(weights), strict=True):
        if (after - weight < top_p * total or top_p == 1) and weight >= min_p and weight > 0:
            chosen[index] = weight
    total = sum(chosen.values())
    return {index: chosen[index] / total for index in sorted(chosen)}


def aimed(logits: Tensor, limits: list[Limits], seed: int = 0) -> tuple[Tensor, list[int], Tensor]:
    """For each row a number in the middle of a kept token's share, far from any border; the token, its log-prob."""
    generator = torch.Generator().manual_seed(seed)
    uniforms, tokens, logprobs = [], [], []
    for row, limit in zip(logits, limits, strict=True):
        if limit[0] == 0:
            shares = kept(row, NONE)
            token, uniform = int(row.float().argmax()), LAST
        else:
            shares = kept(row, limit)
            likely = [token for token, share in shares.items() if share > 1e-4]
            token = likely[int(torch.randint(len(likely), (), generator=generator))]
            uniform = sum(share for other, share in shares.items() if other < token) + shares[token] / 2
        uniforms.append(uniform)
        tokens.append(token)
        logprobs.append(math.log(shares[token]))
    return torch.tensor(uniforms, dtype=torch.float32), tokens, torch.tensor(logprobs, dtype=torch.float64)


def assert_exact(logits: Tensor, limits: list[Limits], seed: int = 0) -> None:
    uniforms, tokens, logprobs = aimed(logits, limits, seed)
    got, values = draw(logits, uniforms, limits)
    assert got.tolist() == tokens
    torch.testing.assert_close(values.double(), logprobs, atol=1e-6, rtol=1e-7)


def test_tokens_and_logprobs_of_rows_with_all_kinds_of_limits() -> None:
    assert_exact(2 * random(len(ROWS), 150, dtype=torch.float32) + 3, ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats(dtype: torch.dtype) -> None:
    limits = [ROWS[i] for i in (1, 3, 4, 7)]
    assert_exact(2 * random(4, 150, dtype=dtype), limits)  # of both signs
    assert_exact(2 * random(4, 70, dtype=dtype) - 20, limits)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 130])
def test_vocabularies_that_no_block_divides(vocabulary: int) -> None:
    limits = [NONE, (0.0, 0, 1.0, 0.0), (0.9, 3, 0.9, 0.0), (1.0, vocabulary, 0.7, 0.05)]
    assert_exact(3 * random(4, vocabulary, seed=vocabulary, dtype=torch.float32), limits)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (30, 1.0), (150, 1.0), (0, 0.01), (90, 0.7)])
def test_of_ties_the_lower_indices_stay(top_k: int, top_p: float) -> None:
    """Few different logits in four blocks, so that the cut goes through a tie: the ends of what is kept show it."""
    logits = random(1, 200, seed=top_k, dtype=torch.float32).round()
    limits = (1.0, top_k, top_p, 0.0)
    shares = kept(logits[0], limits)
    first, last = min(shares), max(shares)
    ends = torch.tensor([shares[first] / 2, 1 - shares[last] / 2])
    tokens, logprobs = draw(logits.expand(2, 200), ends, [limits] * 2)
    assert tokens.tolist() == [first, last]
    expected = torch.tensor([shares[first], shares[last]]).log()
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-7)


def test_a_token_hardly_likelier_is_no_tie() -> None:
    logits = torch.tensor([[1e-9, 2e-9, 30.0]])  # less 30, the first two are the same float32
    for limits in [(50.0, 2, 1.0, 0.0), (50.0, 0, 0.6, 0.0)]:
        assert draw(logits, torch.tensor([0.0]), [limits])[0].tolist() == [1]


def test_zeros_of_both_signs_tie_and_thresholds_may_be_negative() -> None:
    logits = torch.tensor([[-3.0, -0.0, 0.0, -2.0, -0.0, -5.0]])
    limits: list[Limits] = [(1.0, top_k, 1.0, 0.0) for top_k in (1, 2, 3, 4, 5)]
    for uniform, expected in [(0.0, [1, 1, 1, 1, 0]), (LAST, [1, 2, 4, 4, 4])]:
        assert draw(logits.expand(5, 6), torch.full((5,), uniform), limits)[0].tolist() == expected
    assert_exact(logits.half() - 7, [(1.0, 4, 1.0, 0.0)])


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
def test_what_is_banned_is_never_drawn(uniform: float) -> None:
    one, some = torch.full((200,), NINF), random(200, dtype=torch.float32).cpu()
    one[77] = -50.0
    some[:70], some[130:] = NINF, -200.0
    limits = [NONE, (1.0, 9, 0.9, 0.0), (0.0, 0, 1.0, 0.0), (1e-3, 0, 1.0, 0.0), NONE]
    tokens, logprobs = draw(torch.stack([one] * 3 + [some] * 2), torch.full((5,), uniform), limits)
    assert tokens[:3].tolist() == [77] * 3 and logprobs[:3].tolist() == [0.0] * 3
    assert ((tokens[3:] >= 70) & (tokens[3:] < 130)).all() and logprobs.isfinite().all()


def test_more_are_kept_than_can_be_drawn() -> None:
    logits = torch.full((1, 200), NINF)
    logits[0, [3, 120]] = torch.tensor([1.0, 2.0])
    assert_exact(logits, [(1.0, 50, 1.0, 0.0)])
    assert_exact(logits, [(1.0, 50, 1 - 2.0**-24, 0.0)])


def test_draws_as_the_reference_does() -> None:
    logits, uniforms = 2 * random(15, 150, dtype=torch.float32), torch.arange(15) / 15 + 0.01
    limits = [NONE, (0.6, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)] * 5
    tokens, logprobs = draw(logits, uniforms, limits)
    expected = draw(logits, uniforms, limits, backend="reference")
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy under the interpreter
def test_broken_rows_are_told_and_spoil_no_other() -> None:
    nan, inf = float("nan"), float("inf")
    logits = random(1, 100, dtype=torch.float32).repeat(13, 1)
    logits[0, 70], logits[1, 3], logits[2, :] = nan, inf, NINF
    uniforms, limits = torch.full((13,), 0.4), [NONE, NONE, NONE, NONE]
    limits += [(-1.0, 0, 1.0, 0.0), (inf, 0, 1.0, 0.0), (1.0, -1, 1.0, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 1.1, 0.0)]
    limits += [(1.0, 0, 1.0, -0.1), (1.0, 0, 1.0, nan), NONE, NONE]
    uniforms[3], uniforms[11] = 1.0, nan
    tokens, logprobs = draw(logits, uniforms, limits)
    assert tokens[:12].tolist() == [-1] * 12 and logprobs[:12].isnan().all()
    alone = draw(logits[12:], uniforms[12:], limits[12:])
    assert tokens[12] == alone[0][0] and tokens[12] >= 0 and logprobs[12] == alone[1][0]


@pytest.mark.parametrize("limits", [(0.0, 0, 1.0, 0.0), (0.9, 7, 0.9, 0.01)])
def test_a_broken_row_with_limits(limits: Limits) -> None:
    logits = random(1, 100, dtype=torch.float32)
    logits[0, 50] = float("nan")
    tokens, logprobs = draw(logits, torch.tensor([0.5]), [limits])
    assert tokens.tolist() == [-1] and logprobs.isnan().all()


def test_rows_do_not_see_each_other_and_two_runs_are_equal() -> None:
    limits = [ROWS[i] for i in (5, 0, 2, 7)]
    logits, uniforms = 2 * random(4, 130, dtype=torch.float16), torch.linspace(0, 0.99, 4)
    whole, again = draw(logits, uniforms, limits), draw(logits, uniforms, limits)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    for i in range(4):
        alone = draw(logits[i : i + 1], uniforms[i : i + 1], limits[i : i + 1])
        assert alone[0][0] == whole[0][i] and alone[1][0] == whole[1][i]  # the same bits


def test_strided_rows_and_no_rows() -> None:
    wide = torch.full((3, 150), float("inf"), device=DEVICE)  # what lies between the rows is never read
    wide[:, 5:135] = random(3, 130, dtype=torch.float32)
    part, uniforms, limits = wide[:, 5:135], torch.linspace(0.1, 0.9, 3), [NONE, ROWS[2], ROWS[5]]
    straight = draw(part.contiguous(), uniforms, limits)
    for logits in (part, part.T.contiguous().T):
        got = draw(logits, uniforms, limits)
        assert torch.equal(got[0], straight[0]) and torch.equal(got[1], straight[1])
    none = torch.zeros(0, device=DEVICE)
    tokens, logprobs = sample(torch.zeros(0, 5, device=DEVICE), none, none, none, none, none, backend="triton")
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64


@pytest.mark.filterwarnings("ignore:overflow")  # in numpy under the interpreter
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[900.0, 1000.0, -1000.0], [NINF, -8.0, -9.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.0, LAST]), [(temperature, 0, 1.0, 0.0)] * 2)
    hot = temperature > 1
    assert tokens.tolist() == ([0, 2] if hot else [1, 1])
    torch.testing.assert_close(logprobs, -torch.tensor([3.0, 2.0]).log() if hot else torch.zeros(2))
    assert draw(logits, torch.tensor([0.0, 0.0]), [(temperature, 2, 0.9, 0.5)] * 2)[0].tolist() == [1 - hot, 1]


def test_registered_and_under_torch_compile() -> None:
    logits, uniforms = random(3, 70, dtype=torch.float32), torch.tensor([0.2, 0.5, 0.8], device=DEVICE)
    ones, k = torch.ones(3, device=DEVICE), torch.tensor([0, 5, 0], device=DEVICE)
    assert_op(sample_rows, logits, uniforms, ones, k, ones, None)
    for min_p in (None, torch.zeros(3, device=DEVICE)):
        arguments = logits, uniforms, ones, k, ones, min_p
        got = compiled(lambda *x: sample(*x, backend="triton"))(*arguments)
        for one, other in zip(got, sample(*arguments, backend="triton"), strict=True):
            assert torch.equal(one, other)


def test_refusals() -> None:
    logits, ones = random(2, 5, dtype=torch.float32), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"logits are torch.float64; allowed on the kernels: float32 and narrower"):
        sample(logits.double(), ones / 2, ones, ones, ones, backend="triton")
    with pytest.raises(ValueError, match=r"min_p has the shape \(1,\); allowed: \(2,\)"):
        sample(logits, ones / 2, ones, ones, ones, ones[:1], backend="triton")
    with pytest.raises(ValueError, match="backend = 'cuda'; allowed: auto, reference, triton, library"):
        sample(logits, ones / 2, ones, ones, ones, backend="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_production_vocabulary(dtype: torch.dtype) -> None:
    limits = [*ROWS, (1.0, 50, 1.0, 0.0), (0.8, 0, 0.95, 0.0), (1.0, 20_000, 0.999, 0.0), (1.0, 0, 1.0, 0.01)]
    assert_exact(2 * random(len(limits), 151_936, dtype=dtype) + 10, limits)


@pytest.mark.gpu
@needs_gpu
def test_rows_that_start_past_32_bits() -> None:
    logits = torch.zeros(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    logits[2, 5] = 30.0
    for limits in (NONE, (1.0, 1, 1.0, 0.0)):
        assert draw(logits, torch.tensor([0.5] * 3), [limits] * 3)[0][2] == 5
