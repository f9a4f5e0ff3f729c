"""Weights from safetensors files into a model's parameters and back, one tensor at a time: a model is never held twice.

On many ranks each reads its own block of a tensor, and the first writes what all put together.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.shards import block
from bylaw.model.weights import INDEX, SINGLE, Piece


@torch.no_grad()
def read_weights(
    files: Iterable[Path], wanted: Iterable[Piece], parameters: Mapping[str, Tensor], parallel: Parallel = ALONE
) -> None:
    """Copy this rank's block of every wanted tensor into its rows, onto the parameters' device and type."""
    by_name = {piece.name: piece for piece in wanted}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                if name in by_name:
                    piece = by_name[name]
                    mine = block(piece, parameters[piece.parameter], parallel)
                    mine.tensor.copy_(file.get_slice(name)[mine.places(parallel)])


def read_tensor(files: Iterable[Path], name: str) -> Tensor:
    """One whole tensor, which check_weights has found in one of the files."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118, it is no dict
                return file.get_tensor(name)
    raise AssertionError(name)


def write_weights(
    folder: Path | None,
    wanted: Iterable[Piece],
    parameters: Mapping[str, Tensor],
    max_bytes: int,
    parallel: Parallel = ALONE,
) -> None:
    """Write model.safetensors or, past `max_bytes`, shards and their index. A larger tensor gets a shard alone.

    All ranks call it; `folder` is None on those that do not write.
    """
    shards: list[list[Piece]] = [[]]
    sizes = [0]
    for piece in wanted:
        size = torch.Size(piece.shape).numel() * parameters[piece.parameter].element_size()
        if shards[-1] and sizes[-1] + size > max_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(piece)
        sizes[-1] += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder and folder / name, shard, parameters, parallel)
    if folder and count > 1:
        weight_map = {piece.name: name for piece_list, name in zip(shards, names, strict=True) for piece in piece_list}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path | None, shard: Iterable[Piece], parameters: Mapping[str, Tensor], parallel: Parallel
) -> None:
    """Rows of one fused parameter lie in one storage, which safetensors refuses: they are copied, a shard at a time.
    Older Transformers refuse a file whose metadata lacks the format.
    """
    tensors: dict[str, Tensor] = {}
    for piece in shard:
        whole = block(piece, parameters[piece.parameter], parallel).whole(parallel)
        if path:
            tensors[piece.name] = whole.to("cpu", copy=True)
    if path:
        save_file(tensors, path, metadata={"format": "pt"})
