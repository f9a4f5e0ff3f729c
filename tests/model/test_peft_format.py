"""Folders in PEFT's format: round trips, PEFT itself on the same weights where it is installed, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from naive_engine import tiny_model
from safetensors.torch import load, load_file, save_file
from test_lora import ALL, FAMILIES, PACKED, adapted, randomise_adapter
from test_parity import hf_logits, hf_model, load_in_transformers, our_logits, texts

from bylaw.model.checkpoint import load_model, load_reward, save_model, save_reward
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.lora import adapted_parts, adapter_names, adapter_parameters, add_adapter, merge, use_adapter
from bylaw.model.lora_settings import LINEARS, LoraSettings
from bylaw.model.packing import pack
from bylaw.model.peft_format import load_adapter, save_adapter

TARGETS = [("all-linear",), ("q_proj", "v_proj")]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def peft() -> Iterator[Any]:
    yield pytest.importorskip("peft")


def reward(*names: str) -> ScalarModel:
    model = scalar_model(adapted(*names), 1, adapter=names[0] if names else None)
    return model if names else ScalarModel(tiny_model())


def edit(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(fields))


def test_names_and_rows_by_hand(tmp_path: Path) -> None:
    trunk = adapted("policy")
    config = trunk.config
    save_adapter(trunk, "policy", tmp_path / "a", "org/base")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    stem = "base_model.model.model.layers.1."
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv_a, qkv_b = (trunk.get_parameter(f"blocks.1.qkv.lora_policy.{kind}") for kind in "AB")
    assert torch.equal(tensors[f"{stem}self_attn.k_proj.lora_A.weight"], qkv_a[3:6])
    assert torch.equal(tensors[f"{stem}self_attn.k_proj.lora_B.weight"], qkv_b[q : q + kv])
    up = trunk.get_parameter("blocks.1.gate_up.lora_policy.B")[config.intermediate_size :]
    assert torch.equal(tensors[f"{stem}mlp.up_proj.lora_B.weight"], up)
    assert len(tensors) == 2 * 7 * config.num_layers
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"], fields["task_type"]) == (3, 6, "LORA", "CAUSAL_LM")
    assert fields["target_modules"] == list(LINEARS) and fields["base_model_name_or_path"] == "org/base"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=lambda targets: targets[0])
def test_round_trip(targets: tuple[str, ...], rslora: bool, tmp_path: Path) -> None:
    trunk = adapted("policy", settings=LoraSettings(rank=2, alpha=2.5, targets=targets, rslora=rslora))
    save_adapter(trunk, "policy", tmp_path / "a", card="# Adapter\n")
    again = tiny_model()
    load_adapter(again, tmp_path / "a", "other", freeze_base=True)
    with use_adapter(trunk, "policy"), use_adapter(again, "other"):
        assert torch.equal(trunk(PACKED), again(PACKED))
    assert {key for key, p in again.named_parameters() if p.requires_grad} == adapter_parameters(again, "other").keys()
    assert (tmp_path / "a" / "README.md").read_text() == "# Adapter\n"


def test_a_reward_model_as_an_adapter_has_its_head_in_the_file(tmp_path: Path) -> None:
    model = reward("reward")
    save_adapter(model, "reward", tmp_path / "r")
    assert "base_model.model.score.weight" in load_file(tmp_path / "r" / WEIGHTS)
    again = reward()
    load_adapter(again, tmp_path / "r", "mine")
    assert again.adapter == "mine" and torch.equal(again(PACKED), model(PACKED))


def test_a_save_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    trunk = adapted("policy", "value")
    save_adapter(trunk, "policy", tmp_path / "a")
    save_adapter(trunk, "value", tmp_path / "a")
    again = tiny_model()
    load_adapter(again, tmp_path / "a", "value")
    for key, parameter in adapter_parameters(again, "value").items():
        assert torch.equal(parameter, trunk.get_parameter(key))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no checkpoint"):
        save_adapter(trunk, "value", tmp_path / "b")
    with pytest.raises(ValueError, match="adapter = 'polcy'"):
        save_adapter(trunk, "polcy", tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("asked", "modules"),
    [
        ("all-linear", LINEARS),
        (["self_attn.q_proj", "v_proj"], ("q_proj", "v_proj")),
        (r".*\.self_attn\.(q|o)_proj", ("q_proj", "o_proj")),
        ([f"model.layers.{layer}.mlp.up_proj" for layer in range(2)], ("up_proj",)),
    ],
)
def test_every_way_to_name_targets(asked: Any, modules: tuple[str, ...], tmp_path: Path) -> None:
    save_adapter(adapted("policy", settings=LoraSettings(rank=2, targets=modules)), "policy", tmp_path / "a")
    edit(tmp_path / "a", target_modules=asked)
    again = tiny_model()
    load_adapter(again, tmp_path / "a", "policy")
    paths = adapted_parts(again.config, LoraSettings(rank=2, targets=modules))
    assert adapter_parameters(again, "policy").keys() == {f"{p}.lora_policy.{kind}" for p in paths for kind in "AB"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, 'bias = "all" is not supported; allowed: "none"'),
    "dora": ({"use_dora": True}, "use_dora = true is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, 'rank_pattern = {"q_proj": 4} is not supported'),
    "alphas": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    "layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "conv": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" is not supported; allowed: "gaussian"'),
    "unknown": ({"use_tomorrow": 1}, "use_tomorrow = 1 is not supported"),
    "saved": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = .'embed_tokens'.*keeps its head"),
    "method": ({"peft_type": "IA3"}, "peft_type = 'IA3' does not fit this model; allowed: LORA"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' does not fit this model; allowed: CAUSAL_LM"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules .'lm_head'. is no linear layer of a block"),
    "none": ({"target_modules": None}, "target_modules = None is not supported"),
    "nothing": ({"target_modules": ".*c_attn"}, "target_modules .*c_attn is no linear layer"),
    "pattern": ({"target_modules": "("}, "is no regular expression"),
    "some layers": ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, "leaves out model.layers.1"),
    "rank": ({"r": 0}, "r = 0 is no rank"),
    "other rank": ({"r": 4}, r"lora_A.weight has shape \(3, "),
    "alpha": ({"lora_alpha": None}, "lora_alpha = None"),
    "alpha 0": ({"lora_alpha": 0}, r"adapter_config.json: alpha = 0"),
    "fewer": ({"target_modules": ["q_proj"]}, "unexpected tensor base_model.model.model.layers.0.mlp.down_proj.lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name_before_anything_changes(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    save_adapter(adapted("policy"), "policy", tmp_path / "a")
    edit(tmp_path / "a", **changes)
    again = tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(again, tmp_path / "a", "policy")
    assert adapter_names(again) == [] and again.state_dict().keys() == tiny_model().state_dict().keys()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    model = reward("reward")
    save_adapter(model, "reward", tmp_path / "r")
    save_adapter(model.trunk, "reward", tmp_path / "a")
    with pytest.raises(ValueError, match="task_type = 'CAUSAL_LM' does not fit this model; allowed: SEQ_CLS"):
        load_adapter(reward(), tmp_path / "a", "x")
    edit(tmp_path / "a", task_type=None)
    with pytest.raises(ValueError, match=r"tensor base_model.model.score.weight missing"):
        load_adapter(reward(), tmp_path / "a", "x")
    edit(tmp_path / "r", task_type=None, modules_to_save=None)
    with pytest.raises(ValueError, match=r"unexpected tensor base_model.model.score.weight"):
        load_adapter(tiny_model(), tmp_path / "r", "x")
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file; pickles"):
        load_adapter(tiny_model(), tmp_path / "a", "x")
    for text, message in (("{", "not JSON"), ("[]", "a JSON list")):
        (tmp_path / "a" / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(tiny_model(), tmp_path / "a", "x")
    with pytest.raises(FileNotFoundError, match=r"nowhere/adapter_config.json"):
        load_adapter(tiny_model(), tmp_path / "nowhere", "x")


def test_a_merged_export_is_what_transformers_computes_with_the_products_added(tmp_path: Path) -> None:
    """Without PEFT: W + scale B A from the two files, added in float64 to Transformers' weights."""
    reference = hf_model("qwen2", {})
    reference.save_pretrained(tmp_path / "base")
    trunk = load_model(tmp_path / "base")
    add_adapter(trunk, "policy", ALL, seed=0)
    randomise_adapter(trunk, "policy")
    save_adapter(trunk, "policy", tmp_path / "adapter")
    merge(trunk, "policy")
    save_model(trunk, tmp_path / "merged")
    weights, added = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "adapter" / WEIGHTS)
    for key in [key for key in added if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[name] = weights[name].double() + 2 * added[key.replace("_A.", "_B.")].double() @ added[key].double()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(merged[name].double(), weight.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, "all-linear", ["k_proj", "down_proj"]], ids=str)
def test_pefts_own_adapter_gives_its_logits_gradients_and_merged_weights(
    peft: Any, family: str, targets: Any, tmp_path: Path
) -> None:
    kind, options = FAMILIES[family]
    base = hf_model(kind, options)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", use_rslora=not targets)
    theirs = randomised_factors(peft.get_peft_model(base, settings))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter", "policy", freeze_base=True)
    ids = texts()[2]
    with use_adapter(ours, "policy"):
        logits = ours.logits(ours(pack([ids])))
    expected = theirs(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    for out in (logits, expected):
        (out.log_softmax(1) * wanted).sum().backward()
    check_gradients(ours, theirs)
    merge(ours, "policy")
    save_model(ours, tmp_path / "merged")
    merged = load((tmp_path / "merged" / "model.safetensors").read_bytes())
    for name, weight in theirs.merge_and_unload().state_dict().items():
        if name in merged:
            torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)


def randomised_factors(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def check_gradients(ours: Any, theirs: Any) -> None:
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    settings, seen = ours.adapters.settings["policy"], 0
    for path, parts in adapted_parts(ours.config, settings).items():
        for kind, size in (("A", lambda part: settings.rank), ("B", lambda part: part.shape[0])):
            mine = ours.get_parameter(f"{path}.lora_policy.{kind}").grad
            for part, grad in zip(parts, mine.split([size(part) for part in parts]), strict=True):
                stem = part.name.removesuffix(".weight")
                expected = grads[f"base_model.model.{stem}.lora_{kind}.default.weight"]
                torch.testing.assert_close(grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
                seen += 1
    assert seen == len(grads)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_peft_loads_our_adapter(peft: Any, family: str, tmp_path: Path) -> None:
    kind, options = FAMILIES[family]
    hf_model(kind, options).save_pretrained(tmp_path / "base")
    ours = load_model(tmp_path / "base")
    settings = LoraSettings(rank=4, alpha=2.5, targets=("q_proj", "v_proj", "gate_proj"), rslora=True)
    add_adapter(ours, "policy", settings, seed=0)
    randomise_adapter(ours, "policy")
    save_adapter(ours, "policy", tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager").eval()
    with use_adapter(ours, "policy"):
        torch.testing.assert_close(our_logits(ours, texts()), hf_logits(theirs, texts()), atol=2e-4, rtol=0)


def test_reward_adapters_go_both_ways_with_peft(peft: Any, tmp_path: Path) -> None:
    base = hf_model("qwen2", {"num_labels": 1}, "ForSequenceClassification")
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="SEQ_CLS")
    theirs = randomised_factors(peft.get_peft_model(base, settings))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_reward(tmp_path / "base")
    load_adapter(ours, tmp_path / "theirs", "reward")
    packed = pack(texts())
    scores = ours(packed)[packed.last].detach()[:, None]
    torch.testing.assert_close(scores, hf_logits_of_classifier(theirs), atol=2e-4, rtol=0)
    save_adapter(ours, "reward", tmp_path / "ours")
    kind = transformers.AutoModelForSequenceClassification
    again = peft.PeftModel.from_pretrained(load_in_transformers(tmp_path / "base", kind), tmp_path / "ours").eval()
    torch.testing.assert_close(scores, hf_logits_of_classifier(again), atol=2e-4, rtol=0)
    merge(ours.trunk, "reward")
    ours.adapter = None
    save_reward(ours, tmp_path / "merged")
    merged = load_in_transformers(tmp_path / "merged", kind)
    torch.testing.assert_close(scores, hf_logits_of_classifier(merged), atol=2e-4, rtol=0)


@torch.no_grad()
def hf_logits_of_classifier(model: Any) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts()])


def test_half_a_file_is_told(tmp_path: Path) -> None:
    save_adapter(adapted("policy"), "policy", tmp_path / "a")
    tensors = load((tmp_path / "a" / WEIGHTS).read_bytes())
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.lora_B.weight missing"):
        load_adapter(tiny_model(), tmp_path / "a", "policy")
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "a" / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(tiny_model(), tmp_path / "a", "policy")
