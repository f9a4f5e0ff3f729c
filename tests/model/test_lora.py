"""Adapters against products written out beside Transformers' own modules, and what sharing one trunk promises."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_engine import tiny_model
from test_parity import hf_model, texts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bylaw.model.checkpoint import load_model
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.lora import (
    AdaptedLinear,
    active_adapter,
    adapted_parts,
    adapter_module,
    adapter_names,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    merge,
    recomputing,
    remove_adapters,
    require_merged,
    use_adapter,
)
from bylaw.model.lora_settings import LINEARS, LoraSettings
from bylaw.model.optim import adamw, update
from bylaw.model.packing import pack
from bylaw.model.settings import OptimSettings
from bylaw.model.transformer import Transformer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}
TARGETS = [("all-linear",), ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")]
ALL = LoraSettings(rank=3, alpha=6.0)
PACKED = pack([[3, 4, 5, 6, 7], [8], [9, 3, 3]])


def randomise_adapter(trunk: nn.Module, name: str, seed: int = 0, size: float = 0.3) -> None:
    """Values for B too, which would be 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapter_parameters(trunk, name).items():
            if ".lora_" in key:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def adapted(*names: str, size: float = 0.3, freeze: bool = True, settings: LoraSettings = ALL) -> Transformer:
    trunk = tiny_model()
    for seed, name in enumerate(names):
        add_adapter(trunk, name, settings, seed=0, freeze_base=freeze)
        randomise_adapter(trunk, name, seed, size)
    return trunk


def forward(trunk: Transformer, name: str | None) -> Tensor:
    with use_adapter(trunk, name):
        return trunk(PACKED)


def written_out(trunk: Transformer, name: str, settings: LoraSettings) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each Hugging Face module, cut out of ours as leaves of their own."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    parameters = dict(trunk.named_parameters())
    for path, parts in adapted_parts(trunk.config, settings).items():
        a, b = (parameters[f"{path}.lora_{name}.{kind}"].detach() for kind in "AB")
        rows = [part.shape[0] for part in parts]
        for part, one_a, one_b in zip(parts, a.split(settings.rank), b.split(rows), strict=True):
            leaves = one_a.clone().requires_grad_(), one_b.clone().requires_grad_()
            found[part.name.removesuffix(".weight")] = leaves
    return found


@contextmanager
def hooked(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Transformers' modules, each with B (A x) added to what it gives."""

    def hook(a: Tensor, b: Tensor) -> Any:
        return lambda module, inputs, out: out + scale * ((inputs[0] @ a.T) @ b.T)

    handles = [model.get_submodule(name).register_forward_hook(hook(*ab)) for name, ab in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", TARGETS, ids=lambda targets: targets[0])
def test_logits_and_gradients_are_those_of_an_adapter_on_each_module(
    family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    kind, options = FAMILIES[family]
    reference = hf_model(kind, options)
    reference.save_pretrained(tmp_path)
    trunk, settings = load_model(tmp_path), LoraSettings(rank=3, alpha=4.5, targets=targets)
    add_adapter(trunk, "policy", settings, seed=1, freeze_base=True)
    randomise_adapter(trunk, "policy")
    factors, ids = written_out(trunk, "policy", settings), texts()[2]
    assert {name.rsplit(".", 1)[1] for name in factors} == set(settings.modules)
    with hooked(reference, factors, 4.5 / 3):
        theirs = reference(input_ids=torch.tensor([ids])).logits[0]
    bare = reference(input_ids=torch.tensor([ids])).logits[0]
    with use_adapter(trunk, "policy"):
        ours = trunk.logits(trunk(pack([ids])))
    assert (theirs - bare).abs().max() > 0.5, "the adapter does too little to tell anything"
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    wanted = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours.log_softmax(1) * wanted).sum().backward()
    (theirs.log_softmax(1) * wanted).sum().backward()
    for path, parts in adapted_parts(trunk.config, settings).items():
        grads = [factors[part.name.removesuffix(".weight")] for part in parts]
        for leaf, key in enumerate("AB"):
            ours_grad = trunk.get_parameter(f"{path}.lora_policy.{key}").grad
            expected = torch.cat([g for pair in grads if (g := pair[leaf].grad) is not None])
            assert ours_grad is not None and expected.abs().max() > 0
            torch.testing.assert_close(ours_grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_gradients_of_all_inputs_by_finite_differences() -> None:
    trunk = tiny_model().double()
    linear = trunk.blocks[0].get_submodule("qkv")
    add_adapter(trunk, "a", LoraSettings(rank=2, alpha=3.0, targets=("q_proj", "v_proj")), seed=0)
    randomise_adapter(trunk, "a")
    factors: Any = linear.get_submodule("lora_a")
    assert isinstance(linear, AdaptedLinear) and factors.A.dtype == torch.float64
    values = [linear.weight, linear.bias, factors.A, factors.B]
    names = ["weight", "bias", "lora_a.A", "lora_a.B"]
    kept = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    x = torch.randn(3, linear.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with use_adapter(trunk, "a"):
            return torch.func.functional_call(linear, dict(zip(kept, values, strict=True)), (x,))

    leaves = [value.detach().clone().requires_grad_() for value in kept.values()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *leaves))


def test_a_new_adapter_changes_nothing_and_is_drawn_as_in_peft() -> None:
    trunk, bare = tiny_model(), tiny_model()
    add_adapter(trunk, "policy", ALL, seed=5)
    expected = bare(PACKED)
    assert torch.equal(forward(trunk, "policy"), expected) and torch.equal(forward(trunk, None), expected)
    for key, parameter in adapter_parameters(trunk, "policy").items():
        if key.endswith(".B"):
            assert not parameter.any()
            continue
        bound = parameter.shape[1] ** -0.5
        assert parameter.abs().max() <= bound and float(parameter.detach().std()) == pytest.approx(
            bound / 3**0.5, rel=0.2
        )
    again, other, renamed = tiny_model(), tiny_model(), tiny_model()
    add_adapter(again, "policy", ALL, seed=5)
    add_adapter(other, "policy", ALL, seed=6)
    add_adapter(renamed, "value", ALL, seed=5)
    first = [next(iter(adapter_parameters(m, n).values())) for m, n in (
        (trunk, "policy"), (again, "policy"), (other, "policy"), (renamed, "value"))]  # fmt: skip
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])
    few = tiny_model()
    add_adapter(few, "policy", LoraSettings(rank=3, targets=("v_proj",)), seed=5)
    qkv = trunk.get_parameter("blocks.0.qkv.lora_policy.A")
    assert torch.equal(few.get_parameter("blocks.0.qkv.lora_policy.A"), qkv[6:]), "a part is drawn by its own name"


def test_without_an_adapter_in_use_bits_and_kept_memory_are_the_bare_models() -> None:
    trunk, bare = adapted("policy", "value", freeze=False), tiny_model()
    kept: dict[str, int] = {}
    outs = []
    for name, model in (("trunk", trunk), ("bare", bare)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            outs.append(forward(model, None))
        kept[name] = sum(sizes)
        outs[-1].square().sum().backward()
    assert torch.equal(*outs) and kept["trunk"] == kept["bare"]
    for key, parameter in bare.named_parameters():
        mine = trunk.get_parameter(key).grad
        assert (mine is None and parameter.grad is None) or torch.equal(mine, parameter.grad)  # pyright: ignore[reportArgumentType]
    assert all(parameter.grad is None for parameter in adapter_parameters(trunk, "policy").values())


def test_uses_nest_and_are_restored_also_after_an_error() -> None:
    trunk = adapted("policy", "value")
    outs = {name: forward(trunk, name) for name in (None, "policy", "value")}
    assert not torch.equal(outs["policy"], outs["value"]) and not torch.equal(outs["policy"], outs[None])
    with use_adapter(trunk, "policy"):
        with pytest.raises(RuntimeError), use_adapter(trunk, "value"):
            assert torch.equal(trunk(PACKED), outs["value"])
            raise RuntimeError
        assert active_adapter(trunk) == "policy" and torch.equal(trunk(PACKED), outs["policy"])
        with use_adapter(trunk, None):
            assert torch.equal(trunk(PACKED), outs[None])
    assert active_adapter(trunk) is None
    twin = copy.deepcopy(trunk)
    with use_adapter(twin, "value"):
        assert active_adapter(trunk) is None, "a copy has its own"


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_comes_later_and_with_the_adapter_of_the_forward(recompute: bool) -> None:
    def loss(trunk: Transformer, x: Tensor) -> Tensor:
        down = trunk.blocks[0].get_submodule("down")
        if not recompute:
            return down(x).sin().sum()
        return checkpoint(lambda x: down(x).sin().sum(), x, use_reentrant=False, context_fn=recomputing(trunk))

    trunk, twin = adapted("policy", "value"), adapted("policy", "value")
    x = torch.randn(9, trunk.config.intermediate_size, generator=torch.Generator().manual_seed(0))
    with use_adapter(trunk, "policy"):
        late = loss(trunk, x)
    with use_adapter(trunk, "value"):
        late.backward()
    merge(twin, "policy")
    twin.blocks[0].get_submodule("down")(x).sin().sum().backward()
    grads = {key: p.grad for key, p in trunk.named_parameters() if p.grad is not None}
    assert grads.keys() == {f"blocks.0.down.lora_policy.{kind}" for kind in "AB"}
    whole, b = twin.get_parameter("blocks.0.down.weight").grad, trunk.get_parameter("blocks.0.down.lora_policy.B")
    assert whole is not None
    torch.testing.assert_close(grads["blocks.0.down.lora_policy.A"], 2 * b.T @ whole, atol=1e-4, rtol=1e-4)


def test_only_the_adapter_in_use_learns_and_the_base_keeps_its_bytes() -> None:
    trunk = adapted("policy", "value", size=0.05)
    base = {key: p.detach().clone() for key, p in trunk.named_parameters() if ".lora_" not in key}
    others = {key: p.detach().clone() for key, p in adapter_parameters(trunk, "value").items()}
    before = {key: p.detach().clone() for key, p in adapter_parameters(trunk, "policy").items()}
    learning = adapter_module(trunk, "policy")
    assert dict(learning.named_parameters()).keys() == before.keys()
    optimizer = adamw(learning, OptimSettings(learning_rate=0.01, weight_decay=0.1))
    losses = []
    for _ in range(8):
        loss = (forward(trunk, "policy") - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        update(learning, optimizer, 0.01, 1.0)
    assert losses[-1] < 0.9 * losses[0]
    for key, value in (base | others).items():
        assert torch.equal(trunk.get_parameter(key).view(torch.int32), value.view(torch.int32)), key
    for key, value in before.items():
        assert not torch.equal(trunk.get_parameter(key), value), key


def test_policy_value_and_reference_share_one_trunk() -> None:
    trunk = adapted("policy", "reward")
    reward = scalar_model(trunk, 1, adapter="reward")
    copy_adapter(trunk, "reward", "value")
    value = ScalarModel(trunk, "value")
    value.load_state_dict({"score.weight": reward.score.weight}, strict=False)
    assert reward.trunk is trunk and value.trunk is trunk
    with use_adapter(trunk, "policy"):  # a scalar model's own adapter goes before the one in use around it
        scores = value(PACKED)
        assert torch.equal(scores, reward(PACKED))
        assert torch.equal(trunk(PACKED), forward(trunk, "policy"))
    expected = (forward(trunk, "reward").double() * reward.score.weight.double()[0]).sum(1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)
    assert not torch.equal(ScalarModel(trunk)(PACKED), scores), "without a name it is the bare trunk"
    scores.square().sum().backward()
    learning = adapter_parameters(value, "value")
    assert "score.weight" in learning and "trunk.blocks.0.qkv.lora_value.A" in learning
    touched = {key for key, p in value.named_parameters() if p.grad is not None}
    assert touched == learning.keys(), "neither the base nor another adapter"


def test_freezing_is_asked_for_and_ends_with_the_adapters() -> None:
    trunk = adapted("policy", freeze=False)
    assert all(p.requires_grad for p in trunk.parameters())
    trunk.embed.weight.requires_grad_(False)
    add_adapter(trunk, "value", ALL, seed=0, freeze_base=True)
    assert {key for key, p in trunk.named_parameters() if p.requires_grad} == {
        *adapter_parameters(trunk, "policy"), *adapter_parameters(trunk, "value")}  # fmt: skip
    remove_adapters(trunk)
    assert {key for key, p in trunk.named_parameters() if not p.requires_grad} == {"embed.weight"}
    assert type(trunk.blocks[0].get_submodule("qkv")) is nn.Linear and adapter_names(trunk) == []
    assert trunk.state_dict().keys() == tiny_model().state_dict().keys()
    remove_adapters(trunk)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_the_sum_by_hand(rslora: bool) -> None:
    settings = LoraSettings(rank=4, alpha=6.0, targets=("k_proj", "o_proj", "up_proj"), rslora=rslora)
    trunk = adapted("policy", "value", settings=settings)
    expected = forward(trunk, "policy")
    scale, before = 6.0 / (2 if rslora else 4), {key: p.detach().clone() for key, p in trunk.named_parameters()}
    merge(trunk, "policy")
    assert dict(trunk.named_parameters()).keys() == {key for key in before if ".lora_" not in key}
    torch.testing.assert_close(trunk(PACKED), expected, atol=1e-4, rtol=1e-4)
    config = trunk.config
    q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    for linear, rows in (("qkv", slice(q, q + kv)), ("out", slice(None)), ("gate_up", slice(inner, None))):
        key = f"blocks.1.{linear}"
        whole = before[f"{key}.weight"].double()
        whole[rows] += scale * before[f"{key}.lora_policy.B"].double() @ before[f"{key}.lora_policy.A"].double()
        torch.testing.assert_close(trunk.get_parameter(f"{key}.weight").double(), whole, atol=1e-6, rtol=0)
    assert torch.equal(trunk.get_parameter("blocks.1.down.weight"), before["blocks.1.down.weight"])


def test_16_bit_weights_are_merged_in_float32_and_adapters_stay_float32() -> None:
    trunk = tiny_model()
    for parameter in trunk.parameters():
        parameter.data = parameter.data.bfloat16()
    add_adapter(trunk, "policy", ALL, seed=0, freeze_base=True)
    randomise_adapter(trunk, "policy", size=0.02)
    assert {p.dtype for p in adapter_parameters(trunk, "policy").values()} == {torch.float32}
    out = forward(trunk, "policy")
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(trunk, "policy").values()
    )
    key = "blocks.0.down"
    a, b = (trunk.get_parameter(f"{key}.lora_policy.{kind}").detach().double() for kind in "AB")
    exact = trunk.get_parameter(f"{key}.weight").detach().double() + 2 * b @ a
    merge(trunk, "policy")
    merged = trunk.get_parameter(f"{key}.weight").detach()
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())
    torch.testing.assert_close(trunk(PACKED), out, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank = -1"),
        ({"rank": 1, "alpha": 0.0}, "alpha = 0.0"),
        ({"rank": 1, "alpha": float("nan")}, "alpha = nan"),
        ({"rank": 1, "targets": ()}, r"targets = \(\)"),
        ({"rank": 1, "targets": ("qkv",)}, "targets = .'qkv'.*q_proj, k_proj.*all-linear"),
        ({"rank": 1, "targets": ("all-linear", "q_proj")}, "all-linear alone"),
        ({"rank": 1, "targets": ("q_proj", "q_proj")}, "each name once"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_settings_that_can_be() -> None:
    assert LoraSettings(rank=16).modules == LINEARS and LoraSettings(rank=16).scale == 2
    assert LoraSettings(rank=16, rslora=True).scale == 8
    assert LoraSettings(rank=1, targets=("down_proj", "q_proj")).modules == ("q_proj", "down_proj")


def test_mistakes_are_told() -> None:
    trunk = adapted("policy")
    with pytest.raises(ValueError, match="rank = 0"):
        add_adapter(trunk, "value", LoraSettings(), seed=0)
    with pytest.raises(ValueError, match=r"adapter = 'policy'.*a new name"):
        add_adapter(trunk, "policy", ALL, seed=0)
    with pytest.raises(ValueError, match=r"adapter = 'a\.b'.*letters"):
        add_adapter(trunk, "a.b", ALL, seed=0)
    with (
        pytest.raises(ValueError, match="adapter = 'polcy' is not possible; allowed: policy"),
        use_adapter(trunk, "polcy"),
    ):
        pass
    with pytest.raises(ValueError, match="allowed: none, as add_adapter"), use_adapter(tiny_model(), "policy"):
        pass
    with pytest.raises(ValueError, match="adapter = 'value'"):
        merge(trunk, "value")
    with pytest.raises(ValueError, match="meta device"):
        add_adapter(Transformer(trunk.config).to("meta"), "policy", ALL, seed=0)
    with pytest.raises(ValueError, match=r"adapters \(policy\), which save_model would leave out"):
        require_merged(trunk, "save_model")
    require_merged(tiny_model(), "save_model")
