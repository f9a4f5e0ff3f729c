"""The models that the engine benchmark runs: a checkpoint of the person's own, or a random one written for the run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bylaw.benchmarks.engine_config import EngineConfig
from bylaw.model.checkpoint import save_model
from bylaw.model.config import ModelConfig
from bylaw.model.transformer import Transformer, initialize

SPREAD = 0.06  # of the weights: the residual stream outgrows the embedding, and greedy text goes on changing
SHAPES = {
    "tiny": ModelConfig(
        family="llama", vocab_size=256, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.4,
    ),
    "llama-30m": ModelConfig(
        family="llama", vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=4, head_dim=64, max_position_embeddings=2048, initializer_range=SPREAD,
    ),
    "qwen2-1.5b": ModelConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, max_position_embeddings=4096, initializer_range=SPREAD,
        attention_bias=True, tie_word_embeddings=True,
    ),
}  # fmt: skip


@contextmanager
def checkpoint(config: EngineConfig, dtype: torch.dtype) -> Iterator[Path]:
    """A folder that both sides read: `config.model`, or a random model from a fixed seed, removed at the end."""
    if config.model is not None:
        yield config.model
        return
    shape = SHAPES["tiny" if config.quick else config.shape]
    with tempfile.TemporaryDirectory(prefix="bylaw-bench-") as place:
        save_model(initialize(Transformer(shape), seed=0).to(dtype), Path(place) / "model")
        yield Path(place) / "model"
