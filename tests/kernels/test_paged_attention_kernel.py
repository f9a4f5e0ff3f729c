"""Paged decode attention against float64, torch's own on dense keys, and itself in other company."""

import math

import pytest
import torch
import torch.nn.functional as F
from precision import DEVICE, DTYPES, assert_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import paged_attention as module
from bylaw.kernels.paged_attention import paged_attention, paged_attention_lse, reference

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LENGTHS = (1, 63, 0, 100, 33)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def table(rows: int, width: int, pages: int) -> Tensor:
    """Every row its own pages, in no order."""
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(7))[: rows * width]
    return order.view(rows, width).to(DEVICE, torch.int32)


def batch(
    lengths: tuple[int, ...],
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Arguments of `paged_attention`. What no row may see is NaN, and pages that no row needs do not exist."""
    width = -(-max(lengths) // page) + 1
    pages = width * len(lengths) + 3
    keys, values = random(2, pages, page, kv_heads, head_dim, seed=1, dtype=dtype)
    block_table = table(len(lengths), width, pages)
    unseen = torch.ones(pages, page, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate(lengths):
        places = torch.arange(length, device=DEVICE)
        unseen[block_table[row, places // page].long(), places % page] = False
        block_table[row, -(-length // page) :] = 10**6
    keys[unseen], values[unseen] = float("nan"), float("nan")
    return random(len(lengths), heads, head_dim, dtype=dtype), keys, values, block_table, integers(*lengths)


def run(arguments: Arguments, window: int = 0, split: int = 48) -> tuple[Tensor, Tensor]:
    q, keys, values, block_table, lengths = arguments
    return paged_attention_lse(q, keys, values, block_table, lengths, window, split, "triton")


def double(arguments: Arguments) -> Arguments:
    q, keys, values, block_table, lengths = arguments
    return q.double(), keys.double(), values.double(), block_table, lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 20, 64, 1000])
def test_windows_against_float64(window: int, dtype: torch.dtype) -> None:
    arguments = batch(LENGTHS, dtype=dtype)
    out, lse = run(arguments, window)
    same, exact = reference(*arguments, window), reference(*double(arguments), window)
    assert_as_good(out, same[0], exact[0])
    # torch's has nothing to round where a row sees one key: better than twice its error is not to be had.
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(out[2], torch.zeros_like(out[2])) and torch.equal(lse[2], torch.full_like(lse[2], -math.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"),
    [(1, 1, 16, 16), (4, 4, 24, 32), (5, 1, 64, 64), (12, 4, 80, 32), (71, 1, 16, 16)],
)
def test_shapes_against_float64(heads: int, kv_heads: int, head_dim: int, page: int, dtype: torch.dtype) -> None:
    arguments = batch((65, 130), heads, kv_heads, head_dim, page, dtype)
    same, exact = reference(*arguments, 90), reference(*double(arguments), 90)
    for tensors in zip(run(arguments, 90, 64), same, exact, strict=True):
        assert_as_good(*tensors)


@pytest.mark.parametrize("window", [0, 20])
def test_reference_against_dense_decoding(window: int) -> None:
    arguments = batch(LENGTHS, dtype=torch.float64)
    q, keys, values, block_table, _ = arguments
    out = paged_attention(*arguments, window=window)
    for row, length in enumerate(LENGTHS):
        if length:
            pages = block_table[row, : -(-length // 16)].long()
            k, v = (x[pages].flatten(0, 1)[None, :length].transpose(1, 2) for x in (keys, values))
            seen = slice(max(0, length - window) if window else 0, length)
            k, v = k[:, :, seen], v[:, :, seen]
            dense = F.scaled_dot_product_attention(q[row][None, :, None], k, v, enable_gqa=True)
            torch.testing.assert_close(out[row], dense[0, :, 0])


@pytest.mark.parametrize("window", [0, 40])
def test_a_row_keeps_its_bits_in_other_company(window: int) -> None:
    q, keys, values, block_table, lengths = batch(LENGTHS)
    together = run((q, keys, values, block_table, lengths), window)
    for rows, width in ((slice(0, 2), 4), (slice(3, 4), 7), (slice(4, 5), 3)):
        alone = run((q[rows], keys, values, block_table[rows, :width], lengths[rows]), window)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs[rows])
    for first, second in zip(together, run((q, keys, values, block_table, lengths), window), strict=True):
        assert torch.equal(first, second)


def test_splits_that_fill_the_device_change_roundings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = batch((100, 70))
    for programs, split in ((1, 1024), (8, 256), (100, 32)):
        monkeypatch.setattr(module, "multiprocessors", lambda device, n=programs: n)
        assert module._filling(4, 1000, 32, arguments[0].device) == split
        torch.testing.assert_close(run(arguments, split=0), run(arguments))
    assert module._filling(4, 0, 32, arguments[0].device) == 32


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"), [(14, 2, 64, 16), (32, 8, 128, 32), (32, 32, 128, 16), (8, 1, 256, 64)]
)
def test_production_shapes(heads: int, kv_heads: int, head_dim: int, page: int) -> None:
    lengths = tuple(1 + 523 * row % 2048 for row in range(32))
    arguments = batch(lengths, heads, kv_heads, head_dim, page, torch.bfloat16)
    for window in (0, 700):
        same, exact = reference(*arguments, window), reference(*double(arguments), window)
        assert_as_good(run(arguments, window, 512)[0], same[0], exact[0])
        assert_as_good(run(arguments, window, 0)[0], same[0], exact[0])


def test_views_and_empty_batches() -> None:
    q, keys, values, block_table, lengths = batch(LENGTHS)
    slab = random(2, len(keys), 2, 16, 16, dtype=torch.float32)  # [2, P, Nkv, page, D]
    slab[0], slab[1] = keys.transpose(1, 2), values.transpose(1, 2)
    qkv = torch.cat((q, q), dim=1)
    columns = torch.stack((block_table, block_table), dim=2)[..., 1]
    views = (qkv[:, :6], slab[0].transpose(1, 2), slab[1].transpose(1, 2), columns, lengths)
    for got, expected in zip(run(views), run((q, keys, values, block_table, lengths)), strict=True):
        assert torch.equal(got, expected)
    strided = torch.stack((q, q), dim=3)[..., 0]
    assert torch.equal(run((strided, *views[1:]))[0], run(views)[0])
    for got, shape in zip(run((q[:0], keys, values, block_table[:0], lengths[:0])), [(0, 6, 16), (0, 6)], strict=True):
        assert got.shape == shape
    nothing = (q, keys, values, block_table[:, :0], torch.zeros_like(lengths))
    assert not run(nothing)[0].any() and not paged_attention(*nothing).any()


def test_the_operation_is_registered_in_order() -> None:
    assert_op(module._forward, *batch((20, 70)), 0, 48)


def test_under_torch_compile() -> None:
    def step(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        return 2 * paged_attention(q, keys, values, block_table, lengths, 0, 48, "triton")

    arguments = batch((20, 70))
    assert torch.equal(compiled(step)(*arguments), step(*arguments))


def test_refusals() -> None:
    q, keys, values, block_table, lengths = batch((20, 70), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"q has the shape \(2, 96\); allowed: \[B, Nq, D\]"):
        paged_attention(q.flatten(1), keys, values, block_table, lengths)
    with pytest.raises(ValueError, match="5 query heads of size 16 over 2 heads"):
        paged_attention(q[:, :5], keys, values, block_table, lengths)
    with pytest.raises(ValueError, match=r"block_table is torch.int64 \(2, 6\); allowed: torch.int32 \[2, max_pages\]"):
        paged_attention(q, keys, values, block_table.long(), lengths)
    with pytest.raises(ValueError, match=r"lengths are torch.int32 \(1,\); allowed: torch.int32 \[2\]"):
        paged_attention(q, keys, values, block_table, lengths[:1])
    with pytest.raises(ValueError, match="window = -1; allowed: 0"):
        paged_attention(q, keys, values, block_table, lengths, window=-1)
    with pytest.raises(ValueError, match="split_tokens = 8; allowed: 16 and more, or 0"):
        paged_attention(q, keys, values, block_table, lengths, split_tokens=8)
    with pytest.raises(ValueError, match="lengths run from 20 to 97; allowed: 0 to 96 for 6 pages of 16"):
        paged_attention(q, keys, values, block_table, integers(20, 97))
    with pytest.raises(ValueError, match="block_table names pages 0 to 1000000; allowed: 0 to 14"):
        paged_attention(q, keys, values, block_table, integers(20, 90))
    with pytest.raises(ValueError, match="paged_attention: an input requires grad"):
        paged_attention(q.requires_grad_(), keys, values, block_table, lengths)
