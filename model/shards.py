"""What a rank holds of a checkpoint: its block of each Hugging Face tensor, and the whole of it put together again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import Parallel
from bylaw.model.sharding import data_dim, is_shared_out, local, tensor_dim
from bylaw.model.transformer import Transformer
from bylaw.model.weights import Piece, pieces


@dataclass(frozen=True)
class Block:
    """A rank's block of a tensor, a view of its memory; and along which dimension each axis of the mesh cuts the
    tensor, None for not at all.
    """

    tensor: Tensor
    by_data: int | None
    by_tensor: int | None

    def places(self, parallel: Parallel) -> tuple[slice, ...]:
        """Where the block lies in the whole tensor."""
        ranks = {self.by_data: parallel.data_rank, self.by_tensor: parallel.tensor_rank}
        starts = [ranks.get(dim, 0) * size for dim, size in enumerate(self.tensor.shape)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.tensor.shape, strict=True))

    def spread(self, parallel: Parallel) -> Tensor:
        """The block as a part of the whole tensor, in torch's terms: a DTensor, or a plain tensor in one process."""
        if parallel.alone:
            return self.tensor
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, kind = parallel.mesh, self.tensor.device.type
        if kind != mesh.device_type:  # a copy on the CPU, which DTensor would move back to the GPU
            mesh = DeviceMesh(kind, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
        placements = [Replicate() if dim is None else Shard(dim) for dim in (self.by_data, self.by_tensor)]
        return DTensor.from_local(self.tensor, mesh, placements, run_check=False)

    def whole(self, parallel: Parallel) -> Tensor:
        """The whole tensor, on every rank; all ranks call it together."""
        spread: Any = self.spread(parallel)
        return spread if parallel.alone else spread.full_tensor()


def block(piece: Piece, tensor: Tensor, parallel: Parallel) -> Block:
    """This rank's block of `piece`, in `tensor`: the piece's parameter, or an optimiser's state of the same layout."""
    by_tensor = tensor_dim(piece.parameter) if parallel.tensor_ranks > 1 else None
    by_data = data_dim(piece.parameter, len(piece.shape)) if is_shared_out(tensor) else None
    view, start, rows = local(tensor.detach()), piece.start, piece.shape[0]
    if by_tensor == 0:
        start, rows = start // parallel.tensor_ranks, rows // parallel.tensor_ranks
    if by_data == 0:  # never a fused parameter
        rows = len(view)
    return Block(view[start : start + rows], by_data, by_tensor)


def all_pieces(model: nn.Module, prefix: str = "") -> Iterator[Piece]:
    """Every parameter of `model`: under its Hugging Face names where it has such, else as it is."""
    listed: list[Piece] = []
    if isinstance(model, ScalarModel):
        listed = pieces(model.trunk.config, "ForSequenceClassification")
    elif isinstance(model, Transformer):
        listed = pieces(model.config)
    else:
        for name, child in model.named_children():
            yield from all_pieces(child, f"{prefix}{name}.")
    known = {piece.parameter for piece in listed}
    rest = model.named_parameters(recurse=bool(listed))
    listed += [Piece(name, name, 0, tuple(p.shape)) for name, p in rest if name not in known]
    for piece in listed:
        yield Piece(prefix + piece.name, prefix + piece.parameter, piece.start, piece.shape)


@torch.no_grad()
def fill(piece: Piece, parameters: Mapping[str, Tensor], whole: Tensor, parallel: Parallel) -> None:
    """Copy this rank's block of `whole` into its parameter."""
    mine = block(piece, parameters[piece.parameter], parallel)
    mine.tensor.copy_(whole[mine.places(parallel)])
