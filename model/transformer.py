"""A decoder-only transformer over packed streams: Llama, Mistral, Qwen2 and Qwen3 are settings of this one model.

It returns hidden states; losses and log-probs take (hidden, head_weight), so that no [T, V] logits are held for a
batch. Letters: T tokens, H hidden, N heads (N_q, N_kv), D head size, I intermediate, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from bylaw.kernels.linear_head import head_logits
from bylaw.kernels.rms_norm import add_rms_norm, rms_norm
from bylaw.kernels.swiglu import swiglu
from bylaw.model.config import ModelConfig
from bylaw.model.rotary import inverse_frequencies, rotary_table

HEAD_ROWS = 512  # of the head, in one product on a CPU
Rotary = tuple[Tensor, Tensor]
"""cos and sin [T, D] of each token's position."""
Attend = Callable[[int, Tensor, Tensor, Tensor, Rotary, int], Tensor]
"""(layer, q [T, N_q, D], k and v [T, N_kv, D], rotary, window) -> [T, N_q, D], with q and k not yet rotated: a packed
stream rotates them and attends within itself; an engine rotates them on their way to its cache.
"""


class Stream(Protocol):
    """What the model needs of its input."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def wanted(self) -> Tensor | None:
        """Places whose hidden states are asked for, in order; None: all."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int) -> Tensor: ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden + delta, normalised, and as it is. `delta` None stands for nothing to add."""
        if delta is None:
            return self(hidden), hidden
        return add_rms_norm(hidden, delta, self.weight, self.eps)


class Block(nn.Module):
    """Attention, then SwiGLU, each after a norm and added to the stream. q, k, v are one matrix, gate and up one.

    What the block adds last it returns beside the stream: the next norm adds it, in one pass over memory.
    """

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
        self.prepared: Callable[..., tuple[Tensor, Tensor]] | None = None

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        rotary: Rotary,
        attend: Attend,
        wanted: Tensor | None = None,
        trains: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`trains`: run as prepared for training (model/prepare.py), not as an engine samples."""
        run = self.prepared if trains and self.prepared else self.run
        return run(hidden, delta, rotary, attend, wanted)

    def run(
        self, hidden: Tensor, delta: Tensor | None, rotary: Rotary, attend: Attend, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        normed, hidden = self.attn_norm.add(hidden, delta)
        mixed = self._attention(normed, rotary, attend)
        if wanted is not None:  # in the last block, behind attention nobody reads the others
            hidden, mixed = hidden[wanted], mixed[wanted]
        normed, hidden = self.mlp_norm.add(hidden, self.out(mixed))
        return hidden, self.down(swiglu(self.gate_up(normed)))

    def _attention(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        heads = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif v.requires_grad:
            v = v.contiguous()  # a view would keep q and k as they were before the rotation, until the backward pass
        mixed = attend(self.layer, q, k, v, rotary, self.window)
        return mixed.reshape(-1, self.heads * self.head_dim)


class Transformer(nn.Module):
    """`model(stream)` gives hidden states [T, H] after the final norm, or only those that it wants; `head_weight`
    [V, H] turns them into logits.
    """

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
        hidden, delta = self.embed(stream.tokens), None  # [T, H]
        rotary = rotary_table(stream.positions, self.inv_freq, self.attention_factor)
        trains = getattr(stream, "trains", False)
        for block in self.blocks[:-1]:
            hidden, delta = block(hidden, delta, rotary, stream.attend, trains=trains)
        hidden, delta = self.blocks[-1](hidden, delta, rotary, stream.attend, stream.wanted, trains)
        return self.norm.add(hidden, delta)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in float32 of `hidden` [T, H]; for a few rows at a time.

        Without gradient they are not rounded to 16 bits on the way, as they are not in the losses: a sampler must draw
        from what is trained.
        """
        if torch.is_grad_enabled():
            return torch.nn.functional.linear(hidden, self.head_weight).float()
        if hidden.element_size() == 2:
            return head_logits(hidden, self.head_weight)
        if hidden.device.type != "cpu" or hidden.dim() != 2 or len(self.head_weight) <= HEAD_ROWS:
            return torch.nn.functional.linear(hidden, self.head_weight).float()
        # For few rows, pieces of the head that stay in a core's cache are a quarter faster than all of it.
        logits = hidden.new_empty(len(hidden), len(self.head_weight))
        for piece, columns in zip(self.head_weight.split(HEAD_ROWS), logits.split(HEAD_ROWS, dim=1), strict=True):
            torch.mm(hidden, piece.T, out=columns)
        return logits.float()


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
