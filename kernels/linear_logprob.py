"""Log-prob, entropy and log-normaliser of given tokens straight from hidden states, without gradient.

With z = W h / t: logprob = z_y - log sum exp z, entropy = -sum p log p of p = softmax(z). The kernels never write
logits to memory: each tile of tokens x vocabulary ends as three numbers per token (kernels/softmax.py), and a second
kernel merges a token's tiles in a fixed order. So a token's result depends on nothing else in the batch.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bylaw.kernels import softmax
from bylaw.kernels.backend import choose, inference_only
from bylaw.kernels.launch import Config, accumulator, config, operand, start
from bylaw.kernels.softmax import IGNORED, add_logits, add_states, exponent_scale, finish

LOGITS_BYTES = 512 * 2**20


class LogProbs(NamedTuple):
    """Per token [T], float32 (float64 for float64 input), in nats."""

    logprobs: Tensor
    entropy: Tensor
    log_normalizer: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    backend: str = "auto",
) -> LogProbs:
    """Under softmax(`hidden` [T, H] @ `weight` [V, H].T / temperature): log-prob of `targets` [T], entropy, normaliser.

    The log-normaliser is log sum exp(logits / temperature). The log-prob of a target of -100 is 0. The kernels keep
    logits in float32, the reference in the dtype that the product has, in chunks of at most `logits_bytes` of float32.

    Raises ValueError for shapes or dtypes that do not fit, an input that requires grad, a temperature that is not above
    0, a backend that cannot run there, and a target outside 0 to V - 1; on a GPU, where that would have to wait, such a
    log-prob is NaN.
    """
    _check(hidden, weight, targets, temperature)
    if choose("linear_logprob", backend, hidden) == "reference":
        return reference(hidden, weight, targets, temperature, logits_bytes)
    return LogProbs(*_launch(hidden, weight, targets, temperature))


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, logits_bytes: int = LOGITS_BYTES
) -> LogProbs:
    """`linear_logprob` in plain torch."""
    chunk = max(1, logits_bytes // (4 * len(weight)))
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    columns = zip(*(_chunk(F.linear(h, weight), y, temperature) for h, y in pieces), strict=True)
    return LogProbs(*(torch.cat(column) for column in columns))


def _chunk(logits: Tensor, targets: Tensor, temperature: float) -> LogProbs:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(softmax.tempered(logits, temperature), dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)  # 0 where p is 0, also where log p is -inf
    return LogProbs(softmax.picked(log_p, targets), entropy, torch.logsumexp(logits / temperature, dim=-1))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight have the shapes {shapes}; allowed: [T, H] and [V, H], V at least 1")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight are {hidden.dtype} and {weight.dtype}; allowed: one floating-point dtype")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        kind = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets are {kind}; allowed: torch.int64 ({len(hidden)},), one for each row of hidden")
    inference_only("linear_logprob", hidden, weight)
    softmax.check_temperature(temperature)
    softmax.check_targets(targets, len(weight))


@triton.jit(do_not_specialize=["TOKENS"])
def _tile_kernel(
    hidden,
    weight,
    targets,
    partials,
    chosen,
    TOKENS,
    VOCABULARY,
    SIZE,
    hidden_stride,
    weight_stride,
    temperature: np.float64,
    DESCRIPTORS: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`partials` [3, V tiles, T]: the state of each token in each tile. `chosen` [T]: the target's logit."""
    token_tile, tile = _place(tl.cdiv(TOKENS, BLOCK_T), tl.cdiv(VOCABULARY, BLOCK_V), GROUP)
    first_token, first_column = token_tile * BLOCK_T, tile * BLOCK_V
    tokens = first_token + tl.arange(0, BLOCK_T)
    columns = first_column + tl.arange(0, BLOCK_V)
    logits = tl.zeros((BLOCK_T, BLOCK_V), ACC)
    for depth in range(0, SIZE, BLOCK_H):
        x = _load(hidden, first_token, depth, TOKENS, SIZE, hidden_stride, DESCRIPTORS, BLOCK_T, BLOCK_H)
        w = _load(weight, first_column, depth, VOCABULARY, SIZE, weight_stride, DESCRIPTORS, BLOCK_V, BLOCK_H)
        logits = tl.dot(x.to(OPERAND), w.to(OPERAND).T, logits, input_precision="ieee", out_dtype=ACC)

    logits = tl.where((columns < VOCABULARY)[None, :], logits, float("-inf"))
    top = tl.full((BLOCK_T,), float("-inf"), ACC)
    zeros = tl.zeros((BLOCK_T,), ACC)
    scale = exponent_scale(tl.full((), temperature, ACC))
    top, total, weighted = add_logits(top, zeros, zeros, logits, scale)

    inside = tokens < TOKENS
    places = tile.to(tl.int64) * TOKENS + tokens
    part = tl.cdiv(VOCABULARY, BLOCK_V).to(tl.int64) * TOKENS
    tl.store(partials + places, top, inside)
    tl.store(partials + part + places, total, inside)
    tl.store(partials + 2 * part + places, weighted, inside)
    place = tl.load(targets + tokens, inside, other=IGNORED) - first_column
    here = tl.arange(0, BLOCK_V)[None, :] == place.to(tl.int32)[:, None]
    found = (place >= 0) & (place < tl.minimum(VOCABULARY - first_column, BLOCK_V))
    tl.store(chosen + tokens, tl.sum(tl.where(here, logits, 0.0), axis=1), inside & found)


@triton.jit
def _place(token_tiles, vocabulary_tiles, GROUP: tl.constexpr):
    """This program's tiles. GROUP tiles of tokens share each tile of the weight while both are in the L2 cache."""
    program = tl.program_id(0)
    group = program // (GROUP * vocabulary_tiles)
    members = tl.minimum(token_tiles - group * GROUP, GROUP)
    within = program % (GROUP * vocabulary_tiles)
    return group * GROUP + within % members, within // members


@triton.jit
def _load(
    matrix, row, column, ROWS, COLUMNS, stride, DESCRIPTORS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """A tile [HEIGHT, WIDTH] of a matrix. Rows outside it are arbitrary: what is made of them is dropped."""
    if DESCRIPTORS:
        tile = matrix.load([row, column])
    else:
        # The last row again, not a mask: along rows the loads need no predicate.
        rows = tl.minimum(row + tl.arange(0, HEIGHT), ROWS - 1).to(tl.int64)
        columns = column + tl.arange(0, WIDTH)
        tile = tl.load(matrix + rows[:, None] * stride + columns[None, :], (columns < COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["TOKENS"])
def _merge_kernel(
    partials,
    chosen,
    targets,
    logprobs,
    entropies,
    log_normalizers,
    TOKENS,
    VOCABULARY,
    temperature: np.float64,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOKENS_AT_ONCE: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS_AT_ONCE + tl.arange(0, TOKENS_AT_ONCE)
    inside = tokens < TOKENS
    temperature = tl.full((), temperature, ACC)
    scale = exponent_scale(temperature)
    tiles = tl.cdiv(VOCABULARY, BLOCK_V)
    part = tiles.to(tl.int64) * TOKENS
    top = tl.full((TOKENS_AT_ONCE,), float("-inf"), ACC)
    total = tl.zeros((TOKENS_AT_ONCE,), ACC)
    weighted = tl.zeros((TOKENS_AT_ONCE,), ACC)
    for first in range(0, tiles, TILES_AT_ONCE):
        tile = first + tl.arange(0, TILES_AT_ONCE)
        places = partials + tile.to(tl.int64)[None, :] * TOKENS + tokens[:, None]
        there = inside[:, None] & (tile < tiles)[None, :]
        tops = tl.load(places, there, other=float("-inf"))
        totals = tl.load(places + part, there, other=0.0)
        weighteds = tl.load(places + 2 * part, there, other=0.0)
        top, total, weighted = add_states(top, total, weighted, tops, totals, weighteds, scale)
    log_total, entropy = finish(tl.where(inside, total, 1.0), weighted)
    target = tl.load(targets + tokens, inside, other=IGNORED)
    # The tiles wrote a logit only where there is a target.
    valid = (target >= 0) & (target < VOCABULARY)
    logit = tl.load(chosen + tokens, inside & valid, other=float("nan"))
    logprob = tl.where(target == IGNORED, 0.0, (logit - top) / temperature - log_total)
    tl.store(logprobs + tokens, logprob, inside)
    tl.store(entropies + tokens, entropy, inside)
    tl.store(log_normalizers + tokens, top / temperature + log_total, inside)


@torch.library.custom_op("bylaw::linear_logprob", mutates_args=())
def _launch(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    outs = _empty_rows(hidden), _empty_rows(hidden), _empty_rows(hidden)
    hidden, weight, targets = _side_by_side(hidden), _side_by_side(weight), targets.contiguous()
    misaligned = _misaligned(hidden) or _misaligned(weight)
    settings = config("linear_logprob", hidden.device, itemsize=hidden.element_size(), misaligned=misaligned)
    merging = {name: settings.pop(name) for name in ("TOKENS_AT_ONCE", "TILES_AT_ONCE")}
    temperature, settings["ACC"] = softmax.bounded_temperature(temperature), accumulator(hidden.dtype)
    partials, chosen = _tiles(hidden, weight, targets, temperature, settings)
    start(
        _merge_kernel,
        (triton.cdiv(len(hidden), merging["TOKENS_AT_ONCE"]),),
        partials,
        chosen,
        targets,
        *outs,
        len(hidden),
        len(weight),
        temperature,
        ACC=settings["ACC"],
        BLOCK_V=settings["BLOCK_V"],
        **merging,
    )
    return outs


def _tiles(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, settings: Config
) -> tuple[Tensor, Tensor]:
    """The first kernel: `partials` and `chosen`."""
    tiles = triton.cdiv(len(weight), settings["BLOCK_V"])
    chosen = _empty_rows(hidden)
    partials = chosen.new_empty((3, tiles, len(hidden)))
    start(
        _tile_kernel,
        (triton.cdiv(len(hidden), settings["BLOCK_T"]) * tiles,),
        _matrix(hidden, settings["BLOCK_T"], settings),
        _matrix(weight, settings["BLOCK_V"], settings),
        targets,
        partials,
        chosen,
        len(hidden),
        len(weight),
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        temperature,
        OPERAND=operand(hidden.dtype),
        **settings,
    )
    return partials, chosen


def _misaligned(matrix: Tensor) -> int:
    """1 where no descriptor serves: hardware wants a start and strides of 16 bytes, above 0, and something to copy."""
    stride = matrix.stride(0) * matrix.element_size()
    return int(not matrix.numel() or stride == 0 or stride % 16 != 0 or matrix.data_ptr() % 16 != 0)


def _matrix(matrix: Tensor, height: int, settings: Config) -> Tensor | TensorDescriptor:
    if not settings["DESCRIPTORS"]:
        return matrix
    block = [height, settings["BLOCK_H"]]
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)


def _side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _empty_rows(hidden: Tensor) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(len(hidden), dtype=dtype)


@_launch.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows(hidden), _empty_rows(hidden), _empty_rows(hidden)
