"""The GAE kernel against float64 and against torch in the same dtype."""

import pytest
import torch
from precision import DEVICE, assert_as_good, assert_op, compiled, random
from torch import Tensor

from bylaw.kernels import gae as module
from bylaw.kernels.gae import gae, reference


def episodes(*lengths: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rewards, values = random(2, sum(lengths), dtype=dtype)
    return rewards, values, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def ours(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float = 0.99, lam: float = 0.95) -> list[Tensor]:
    return list(gae(rewards, values, cu_seqlens, gamma, lam, backend="triton"))


@pytest.mark.parametrize("lengths", [(1,), (8,), (0, 9, 0, 3, 0), (2, 17), (0, 0)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.0), (0.0, 1.0)])
def test_values(lengths: tuple[int, ...], gamma: float, lam: float) -> None:
    single, double = episodes(*lengths), episodes(*lengths, dtype=torch.float64)
    exact = reference(single[0].double(), single[1].double(), single[2], gamma, lam)
    torchs = reference(*single, gamma, lam)
    for got, same, true in zip(ours(*single, gamma, lam), torchs, exact, strict=True):
        assert_as_good(got, same, true)
    for got, true in zip(ours(*double, gamma, lam), reference(*double, gamma, lam), strict=True):
        torch.testing.assert_close(got, true, atol=1e-13, rtol=0)


def test_an_episode_stands_alone_and_two_runs_are_equal() -> None:
    rewards, values, cu_seqlens = episodes(3, 10, 4)
    whole = ours(rewards, values, cu_seqlens)
    rewards[:3] = values[13:] = float("nan")
    alone = ours(rewards[3:13], values[3:13], torch.tensor([0, 10], device=DEVICE))
    for first, again, single in zip(whole, ours(rewards, values, cu_seqlens), alone, strict=True):
        assert torch.equal(first[3:13], again[3:13]) and torch.equal(first[3:13], single)


def test_input_that_is_not_contiguous_and_offsets_of_32_bits() -> None:
    rewards, values, cu_seqlens = episodes(3, 10)
    pair = torch.stack([rewards, values], dim=1)
    expected = ours(rewards, values, cu_seqlens)
    got = ours(pair[:, 0], pair[:, 1], cu_seqlens.int().repeat_interleave(2)[::2])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_no_gradient() -> None:
    rewards, values, cu_seqlens = episodes(3)
    assert not any(x.requires_grad for x in ours(rewards, values.requires_grad_(), cu_seqlens))


def test_the_operation_is_registered_in_order() -> None:
    assert_op(module._launch, *episodes(2, 1), 0.99, 0.95)


def test_under_torch_compile() -> None:
    for got, expected in zip(compiled(ours)(*episodes(2, 9)), ours(*episodes(2, 9)), strict=True):
        assert torch.equal(got, expected)


def test_the_backend_is_checked() -> None:
    with pytest.raises(ValueError, match="gae: backend = 'scan'; allowed"):
        gae(*episodes(3), 1.0, 0.95, backend="scan")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_long_episodes() -> None:
    rewards, values, cu_seqlens = episodes(5000, 1, 1024, 0, 4096, 3000)
    exact = reference(rewards.double(), values.double(), cu_seqlens, 1.0, 0.95)
    torchs = reference(rewards, values, cu_seqlens, 1.0, 0.95)
    for got, same, true in zip(ours(rewards, values, cu_seqlens, 1.0), torchs, exact, strict=True):
        assert_as_good(got, same, true)
