"""Streams with shared beginnings against every sequence on its own: hidden states and gradients of all families."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.model.config import ModelConfig
from bylaw.model.packing import pack
from bylaw.model.shared_prompt import Shared, common_length, pack_shared
from bylaw.model.transformer import Transformer, initialize

Groups = Sequence[Sequence[Sequence[int]]]
VOCAB = 41
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "mistral": {"family": "mistral", "windows": (5, 5)},
    "qwen2": {"family": "qwen2", "attention_bias": True, "windows": (0, 7)},
    "qwen3": {"family": "qwen3", "qk_norm": True, "num_kv_heads": 4},
}


def made(family: str) -> Transformer:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 6, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    return initialize(Transformer(ModelConfig(**(settings | FAMILIES[family]))), seed=0).double()


def drawn(prompts: Sequence[int], answers: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
    """Groups of a prompt of so many tokens with answers of so many."""
    draw = random.Random(0)
    groups = []
    for prompt, lengths in zip(prompts, answers, strict=True):
        begin = [draw.randrange(VOCAB) for _ in range(prompt)]
        groups.append([begin + [draw.randrange(VOCAB) for _ in range(n)] for n in lengths])
    return groups


GROUPS = drawn((9, 1, 0, 30, 17, 64, 33), ((7, 3), (1, 1), (5, 8), (1, 12), (3, 3, 5), (9, 20), (4,)))
# Answers that begin alike, the very same answers, and one that is how the other begins.
GROUPS += [[[3, 4, 5, 6, 7], [3, 4, 5, 8]], [[3, 4, 5], [3, 4, 5]], [[9, 9, 9, 9], [9, 9]]]


def outcome(model: Transformer, stream: Any, places: Tensor) -> dict[str, Tensor]:
    """Hidden states at `places`, and the gradient of a sum over them whose weights tell them apart."""
    model.zero_grad()
    hidden = model(stream)[places]
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach()} | grads


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_each_sequence_in_full(family: str, masked: bool) -> None:
    model, shared = made(family), pack_shared(GROUPS, masked=masked)
    full = pack([ids for group in GROUPS for ids in group])
    assert len(shared.tokens) < len(full.tokens) - 140
    expected = outcome(model, full, torch.arange(len(full.tokens)))
    found = outcome(model, shared, shared.source)
    assert found.keys() == expected.keys() and len(found) > 8
    assert expected["hidden"].std() > 0.5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [True, False])
def test_in_float32(masked: bool) -> None:
    model, shared, full = (
        made("qwen2").float(),
        pack_shared(GROUPS, masked=masked),
        pack([ids for group in GROUPS for ids in group]),
    )
    expected, found = outcome(model, full, full.last), outcome(model, shared, shared.last)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


def test_a_stream_by_hand() -> None:
    shared = pack_shared([[[5, 6, 1, 2], [5, 6, 3]], [[7], [7]], [[8, 9]]])
    assert shared.tokens.tolist() == [5, 6, 1, 2, 3, 7, 8, 9]
    assert shared.positions.tolist() == [0, 1, 2, 3, 2, 0, 0, 1]
    assert shared.source.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 5, 6, 7]
    assert shared.cu_seqlens.tolist() == [0, 4, 7, 8, 9, 11]
    assert shared.last.tolist() == [3, 4, 5, 5, 7] and shared.wanted is None


@pytest.mark.parametrize("masked", [True, False])
def test_only_what_is_asked_for(masked: bool) -> None:
    """The states asked for, one of them twice, and their gradient."""
    model, shared = made("llama"), pack_shared(GROUPS, masked=masked)
    wanted = torch.cat([shared.last, shared.last[:2]])
    expected = outcome(model, shared, wanted)
    found = outcome(model, shared.asking(wanted), torch.arange(len(wanted)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10)


def test_a_group_has_the_same_states_in_any_company() -> None:
    model = made("mistral").float()
    with torch.no_grad():
        shared = pack_shared(GROUPS)
        together = model(shared)[shared.last]
        alone = torch.cat([model(one)[one.last] for one in map(only, GROUPS)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def only(group: Sequence[Sequence[int]]) -> Shared:
    return pack_shared([group])


def test_what_sequences_begin_with() -> None:
    assert common_length([[1, 2, 3]]) == 3
    assert common_length([[1, 2, 3], [1, 2]]) == 2
    assert common_length([[1, 2, 3], [1, 5, 3], [1, 2, 3]]) == 1
    assert common_length([[1], [2]]) == 0


@pytest.mark.parametrize(
    ("groups", "said"),
    [([], "no groups"), ([[[1]], []], "group 1 has no sequences"), ([[[1], []]], "group 0 has a se")],
)
def test_nothing_to_pack_is_refused(groups: Groups, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_shared(groups)
