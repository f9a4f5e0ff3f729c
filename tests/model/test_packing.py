"""Packed streams against each sequence on its own, and batches by a token budget by hand."""

import random

import pytest
import torch

from bylaw.model.config import ModelConfig
from bylaw.model.packing import pack, token_batches
from bylaw.model.transformer import Transformer, initialize


def test_a_stream_of_three() -> None:
    packed = pack([[5, 6, 7], [8], [9, 4]])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 4]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.last.tolist() == [2, 3, 5]
    assert {packed.tokens.dtype, packed.positions.dtype, packed.cu_seqlens.dtype} == {torch.int64}


@pytest.mark.parametrize("windows", [(0, 0), (6, 6)])
def test_a_model_reads_each_sequence_of_a_stream_as_if_alone(windows: tuple[int, ...]) -> None:
    config = ModelConfig(
        family="mistral", vocab_size=31, hidden_size=16, intermediate_size=12, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=6, max_position_embeddings=64, windows=windows, initializer_range=0.3,
    )  # fmt: skip
    model = initialize(Transformer(config), seed=0)
    draw = random.Random(0)
    sequences = [[draw.randrange(31) for _ in range(length)] for length in (1, 40, 7, 8, 1, 23, 39)]
    packed = pack(sequences)
    with torch.no_grad():
        together = model(packed)
        alone = torch.cat([model(pack([ids])) for ids in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.5


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        pack([])
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        pack([[3], [], [4]])


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [
        ([], 10, []),
        ([4, 6, 1], 10, [[0, 1], [2]]),
        ([4, 7, 3], 10, [[0], [1, 2]]),
        ([11, 1], 10, [[0], [1]]),  # longer than the budget: alone
        ([1, 11, 12, 1, 9], 10, [[0], [1], [2], [3, 4]]),
        ([3, 3, 3], 1, [[0], [1], [2]]),
        ([5, 5, 5], 10**9, [[0, 1, 2]]),
    ],
)
def test_batches_keep_order_and_budget(lengths: list[int], budget: int, batches: list[list[int]]) -> None:
    assert token_batches(lengths, budget) == batches
