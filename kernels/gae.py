"""Generalised advantage estimation over packed episodes (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

An episode ends at its last token: V and A after it are 0, and nothing flows from one episode into another.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, start


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Advantages [T] and returns [T], without gradient, from `rewards` [T], `values` [T] and `cu_seqlens` [B+1].

    An episode may be empty. Raises ValueError for shapes that differ, a gamma or lam outside 0 to 1, a backend that
    cannot run there, and cu_seqlens that do not rise from 0 to T, where their values are on a CPU: on a GPU they are
    not looked at, and offsets outside 0 to T read and write foreign memory.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(
            f"rewards have the shape {tuple(rewards.shape)} and values {tuple(values.shape)}; allowed: both [T]"
        )
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} is {factor}; allowed: 0 to 1")
    check_cu_seqlens(cu_seqlens, len(rewards))
    if choose("gae", backend, values) == "reference":
        return reference(rewards, values, cu_seqlens, gamma, lam)
    return _launch(rewards.detach(), values.detach(), cu_seqlens, gamma, lam)


@torch.no_grad()
def reference(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """`gae` in plain torch, on checked input: one step for each position of the longest episode, all rows at once."""
    if not len(rewards):
        return torch.zeros_like(values), torch.zeros_like(values)
    lengths = cu_seqlens.diff()
    episode = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)  # [T]
    column = torch.arange(len(values), device=values.device) - cu_seqlens[episode]  # [T], from the episode's start
    following = torch.cat((values[1:], values.new_zeros(1)))
    following[cu_seqlens[1:] - 1] = 0  # an empty episode only names the end before it again, or -1, the stream's end
    padded = values.new_zeros(len(lengths), int(lengths.max()))  # [B, S]: 0 after an episode's end keeps the carry at 0
    padded[episode, column] = rewards + gamma * following - values
    for step in reversed(range(padded.shape[1] - 1)):
        padded[:, step] += gamma * lam * padded[:, step + 1]
    advantages = padded[episode, column]
    return advantages, advantages + values


@triton.jit
def _after(later_decay, later, decay, delta):
    """Two stretches of an episode as maps of the advantage that follows them, x -> sum + decay x, in one."""
    return later_decay * decay, delta + decay * later


@triton.jit
def _kernel(
    rewards,
    values,
    cu_seqlens,
    advantages,
    returns,
    gamma: np.float64,
    decay: np.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One episode, in blocks from its end. `decay` is gamma lambda."""
    episode = tl.program_id(0)
    first = tl.load(cu_seqlens + episode).to(tl.int64)
    end = tl.load(cu_seqlens + episode + 1).to(tl.int64)
    gamma = tl.full((), gamma, ACC)
    decays = tl.full((BLOCK,), decay, ACC)
    lanes = tl.arange(0, BLOCK)
    following = tl.full((), 0, ACC)  # the advantage after the block
    for done in range(0, (end - first).to(tl.int32), BLOCK):
        tokens = end - done - BLOCK + lanes  # in the last block, from before the first token on
        inside = tokens >= first
        value = tl.load(values + tokens, inside, other=0.0).to(ACC)
        next_value = tl.load(values + tokens + 1, inside & (tokens + 1 < end), other=0.0).to(ACC)
        delta = tl.load(rewards + tokens, inside, other=0.0).to(ACC) + gamma * next_value - value
        power, total = tl.associative_scan((decays, delta), 0, _after, reverse=True)
        advantage = total + power * following
        following = tl.sum(tl.where(lanes == 0, advantage, 0.0))
        tl.store(advantages + tokens, advantage.to(advantages.dtype.element_ty), inside)
        tl.store(returns + tokens, (advantage + value).to(returns.dtype.element_ty), inside)


@torch.library.custom_op("bylaw::gae", mutates_args=())
def _launch(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    outs = _empty_like(rewards, values), _empty_like(rewards, values)
    columns = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    settings = config("gae", values.device)
    acc = accumulator(outs[0].dtype)
    start(_kernel, (len(cu_seqlens) - 1,), *columns, *outs, gamma, gamma * lam, ACC=acc, **settings)
    return outs


def _empty_like(rewards: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(len(values), dtype=torch.promote_types(rewards.dtype, values.dtype))


@_launch.register_fake
def _(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    return _empty_like(rewards, values), _empty_like(rewards, values)


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """ValueError unless cu_seqlens [B+1] rises (or stays) from 0 to `tokens`; on a GPU only its shape is checked."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        shape = tuple(cu_seqlens.shape)
        raise ValueError(
            f"cu_seqlens has the shape {shape}; allowed: [B+1], offsets that rise from 0 to {tokens} tokens"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():  # reading it would wait for the device
        return
    good = cu_seqlens[0] == 0 and cu_seqlens[-1] == tokens and (cu_seqlens.diff() >= 0).all()
    if not good:
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; allowed: offsets that rise from 0 to {tokens} tokens")
