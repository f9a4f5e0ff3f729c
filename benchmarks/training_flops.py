"""The arithmetic of a transformer, and what devices could do: model FLOP utilisation (arXiv 2204.02311, appendix B)."""

from collections.abc import Sequence

from bylaw.model.config import ModelConfig

# Dense bfloat16 products per second, from the vendor's data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak(device: str) -> float | None:
    """FLOPs per second that a device of this name could do at most, None where that is not known."""
    return next((flops for part, flops in PEAKS.items() if part in device), None)


def block_weights(config: ModelConfig) -> int:
    """The weights of all blocks' matrices: a token is multiplied by each once."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(config: ModelConfig, lengths: Sequence[int], logits: int) -> int:
    """FLOPs of one pass over texts of `lengths`, `logits` of whose tokens go through the vocabulary head.

    Two for each weight that a token meets; and for each token and every one that it sees, itself included, two for the
    product of query and key and two for the weighted value, in each query head. Backward costs twice as much again.
    """
    seen = sum(n * (n + 1) // 2 for n in lengths)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    head = 2 * config.hidden_size * config.vocab_size * logits
    return 2 * block_weights(config) * sum(lengths) + attention + head


def training_flops(config: ModelConfig, lengths: Sequence[int], logits: int) -> int:
    """Forward and backward: 6 for each weight and token, and the attention's. What is computed again counts once."""
    return 3 * forward_flops(config, lengths, logits)
