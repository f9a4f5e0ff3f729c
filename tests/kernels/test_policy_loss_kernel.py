"""The PPO kernels against the references, in float64 and in the same dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from precision import DEVICE, assert_all_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import kl
from bylaw.kernels import policy_loss as module
from bylaw.kernels.kl import kl_k2, kl_k3
from bylaw.kernels.policy_loss import mean_stats, merge_stats, policy_loss, value_loss

Outputs = tuple[Tensor, ...]
dual_policy_loss = partial(policy_loss, dual_clip=1.3)
LOSSES = [(policy_loss, (0.25, 0.5)), (dual_policy_loss, (0.25, 0.5)), (value_loss, 0.25)]


def batch(size: int, dtype: torch.dtype = torch.float64, far: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Ratios and values on both sides of the clip, one at the old value, and one `far` off."""
    old, constants = random(size, seed=1), random(size, seed=2)
    new = old + 0.4 * random(size)
    new[:1] = old[:1]
    new[3:4] += far
    return new.to(dtype), old.to(dtype), constants.to(dtype)


def outputs(loss_of: Callable[..., Any], columns: Outputs, clip: Any, backend: str) -> Outputs:
    leaf = columns[0].clone().requires_grad_()
    loss, stats = loss_of(leaf, *columns[1:], clip, 7.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(0.3, dtype=loss.dtype, device=DEVICE))
    assert next(iter(stats)) == "tokens" and not any(x.requires_grad for x in stats.values())
    return loss.detach(), gradient, *stats.values()


@pytest.mark.parametrize(("loss_of", "clip"), LOSSES)
@pytest.mark.parametrize("size", [0, 1, 63, 65])
def test_loss_gradient_and_every_statistic(loss_of: Callable[..., Any], clip: Any, size: int) -> None:
    for far in (30.0, -30.0):
        columns = batch(min(size, 17), far=far)
        exact = outputs(loss_of, columns, clip, "reference")
        for got, expected in zip(outputs(loss_of, columns, clip, "triton"), exact, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    narrow = batch(size, torch.float32)
    exact = outputs(loss_of, tuple(x.double() for x in narrow), clip, "reference")
    ours, torchs = (outputs(loss_of, narrow, clip, backend) for backend in ("triton", "reference"))
    assert_all_as_good(ours[:2], torchs[:2], exact[:2])
    for got, expected in zip(ours[2:], exact[2:], strict=True):  # float64 sums of float32 numbers
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_the_first_minibatch_has_ratio_one_exactly() -> None:
    logprobs = batch(40, torch.float32)[0]
    _, stats = policy_loss(logprobs, logprobs.clone(), torch.ones_like(logprobs), 0.2, 40, backend="triton")
    assert stats["ratio_gap_max"] == 0 and stats["clip_fraction"] == 0 and stats["approx_kl_k3"] == 0
    assert stats["ratio"] == 40 and stats["ratio_max"] == 1


def test_a_pair_clips_to_its_own_sides() -> None:
    ratio = torch.tensor([0.6, 0.8, 1.3, 1.6], device=DEVICE).double()
    for advantage, expected in ((1.0, [-0.6, -0.8, -1.3, 0]), (-1.0, [0, 0.8, 1.3, 1.6])):
        for backend in ("reference", "triton"):
            logprobs = ratio.log().requires_grad_()
            loss, stats = policy_loss(
                logprobs, torch.zeros_like(ratio), advantage * torch.ones_like(ratio), (0.25, 0.5), 1, backend=backend
            )
            loss.backward()
            torch.testing.assert_close(logprobs.grad, torch.tensor(expected, device=DEVICE).double())
            assert stats["clip_fraction"] == 1


def test_the_dual_clip_bounds_the_loss_of_negative_advantages() -> None:
    ratio = torch.tensor([0.5, 2.0, 5.0], device=DEVICE).double()
    # The loss is at most 3 |A| for A < 0; above 0 it ends at the upper clip.
    for advantage, gradient, cut, dual_cut in ((-2.0, [0, 4.0, 0], 1, 1), (2.0, [-1.0, 0, 0], 2, 0)):
        loss_of = partial(policy_loss, advantages=advantage * torch.ones_like(ratio), clip=0.2, denominator=1)
        for backend in ("reference", "triton"):
            logprobs = ratio.log().requires_grad_()
            loss, stats = loss_of(logprobs, torch.zeros_like(ratio), dual_clip=3.0, backend=backend)
            loss.backward()
            expected = 1.6 + 4 + 6 if advantage < 0 else -(1 + 2.4 + 2.4)
            torch.testing.assert_close(float(loss.detach()), expected)
            torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, device=DEVICE).double())
            assert stats["clip_fraction"] == cut and stats["dual_clip_fraction"] == dual_cut


@pytest.mark.parametrize(("loss_of", "clip"), LOSSES)
def test_gradient_numerically(loss_of: Callable[..., Any], clip: Any) -> None:
    logprobs, *others = batch(4)
    assert torch.autograd.gradcheck(
        lambda x: loss_of(x, *others, clip, 3.0, backend="triton")[0], logprobs.requires_grad_()
    )


@pytest.mark.parametrize(("loss_of", "clip"), LOSSES)
def test_two_runs_and_micro_batches(loss_of: Callable[..., Any], clip: Any) -> None:
    columns = batch(50, torch.float32)
    first, again = (outputs(loss_of, columns, clip, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    scattered = tuple(torch.stack([x, x], 1)[:, 0] for x in columns)
    assert all(torch.equal(x, y) for x, y in zip(first, outputs(loss_of, scattered, clip, "triton"), strict=True))
    parts = [loss_of(*(x[cut] for x in columns), clip, 7.0, backend="triton") for cut in (slice(9), slice(9, 50))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], first[0])
    whole = loss_of(*columns, clip, 7.0, backend="triton")[1]
    assert mean_stats(merge_stats(part for _, part in parts)) == pytest.approx(mean_stats(whole), rel=1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, in numpy under the interpreter
@pytest.mark.parametrize("loss_of", [policy_loss, dual_policy_loss, value_loss])
@pytest.mark.parametrize("constant", [-1.0, 1.0])
def test_nan_shows_in_the_loss_and_in_sums_and_maxima(loss_of: Callable[..., Any], constant: float) -> None:
    new, *others = batch(40)
    new[20], others[1][20] = torch.nan, constant
    loss, stats = loss_of(new, *others, 0.2, 1.0, backend="triton")
    assert loss.isnan()
    counts = {"tokens", "clip_fraction", "dual_clip_fraction", "value_clip_fraction"}
    assert {name for name, x in stats.items() if not x.isnan()} <= counts
    new[20], others[1][20] = 0.0, torch.nan
    assert loss_of(new, *others, 0.2, 1.0, backend="triton")[0].isnan()


@triton.jit
def _kl_kernel(logprobs, others, values, slopes, K2: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    if K2:
        value, slope = kl.kl_k2_terms(tl.load(logprobs + places), tl.load(others + places))
    else:
        value, slope = kl.kl_k3_terms(tl.load(logprobs + places), tl.load(others + places))
    tl.store(values + places, value)
    tl.store(slopes + places, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k2_is_not_clamped_and_its_slope_is_the_log_ratio(dtype: torch.dtype) -> None:
    logprobs = torch.tensor([-1.0, -2.0, 0.0, -100.0], dtype=dtype, device=DEVICE)
    others = torch.tensor([-1.0, -1.5, -3.0, 0.0], dtype=dtype, device=DEVICE)
    values, slopes = torch.empty_like(others), torch.empty_like(others)
    settings: dict[str, Any] = {"K2": True, "BLOCK": 4}
    _kl_kernel[(1,)](logprobs, others, values, slopes, **settings)
    assert values.tolist() == kl_k2(logprobs, others).tolist() == [0.0, 0.125, 4.5, 5000.0]
    assert slopes.tolist() == [0.0, -0.5, 3.0, -100.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_keeps_the_digits_of_small_differences(dtype: torch.dtype) -> None:
    gaps = [0.0, 2.0**-30, -(2.0**-12), 0.1, -0.5, 0.99, -1.0, 1.01, -3.0, 5.0, 19.0, 21.0, -19.0, -21.0, 1e4, -1e4]
    others = torch.tensor(gaps, dtype=dtype, device=DEVICE)
    values, slopes = torch.empty_like(others), torch.empty_like(others)
    settings: dict[str, Any] = {"K2": False, "BLOCK": len(gaps)}
    _kl_kernel[(1,)](torch.zeros_like(others), others, values, slopes, **settings)
    d = others.double()
    # The reference subtracts, and so keeps fewer digits near 0 than this.
    exact = torch.where(d.abs() < 0.05, d**2 / 2 * (1 + d / 3 + d**2 / 12 + d**3 / 60), kl_k3(torch.zeros_like(d), d))
    exact_slopes = torch.where(d.abs() > 20, 0.0, -d.expm1())
    for got, expected in ((values, exact), (slopes, exact_slopes)):
        torch.testing.assert_close(got.double(), expected, atol=0, rtol=16 * torch.finfo(dtype).eps)


def test_the_operations_are_registered_in_order() -> None:
    new, *others = batch(20, torch.float32)
    for dual in (3.0, float("inf")):
        assert_op(module._policy, new.clone().requires_grad_(), *others, 0.8, 1.2, dual)
    assert_op(module._value, new.clone().requires_grad_(), *others, 0.2)
    assert_op(module.scaled, random(3, 2, dtype=torch.float32), random(dtype=torch.float32), torch.float16)


@pytest.mark.parametrize(("loss_of", "clip"), LOSSES)
def test_under_torch_compile(loss_of: Callable[..., Any], clip: Any) -> None:
    columns = batch(20, torch.float32)
    got = outputs(compiled(loss_of), columns, clip, "triton")
    assert all(torch.equal(x, y) for x, y in zip(got, outputs(loss_of, columns, clip, "triton"), strict=True))


def test_a_factor_is_not_rounded_to_what_it_scales() -> None:
    factor = torch.tensor(1 + 2.0**-9, device=DEVICE)  # in bfloat16, 1
    x = torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(module.scaled(x, factor, torch.float32), x.float() * factor)


def test_refusals() -> None:
    three = random(3)
    for clip in (0.0, (0.2, 0.0), (-0.1, 0.2)):
        with pytest.raises(ValueError, match=r"clip is .*allowed: above 0"):
            policy_loss(three, three, three, clip, 1)
    with pytest.raises(ValueError, match="policy_loss: backend = 'library'"):
        policy_loss(three, three, three, 0.2, 1, backend="library")
    with pytest.raises(ValueError, match="value_loss: backend = 'cuda'"):
        value_loss(three, three, three, 0.2, 1, backend="cuda")
