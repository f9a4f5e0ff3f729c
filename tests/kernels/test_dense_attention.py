"""Dense attention with its log-sum-exp, against sums written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from bylaw.kernels.dense_attention import dense_attention, hiding, merge_parts


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bnmd,bnsd->bnms", q.double(), k.double()) / math.sqrt(q.shape[-1])
    weights = scores.exp() * seen
    total = weights.sum(-1)
    return torch.einsum("bnms,bnsd->bnmd", weights, v.double()) / total[..., None], total.log()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "queries", "keys", "size"), [(3, 1, 7, 8), (1, 33, 65, 5), (2, 2, 130, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_query_over_what_it_sees(rows: int, queries: int, keys: int, size: int, dtype: torch.dtype) -> None:
    q, k, v = (random(rows, 2, n, size, seed=i).to(dtype) for i, n in enumerate((queries, keys, keys)))
    seen = random(rows, 1, queries, keys, seed=3) > 0
    seen[..., 0] = True
    for bias, visible in ((None, torch.ones_like(seen)), (hiding(seen, q), seen)):
        out, lse = dense_attention(q, k, v, bias)
        wanted, wanted_lse = written_out(q, k, v, visible)
        assert out.dtype == dtype
        tolerance = 0.02 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=0)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 17, 64])
def test_causal(length: int) -> None:
    q, k, v = (random(2, 3, length, 6, seed=i) for i in range(3))
    out, lse = dense_attention(q, k, v, causal=True)
    wanted = written_out(q, k, v, torch.ones(length, length).tril())
    torch.testing.assert_close((out.double(), lse.double()), wanted, atol=2e-6, rtol=1e-6)


def test_parts_of_the_keys_are_merged_and_an_empty_one_counts_nothing() -> None:
    q, k, v = (random(2, 2, n, 4, seed=i) for i, n in enumerate((3, 11, 11)))
    whole = written_out(q, k, v, torch.ones(3, 11))
    parts = (dense_attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 11)))
    out, lse = merge_parts(*next(parts), *next(parts))
    torch.testing.assert_close((out.double(), lse.double()), whole, atol=2e-6, rtol=1e-6)
    nothing = torch.full_like(out, 7.0), torch.full_like(lse, float("-inf"))
    assert all(torch.equal(a, b) for a, b in zip(merge_parts(out, lse, *nothing), (out, lse), strict=True))


def test_keys_with_strides_of_a_larger_slab() -> None:
    slab = random(4, 2, 50, 8)
    q, k = random(3, 2, 1, 8, seed=1), slab[:3, :, :20]
    torch.testing.assert_close(dense_attention(q, k, k), dense_attention(q, k.contiguous(), k.contiguous()))
