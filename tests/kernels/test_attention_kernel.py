"""The attention kernels against float64 and against torch in the same dtype."""

from collections.abc import Callable, Sequence

import pytest
import torch
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import flash, tiles
from bylaw.kernels.attention import attention, plan, reference
from bylaw.kernels.flash_backward import backward
from bylaw.kernels.layout import TILE, Layout

Heads = tuple[int, int, int]


def layout_of(lengths: Sequence[int]) -> Layout:
    return plan(torch.tensor([0, *lengths]).cumsum(0), DEVICE)


def random_qkv(tokens: int, heads: Heads, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Sharp enough that a wrong mask or scale shows; heads = (Nq, Nkv, D)."""
    q_heads, kv_heads, size = heads
    q, k, v = (random(tokens, n, size, seed=seed) for seed, n in enumerate((q_heads, kv_heads, kv_heads)))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def ours(layout: Layout, window: int = 0) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, layout, window, backend="triton")


def torchs(layout: Layout, window: int = 0) -> Callable[..., Tensor]:
    return lambda q, k, v: reference(q, k, v, layout, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "window"),
    [
        ((1, 63, 0, 65), (2, 1, 16), 0),
        ((33, 0, 6), (6, 2, 40), 7),
        ((TILE + 12, 5), (1, 1, 64), 70),
        ((65,), (2, 2, 16), 1000),
        ((50,), (2, 1, 80), 1),
        ((17, 16), (4, 1, 10), 17),
    ],
)
def test_forward_and_gradients(lengths: tuple[int, ...], heads: Heads, window: int, dtype: torch.dtype) -> None:
    layout, inputs = layout_of(lengths), random_qkv(sum(lengths), heads, dtype)
    grad = random(sum(lengths), heads[0], heads[2], seed=3).to(dtype)
    exact = gradients(torchs(layout, window), grad.double(), *(x.double() for x in inputs))
    got, same_dtype = (gradients(attend(layout, window), grad, *inputs) for attend in (ours, torchs))
    # The backward pass makes weights anew from exponents as large as the log-sum-exp.
    _, lse = flash.forward(*inputs, layout, window)
    assert_all_as_good(got, same_dtype, exact, exponent=float(lse.abs().max()))


@pytest.mark.parametrize("window", [0, 1, 16, 37])
@pytest.mark.parametrize(("block", "step"), [(16, 16), (16, 64), (64, 16)])
def test_any_blocks(block: int, step: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"BLOCK": block, "STEP": step, "num_warps": 4}
    monkeypatch.setattr(tiles, "config", lambda *args, **sizes: settings)
    layout, inputs = layout_of((75,)), random_qkv(75, (1, 1, 16))
    grad = random(75, 1, 16, seed=3)
    exact = gradients(torchs(layout, window), grad, *inputs)
    for got, expected in zip(gradients(ours(layout, window), grad, *inputs), exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [0, 2])
def test_gradients_numerically_and_of_the_log_sum_exp(window: int) -> None:
    layout = layout_of((3,))
    inputs = [x.requires_grad_() for x in random_qkv(3, (2, 1, 1))]
    assert torch.autograd.gradcheck(lambda q, k, v: flash.forward(q, k, v, layout, window), inputs)


def test_the_log_sum_exp_and_its_gradient_alone() -> None:
    layout, (q, k, v) = layout_of((5, 1)), random_qkv(6, (2, 1, 4), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k)]
    seen = torch.ones(6, 6, device=DEVICE).tril().bool()
    seen[5, :5] = False
    expected = (torch.einsum("ihd,jd->hij", q, k[:, 0]) / 2).masked_fill(~seen, -torch.inf).logsumexp(2)
    _, lse = flash.forward(q, k, v, layout)
    torch.testing.assert_close(lse, expected)
    grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (lse, expected))
    for got, true in zip(*grads, strict=True):
        torch.testing.assert_close(got, true)


def test_a_sequence_does_not_feel_its_batch_mates_and_two_runs_agree() -> None:
    lengths, window = (20, 3, 40), 25
    q, k, v = inputs = random_qkv(sum(lengths), (2, 1, 16), torch.float32)
    grad = random(sum(lengths), 2, 16, seed=3, dtype=torch.float32)
    together = gradients(ours(layout_of(lengths), window), grad, *inputs)
    for a, b in zip(together, gradients(ours(layout_of(lengths), window), grad, *inputs), strict=True):
        assert torch.equal(a, b)
    for piece in (slice(0, 20), slice(20, 23), slice(23, 63)):
        layout = layout_of([piece.stop - piece.start])
        alone = gradients(ours(layout, window), grad[piece], q[piece], k[piece], v[piece])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[piece], b)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy under the interpreter, for the broken one
def test_a_broken_batch_mate_breaks_nobody_else() -> None:
    layout, inputs = layout_of((21, 9, 30)), random_qkv(60, (1, 1, 16), torch.float32)
    grad = random(60, 1, 16, seed=3)
    before = gradients(ours(layout), grad, *inputs)
    for x in inputs:
        x[21:30] = torch.nan
    for was, now in zip(before, gradients(ours(layout), grad, *inputs), strict=True):
        assert now[21:30].isnan().any()
        assert torch.equal(now[:21], was[:21]) and torch.equal(now[30:], was[30:])


def test_heads_of_one_fused_tensor_and_other_strides() -> None:
    layout, fused = layout_of((20, 13)), random(33, 4, 24, dtype=torch.float32)
    q, k, v = fused.split((2, 1, 1), dim=1)
    grad = random(33, 2, 24, seed=1, dtype=torch.float32)
    straight = gradients(ours(layout), grad, *(x.contiguous() for x in (q, k, v)))
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for strided in ((q, k, v), turned):
        leaves = [x.detach().requires_grad_() for x in strided]
        out = ours(layout)(*leaves)
        results = (out, *torch.autograd.grad(out, leaves, grad.transpose(0, 1).contiguous().transpose(0, 1)))
        for got, expected in zip(results, straight, strict=True):
            assert torch.equal(got, expected)


def test_offsets_beyond_what_32_bits_count() -> None:
    # A token stands 2**24 elements behind the one before: 4 GiB of addresses, of which a few pages are touched.
    far = torch.empty_strided((TILE + 6, 3, 16), (2**24, 16, 1), dtype=torch.float16, device=DEVICE)
    near = far.copy_(random(TILE + 6, 3, 16, dtype=torch.float16)).contiguous()
    layout, grad = layout_of([TILE + 6]), random(TILE + 6, 1, 16, seed=1, dtype=torch.float16)
    results = []
    for q, k, v in (far.split(1, dim=1), near.split(1, dim=1)):
        out, lse = flash.forward(q, k, v, layout)
        results.append((out, *backward(q, k, v, out, lse, grad, None, layout.cu_seqlens, layout.tiles, 0)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_tokens() -> None:
    for lengths in ((), (0, 0)):
        leaves = [x.requires_grad_() for x in random_qkv(0, (2, 1, 4))]
        out = ours(layout_of(lengths))(*leaves)
        assert out.shape == (0, 2, 4)
        assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


def test_the_operations_are_registered_in_order() -> None:
    layout, inputs = layout_of((3, 2)), random_qkv(5, (2, 1, 4), torch.float32)
    q, k, v = (x.requires_grad_() for x in inputs)
    assert_op(flash._forward, q, k, v, layout.cu_seqlens, layout.tiles, 2)
    out, lse = flash.forward(q.detach(), k.detach(), v.detach(), layout)
    for grad_lse in (None, torch.ones_like(lse)):
        tensors = [x.detach() for x in (q, k, v, out, lse, torch.ones_like(out))]
        assert_op(backward, *tensors, grad_lse, layout.cu_seqlens, layout.tiles, 0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_under_torch_compile(backend: str) -> None:
    layout, inputs = layout_of((20, 3)), random_qkv(23, (2, 1, 8), torch.float32)
    grad = random(23, 2, 8, seed=3, dtype=torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, 4, backend=backend)

    for got, expected in zip(gradients(compiled(attend), grad, *inputs), gradients(attend, grad, *inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=0 if backend == "triton" else 1e-6, rtol=0)


def test_every_tile_once_and_the_longest_past_first() -> None:
    layout = layout_of((TILE + 1, 0, 1, 3 * TILE))
    assert layout.tiles.dtype == layout.cu_seqlens.dtype == torch.int32
    assert layout.tiles.tolist() == [[3, 2], [0, 1], [3, 1], [0, 0], [2, 0], [3, 0]]
    assert (layout.tokens, layout.max_seqlen) == (4 * TILE + 2, 3 * TILE)


def test_refusals() -> None:
    layout, (q, k, v) = layout_of((3, 2)), random_qkv(5, (4, 2, 8))
    for wrong in (
        (q[:, :3], k, v),
        (q, k[:, :1], v),
        (q, k, v[:, :, :4]),
        (q[:4], k[:4], v[:4]),
        (q, k[0], v[0]),
        (q, k[:, :0], v[:, :0]),
    ):
        with pytest.raises(ValueError, match=r"have the shapes .* and the layout 5 tokens; allowed"):
            attention(*wrong, layout)
    with pytest.raises(ValueError, match="the same dtype"):
        attention(q.float(), k, v, layout)
    with pytest.raises(ValueError, match="window = -1; allowed"):
        attention(q, k, v, layout, -1)
    with pytest.raises(ValueError, match="heads of size 257; allowed: up to 256"):
        attention(*random_qkv(5, (1, 1, 257)), layout, backend="triton")
    with pytest.raises(ValueError, match="no library"):
        attention(q, k, v, layout, backend="library")
    for cu_seqlens in ([], [1, 2], [0, 3, 2], [0, 2**31]):
        with pytest.raises(ValueError, match="allowed: \\[B \\+ 1\\], from 0"):
            plan(torch.tensor(cu_seqlens, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 512])
def test_production_shapes(size: int, window: int) -> None:
    lengths = (2048, 1, 1500, 63, 65, 0, 371)
    layout, inputs = layout_of(lengths), random_qkv(sum(lengths), (8, 2, size), torch.bfloat16)
    grad = random(sum(lengths), 8, size, seed=3).bfloat16()
    exact = gradients(torchs(layout, window), grad.double(), *(x.double() for x in inputs))
    first = gradients(ours(layout, window), grad, *inputs)
    assert_all_as_good(first, gradients(torchs(layout, window), grad, *inputs), exact)
    for a, b in zip(first, gradients(ours(layout, window), grad, *inputs), strict=True):
        assert torch.equal(a, b)
