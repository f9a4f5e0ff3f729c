"""GAE against hand-worked numbers, a plain double loop and the telescoped form."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bylaw.kernels.gae import check_cu_seqlens, gae


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def random_episodes(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rewards, values, offsets(*lengths)


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One episode, as the sum of equation 16: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, len(deltas))) for t in range(len(deltas))]


def test_hand_worked_numbers() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    values = torch.tensor([0.5, 1.5, 2.5, 4.0], dtype=torch.float64)
    advantages, returns = gae(rewards, values, offsets(3, 1), gamma=0.5, lam=0.5)
    # delta = 1 + .75 - .5 = 1.25, 2 + 1.25 - 1.5 = 1.75, 3 - 2.5 = .5
    # A_2 = .5, A_1 = 1.75 + .5 / 4 = 1.875, A_0 = 1.25 + 1.875 / 4
    torch.testing.assert_close(advantages, torch.tensor([1.71875, 1.875, 0.5, 6.0], dtype=torch.float64))
    torch.testing.assert_close(returns, torch.tensor([2.21875, 3.375, 3.0, 10.0], dtype=torch.float64))


@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 1, 7), (0, 4, 0, 0, 2, 0), (1, 1, 1), (2, 30, 2)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.0, 1.0), (1.0, 1.0), (0.99, 0.5)])
def test_packed_episodes_agree_with_a_plain_loop(lengths: tuple[int, ...], gamma: float, lam: float) -> None:
    rewards, values, cu_seqlens = random_episodes(*lengths)
    advantages, returns = gae(rewards, values, cu_seqlens, gamma, lam)
    expected: list[float] = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        expected += plain_gae(r.tolist(), v.tolist(), gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)


def test_with_gamma_and_lambda_one_the_return_is_the_reward_still_to_come() -> None:
    rewards, values, cu_seqlens = random_episodes(4, 3)
    _, returns = gae(rewards, values, cu_seqlens, 1.0, 1.0)
    to_come = [episode.flip(0).cumsum(0).flip(0) for episode in rewards.split([4, 3])]
    torch.testing.assert_close(returns, torch.cat(to_come))


def test_nothing_flows_between_episodes() -> None:
    rewards, values, cu_seqlens = random_episodes(3, 2, 4)
    before = gae(rewards, values, cu_seqlens, 1.0, 0.95)
    rewards[3:5], values[3:5] = float("nan"), float("inf")
    after = gae(rewards, values, cu_seqlens, 1.0, 0.95)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:3], new[:3]) and torch.equal(old[5:], new[5:])


def test_values_train_on_returns_that_carry_no_gradient() -> None:
    rewards, values, cu_seqlens = random_episodes(3)
    advantages, returns = gae(rewards, values.requires_grad_(), cu_seqlens, 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_layout_and_dtype() -> None:
    rewards, values, cu_seqlens = random_episodes(3, 2)
    expected = gae(rewards, values, cu_seqlens, 1.0, 0.9)
    strided = torch.stack((rewards, values), dim=1)
    got = gae(strided[:, 0], strided[:, 1], cu_seqlens.int(), 1.0, 0.9)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    single = gae(rewards.float(), values.float(), cu_seqlens, 1.0, 0.9)
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[0].double(), expected[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cu_seqlens", [torch.tensor([0]), torch.tensor([0, 0, 0])])
def test_no_tokens(cu_seqlens: Tensor) -> None:
    advantages, returns = gae(torch.zeros(0), torch.zeros(0), cu_seqlens, 1.0, 0.95)
    assert advantages.shape == returns.shape == (0,)


def test_bad_input_is_refused() -> None:
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=r"rewards have the shape \(3,\) and values \(2,\)"):
        gae(zeros, torch.zeros(2), offsets(3), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"both \[T\]"):
        gae(zeros[None], zeros[None], offsets(3), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"gamma is 1\.5; allowed: 0 to 1"):
        gae(zeros, zeros, offsets(3), 1.5, 0.95)
    with pytest.raises(ValueError, match="lam is nan"):
        gae(zeros, zeros, offsets(3), 1.0, float("nan"))


@pytest.mark.parametrize("broken", [[], [0], [1, 3], [0, 2], [0, 4], [0, 2, 1, 3]])
def test_offsets_that_do_not_fit_are_refused(broken: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets that rise from 0 to 3 tokens"):
        check_cu_seqlens(torch.tensor(broken, dtype=torch.long), 3)


def test_nothing_is_read_token_by_token() -> None:
    """How often a number goes to Python does not grow with the tokens."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero")
            return func(*args, **(kwargs or {}))

    counts = []
    for lengths in ((3, 2), (300, 200)):
        with Reads() as reads:
            gae(*random_episodes(*lengths), 0.9, 0.8)
        counts.append(reads.count)
    assert counts[0] == counts[1]
