"""Whole checkpoints: a Hugging Face folder to a model and back, for language models and reward models.

A folder appears whole or not at all: it is written beside its place and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bylaw.model.config import ModelConfig
from bylaw.model.heads import ScalarModel, fresh_head
from bylaw.model.hf_config import Head, config_from_hf, config_to_hf
from bylaw.model.lora import require_merged
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import read_object, sha256_file
from bylaw.model.rotary import inverse_frequencies
from bylaw.model.sharding import shard
from bylaw.model.shards import fill
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.model.weight_io import read_tensor, read_weights, write_weights
from bylaw.model.weights import INDEX, check_weights, pieces, weight_files

SHARD_BYTES = 5 * 10**9
# What decides a model's outputs besides its weights, in the order in which it is hashed.
_HASHED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", INDEX,
)  # fmt: skip


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    parallel: Parallel = ALONE,
) -> Transformer:
    """The language model of a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3; safetensors, single or sharded).

    `dtype` None stands for float32 on a CPU and bfloat16 elsewhere. Weights stream into the fused parameters, so the
    model is held once; on many ranks each reads its own part (model/sharding.py). Raises FileNotFoundError for a
    missing folder, config.json or shard; ValueError naming file and field or tensor for an unsupported config and for
    weights that do not fit it, before any weight is read.
    """
    folder = Path(folder)
    config, found = check_model(folder)
    files, wanted = weight_files(folder), pieces(config)
    twin = "lm_head.weight" if config.tie_word_embeddings else ""
    with torch.device("meta"):
        model = Transformer(config)
    _materialise(model, device, dtype, parallel)
    read_weights(files, wanted, dict(model.named_parameters()), parallel)
    if twin in found:
        embed, head = (read_tensor(files, name).float() for name in ("model.embed_tokens.weight", twin))
        if not torch.equal(embed, head):
            raise ValueError(f"{folder}: {twin} differs from the embedding, but config.json says tie_word_embeddings")
    return model


def check_model(folder: str | Path) -> tuple[ModelConfig, set[str]]:
    """The config of a language model's folder, and the names of its tensors, whose headers fit it. Reads no weights.

    Errors as for load_model.
    """
    folder = Path(folder)
    _, config = _read_config(folder, "ForCausalLM", "load_reward")
    twin = "lm_head.weight" if config.tie_word_embeddings else ""
    return config, check_weights(weight_files(folder), pieces(config), folder, spare=twin)


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")


def load_reward(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    parallel: Parallel = ALONE,
) -> tuple[ScalarModel, dict[str, Any]]:
    """The reward model of a folder that holds a sequence classifier with one label, and the extras saved with it.

    Errors as for load_model, and ValueError for more than one label.
    """
    folder = Path(folder)
    extras = reward_extras(folder)
    _, config = _read_config(folder, "ForSequenceClassification", "load_model")
    files, wanted = weight_files(folder), pieces(config, "ForSequenceClassification")
    check_weights(files, wanted, folder)
    with torch.device("meta"):
        model = ScalarModel(Transformer(config, with_head=False))
    _materialise(model, device, dtype, parallel)
    read_weights(files, wanted, dict(model.named_parameters()), parallel)
    return model, extras


def reward_extras(folder: str | Path) -> dict[str, Any]:
    """What was saved with a reward model beside its weights. Errors as for load_reward, from its config.json alone."""
    path = Path(folder) / "config.json"
    fields, _ = _read_config(Path(folder), "ForSequenceClassification", "load_model")
    labels = fields.get("num_labels", len(fields.get("id2label") or "ab"))  # without either, Transformers takes two
    if labels != 1:
        raise ValueError(f"{path}: num_labels = {labels} is not a reward model; allowed: 1")
    return dict(fields.get("bylaw") or {})


def load_scalar(
    folder: str | Path,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    parallel: Parallel = ALONE,
) -> ScalarModel:
    """A language model's folder as the start of a reward or value model: its trunk, and a fresh head drawn from `seed`.

    Errors as for load_model.
    """
    folder = Path(folder)
    config, _ = check_model(folder)
    with torch.device("meta"):
        model = ScalarModel(Transformer(config, with_head=False))
    _materialise(model, device, dtype, parallel)
    *trunk, score = pieces(config, "ForSequenceClassification")
    parameters = dict(model.named_parameters())
    read_weights(weight_files(folder), trunk, parameters, parallel)
    fill(score, parameters, fresh_head(config.hidden_size, seed), parallel)
    return model


def save_model(
    model: Transformer,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    card: str = "",
    *,
    max_shard_bytes: int = SHARD_BYTES,
    parallel: Parallel = ALONE,
) -> None:
    """Write a folder that Transformers, vLLM and the like load as they do any other: config, weights under Hugging
    Face's names, generation defaults, tokenizer, and `card` as README.md.

    A checkpoint that stands there is replaced once the new one is whole. Raises ValueError for a folder that holds
    something else, for a tokenizer with more tokens than the model, and for adapters that are not merged.
    """
    require_merged(model, "save_model")
    check_tokenizer(model.config, tokenizer)
    fields = config_to_hf(model.config, dtype=_dtype_name(model))
    generation = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _replaced_by_first(Path(folder), parallel) as beside:
        write_weights(beside, pieces(model.config), dict(model.named_parameters()), max_shard_bytes, parallel)
        if beside:
            _write_json(beside / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
            _write_rest(beside, fields, tokenizer, card)


def save_reward(
    model: ScalarModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    extras: Mapping[str, Any] | None = None,
    card: str = "",
    *,
    max_shard_bytes: int = SHARD_BYTES,
    parallel: Parallel = ALONE,
) -> None:
    """Write a reward model as a sequence classifier with one label; `extras` (JSON values) go to config.json.

    Transformers reads the score at the last token that is not padding, so an end-of-text token is not written as the
    padding token: the score would be read one token early. Without a padding token it takes batches of one. Errors as
    for save_model.
    """
    require_merged(model.trunk, "save_reward")
    config = model.trunk.config
    check_tokenizer(config, tokenizer)
    fields = config_to_hf(config, dtype=_dtype_name(model), head="ForSequenceClassification")
    fields |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "bylaw": dict(extras or {})}
    fields["pad_token_id"] = _safe_pad(config, tokenizer)
    with _replaced_by_first(Path(folder), parallel) as beside:
        wanted = pieces(config, "ForSequenceClassification")
        write_weights(beside, wanted, dict(model.named_parameters()), max_shard_bytes, parallel)
        if beside:
            _write_rest(beside, fields, tokenizer, card)


def checkpoint_hash(folder: str | Path) -> str:
    """SHA-256, in hex, over the weights, config and tokenizer files of a folder: their names and bytes.

    The model card is left out. Errors as for finding the weights in load_model.
    """
    folder = Path(folder)
    _require_folder(folder)
    names = [name for name in _HASHED if (folder / name).exists()]
    total = hashlib.sha256()
    for path in [folder / name for name in names] + weight_files(folder):
        total.update(f"{path.name} {sha256_file(path)}\n".encode())
    return total.hexdigest()


@contextmanager
def replaced_folder(folder: Path, mark: str = "config.json") -> Iterator[Path]:
    """A new empty folder beside `folder`, which takes its place when the block ends well and is removed otherwise.

    What stood there stays whole until the new folder is on disk. Killed between the two renames that swap them, both
    stand under hidden names, and reading says where. Raises ValueError where `folder` holds something that is no
    checkpoint: it is not ours to replace.
    """
    folder = folder.resolve()
    beside, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).exists())):
        raise ValueError(f"{folder} exists and is no checkpoint (it has no {mark}), so it is not replaced")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _sync(*beside.iterdir(), beside)
    except BaseException:
        shutil.rmtree(beside)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    beside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _replaced_by_first(folder: Path, parallel: Parallel) -> Iterator[Path | None]:
    """`replaced_folder` on the first rank, None on the others, which go on once it is in its place."""
    with replaced_folder(folder) if parallel.first else nullcontext() as beside:
        yield beside
    parallel.meet()


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        old = _old(folder.resolve())
        cut = f"; a save was cut short as it put it in place, rename {old} back" if old.exists() else ""
        raise FileNotFoundError(f"{folder}: no such folder (models are read from local folders){cut}")


def _read_config(folder: Path, head: Head, other: str) -> tuple[dict[str, Any], ModelConfig]:
    """config.json's fields and what they mean; ValueError naming `other`, the function for the other head."""
    _require_folder(folder)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has one")
    fields = read_object(path)
    config = config_from_hf(fields, str(path))
    names = fields.get("architectures") or ["ForCausalLM"]
    if not names[0].endswith(head):
        raise ValueError(f"{path}: architectures = {names} is read by bylaw's {other}, not as a model {head}")
    return fields, config


def _materialise(
    model: Transformer | ScalarModel, device: torch.device | str, dtype: torch.dtype | None, parallel: Parallel
) -> None:
    """Give a model made on the meta device its memory, unset, of this rank's parts; and its rotary frequencies, which
    no file holds.
    """
    device, trunk = torch.device(device), model.trunk if isinstance(model, ScalarModel) else model
    model.to(dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16))
    shard(model, parallel)
    model.to_empty(device=device)
    # After the casts above: frequencies stay float32, or far positions would turn by wrong angles.
    trunk.inv_freq = inverse_frequencies(trunk.config)[0].to(device)


def _safe_pad(config: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
    pad = config.pad_token_id if config.pad_token_id >= 0 or tokenizer is None else tokenizer.pad_id
    ends = set(config.eos_token_ids) | set(tokenizer.stop_ids if tokenizer else ())
    return pad if pad >= 0 and pad not in ends else None


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _write_rest(folder: Path, fields: Mapping[str, Any], tokenizer: Tokenizer | None, card: str) -> None:
    _write_json(folder / "config.json", fields)
    if tokenizer is not None:
        tokenizer.save(folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
