"""Rotary embedding and the write into pages, against float64, torch in the same dtype, and `rope` and indexing."""

import pytest
import torch
from precision import DEVICE, DTYPES, assert_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import kv_write as module
from bylaw.kernels.kv_write import kv_write
from bylaw.kernels.rope import reference as rope_reference


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """As model.rotary makes them: the same in both halves."""
    turned = 3 * random(tokens, head_dim // 2, seed=1, dtype=torch.float32).repeat(1, 2)
    return turned.cos(), turned.sin()


def cache(pages: int, page: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = random(2, pages, page, heads, head_dim, seed=2, dtype=dtype)
    return keys, values


def slots(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=DEVICE)


def parts(qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one projection, as views."""
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def run(qkv: Tensor, kv_heads: int, places: Tensor, page: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(qkv, keys, values) after writing to a cache of 5 pages."""
    qkv = qkv.clone()
    keys, values = cache(5, page, kv_heads, qkv.shape[2], qkv.dtype)
    kv_write(*parts(qkv, kv_heads), *angles(len(qkv), qkv.shape[2]), keys, values, places, backend)
    return qkv, keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"), [(2, 1, 16, 16), (3, 3, 24, 32), (7, 1, 64, 64), (10, 2, 130, 16)]
)
def test_against_float64(heads: int, kv_heads: int, head_dim: int, page: int, dtype: torch.dtype) -> None:
    qkv = random(5, heads + 2 * kv_heads, head_dim, dtype=dtype)
    places = slots(0, page - 1, 3 * page, -1, 5 * page - 1)
    exact = run(qkv.double(), kv_heads, places, page, "reference")
    torchs = run(qkv, kv_heads, places, page, "reference")
    for name, got, same, true in zip(
        ("qkv", "keys", "values"), run(qkv, kv_heads, places, page, "triton"), torchs, exact, strict=True
    ):
        # What was not written was drawn in float64, or rounded to this dtype.
        assert_as_good(got, same, true, name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_rotated_written_and_left(backend: str) -> None:
    qkv = random(4, 8, 16, dtype=torch.float32)
    places = slots(17, -1, 40, 2)
    cos, sin = angles(4, 16)
    before = cache(5, 16, 2, 16, torch.float32)
    after, keys, values = run(qkv, 2, places, 16, backend)
    torch.testing.assert_close(after[:, :6], rope_reference(qkv[:, :6], cos, sin))
    assert torch.equal(after[:, 6:], qkv[:, 6:])
    for cached, old, new in ((keys, before[0], after[:, 4:6]), (values, before[1], qkv[:, 6:])):
        expected = old.clone().view(80, 2, 16)
        for token in (0, 2, 3):
            expected[places[token]] = new[token]
        assert torch.equal(cached.view(80, 2, 16), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_views_of_larger_tensors(backend: str) -> None:
    """A layer of [P, layers, 2, Nkv, page, D], and a projection that holds more than q, k and v."""
    slab, wide = random(5, 3, 2, 2, 16, 16, dtype=torch.float32), random(4, 9, 20, dtype=torch.float32)
    slab_before, wide_before = slab.clone(), wide.clone()
    keys, values = (slab[:, 1, i].transpose(1, 2) for i in range(2))
    places = slots(3, 79, -1, 16)
    kv_write(*parts(wide[:, :8, 2:18], 2), *angles(4, 16), keys, values, places, backend)
    qkv, fresh_keys, fresh_values = wide_before[:, :8, 2:18].contiguous(), slab_before[:, 1, 0], slab_before[:, 1, 1]
    fresh_keys, fresh_values = (x.transpose(1, 2).contiguous() for x in (fresh_keys, fresh_values))
    kv_write(*parts(qkv, 2), *angles(4, 16), fresh_keys, fresh_values, places, backend)
    slab_before[:, 1, 0], slab_before[:, 1, 1] = fresh_keys.transpose(1, 2), fresh_values.transpose(1, 2)
    wide_before[:, :8, 2:18] = qkv
    assert torch.equal(wide, wide_before) and torch.equal(slab, slab_before)


def test_no_tokens() -> None:
    run(random(0, 4, 16), 1, slots(), 16, "triton")


def test_the_operation_is_registered_in_order() -> None:
    keys, values = cache(2, 16, 1, 16, torch.float32)
    qkv = parts(random(3, 4, 16, dtype=torch.float32), 1)
    assert_op(module._write, *(x.contiguous() for x in qkv), *angles(3, 16), keys, values, slots(1, -1, 20))


def test_under_torch_compile() -> None:
    (cos, sin), places = angles(3, 16), slots(1, -1, 20)

    def step(qkv: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = parts(qkv, 1)
        kv_write(q, k, v, cos, sin, keys, values, places, "triton")
        return q * 2, keys[0]

    qkv, (keys, values) = random(3, 4, 16, dtype=torch.float32), cache(2, 16, 1, 16, torch.float32)
    mine, theirs = [x.clone() for x in (qkv, keys, values)], [x.clone() for x in (qkv, keys, values)]
    for got, expected in zip((*compiled(step)(*mine), *mine), (*step(*theirs), *theirs), strict=True):
        assert torch.equal(got, expected)


def test_refusals() -> None:
    qkv, (keys, values) = random(3, 4, 16), cache(2, 16, 1, 16, torch.float64)
    cos, sin = (x.double() for x in angles(3, 16))
    places = slots(1, -1, 20)
    with pytest.raises(ValueError, match="D even and its stride 1"):
        kv_write(*parts(qkv[..., :15], 1), cos, sin, keys, values, places)
    with pytest.raises(ValueError, match="page of 16, 32, 64 tokens"):
        kv_write(*parts(qkv, 1), cos, sin, keys[:, :8], values[:, :8], places)
    with pytest.raises(ValueError, match="strides"):
        kv_write(*parts(qkv, 1), cos, sin, keys, values.repeat(1, 1, 1, 2)[..., ::2], places)
    with pytest.raises(ValueError, match="2 query heads of size 16 over 1 heads of size 8"):
        kv_write(*parts(qkv, 1), cos, sin, keys[..., :8], values[..., :8], places)
    with pytest.raises(ValueError, match=r"dtypes torch\.float64, torch\.float32"):
        kv_write(*parts(qkv, 1), cos, sin, keys.float(), values.float(), places)
    with pytest.raises(ValueError, match=r"cos and sin .* allowed: \[3, 16\]"):
        kv_write(*parts(qkv, 1), cos[:2], sin[:2], keys, values, places)
    with pytest.raises(ValueError, match=r"slots are torch.int32 \(3,\); allowed: torch.int64 \[3\]"):
        kv_write(*parts(qkv, 1), cos, sin, keys, values, places.int())
    with pytest.raises(ValueError, match="slots run from -1 to 32; allowed: -1 to 31 for 2 pages of 16"):
        kv_write(*parts(qkv, 1), cos, sin, keys, values, slots(1, -1, 32), "reference")
    with pytest.raises(ValueError, match="kv_write: an input requires grad"):
        kv_write(*parts(qkv.requires_grad_(), 1), cos, sin, keys, values, places)
