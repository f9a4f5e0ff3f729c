"""The same weights give the same numbers in Transformers, whichever of the two wrote the checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bylaw.model.checkpoint import load_model, load_reward, save_model, save_reward
from bylaw.model.config import ModelConfig, RopeConfig
from bylaw.model.heads import ScalarModel
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer

LENGTHS = (1, 7, 33, 65)
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,  # not 48 / 4
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Transformers 4 takes yarn's factor from the two context lengths, 5 takes it as written: here they are the same.
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
MHA = {"num_key_value_heads": 4, "head_dim": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 500.0}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha-biases": ("llama", MHA | {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-attention": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.7, "beta_fast": 8.0}}),
    "llama-yarn-mscale": ("llama", {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0, "truncate": False}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "mistral-window-1": ("mistral", {"sliding_window": 1, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2-tied-window": ("qwen2", WINDOWED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3-bias-window": ("qwen3", WINDOWED | {"attention_bias": True, "layer_types": ALTERNATING}),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def randomised(model: Any, seed: int) -> Any:
    """Weights large enough that every part matters: as built, norms are 1, biases 0 and logits near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval()


def hf_model(family: str, options: dict[str, Any], head: str = "ForCausalLM", seed: int = 0) -> Any:
    config = getattr(transformers, f"{CLASSES[family]}Config")(**(SMALL | options))
    config._attn_implementation = "eager"
    return randomised(getattr(transformers, CLASSES[family] + head)(config), seed)


def texts(seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def hf_logits(model: Any, sequences: list[list[int]]) -> Tensor:
    """Each sequence alone through Transformers; for a classifier, one row per sequence."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits.reshape(-1, model_width(model)) for ids in sequences])


def model_width(model: Any) -> int:
    return 1 if "SequenceClassification" in type(model).__name__ else model.config.vocab_size


@torch.no_grad()
def our_logits(model: Transformer, sequences: list[list[int]]) -> Tensor:
    return model.logits(model(pack(sequences)))


def load_in_transformers(folder: Path, kind: Any) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    reference = hf_model(family, options)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    expected = hf_logits(reference, texts())
    assert expected.std() > 1, "logits too small to tell anything"
    torch.testing.assert_close(our_logits(model, texts()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_our_checkpoint_loads_in_transformers(case: str, shard_bytes: int, tmp_path: Path) -> None:
    family, options = CASES[case]
    hf_model(family, options).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or shard_bytes == 10**9
    theirs = load_in_transformers(tmp_path / "ours", transformers.AutoModelForCausalLM)
    torch.testing.assert_close(hf_logits(theirs, texts()), our_logits(model, texts()), atol=1e-4, rtol=0)
    again = load_model(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(our_logits(again, texts()), our_logits(model, texts()))


@pytest.mark.parametrize("case", ["llama-llama3", "llama-linear", "llama-yarn", "llama-yarn-mscale", "mistral-window"])
def test_the_setting_changes_the_logits(case: str, tmp_path: Path) -> None:
    """What parity is claimed for is felt at these lengths; else the tests above would pass without it."""
    family, options = CASES[case]
    hf_model(family, options).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    plain_rope = RopeConfig(theta=model.config.rope.theta)
    plain = Transformer(dataclasses.replace(model.config, rope=plain_rope, windows=()))
    plain.load_state_dict(model.state_dict())
    assert (our_logits(plain, texts()) - our_logits(model, texts())).abs().max() > 0.1


@pytest.mark.parametrize(
    "case", ["llama-llama3", "llama-yarn", "mistral-window", "qwen2", "qwen2-tied-window", "qwen3"]
)
def test_reward_model_scores_as_a_sequence_classifier(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    reference = hf_model(family, options | {"num_labels": 1}, "ForSequenceClassification")
    reference.save_pretrained(tmp_path / "theirs")
    model, extras = load_reward(tmp_path / "theirs")
    assert extras == {}
    packed = pack(texts())
    scores = model(packed)[packed.last].detach()
    torch.testing.assert_close(scores[:, None], hf_logits(reference, texts()), atol=1e-4, rtol=0)
    save_reward(model, tmp_path / "ours", extras={"mean": 0.25, "std": 2.0})
    theirs = load_in_transformers(tmp_path / "ours", transformers.AutoModelForSequenceClassification)
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(hf_logits(theirs, texts()), scores[:, None], atol=1e-4, rtol=0)
    again, extras = load_reward(tmp_path / "ours")
    assert extras == {"mean": 0.25, "std": 2.0}
    assert torch.equal(again(packed), model(packed))


def test_reward_in_a_padded_batch_is_read_at_the_last_token(tmp_path: Path) -> None:
    """Answers end in the end-of-text token: with that as padding, Transformers would read the score a token early."""
    config = ModelConfig(
        family="llama", vocab_size=97, hidden_size=48, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_position_embeddings=128, eos_token_ids=(2,), pad_token_id=2,
    )  # fmt: skip
    model = randomised(ScalarModel(Transformer(config)), 3)
    packed = pack([[*ids, 2] for ids in texts()])
    scores = model(packed)[packed.last].detach()
    save_reward(model, tmp_path / "eos_as_pad")
    alone = load_in_transformers(tmp_path / "eos_as_pad", transformers.AutoModelForSequenceClassification)
    torch.testing.assert_close(hf_logits(alone, [[*ids, 2] for ids in texts()])[:, 0], scores, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="padding token"):
        alone(input_ids=torch.full((2, 3), 2))
    padded = randomised(ScalarModel(Transformer(dataclasses.replace(config, pad_token_id=0))), 3)
    save_reward(padded, tmp_path / "own_pad")
    batch = torch.zeros(len(LENGTHS), max(LENGTHS) + 1, dtype=torch.int64)
    for row, ids in zip(batch, texts(), strict=True):
        row[: len(ids) + 1] = torch.tensor([*ids, 2])
    together = load_in_transformers(tmp_path / "own_pad", transformers.AutoModelForSequenceClassification)
    with torch.no_grad():
        theirs = together(input_ids=batch, attention_mask=(batch != 0).long()).logits[:, 0]
    torch.testing.assert_close(theirs, scores, atol=1e-4, rtol=0)
