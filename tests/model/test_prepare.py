"""Blocks that recompute and compile: the same gradients, and what is kept and computed again."""

import collections
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bylaw.model.config import ModelConfig
from bylaw.model.lora import add_adapter, use_adapter
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.packing import pack
from bylaw.model.prepare import prepare
from bylaw.model.transformer import Transformer, initialize

SEQUENCES = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


def tiny(layers: int = 3) -> Transformer:
    config = ModelConfig(
        family="qwen3", vocab_size=13, hidden_size=8, intermediate_size=12, num_layers=layers, num_heads=2,
        num_kv_heads=1, head_dim=4, max_position_embeddings=16, qk_norm=True, initializer_range=0.5,
    )  # fmt: skip
    return initialize(Transformer(config), 0)


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def trained(model: Transformer) -> tuple[list[Tensor], collections.Counter[str], int]:
    """Gradients, how often each operation ran, and bytes that autograd kept between the passes."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(pack(SEQUENCES)).square().sum()
    with Counted() as counted:
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counted.calls, kept


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_gives_the_same_bits_for_less_memory(recompute: Any) -> None:
    plain, _, all_kept = trained(tiny())
    model = tiny()
    prepare(model, recompute)
    grads, _, kept = trained(model)
    assert len(grads) == len(plain) == len(list(model.parameters())) - 1  # there is no loss on the head
    assert all(torch.equal(one, other) for one, other in zip(grads, plain, strict=True))
    if recompute == "full":
        assert kept < all_kept / 3


def test_selective_computes_no_product_and_no_attention_again() -> None:
    calls = {}
    for recompute in ("none", "selective", "full"):
        model = tiny()
        prepare(model, recompute)  # type: ignore[arg-type]
        _, calls[recompute], _ = trained(model)
    products = {name: count["aten::mm"] for name, count in calls.items()}
    assert products["none"] == products["selective"] == 2 * 4 * 3
    assert products["full"] == (2 * 4 + 3) * 3  # a block's last product is nobody's input in it
    forward = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [calls[name][forward] for name in ("none", "selective")] == [0, 0] and calls["full"][forward] > 0
    assert calls["selective"]["aten::rsqrt"] > calls["none"]["aten::rsqrt"]  # norms are


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_recomputed_runs_with_the_adapter_of_its_forward_pass(recompute: Any) -> None:
    """The backward pass comes when another adapter is in use."""
    grads = []
    for kind in ("none", recompute):
        model = tiny()
        for name in ("policy", "value"):
            add_adapter(model, name, LoraSettings(rank=2), seed=1)
        with torch.no_grad():
            for parameter in (p for name, p in model.named_parameters() if name.endswith(".B")):
                parameter.fill_(0.1)
        prepare(model, kind)
        with use_adapter(model, "policy"):
            loss = model(pack(SEQUENCES)).square().sum()
        with use_adapter(model, "value"):
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("lora_policy" in name for name in grads[0])
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_without_gradient_nothing_is_recomputed() -> None:
    model = tiny()
    prepare(model, "full")
    with torch.no_grad():
        assert torch.equal(model(pack(SEQUENCES)), tiny()(pack(SEQUENCES)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it itself
def test_a_compiled_block_learns_the_same() -> None:
    plain, _, _ = trained(tiny(layers=1))
    model = tiny(layers=1)
    prepare(model, "selective", compile=True, backend="aot_eager")
    grads, _, _ = trained(model)
    for one, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_only_what_trains_runs_as_prepared() -> None:
    model = tiny()
    prepare(model, "full")

    def refuse(*inputs: Any) -> Any:
        raise AssertionError("a sampling stream ran a prepared block")

    for block in model.blocks:
        block.prepared = refuse  # type: ignore[assignment]

    class Sampling:
        tokens, positions, wanted = torch.tensor([1, 2]), torch.tensor([0, 1]), None
        attend = staticmethod(lambda layer, q, k, v, rotary, window: q)

    model(Sampling())  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        model(pack(SEQUENCES))


def test_prepared_blocks_can_be_made_plain_again() -> None:
    model = tiny()
    prepare(model, "full")
    prepare(model)
    assert all(block.prepared is None for block in model.blocks)
    with pytest.raises(ValueError, match="allowed: none, selective, full"):
        prepare(model, "some")  # type: ignore[arg-type]
