"""Hugging Face weight names and our fused parameters: which tensor is which rows of what; and the files' headers, from
which everything is checked before a byte of weights is read.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bylaw.model.config import ModelConfig
from bylaw.model.hf_config import Head

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor, and the rows of our parameter that hold it, from `start` on."""

    name: str
    parameter: str
    start: int
    shape: tuple[int, ...]


def pieces(config: ModelConfig, head: Head = "ForCausalLM") -> list[Piece]:
    """Every tensor of a checkpoint, in the order in which it is written.

    `parameter` names are those of a Transformer, or of a ScalarModel with its `trunk` for a sequence classifier.
    """
    hidden, classifier = config.hidden_size, head == "ForSequenceClassification"
    trunk = "trunk." if classifier else ""
    listed = [Piece("model.embed_tokens.weight", f"{trunk}embed.weight", 0, (config.vocab_size, hidden))]
    for layer in range(config.num_layers):
        listed += _layer_pieces(config, f"{trunk}blocks.{layer}.", f"model.layers.{layer}.")
    listed.append(Piece("model.norm.weight", f"{trunk}norm.weight", 0, (hidden,)))
    if classifier:
        listed.append(Piece("score.weight", "score.weight", 0, (1, hidden)))
    elif not config.tie_word_embeddings:
        listed.append(Piece("lm_head.weight", "lm_head.weight", 0, (config.vocab_size, hidden)))
    return listed


def _layer_pieces(config: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(parameter: str, rows: dict[str, int], width: int, bias: bool) -> Iterator[Piece]:
        for kind, tail in (("weight", (width,)), ("bias", ())) if bias else (("weight", (width,)),):
            start = 0
            for name, size in rows.items():
                yield Piece(f"{theirs}{name}.{kind}", f"{ours}{parameter}.{kind}", start, (size, *tail))
                start += size

    def norm(parameter: str, name: str, size: int) -> Piece:
        return Piece(f"{theirs}{name}.weight", f"{ours}{parameter}.weight", 0, (size,))

    yield norm("attn_norm", "input_layernorm", hidden)
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    yield from linear("qkv", qkv, hidden, config.attention_bias)
    if config.qk_norm:
        yield norm("q_norm", "self_attn.q_norm", config.head_dim)
        yield norm("k_norm", "self_attn.k_norm", config.head_dim)
    yield from linear("out", {"self_attn.o_proj": hidden}, q, config.output_bias)
    yield norm("mlp_norm", "post_attention_layernorm", hidden)
    yield from linear("gate_up", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, config.mlp_bias)
    yield from linear("down", {"mlp.down_proj": hidden}, inner, config.mlp_bias)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, single or by its index; all of them are there.

    Raises FileNotFoundError for none, or for a shard of the index that is missing; ValueError where the only weights
    are pickles, where a single file and an index stand together, and for an index that cannot be read.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder}: both {SINGLE} and {INDEX} are here; remove the one that is not meant")
    if single.exists():
        return [single]
    if index.exists():
        return _shards(index)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if found:
        raise ValueError(
            f"{folder}: {found[0]} is a pickle, which can run any code as it loads; allowed: {SINGLE}, or {INDEX} and "
            "its shards. Transformers' save_pretrained writes them"
        )
    raise FileNotFoundError(f"{folder}: no weights; neither {SINGLE} nor {INDEX} is here")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index}: not an index of shards ({error!r}); allowed: {{"weight_map": {{...}}}}') from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not a safetensors file of this folder")
        if not (index.parent / name).exists():
            raise FileNotFoundError(f"{index.parent / name}: this shard is missing; {INDEX} lists {len(names)} of them")
    return [index.parent / name for name in names]


def check_weights(files: Iterable[Path], wanted: Iterable[Piece], source: Path, spare: str = "") -> set[str]:
    """Compare the files' headers with what the model needs; returns the names found. Reads no weights.

    `spare` is a tensor that may be there without being wanted. Raises ValueError naming the file and the tensor: an
    unreadable file, a missing or unexpected tensor, one that stands twice, a wrong shape, a type that is no float.
    """
    shapes = {piece.name: piece.shape for piece in wanted}
    found: dict[str, Path] = {}
    for path in files:
        for name, shape, dtype in _header(path):
            if name.endswith(".rotary_emb.inv_freq"):  # a buffer that old Llama checkpoints carry; it is derived
                continue
            if name in found:
                raise ValueError(f"{path}: tensor {name} stands in {found[name].name} too")
            if name not in shapes and name != spare:
                raise ValueError(f"{path}: unexpected tensor {name}; config.json asks for none of that name")
            if shape != shapes.get(name, shape):
                raise ValueError(f"{path}: tensor {name} has shape {shape}; config.json asks for {shapes[name]}")
            if dtype not in FLOATS:
                raise ValueError(f"{path}: tensor {name} is of type {dtype}; allowed: {', '.join(FLOATS)}")
            found[name] = path
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{source}: tensor {missing[0]}{more} missing from the weights, though config.json asks for it"
        )
    return set(found)


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor. Opening checks that the file is as long as its header says."""
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return [(name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file, {_looks_like(path)} ({error})") from error


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "but a Git LFS pointer: fetch the file itself with git lfs pull"
    # A header's length may begin with a pickle's first byte; after its eight bytes the header itself opens with "{".
    if start[8:9] != b"{" and start.startswith((b"PK\x03\x04", b"\x80")):
        return "but a pickle"
    return f"perhaps cut short at {path.stat().st_size} bytes"
