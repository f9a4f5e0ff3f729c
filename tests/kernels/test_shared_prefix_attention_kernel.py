"""Attention over a common prefix and each sequence's own tokens, against attention over the two written out."""

import math

import pytest
import torch
from precision import DEVICE, DTYPES, assert_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import merge_attention as merging
from bylaw.kernels import shared_prefix_attention as module
from bylaw.kernels.attention import plan
from bylaw.kernels.attention import reference as attention
from bylaw.kernels.layout import Layout
from bylaw.kernels.merge_attention import merge_attention
from bylaw.kernels.paged_attention import paged_attention_lse
from bylaw.kernels.shared_prefix_attention import prefix_attention, reference, shared_prefix_attention

Arguments = tuple[Tensor, Tensor, Tensor, Layout, Tensor, Tensor]
LENGTHS = (1, 9, 0, 18)


def layout_of(*lengths: int) -> Layout:
    return plan(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), DEVICE)


def batch(
    prefix: int,
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = 3,
    kv_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    k, v = random(2, sum(lengths), kv_heads, head_dim, seed=1, dtype=dtype)
    prefix_k, prefix_v = random(2, prefix, kv_heads, head_dim, seed=2, dtype=dtype)
    return random(sum(lengths), heads, head_dim, dtype=dtype), k, v, layout_of(*lengths), prefix_k, prefix_v


def double(arguments: Arguments) -> Arguments:
    q, k, v, layout, prefix_k, prefix_v = arguments
    return q.double(), k.double(), v.double(), layout, prefix_k.double(), prefix_v.double()


def written_out(arguments: Arguments, window: int = 0) -> Tensor:
    """Every sequence with the prefix before it, under the ordinary attention."""
    q, k, v, layout, prefix_k, prefix_v = arguments
    outs = []
    for q_b, k_b, v_b in zip(*(x.split(list(layout.lengths)) for x in (q, k, v)), strict=True):
        long_q = torch.cat((q_b.new_zeros(len(prefix_k), *q.shape[1:]), q_b))
        whole = layout_of(len(long_q))
        out = attention(long_q, torch.cat((prefix_k, k_b)), torch.cat((prefix_v, v_b)), whole, window)
        outs.append(out[len(prefix_k) :])
    return torch.cat(outs)


@pytest.mark.parametrize("window", [0, 1, 30, 65, 1000])
@pytest.mark.parametrize("prefix", [0, 1, 63, 96])
def test_reference_against_attention_written_out(prefix: int, window: int) -> None:
    arguments = batch(prefix, heads=6, kv_heads=2, dtype=torch.float64)
    torch.testing.assert_close(shared_prefix_attention(*arguments, window=window), written_out(arguments, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("prefix", "window"), [(0, 0), (1, 0), (65, 0), (64, 30), (33, 1), (33, 1000)])
def test_against_float64(prefix: int, window: int, dtype: torch.dtype) -> None:
    arguments = batch(prefix, dtype=dtype)
    ours = shared_prefix_attention(*arguments, window=window, backend="triton")
    assert_as_good(ours, reference(*arguments, window), reference(*double(arguments), window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [0, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 4, 24), (5, 1, 16), (12, 4, 80)])
def test_prefix_against_float64(heads: int, kv_heads: int, head_dim: int, split: int, dtype: torch.dtype) -> None:
    q, _, _, _, k, v = batch(65, (9,), heads, kv_heads, head_dim, dtype)
    ours = prefix_attention(q, k, v, split_tokens=split, backend="triton")
    exact = prefix_attention(q.double(), k.double(), v.double())
    for got, same, true in zip(ours, prefix_attention(q, k, v, backend="reference"), exact, strict=True):
        assert_as_good(got, same, true)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (32, 8, 128), (8, 4, 256)])
def test_production_shapes(heads: int, kv_heads: int, head_dim: int) -> None:
    arguments = batch(1500, (100, 130, 257, 3), heads, kv_heads, head_dim, torch.bfloat16)
    for window in (0, 1000):
        ours = shared_prefix_attention(*arguments, window=window, backend="triton")
        assert_as_good(ours, reference(*arguments, window), reference(*double(arguments), window))
    q, _, _, _, k, v = arguments
    exact = prefix_attention(q.double(), k.double(), v.double(), backend="reference")
    for split in (0, 512):
        ours = prefix_attention(q, k, v, split_tokens=split, backend="triton")
        assert_as_good(ours[0], prefix_attention(q, k, v, backend="reference")[0], exact[0])


@pytest.mark.parametrize("split", [0, 32])
def test_prefix_in_a_window(split: int) -> None:
    """A query that the prefix has left behind, or an empty prefix, has nothing to see."""
    q, _, _, _, k, v = batch(70, (20,), dtype=torch.float64)
    places = torch.arange(20, dtype=torch.int32, device=DEVICE).flip(0) * 3
    out, lse = prefix_attention(q, k, v, 40, places, split, "triton")
    for expected, got in zip(prefix_attention(q, k, v, 40, places), (out, lse), strict=True):
        torch.testing.assert_close(got, expected)
    behind = places >= 39
    assert torch.equal(lse.isneginf(), behind.expand(3, -1)) and not out[behind].any() and out[~behind].all()
    out, lse = prefix_attention(q, k[:0], v[:0], split_tokens=split, backend="triton")
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize(("split", "window"), [(0, 0), (32, 0), (32, 50)])
def test_a_query_keeps_its_bits_in_other_company(split: int, window: int) -> None:
    q, _, _, _, k, v = batch(70, (26,))
    places = torch.arange(26, dtype=torch.int32, device=DEVICE)
    together = prefix_attention(q, k, v, window, places, split, "triton")
    for chosen in (slice(0, 1), slice(7, 20), slice(0, 26)):
        out, lse = prefix_attention(q[chosen], k, v, window, places[chosen], split, "triton")
        assert torch.equal(out, together[0][chosen]) and torch.equal(lse, together[1][:, chosen])


def test_a_sequence_keeps_its_bits_in_other_company() -> None:
    q, k, v, layout, prefix_k, prefix_v = batch(33)
    together = shared_prefix_attention(q, k, v, layout, prefix_k, prefix_v, backend="triton")
    last = slice(10, 28)
    alone = shared_prefix_attention(q[last], k[last], v[last], layout_of(18), prefix_k, prefix_v, backend="triton")
    assert torch.equal(alone, together[last])


def test_decoding_over_two_prefixes_and_pages() -> None:
    """Three parts: what everyone shares, what these rows share, and each row's own pages."""
    q, _, _, _, k, v = batch(65, (3,), 6, 2, dtype=torch.float64)
    keys, values = random(2, 6, 16, 2, 16, seed=3)
    block_table = torch.tensor([[3, 1], [5, 0], [2, 4]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([20, 0, 32], dtype=torch.int32, device=DEVICE)
    out, lse = paged_attention_lse(q, keys, values, block_table, lengths, backend="triton")
    inner = merge_attention(*prefix_attention(q, k[40:], v[40:], backend="triton"), out, lse.T, "triton")
    got, _ = merge_attention(*prefix_attention(q, k[:40], v[:40], backend="triton"), *inner, "triton")
    for row, length in enumerate(lengths.tolist()):
        own = [x[block_table[row].long()].flatten(0, 1)[:length] for x in (keys, values)]
        whole, _ = prefix_attention(q[row : row + 1], torch.cat((k, own[0])), torch.cat((v, own[1])))
        torch.testing.assert_close(got[row], whole[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_against_float64(dtype: torch.dtype) -> None:
    outs, lses = random(2, 5, 3, 80, dtype=dtype), 3 * random(2, 3, 5, seed=1, dtype=torch.float32)
    lses[0, 0, :2], lses[1, 0, 1:3], lses[0, 1, 4] = -math.inf, -math.inf, 100.0
    arguments = outs[0], lses[0], outs[1], lses[1]
    exact = merge_attention(outs[0].double(), lses[0].double(), outs[1].double(), lses[1].double(), "reference")
    same = merge_attention(*arguments, backend="reference")
    out, lse = merge_attention(*arguments, backend="triton")
    assert lse[0, 1] == same[1][0, 1] == -math.inf
    for ours in (lse, same[1], exact[1]):
        ours[0, 1] = 0.0
    assert_as_good(out, same[0], exact[0])
    assert_as_good(lse, same[1], exact[1])


def test_views_and_no_tokens() -> None:
    q, k, v, layout, prefix_k, prefix_v = batch(33, (2, 5), 6, 2)
    expected = shared_prefix_attention(q, k, v, layout, prefix_k, prefix_v, backend="triton")
    q, k, v = torch.cat((q, k, v), dim=1).split((6, 2, 2), dim=1)
    prefix_v = torch.stack((prefix_k, prefix_v), dim=1)[:, 1]
    prefix_k = torch.stack((prefix_k, prefix_k), dim=3)[..., 0]
    assert torch.equal(shared_prefix_attention(q, k, v, layout, prefix_k, prefix_v, backend="triton"), expected)
    nothing = batch(20, (0, 0))
    for backend in ("reference", "triton"):
        assert shared_prefix_attention(*nothing, window=5, backend=backend).shape == (0, 3, 16)


def test_the_operations_are_registered_in_order() -> None:
    q, _, _, _, k, v = batch(70, (5,))
    places = torch.arange(5, dtype=torch.int32, device=DEVICE)
    assert_op(module._prefix, q, k, v, places, 40, 32)
    out, lse = module._prefix(q, k, v, None, 0, 0)
    assert_op(merging._merge, out, lse, out, lse)


def test_under_torch_compile() -> None:
    arguments = batch(33, (1, 6))
    layout = arguments[3]

    def step(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        return 2 * shared_prefix_attention(q, k, v, layout, prefix_k, prefix_v, 40, "triton")

    tensors = (*arguments[:3], *arguments[4:])
    assert torch.equal(compiled(step)(*tensors), step(*tensors))


def test_refusals() -> None:
    q, k, v, layout, prefix_k, prefix_v = batch(20, (5,), 6, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="the layout 4 tokens"):
        shared_prefix_attention(q, k, v, layout_of(4), prefix_k, prefix_v)
    with pytest.raises(ValueError, match=r"queries \(5, 6, 16\) over keys \(20, 2, 8\)"):
        shared_prefix_attention(q, k, v, layout, prefix_k[..., :8], prefix_v[..., :8])
    with pytest.raises(ValueError, match=r"queries \(5, 5, 16\) over keys \(5, 2, 16\)"):
        shared_prefix_attention(q[:, :5], k, v, layout, prefix_k, prefix_v)
    with pytest.raises(ValueError, match="heads of size 272; allowed: 1 to 256"):
        wide_q, wide_k, wide_v = (x.repeat(1, 1, 17) for x in (q, prefix_k, prefix_v))
        prefix_attention(wide_q, wide_k, wide_v, backend="triton")
    with pytest.raises(ValueError, match=r"dtypes torch\.float64, torch\.float32"):
        prefix_attention(q, prefix_k.float(), prefix_v.float())
    with pytest.raises(ValueError, match="window = -1; allowed: 0"):
        prefix_attention(q, prefix_k, prefix_v, window=-1)
    with pytest.raises(ValueError, match=r"places = None; allowed with a window: torch.int32 \[5\]"):
        prefix_attention(q, prefix_k, prefix_v, window=3)
    with pytest.raises(ValueError, match="split_tokens = 8; allowed: 16 and more, or 0"):
        prefix_attention(q, prefix_k, prefix_v, split_tokens=8)
    out, lse = prefix_attention(q, prefix_k, prefix_v)
    with pytest.raises(ValueError, match=r"parts of the shapes .* allowed: twice \[T, Nq, D\] and \[Nq, T\]"):
        merge_attention(out, lse, out, lse.T)
    with pytest.raises(ValueError, match=r"parts of the dtypes .* and torch\.float32 for lse"):
        merge_attention(out.float(), lse, out.float(), lse)
    for call in (
        lambda: shared_prefix_attention(q.clone().requires_grad_(), k, v, layout, prefix_k, prefix_v),
        lambda: prefix_attention(q, prefix_k.clone().requires_grad_(), prefix_v),
        lambda: merge_attention(out.clone().requires_grad_(), lse, out, lse),
    ):
        with pytest.raises(ValueError, match="an input requires grad, but the operation has no gradient"):
            call()
        with torch.no_grad():
            call()
