"""Packed streams against each sequence on its own, and batches by a token budget by hand."""

import random

import pytest
import torch

from bylaw.model.config import ModelConfig
from bylaw.model.packing import pack, packing_efficiency, token_batches
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
        ([4, 6, 1], 10, [[0, 2], [1]]),  # two are needed: 5 and 6, not 10 and 1
        ([4, 7, 3], 10, [[0, 2], [1]]),
        ([11, 1], 10, [[0], [1]]),  # longer than the budget: alone
        ([1, 11, 12, 1, 9], 10, [[0, 3], [1], [2], [4]]),
        ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),  # two that are full to the last token
        ([5, 5, 4, 3, 3], 10, [[0, 1], [2, 3, 4]]),  # evenly spread, one would have 11
        ([3, 3, 3], 1, [[0], [1], [2]]),
        ([5, 5, 5], 10**9, [[0, 1, 2]]),
    ],
)
def test_batches_by_hand(lengths: list[int], budget: int, batches: list[list[int]]) -> None:
    assert token_batches(lengths, budget) == batches


def in_order(lengths: list[int], budget: int) -> list[list[int]]:
    """Runs filled in the items' order, what a person would do first."""
    runs: list[list[int]] = []
    for i, length in enumerate(lengths):
        if not runs or sum(lengths[j] for j in runs[-1]) + length > budget:
            runs.append([])
        runs[-1].append(i)
    return runs


@pytest.mark.parametrize("seed", range(40))
def test_batches_hold_each_item_once_within_the_budget_and_are_no_more_than_in_order(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.randint(20, 400)
    lengths = [int(draw.lognormvariate(3, 1)) + 1 for _ in range(draw.randint(1, 150))]
    runs = token_batches(lengths, budget)
    assert sorted(i for run in runs for i in run) == list(range(len(lengths)))
    assert all(run == sorted(run) for run in runs) and runs == sorted(runs)
    assert all(sum(lengths[i] for i in run) <= budget or len(run) == 1 for run in runs)
    assert len(runs) <= len(in_order(lengths, budget))
    assert runs == token_batches(lengths, budget)


def test_batches_of_dialogues_are_even() -> None:
    """Where items are many and short beside the budget, nothing is lost, nor one run more than needed made."""
    draw = random.Random(0)
    lengths = [min(700, int(draw.lognormvariate(5, 0.7)) + 1) for _ in range(400)]
    runs, naive = token_batches(lengths, 4096), in_order(lengths, 4096)
    assert len(runs) == -(-sum(lengths) // 4096)
    assert packing_efficiency(lengths, runs) > 0.98 > packing_efficiency(lengths, naive)


def test_packing_efficiency_by_hand() -> None:
    assert packing_efficiency([4, 6, 1], [[0, 1], [2]]) == pytest.approx(11 / 20)
    assert packing_efficiency([4, 6, 1], [[0, 2], [1]]) == pytest.approx(11 / 12)
    assert packing_efficiency([7], [[0]]) == 1
    with pytest.raises(ValueError, match="no micro-batches"):
        packing_efficiency([], [])
