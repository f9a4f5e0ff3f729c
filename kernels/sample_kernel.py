"""The kernels of sample.py: one reading of the logits, and a program per row that finds the token.

1. A program per block of a row writes the block's largest logit and its sum of exp((logit - largest) / temperature).
2. A program per row merges them, finds the block in which the running sum passes uniform * total, reads that one again
   and finds the token in it.

A row with a limit searches its threshold in between, without sorting: the largest value that k tokens, or the mass of
the nucleus, lie at or above. Each pass over the row, by then in the L2 cache, measures what lies at or above a few
pivots and goes on between two of them, until one token is left there, or one value that several share. The pivots part
the floats evenly, not the line, so that takes at most log(2**16) / log(PIVOTS + 1) passes for 16-bit logits and twice
as many for float32. A row without limits skips it all.
"""

# It reads Triton's language as Python.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.launch import config
from bylaw.kernels.softmax import LOG2_E

# How far apart the bits of neighbours are when the dtype's numbers stand in float32.
STEPS = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}
# A weight under 2**-126 counts as 0: so devices with and without subnormal numbers agree on what can be drawn.
LEAST: tl.constexpr = tl.constexpr(-126.0)
LOWEST_KEY: tl.constexpr = tl.constexpr(-0x7F800000)  # of -inf


@triton.jit
def _exponent_scale(temperature):
    """log2(e) / temperature, so bounded that neither 0 * it nor -inf * it is NaN."""
    return LOG2_E / tl.minimum(tl.maximum(temperature, 2.0**-125), 2.0**125)


@triton.jit
def _weight(logits, largest, scale, least):
    """exp((logits - largest) / temperature): up to 1, and 0 where it is below 2**least."""
    exponent = (logits - largest) * scale
    return tl.where(exponent >= least, tl.exp2(exponent), 0.0)


@triton.jit
def _block(logits, start, SIZE, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(logits + columns, columns < SIZE, other=-float("inf")).to(tl.float32)


@triton.jit
def _crossing(weights, target, LENGTH: tl.constexpr):
    """Where the running sum of `weights` [LENGTH] passes `target`, and the sum before; never at a weight of 0.

    However the sums are rounded: where none passes, the last weight above 0 is the one.
    """
    sums, index, some = tl.cumsum(weights, 0), tl.arange(0, LENGTH), weights > 0
    first = tl.min(tl.where(some & (sums > target), index, LENGTH), 0)
    last = tl.max(tl.where(some, index, 0), 0)
    place = tl.where(first < LENGTH, first, last)
    return place, tl.sum(tl.where(index < place, weights, 0.0), 0)


@triton.jit
def _key(value):
    """The bits of a float32 as a number in the same order: that of -x is minus that of x."""
    magnitude = tl.abs(value).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(value < 0, -magnitude, magnitude)


@triton.jit
def _value(key):
    magnitude = tl.abs(key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)


@triton.jit
def _at_or_above(logits, SIZE, largest, scale, pivots, MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """How many logits are at or above each of `pivots` [PIVOTS], or (MASS) their mass. Falls as a pivot rises."""
    found = tl.zeros([PIVOTS, BLOCK], tl.float32)  # summed once, at the end; counts are exact up to 2**24 tokens
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        values = tl.load(logits + columns, columns < SIZE, other=-float("inf")).to(tl.float32)
        weights = 1.0
        if MASS:
            weights = _weight(values, largest, scale, LEAST)
        found += tl.where(values >= pivots[:, None], weights, 0.0)
    return tl.sum(found, 1)


@triton.jit
def _search(
    logits, SIZE, largest, scale, low, goal, MASS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """A key down to which there is `goal` (tokens, or mass), and what is above the token or tie that makes it full.

    The key is that of the tie, or lies at the token or between it and the next lower. `low` is a key known to have the
    goal at or above it; a logit's key is a multiple of STEP. What is left from the key low to below high weighs
    reaching - above: under 1.5 times the least weight of a token in there, it is a single one.
    """
    high, above, reaching, least = _key(largest) + STEP, 0.0, float("inf"), 1.0
    while (high - low > STEP) & (reaching - above > 1.5 * least):
        parts = tl.arange(0, PIVOTS).to(tl.int64) + 1
        keys = low + (high - low) // STEP * parts // (PIVOTS + 1) * STEP
        found = _at_or_above(logits, SIZE, largest, scale, _value(keys), MASS, BLOCK, PIVOTS)
        reached = found >= goal
        above = tl.maximum(above, tl.max(tl.where(reached, 0.0, found), 0))
        reaching = tl.minimum(reaching, tl.min(tl.where(reached, found, float("inf")), 0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, keys), 0))
        low = tl.maximum(low, tl.max(tl.where(reached, keys, low), 0))
        if MASS:
            least = _weight(_value(low), largest, scale, LEAST)
    return low, above


@triton.jit
def _kept(logits, SIZE, largest, scale, least, threshold, ties, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The mass that is kept in each block, and the logits equal to `threshold` before it: two [BLOCKS].

    Kept are the logits above `threshold` and the first `ties` of those equal to it, but for weights under 2**least.
    """
    index, tie = tl.arange(0, BLOCKS), _weight(threshold, largest, scale, least)
    masses, ties_before, seen = tl.zeros([BLOCKS], tl.float64), tl.zeros([BLOCKS], tl.float32), 0.0
    for start in range(0, SIZE, BLOCK):
        values = _block(logits, start, SIZE, BLOCK)
        above = tl.sum(tl.where(values > threshold, _weight(values, largest, scale, least), 0.0), 0)
        tied = tl.sum((values == threshold).to(tl.float32), 0)
        mass = above + tie * tl.minimum(tl.maximum(ties - seen, 0.0), tied)
        masses = tl.where(index == start // BLOCK, mass.to(tl.float64), masses)
        ties_before = tl.where(index == start // BLOCK, seen, ties_before)
        seen += tied
    return masses, ties_before


@triton.jit
def _limits(
    logits, SIZE, largest, scale, total, k, p, STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """What all logits that top-k and top-p keep are above; of those equal to it they keep so many, by lower index."""
    lowest = tl.full((), LOWEST_KEY, tl.int64)
    threshold, ties = lowest, 0.0
    if (k > 0) & (k < SIZE):
        threshold, above = _search(logits, SIZE, largest, scale, lowest, k.to(tl.float32), False, STEP, BLOCK, PIVOTS)
        ties = k.to(tl.float32) - above
        if p < 1:
            masses, _ = _kept(logits, SIZE, largest, scale, LEAST, _value(threshold), ties, BLOCK, BLOCKS)
            total = tl.sum(masses, 0).to(tl.float32)
    if p < 1:
        # SIZE logits of the weight (1 - p) * total / SIZE would hold what the nucleus leaves, so none of it is lower;
        # by half of that, rounding does not matter.
        reach = tl.log2(2.0 * SIZE / ((1 - p) * total)) / scale
        low = tl.maximum(threshold, _key(largest - reach) & -STEP)
        nucleus, above = _search(logits, SIZE, largest, scale, low, p * total, True, STEP, BLOCK, PIVOTS)
        room = tl.ceil((p * total - above) / _weight(_value(nucleus), largest, scale, LEAST))
        room = tl.where(room > 1, room, 1.0)
        ties = tl.where(nucleus > threshold, room, tl.minimum(ties, room))
        threshold = nucleus
    return _value(threshold), ties


@triton.jit
def _blocks_kernel(logits, stride, temperature, tops, sums, SIZE, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(SIZE, BLOCK)
    row = program // blocks
    heat = tl.load(temperature + row).to(tl.float32)
    scale = _exponent_scale(tl.where(heat == 0, 1.0, heat))
    values = _block(logits + row.to(tl.int64) * stride, program % blocks * BLOCK, SIZE, BLOCK)
    top = tl.max(values, 0)
    pivot = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    tl.store(tops + program, top)
    tl.store(sums + program, tl.sum(tl.exp2((values - pivot) * scale), 0))


@triton.jit
def _rows_kernel(
    logits, stride, uniforms, temperature, top_k, top_p, min_p, tops, sums, tokens, logprobs, SIZE,
    STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    uniform = tl.load(uniforms + row).to(tl.float64)
    heat = tl.load(temperature + row).to(tl.float32)
    k, p, m = tl.load(top_k + row).to(tl.int64), tl.load(top_p + row).to(tl.float32), 0.0
    if min_p is not None:
        m = tl.load(min_p + row).to(tl.float32)
    greedy = heat == 0
    scale = _exponent_scale(tl.where(greedy, 1.0, heat))

    blocks = tl.arange(0, BLOCKS)
    there = blocks < tl.cdiv(SIZE, BLOCK)
    entry = row * tl.cdiv(SIZE, BLOCK) + blocks
    top = tl.load(tops + entry, there, other=-float("inf"))
    largest = tl.max(top, 0)
    masses = tl.load(sums + entry, there, other=0.0).to(tl.float64) * _weight(top, largest, scale, LEAST)
    total = tl.sum(masses, 0)
    # A NaN or an infinity made the total NaN; it is 0 when every token is banned.
    good = (total > 0) & (total < float("inf")) & (uniform >= 0) & (uniform < 1) & (heat >= 0) & (heat < float("inf"))
    good &= (k >= 0) & (p > 0) & (p <= 1) & (m >= 0) & (m <= 1)

    least, threshold, ties, ties_before = LEAST, -float("inf"), 0.0, tl.zeros([BLOCKS], tl.float32)
    limited = good & ~greedy & (((k > 0) & (k < SIZE)) | (p < 1) | (m > 0))
    if limited:
        threshold, ties = _limits(logits, SIZE, largest, scale, total.to(tl.float32), k, p, STEP, BLOCK, BLOCKS, PIVOTS)
        least = tl.minimum(tl.log2(tl.maximum(m, 2.0**-126)), 0.0)  # at most 0: the likeliest token stays
        masses, ties_before = _kept(logits, SIZE, largest, scale, least, threshold, ties, BLOCK, BLOCKS)
        total = tl.sum(masses, 0)

    target = tl.where(greedy, 0.0, uniform * total)
    block, before = _crossing(tl.where(greedy, (top == largest).to(tl.float64), masses), target, BLOCKS)
    values = _block(logits, block * BLOCK, SIZE, BLOCK)
    weights = _weight(values, largest, scale, least)
    if limited:
        tied = values == threshold
        rank = tl.cumsum(tied.to(tl.int32), 0) + tl.sum(tl.where(blocks == block, ties_before, 0.0), 0)
        weights = tl.where((values > threshold) | (tied & (rank <= ties)), weights, 0.0)
    weights = tl.where(greedy, (values == largest).to(tl.float32), weights).to(tl.float64)
    place, _ = _crossing(weights, target - before, BLOCK)
    chosen = tl.sum(tl.where(tl.arange(0, BLOCK) == place, values, 0.0), 0)
    divisor = tl.where(greedy, 1.0, tl.maximum(heat, 2.0**-125)).to(tl.float64)
    logprob = (chosen - largest).to(tl.float64) / divisor - tl.log(total)
    tl.store(tokens + row, tl.where(good, block * BLOCK + place, -1))
    tl.store(logprobs + row, tl.where(good, logprob, float("nan")).to(tl.float32))


@torch.library.custom_op("bylaw::sample", mutates_args=())
def sample_rows(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`sample` on its arguments, checked for their shapes: tokens and log-probs [B]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, logprobs = _outputs(logits)
    if len(logits):
        _launch(logits, tokens, logprobs, (uniforms, temperature, top_k, top_p, min_p))
    return tokens, logprobs


def _launch(logits: Tensor, tokens: Tensor, logprobs: Tensor, settings: tuple[Tensor | None, ...]) -> None:
    uniforms, temperature, top_k, top_p, min_p = (None if x is None else x.contiguous() for x in settings)
    rows, size = logits.shape
    table = config("sample", logits.device)
    blocks = triton.cdiv(size, table["BLOCK"])
    tops = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops)
    _blocks_kernel[(rows * blocks,)](
        logits, logits.stride(0), temperature, tops, sums, size, BLOCK=table["BLOCK"], **table["blocks"]
    )
    _rows_kernel[(rows,)](
        logits, logits.stride(0), uniforms, temperature, top_k, top_p, min_p, tops, sums, tokens, logprobs, size,
        STEP=STEPS[logits.dtype], BLOCK=table["BLOCK"], BLOCKS=triton.next_power_of_2(blocks), **table["rows"],
    )  # fmt: skip


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits), dtype=torch.float32)


@sample_rows.register_fake
def _(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _outputs(logits)
