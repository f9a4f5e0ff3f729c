"""Checkpoint folders: what is written, how it is replaced, and what is refused before any weight is read."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from bylaw.model import checkpoint
from bylaw.model.checkpoint import checkpoint_hash, load_model, load_reward, save_model, save_reward
from bylaw.model.config import ModelConfig
from bylaw.model.heads import scalar_model
from bylaw.model.hf_config import Head
from bylaw.model.parallel import ALONE
from bylaw.model.shards import block
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize
from bylaw.model.weights import pieces

WORDS = ("<eos>", "<pad>", "a", "b", "c")
INDEX = "model.safetensors.index.json"


def tiny(seed: int = 0, **changes: Any) -> Transformer:
    settings: dict[str, Any] = {
        "family": "qwen3", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "max_position_embeddings": 32, "qk_norm": True,
        "attention_bias": True, "output_bias": True, "eos_token_ids": (0,),
    }  # fmt: skip
    return initialize(Transformer(ModelConfig(**(settings | changes))), seed)


def words_tokenizer(count: int = 5) -> Tokenizer:
    vocabulary = {word: id for id, word in enumerate([*WORDS, *(f"w{n}" for n in range(count - 5))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer.from_parts(backend, eos_token="<eos>", pad_token="<pad>")


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, not mapped onto it: some tests write over the file while they hold them."""
    return load(path.read_bytes())


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shard_bytes", [10**9, 600])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, shard_bytes: int, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    save_model(model, tmp_path / "a", max_shard_bytes=shard_bytes)
    loaded = load_model(tmp_path / "a")
    assert same(model, loaded) and loaded.config == model.config
    assert torch.equal(loaded.inv_freq, model.inv_freq)
    assert (tmp_path / "a" / INDEX).exists() == (shard_bytes == 600)


def test_pieces_cover_every_row_of_every_parameter_once() -> None:
    heads: dict[Head, torch.nn.Module] = {
        "ForCausalLM": tiny(),
        "ForSequenceClassification": scalar_model(tiny(), seed=1),
    }
    for head, model in heads.items():
        counts = {name: torch.zeros(len(parameter)) for name, parameter in model.named_parameters()}
        for piece in pieces(tiny().config, head):
            assert block(piece, dict(model.named_parameters())[piece.parameter], ALONE).tensor.shape == piece.shape
            counts[piece.parameter][piece.start : piece.start + piece.shape[0]] += 1
        assert all(bool((rows == 1).all()) for rows in counts.values()), counts


def test_index_lists_every_tensor_and_no_shard_is_too_large(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a", max_shard_bytes=600)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    sizes: dict[str, int] = {}
    for name, shard in index["weight_map"].items():
        tensors = load_file(tmp_path / "a" / shard)
        assert name in tensors
        sizes[shard] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[shard] <= 600 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == {piece.name for piece in pieces(tiny().config)}


def test_types(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    save_model(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "a" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    loaded = load_model(tmp_path / "a")
    assert loaded.norm.weight.dtype == torch.float32, "on a CPU everything is float32"
    half = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert same(half, model)
    assert half.inv_freq.dtype == torch.float32, "rotary frequencies in bfloat16 turn far tokens by wrong angles"


def test_each_tensor_is_copied_once_into_a_parameter_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a model is held once, and beside it one tensor at a time."""
    model = tiny()
    save_model(model, tmp_path / "a", max_shard_bytes=600)
    copied: list[Tensor] = []
    copy = Tensor.copy_

    def watched(target: Tensor, source: Tensor) -> Tensor:
        copied.extend([] if target.is_meta else [target])
        return copy(target, source)

    monkeypatch.setattr(Tensor, "copy_", watched)
    loaded = load_model(tmp_path / "a")
    storages = {parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()}
    assert len(copied) == len(pieces(model.config))
    assert {target.untyped_storage().data_ptr() for target in copied} == storages


def test_reward_round_trip_drops_the_vocabulary_head(tmp_path: Path) -> None:
    model = scalar_model(tiny(), seed=1)
    save_reward(model, tmp_path / "r", words_tokenizer(), {"mean": -0.5, "std": 1.25}, card="# Reward\n")
    loaded, extras = load_reward(tmp_path / "r")
    assert extras == {"mean": -0.5, "std": 1.25}
    assert same(loaded, model)
    assert loaded.trunk.config == dataclasses.replace(model.trunk.config, pad_token_id=1), "pad is the tokenizer's"
    assert "trunk.lm_head.weight" not in dict(loaded.named_parameters())
    fields = json.loads((tmp_path / "r" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3ForSequenceClassification"]
    assert fields["pad_token_id"] == 1, "from the tokenizer"
    assert (tmp_path / "r" / "README.md").read_text() == "# Reward\n"


def test_reward_extras_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_reward(scalar_model(tiny(), seed=1), tmp_path / "r", extras={"std": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tokenizer_and_card_travel_along(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a", words_tokenizer(), "---\nlicense: mit\n---\n")
    assert Tokenizer.load(tmp_path / "a").encode("a b") == [2, 3]
    assert (tmp_path / "a" / "README.md").read_text() == "---\nlicense: mit\n---\n"
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == [0]
    save_model(tiny(), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert not (tmp_path / "b" / "README.md").exists()


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"12 tokens.*11"):
        save_model(tiny(), tmp_path / "a", words_tokenizer(12))
    with pytest.raises(ValueError, match=r"12 tokens.*11"):
        save_reward(scalar_model(tiny(), seed=1), tmp_path / "a", words_tokenizer(12))


def test_replacing_leaves_nothing_of_the_old_and_nothing_beside(tmp_path: Path) -> None:
    save_model(tiny(0), tmp_path / "a", card="old", max_shard_bytes=600)
    save_model(tiny(1), tmp_path / "a")
    assert same(load_model(tmp_path / "a"), tiny(1))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny(0), tmp_path / "a")
    before = checkpoint_hash(tmp_path / "a")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "_write_rest", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tiny(1), tmp_path / "a")
    assert checkpoint_hash(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_save_left_is_cleared_or_told(tmp_path: Path) -> None:
    save_model(tiny(0), tmp_path / "a")
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "junk").write_text("half")
    (tmp_path / "a").rename(tmp_path / ".a.replaced")
    with pytest.raises(FileNotFoundError, match=r"\.a\.replaced back"):
        load_model(tmp_path / "a")
    save_model(tiny(1), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no checkpoint"):
        save_model(tiny(), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        save_model(tiny(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_link_is_followed(tmp_path: Path) -> None:
    save_model(tiny(0), tmp_path / "a")
    (tmp_path / "latest").symlink_to("a")
    save_model(tiny(1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert same(load_model(tmp_path / "a"), tiny(1))


def test_hash_changes_with_weights_config_and_tokenizer_and_not_with_the_card(tmp_path: Path) -> None:
    save_model(tiny(0), tmp_path / "a", words_tokenizer(), "one")
    save_model(tiny(0), tmp_path / "b", words_tokenizer(), "two")
    first = checkpoint_hash(tmp_path / "a")
    assert len(first) == 64 and first == checkpoint_hash(tmp_path / "b")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "generation_config.json"):
        save_model(tiny(0), tmp_path / "c", words_tokenizer())
        with (tmp_path / "c" / name).open("ab") as file:
            file.write(b" ")
        assert checkpoint_hash(tmp_path / "c") != first, name
    save_model(tiny(0), tmp_path / "d", words_tokenizer(), max_shard_bytes=600)
    assert checkpoint_hash(tmp_path / "d") != first, "it is over bytes, not over meaning"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint_hash(tmp_path / "nowhere")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))


def add(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(1)}))


def reshape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(9, 12)}))


def quantise(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(12, dtype=torch.int8)}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def disguise(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def both(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3",\n oops}')


def listed_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def foreign(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(fields))


def capped(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text()) | {"attn_logit_softcapping": 50.0}
    (folder / "config.json").write_text(json.dumps(fields))


SPOILT: dict[Callable[[Path], None], str] = {
    drop: "a: tensor model.layers.1.self_attn.k_norm.weight missing",
    add: "model.safetensors: unexpected tensor model.layers.2.extra",
    reshape: r"tensor model.layers.0.mlp.up_proj.weight has shape \(9, 12\); config.json asks for \(10, 12\)",
    quantise: "tensor model.norm.weight is of type I8; allowed: F64, F32, F16, BF16",
    cut: "model.safetensors: not a whole safetensors file, perhaps cut short at [0-9]+ bytes",
    empty: "model.safetensors: not a whole safetensors file, perhaps cut short at 0 bytes",
    pointer: "model.safetensors: not a whole safetensors file, but a Git LFS pointer",
    disguise: "model.safetensors: not a whole safetensors file, but a pickle",
    pickle_only: "pytorch_model.bin is a pickle.*allowed: model.safetensors",
    both: "both model.safetensors and model.safetensors.index.json",
    broken_config: r"config.json: not JSON \(.*line 2",
    listed_config: "config.json: a JSON list; allowed: one object",
    foreign: "config.json: architectures = .'GPT2LMHeadModel'.*Qwen2ForCausalLM",
    capped: "config.json: attn_logit_softcapping = 50.0 is not supported",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_is_refused_before_weights_are_read(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny(), tmp_path / "a")
    spoil(tmp_path / "a")
    monkeypatch.setattr(checkpoint, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=SPOILT[spoil]):
        load_model(tmp_path / "a")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"meta-llama/Llama.*local folders"):
        load_model("meta-llama/Llama-3.1-8B")
    save_model(tiny(), tmp_path / "a", max_shard_bytes=600)
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name}: this shard is missing"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"x": "../b/model.safetensors"}}'])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    save_model(tiny(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        load_model(tmp_path / "a")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a", max_shard_bytes=600)
    one, two, *_ = sorted((tmp_path / "a").glob("*.safetensors"))
    save_file(load_file(one) | load_file(two), two)
    with pytest.raises(ValueError, match=rf"{two.name}: tensor model.embed_tokens.weight stands in {one.name} too"):
        load_model(tmp_path / "a")


def test_head_that_a_tied_checkpoint_repeats(tmp_path: Path) -> None:
    """Some tied checkpoints store the head too. The same is taken; another one would be lost, so it is refused."""
    save_model(tiny(tie_word_embeddings=True), tmp_path / "a")
    embedding = load_file(tmp_path / "a" / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path / "a", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert same(load_model(tmp_path / "a"), tiny(tie_word_embeddings=True))
    edit(tmp_path / "a", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        load_model(tmp_path / "a")


def test_rotary_buffers_of_old_checkpoints_are_derived_instead(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path / "a", lambda tensors: tensors.update({name: torch.full((3,), 9.0)}))
    assert torch.equal(load_model(tmp_path / "a").inv_freq, tiny().inv_freq)


def test_reward_and_language_models_are_told_apart(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a")
    save_reward(scalar_model(tiny(), seed=1), tmp_path / "r")
    with pytest.raises(ValueError, match=r"Qwen3ForSequenceClassification.*load_reward"):
        load_model(tmp_path / "r")
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM.*load_model"):
        load_reward(tmp_path / "a")
    fields = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps(fields | {"id2label": {"0": "good", "1": "bad"}}))
    with pytest.raises(ValueError, match="num_labels = 2 is not a reward model"):
        load_reward(tmp_path / "r")
