"""config.json in and out, what it must refuse, and the rotary tables that it decides."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bylaw.model.config import ModelConfig, RopeConfig
from bylaw.model.hf_config import config_from_hf, config_to_hf
from bylaw.model.rotary import inverse_frequencies, rotary_table

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 20, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 4}
MISTRAL = QWEN2 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ROPES = {
    "default": RopeConfig(theta=500.0),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "llama3": RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_max_position_embeddings=16),
    "yarn": RopeConfig(kind="yarn", factor=8.0, original_max_position_embeddings=16),
    "yarn-whole": RopeConfig(
        kind="yarn", factor=8.0, original_max_position_embeddings=16, truncate=False, mscale=2.0, mscale_all_dim=1.0,
        beta_fast=8.0, beta_slow=2.0,
    ),
    "yarn-factor": RopeConfig(kind="yarn", factor=8.0, original_max_position_embeddings=16, attention_factor=1.5),
}  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    **{name: ModelConfig(family="llama", rope=rope, **SHAPE) for name, rope in ROPES.items()},
    "llama-biases": ModelConfig(
        family="llama", attention_bias=True, output_bias=True, mlp_bias=True, bos_token_id=1, eos_token_ids=(2, 5),
        pad_token_id=0, tie_word_embeddings=True, initializer_range=0.1, rms_norm_eps=1e-5, **SHAPE,
    ),
    "mistral": ModelConfig(family="mistral", **SHAPE),
    "mistral-window": ModelConfig(family="mistral", windows=(9, 9, 9), eos_token_ids=(2,), **SHAPE),
    "qwen2": ModelConfig(family="qwen2", attention_bias=True, **SHAPE),
    "qwen2-window": ModelConfig(family="qwen2", attention_bias=True, windows=(9, 0, 9), **SHAPE),
    "qwen3": ModelConfig(family="qwen3", qk_norm=True, windows=(0, 0, 5), **SHAPE),
    "qwen3-bias": ModelConfig(family="qwen3", qk_norm=True, attention_bias=True, output_bias=True, **SHAPE),
}  # fmt: skip


def read(fields: dict[str, Any]) -> ModelConfig:
    return config_from_hf(fields, "DIR/config.json")


def in_transformers(config: ModelConfig, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_back_is_the_same(name: str) -> None:
    assert read(json.loads(json.dumps(config_to_hf(CONFIGS[name])))) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_and_writes_the_same(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = in_transformers(config, tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert read(again) == config


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = transformers.LlamaModel(in_transformers(config, tmp_path)).rotary_emb
    positions = torch.tensor([0, 1, 2, 15, 16, 17, 127, 100_003])
    cos, sin = rotary_table(positions, *inverse_frequencies(config))
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, expected_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0], atol=1e-6, rtol=0)


def test_llama3_scaling_by_hand() -> None:
    """theta 100 and head size 4 give waves of 2 pi and 20 pi tokens. With an original context of 100, waves below
    100 / 4 are kept (the first); the second, 62.8, lies between 25 and 100 and is blended."""
    rope = RopeConfig(kind="llama3", theta=100.0, factor=8.0, original_max_position_embeddings=100)
    config = dataclasses.replace(CONFIGS["default"], rope=rope, head_dim=4)
    smooth = (100 / (20 * math.pi) - 1) / (4 - 1)
    inv_freq, factor = inverse_frequencies(config)
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1 * ((1 - smooth) / 8 + smooth)]))
    assert factor == 1.0


def test_rotary_table_turns_by_position_and_repeats_for_both_halves() -> None:
    cos, sin = rotary_table(torch.tensor([0, 3]), torch.tensor([1.0, 0.5]), 2.0)
    angles = torch.tensor([[0, 0, 0, 0], [3, 1.5, 3, 1.5]])
    torch.testing.assert_close(cos, 2 * angles.cos())
    torch.testing.assert_close(sin, 2 * angles.sin())


def test_both_generations_of_rope_fields_mean_the_same() -> None:
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    new = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    assert read(old) == read(new) == read(old | new)
    assert read(old).rope == RopeConfig(kind="linear", theta=5e5, factor=4.0)
    assert read(LLAMA).rope == read(LLAMA | {"rope_scaling": None}).rope == RopeConfig(theta=10000.0)


def test_fields_of_old_and_sparse_configs() -> None:
    assert read(LLAMA).num_kv_heads == 4, "the first Llama had no such field"
    assert read(LLAMA).head_dim == 12
    assert read(QWEN2 | {"model_type": "qwen3", "architectures": None}).head_dim == 128, "Qwen3's own default"
    assert read(QWEN2).attention_bias and not read(QWEN2).output_bias
    assert read(LLAMA | {"attention_bias": True}).output_bias
    assert read(MISTRAL).windows == (9, 9, 9)
    assert read(QWEN2 | {"sliding_window": 9, "max_window_layers": 1}).windows == (0, 0, 0), "use_sliding_window is off"
    windowed = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert read(QWEN2 | windowed).windows == (0, 9, 9)
    assert read(LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}).rope == RopeConfig(
        kind="llama3", factor=8.0, original_max_position_embeddings=128
    )
    assert read(LLAMA | {"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
    "headless architecture": (LLAMA | {"architectures": ["LlamaModel"]}, r"\['LlamaModel'\].*Qwen3ForCausalLM"),
    "architecture no list": (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'"),
    "model type of another": (LLAMA | {"model_type": "gemma"}, "model_type = 'gemma'.*llama"),
    "no model type": ({}, "model_type = None.*llama or mistral or qwen2 or qwen3"),
    "activation": (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*silu"),
    "partial rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5.*1.0"),
    "partial rotary within": (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "quantised": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    "bidirectional": (LLAMA | {"is_causal": False}, "is_causal = False"),
    "dropout": (LLAMA | {"attention_dropout": 0.1}, "attention_dropout = 0.1.*0.0"),
    "experts": (LLAMA | {"num_local_experts": 8}, "num_local_experts = 8"),
    "soft cap": (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "rope kind": (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type = 'dynamic'.*llama3, yarn"),
    "rope key": (
        LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_fact": 1}},
        "low_freq_fact is not supported with rope_type llama3; did you mean low_freq_factor",
    ),
    "rope key of another kind": (LLAMA | {"rope_parameters": {"factor": 2.0}}, "factor is not.* default"),
    "rope key missing": (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope disagrees": (
        LLAMA | {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}},
        "rope_theta is 10.0 in one place and 20.0 in another",
    ),
    "rope no object": (LLAMA | {"rope_scaling": 4}, "rope_scaling or rope_parameters = 4"),
    "rope by layer type": (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "full_attention"),
    "rope factor": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor = 0.5.*1 or more"),
    "rope theta": (LLAMA | {"rope_theta": 0.0}, "rope theta = 0.0"),
    "missing": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size is missing"),
    "misspelt": (
        {k: v for k, v in LLAMA.items() if k != "hidden_size"} | {"hiden_size": 48},
        "hidden_size is missing; did you mean hiden_size",
    ),
    "no window": ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, "sliding_window is missing.*null"),
    "no number": (LLAMA | {"hidden_size": "48"}, "hidden_size = '48' is not a whole number"),
    "a fraction": (LLAMA | {"hidden_size": 48.0}, "hidden_size = 48.0 is not a whole number"),
    "a truth": (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
    "no truth": (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is not true or false"),
    "eps": (LLAMA | {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "num_kv_heads = 3.*divisor of num_heads .4"),
    "odd head": (LLAMA | {"head_dim": 13}, "head_dim = 13.*even"),
    "no layers": (LLAMA | {"num_hidden_layers": 0}, "num_layers = 0"),
    "window in llama": (LLAMA | {"sliding_window": 9}, "sliding_window = 9 is not supported; allowed: null in llama"),
    "negative window": (MISTRAL | {"sliding_window": -1}, "sliding_window = -1.*1 and more"),
    "bias in mistral": (MISTRAL | {"attention_bias": True}, "attention_bias.*True.*mistral"),
    "no bias in qwen2": (QWEN2 | {"attention_bias": False}, "attention_bias.*False.*qwen2"),
    "mlp bias in qwen2": (QWEN2 | {"mlp_bias": True}, "mlp_bias.*qwen2"),
    "layer kind": (QWEN2 | {"layer_types": ["chunked_attention"] * 3}, "chunked_attention.*full_attention"),
    "layer count": (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types = .*a list of 3"),
    "layers without window": (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
    "mixed mistral": (MISTRAL | {"layer_types": ["full_attention"] * 3}, "layer_types = .*not supported in mistral"),
    "eos outside": (LLAMA | {"eos_token_id": [2, 97]}, r"eos_token_ids = \(2, 97\).*below 97"),
    "pad outside": (LLAMA | {"pad_token_id": 97}, "pad_token_id = 97.*vocab_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^DIR/config.json: (?s:.*){message}"):
        read(fields)


def test_neutral_values_are_taken() -> None:
    neutral = {
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "attention_dropout": 0.0,
    }
    assert read(LLAMA | neutral | {"_name_or_path": "x", "use_cache": False}) == read(LLAMA)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden_size": 50}, "hidden_size"),
        ({"windows": (0, 0)}, "windows"),
        ({"windows": (0, -1, 0)}, "windows"),
        ({"qk_norm": True}, "qk_norm"),
        ({"output_bias": True}, "output_bias"),
        ({"family": "gemma"}, "family"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], name: str) -> None:
    """hidden_size 50 with 4 heads: Transformers' LlamaConfig refuses it even where head_dim is given."""
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(CONFIGS["default"], **change)
