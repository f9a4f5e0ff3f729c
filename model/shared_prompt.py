"""A packed stream in which the tokens that several sequences begin with are there once, with gradient.

Of a group of sequences that begin alike, as a prompt with two answers, the stream holds [common | rest a | rest b]: all
but attention runs once on the common part. Attention is what it would be on the sequences in full. There are two ways
to it: a dense call under a mask, the faster one on a CPU, and any backend's own on keys and values copied out in full.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bylaw.kernels.attention import Layout, attention, plan
from bylaw.kernels.dense_attention import hiding
from bylaw.kernels.rope import rope
from bylaw.kernels.upload import upload

COMMON = 0  # branch of a group's common part; those of its sequences are 1, 2 ...


@dataclass(frozen=True)
class InFull:
    """Attention on the sequences laid out in full."""

    source: Tensor  # [T] int64, where in the stream each of their tokens is
    first: Tensor  # [U] int64, the first place of each of the stream's tokens among theirs
    layout: Layout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        # Backward sums the copies; of two, as pairs have, to the same bits whichever comes first.
        q, k, v = (x.index_select(0, self.source) for x in (q, k, v))
        return attention(q, k, v, self.layout, window).index_select(0, self.first)


@dataclass(frozen=True)
class Masked:
    """Attention within each group under a mask that hides its sequences from each other."""

    branches: Tensor  # [U] int64
    positions: Tensor  # [U] int64
    lengths: list[int]  # of the groups
    biases: dict[tuple[int, torch.dtype], list[Tensor]] = field(default_factory=dict)  # filled by the first layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        groups = zip(*(x.split(self.lengths) for x in (q, k, v)), self._biases(q, window), strict=True)
        return torch.cat([_under(*group) for group in groups])

    def _biases(self, q: Tensor, window: int) -> list[Tensor]:
        if (window, q.dtype) not in self.biases:
            groups = zip(self.branches.split(self.lengths), self.positions.split(self.lengths), strict=True)
            self.biases[window, q.dtype] = [hiding(_seen(*group, window), q) for group in groups]
        return self.biases[window, q.dtype]


def _seen(branch: Tensor, position: Tensor, window: int) -> Tensor:
    """[U, U] of a group, which keys each query sees."""
    distance = position[:, None] - position
    within = (branch == COMMON) | (branch[:, None] == branch)
    return within & (distance >= 0) & (distance < (window or len(position)))


def _under(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, U, D]
    out = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@dataclass(frozen=True)
class Shared:
    """A stream of U tokens that stands for B sequences of T tokens in all."""

    tokens: Tensor  # [U] int64
    positions: Tensor  # [U] int64, within each sequence
    cu_seqlens: Tensor  # [B + 1] int64, of the sequences in full
    source: Tensor  # [T] int64, where in the stream each token of the sequences is
    mix: InFull | Masked
    wanted: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], window: int) -> Tensor:
        """Rotate q and k, and attend causally within each sequence."""
        return self.mix(*rope(q, k, *rotary), v, window)

    @property
    def trains(self) -> bool:
        """Blocks run on it as they are prepared for training (model/prepare.py)."""
        return True

    @property
    def last(self) -> Tensor:
        """Places [B] of each sequence's last token in the stream."""
        return self.source[self.cu_seqlens[1:] - 1]

    def asking(self, wanted: Tensor) -> "Shared":
        """This stream, of which only the hidden states at the places `wanted` are asked for; one may come twice."""
        return dataclasses.replace(self, wanted=wanted)


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of `ids`, whose sequence stands at `place` of the sequences in full."""

    ids: Sequence[int]
    start: int
    stop: int
    branch: int
    place: int


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of `sequences` begin with."""
    first, *others = sequences
    length = min(map(len, sequences))
    for other in others:
        length = next((i for i in range(length) if first[i] != other[i]), length)
    return length


def pack_shared(
    groups: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu", masked: bool | None = None
) -> Shared:
    """Lay out groups of sequences; the tokens that all of a group begin with are there once.

    `masked` says how attention is done (`Masked` or `InFull`); None chooses by the device. Raises ValueError for no
    groups, an empty group, and an empty sequence, which would have no last token.
    """
    _check(groups)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(len(ids) for group in groups for ids in group)])
    pieces = _pieces(groups, cu_seqlens.tolist())
    tokens = torch.tensor([token for p in pieces for token in p.ids[p.start : p.stop]])
    positions = torch.tensor([n for p in pieces for n in range(p.start, p.stop)])
    first = torch.tensor([n for p in pieces for n in range(p.place + p.start, p.place + p.stop)])
    source = torch.tensor(_source(pieces))
    device = torch.device(device)
    mix: InFull | Masked
    if device.type == "cpu" if masked is None else masked:
        branches = torch.tensor([p.branch for p in pieces for _ in range(p.start, p.stop)])
        mix = Masked(upload(branches, device), upload(positions, device), _lengths(pieces))
    else:
        mix = InFull(upload(source, device), upload(first, device), plan(cu_seqlens, device))
    tokens, positions, cu_seqlens, source = (upload(x, device) for x in (tokens, positions, cu_seqlens, source))
    return Shared(tokens, positions, cu_seqlens, source, mix)


def _pieces(groups: Sequence[Sequence[Sequence[int]]], places: list[int]) -> list[_Piece]:
    """Of each group what is common, and then the rest of each sequence."""
    pieces, at = [], 0
    for group in groups:
        common = common_length(group)
        pieces.append(_Piece(group[0], 0, common, COMMON, places[at]))
        for branch, ids in enumerate(group, 1):
            pieces.append(_Piece(ids, common, len(ids), branch, places[at]))
            at += 1
    return pieces


def _source(pieces: list[_Piece]) -> list[int]:
    source: list[int] = []
    shared, begin = range(0), 0
    for piece in pieces:
        own = range(begin, begin + piece.stop - piece.start)
        begin = own.stop
        if piece.branch == COMMON:
            shared = own
        else:
            source += [*shared, *own]
    return source


def _lengths(pieces: list[_Piece]) -> list[int]:
    """Of the groups in the stream."""
    lengths: list[int] = []
    for piece in pieces:
        if piece.branch == COMMON:
            lengths.append(0)
        lengths[-1] += piece.stop - piece.start
    return lengths


def _check(groups: Sequence[Sequence[Sequence[int]]]) -> None:
    if not groups:
        raise ValueError("cannot pack: no groups of sequences")
    for number, group in enumerate(groups):
        if not group or not all(len(ids) for ids in group):
            what = f"a sequence of no tokens among its {len(group)}" if group else "no sequences"
            raise ValueError(
                f"cannot pack: group {number} has {what}; allowed: one sequence or more, none of them empty"
            )
