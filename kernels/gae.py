"""Generalised advantage estimation over packed episodes (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

An episode ends at its last token: V and A after it are 0, and nothing flows from one episode into another.
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages [T] and returns [T], without gradient, from `rewards` [T], `values` [T] and `cu_seqlens` [B+1].

    An episode may be empty. Raises ValueError for shapes that differ, a gamma or lam outside 0 to 1, and cu_seqlens
    that do not rise from 0 to T.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(
            f"rewards have the shape {tuple(rewards.shape)} and values {tuple(values.shape)}; allowed: both [T]"
        )
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} is {factor}; allowed: 0 to 1")
    check_cu_seqlens(cu_seqlens, len(rewards))
    return reference(rewards, values, cu_seqlens, gamma, lam)


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


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """ValueError unless cu_seqlens [B+1] rises (or stays) from 0 to `tokens`."""
    good = cu_seqlens.ndim == 1 and len(cu_seqlens) > 0 and cu_seqlens[0] == 0 and cu_seqlens[-1] == tokens
    if not good or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; allowed: offsets that rise from 0 to {tokens} tokens")
