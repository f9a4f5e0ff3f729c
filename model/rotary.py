"""Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4) and its stretched forms for longer contexts.

The arithmetic, its order and its float32 roundings are those of Transformers' modeling_rope_utils, with which
checkpoints are trained and judged. Half-split convention: dimension d of a head turns with dimension d + D/2.
"""

import math

import torch
from torch import Tensor

from bylaw.model.config import ModelConfig, RopeConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position, [D/2] float32, and the factor that cos and sin are scaled by (1 except in yarn)."""
    rope, dim = config.rope, config.head_dim
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, dim), rope.attention_factor or _yarn_attention_factor(rope)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1's published reference code)."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, stretched)


def _yarn(inv_freq: Tensor, rope: RopeConfig, dim: int) -> Tensor:
    """NTK-by-parts: stretch the dimensions that turn seldom, keep the others (arXiv 2309.00071, section 3.2)."""
    original = rope.original_max_position_embeddings

    def dimension(turns: float) -> float:
        """The dimension that turns this often within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    pos_freqs = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return 1.0 / (rope.factor * pos_freqs) * (1 - keep) + inv_freq * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), or DeepSeek's ratio of two of its kind."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotary_table(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, D] float32, of `positions` [T]; both halves of D hold the same angles."""
    angles = positions[:, None].float() * inv_freq  # [T, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor
