"""Packed and cached attention against a naive softmax in float64: one sequence, one head and one mask at a time."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bylaw.kernels.attention import attention, plan

EVERY_LENGTH = tuple((17 * n) % 71 for n in range(1, 71))  # 1 to 70, mixed
MIXED = (3, 70, 1, 33, 0, 7, 7, 50, 2)


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def random_qkv(tokens: int, heads: int, kv_heads: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v  # sharp enough that a wrong mask or scale shows


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int = 0) -> Tensor:
    group = q.shape[1] // k.shape[1]
    rows = []
    for start, end in itertools.pairwise(offsets(lengths).tolist()):
        heads = []
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[start:end, head // group].T / q.shape[2] ** 0.5
            for i, j in itertools.product(range(end - start), repeat=2):
                if j > i or (window and i - j >= window):
                    scores[i, j] = -torch.inf
            heads.append(torch.softmax(scores, dim=1) @ v[start:end, head // group])
        rows.append(torch.stack(heads, dim=1))
    return torch.cat(rows)


def test_every_length_from_1_to_70() -> None:
    q, k, v = random_qkv(sum(EVERY_LENGTH), 2, 1, 6)
    out = attention(q, k, v, plan(offsets(EVERY_LENGTH)))
    torch.testing.assert_close(out, naive(q, k, v, EVERY_LENGTH), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 10), (3, 3, 5), (6, 1, 34), (9, 3, 2), (1, 1, 1)])
@pytest.mark.parametrize("window", [0, 1, 5, 50, 1000])
def test_grouped_heads_odd_sizes_and_windows(heads: int, kv_heads: int, size: int, window: int) -> None:
    lengths = (3, 19, 1, 8, 0, 2, 51)
    q, k, v = random_qkv(sum(lengths), heads, kv_heads, size)
    out = attention(q, k, v, plan(offsets(lengths)), window)
    torch.testing.assert_close(out, naive(q, k, v, lengths, window), atol=1e-12, rtol=0)
    narrow = attention(q.float(), k.float(), v.float(), plan(offsets(lengths)), window)
    torch.testing.assert_close(narrow.double(), out, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [0, 4])
def test_gradients_equal_those_of_the_naive_version(window: int) -> None:
    lengths = (5, 1, 40, 9)
    q, k, v = inputs = tuple(x.requires_grad_() for x in random_qkv(sum(lengths), 4, 2, 6))
    weights = torch.randn(sum(lengths), 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((attention(q, k, v, plan(offsets(lengths)), window) * weights).sum(), inputs)
    expected = torch.autograd.grad((naive(q, k, v, lengths, window) * weights).sum(), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("window", [0, 2])
def test_gradients_equal_finite_differences(window: int) -> None:
    inputs = [x.requires_grad_() for x in random_qkv(5, 2, 1, 2)]
    layout = plan(offsets((3, 2)))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, layout, window), inputs)


@pytest.mark.parametrize("window", [0, 6])
def test_a_sequence_does_not_feel_its_batch_mates(window: int) -> None:
    q, k, v = (x.float() for x in random_qkv(sum(MIXED), 4, 2, 10))
    together = attention(q, k, v, plan(offsets(MIXED)), window)
    for start, end in itertools.pairwise(offsets(MIXED).tolist()):
        alone = attention(q[start:end], k[start:end], v[start:end], plan(offsets([end - start])), window)
        torch.testing.assert_close(together[start:end], alone, atol=1e-6, rtol=0)


def test_a_broken_batch_mate_breaks_nobody_else() -> None:
    q, k, v = random_qkv(12, 2, 1, 4)
    layout = plan(offsets((5, 4, 3)))
    before = attention(q, k, v, layout)
    for x in (q, k, v):
        x[5:9] = torch.nan
    after = attention(q, k, v, layout)
    assert after[5:9].isnan().all()
    assert torch.equal(after[:5], before[:5]) and torch.equal(after[9:], before[9:])


@pytest.mark.parametrize("cu_seqlens", [torch.tensor([0]), torch.tensor([0, 0, 0])])
def test_no_tokens(cu_seqlens: Tensor) -> None:
    q, k, v = random_qkv(0, 2, 1, 4)
    assert attention(q, k, v, plan(cu_seqlens)).shape == (0, 2, 4)
