"""A decoder-only transformer over packed streams: Llama, Mistral, Qwen2 and Qwen3 are settings of this one model.

It returns hidden states; losses and log-probs take (hidden, head_weight), so that no [T, V] logits are held for a
batch. Letters: T tokens, H hidden, N heads (N_q, N_kv), D head size, I intermediate, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from bylaw.kernels.rms_norm import rms_norm
from bylaw.kernels.rope import rope
from bylaw.kernels.swiglu import swiglu
from bylaw.model.config import ModelConfig
from bylaw.model.rotary import inverse_frequencies, rotary_table

Attend = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]
"""(layer, q [T, N_q, D], k and v [T, N_kv, D], window) -> [T, N_q, D]. A packed stream attends within itself; an engine
attends over its cache.
"""


class Stream(Protocol):
    """What the model needs of its input."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """Attention, then SwiGLU, each after a norm and added to the stream. q, k, v are one matrix, gate and up one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.layer, self.window = layer, config.windows[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_size = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.attn_norm = RMSNorm(hidden, eps)
        self.qkv = nn.Linear(hidden, qkv_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.out = nn.Linear(self.heads * self.head_dim, hidden, bias=config.output_bias)
        self.mlp_norm = RMSNorm(hidden, eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        hidden = hidden + self.out(self._attention(self.attn_norm(hidden), cos, sin, attend))
        return hidden + self.down(swiglu(self.gate_up(self.mlp_norm(hidden))))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(self.layer, rope(q, cos, sin), rope(k, cos, sin), v, self.window)
        return mixed.reshape(-1, self.heads * self.head_dim)


class Transformer(nn.Module):
    """`model(stream)` gives hidden states [T, H] after the final norm; `head_weight` [V, H] turns them into logits."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, with_head: bool = True) -> None:
        """`with_head` False leaves out an untied vocabulary head: the trunk of a reward or value model has none."""
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        own_head = with_head and not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if own_head else None
        inv_freq, self.attention_factor = inverse_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H], the embedding itself when tied."""
        if self.config.tie_word_embeddings:
            return self.embed.weight
        assert self.lm_head is not None, "this trunk was built without a vocabulary head"
        return self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, stream: Stream) -> Tensor:
        hidden = self.embed(stream.tokens)  # [T, H]
        cos, sin = rotary_table(stream.positions, self.inv_freq, self.attention_factor)
        for block in self.blocks:
            hidden = block(hidden, cos, sin, stream.attend)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in float32 of `hidden` [T, H]; for a few rows at a time."""
        return torch.nn.functional.linear(hidden, self.head_weight).float()


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> Transformer:
    """Fill `model` with N(0, initializer_range) weights drawn from `seed`; the projections into the residual stream are
    scaled down by sqrt(2 * layers) as in GPT-2 (Radford et al. 2019, section 2.3); norms are 1 and biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    std, depth = model.config.initializer_range, (2 * model.config.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = std / depth if name.endswith(("out.weight", "down.weight")) else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model
