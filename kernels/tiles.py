"""How the attention kernels walk a packed stream: which tile a program has, what it sees, how its rows are loaded."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.launch import accumulator, config, operand
from bylaw.kernels.layout import TILE


def launch(
    table: str, kernel: triton.JITFunction, heads: int, tiles: Tensor, q: Tensor, *others: Any, **flags: Any
) -> None:
    """Run `kernel` with a program for each block of each tile and for each of `heads`, by the launch settings `table`.

    A program holds BLOCK rows and walks the other side's STEP at a time. SCALE makes of a query's product with a key
    the exponent of 2.
    """
    size = q.shape[2]
    padded = max(16, triton.next_power_of_2(size))
    settings = config(table, q.device, head_dim=padded, itemsize=q.element_size())
    assert TILE % settings["BLOCK"] == 0, f"{table}: blocks of {settings['BLOCK']} do not fill tiles of {TILE}"
    grid = (tiles.shape[0] * (TILE // settings["BLOCK"]), heads)
    if grid[0] and heads:
        kernel[grid](
            q, *others, D=size, BLOCK_D=padded, TILE=TILE, SCALE=size**-0.5 / math.log(2), ACC=accumulator(q.dtype),
            OPERAND=operand(q.dtype), **flags, **settings,
        )  # fmt: skip


def reach(window: int) -> int:
    """How far back a window lets a query see: 0 is as far as there is, and small enough to be added to in int32."""
    return min(window or 2**30, 2**30)


@triton.jit
def place(tiles, cu_seqlens, FROM_END, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sequence (its start in the stream, its length) and the first of its BLOCK rows in there.

    A sequence's last tile may have blocks with no row in it: their programs have nothing to do.
    """
    program = tl.program_id(0)
    entry = tiles + program // (TILE // BLOCK) * 2
    sequence, tile = tl.load(entry), tl.load(entry + 1)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    if FROM_END:
        tile = (length + TILE - 1) // TILE - 1 - tile
    return start.to(tl.int64), length, tile * TILE + program % (TILE // BLOCK) * BLOCK


@triton.jit
def keys_of(first, length, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The blocks of KEYS keys that QUERIES rows from `first` on see.

    Returns (whole, wholes, near, nears, far, masked): `wholes` blocks from `whole` on are seen entirely. `masked` more
    need a mask: `nears` from `near` on, where the window begins, and then those from `far` on, around the diagonal.
    """
    far = first // KEYS * KEYS
    near = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    whole = (tl.maximum(first + QUERIES - window, 0) + KEYS - 1) // KEYS * KEYS
    whole = tl.maximum(tl.minimum(whole, far), near)
    nears = (whole - near) // KEYS
    fars = (tl.minimum(first + QUERIES, length) - far + KEYS - 1) // KEYS
    return whole, (far - whole) // KEYS, near, nears, far, nears + fars


@triton.jit
def queries_of(first, length, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The blocks of QUERIES queries that see KEYS rows from `first` on, as `keys_of` has them: `near` is the diagonal
    here, and `far` where the window ends.
    """
    end = tl.minimum(first + KEYS - 1 + window, length)
    whole = tl.minimum(first + (KEYS + QUERIES - 1) // QUERIES * QUERIES, end)
    far = tl.minimum(tl.maximum(first + window // QUERIES * QUERIES, whole), end)
    nears = (whole - first + QUERIES - 1) // QUERIES
    fars = (end - far + QUERIES - 1) // QUERIES
    return whole, (far - whole + QUERIES - 1) // QUERIES, first, nears, far, nears + fars


@triton.jit
def block_at(turn, near, nears, far, STEP: tl.constexpr):
    """Where the `turn`th block begins: `nears` of them stand from `near` on, and then the others from `far` on."""
    return tl.where(turn < nears, near + turn * STEP, far + (turn - nears) * STEP)


@triton.jit
def sees(queries, keys, window):
    """Whether each query sees each key, by their places in the sequence."""
    return (keys <= queries) & (queries - keys < window)


@triton.jit
def load_rows(pointer, first, stride, left, WHOLE, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] from row `first` on, of which `left` exist, or all if WHOLE; zero beyond them and beyond D.

    `first` is int64, and so are all offsets: compilers keep fewer registers for them than for 32-bit ones.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + ((first + rows) * stride + columns)
    if WHOLE and D == BLOCK_D:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, columns < D, other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers, rows < left, other=0.0)
    return tl.load(pointers, (rows < left) & (columns < D), other=0.0)


@triton.jit
def store_rows(pointer, first, stride, left, value, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_rows`."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + ((first + rows) * stride + columns)
    tl.store(pointers, value.to(pointer.dtype.element_ty), (rows < left) & (columns < D))
