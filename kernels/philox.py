"""Randomness as a function: uniform draws from the counter-based generator Philox4x32-10.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3. A draw depends on nothing but (seed,
request, position, stream), so it is the same in any batch, after a restart, and on any number of processes. The words
are those of Random123 and of `tl.philox(seed, c0, c1, c2, c3)`: key = (low, high word of the seed), counter =
(position, stream, low, high word of the request).
"""

import hashlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import config

WORD = 0xFFFFFFFF  # the largest 32-bit word, also the mask
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PERMUTATION_STREAM = WORD  # kept from callers of uniform, so a shuffle shares no draw with a sample


def philox4x32(key: Tensor, counters: Tensor) -> Tensor:
    """Ten rounds of Philox on 32-bit words held in int64.

    `key` [..., 2] and `counters` [..., 4] hold words from 0 to 2**32 - 1 and broadcast against each other. The result
    [..., 4] has the same form.
    """
    multipliers = torch.tensor(MULTIPLIERS, device=key.device)
    steps = torch.arange(ROUNDS, device=key.device)[:, None] * torch.tensor(KEY_STEPS, device=key.device)
    even, odd = counters[..., 0::2], counters[..., 1::2]  # (c0, c2), (c1, c3)
    for round_key in (key[..., None, :] + steps & WORD).unbind(-2):
        # The product wraps past 2**63, which leaves its 64 bits right; shift and mask read them as if unsigned.
        product = (even * multipliers).flip(-1)
        even, odd = (product >> 32 & WORD) ^ odd ^ round_key, product & WORD
    return torch.stack(torch.broadcast_tensors(even, odd), dim=-1).flatten(-2)


def uniform(seed: Tensor, request: Tensor, position: Tensor, stream: int = 0, backend: str = "auto") -> Tensor:
    """Draws in [0, 1) in steps of 2**-24, float32 [B], for `seed`, `request` and `position` [B] (int64).

    The three may have any shapes that broadcast, as [B, 1], [B, 1] and [S] to draw S positions ahead in one go. All 64
    bits of seed and request count, and the low 32 of position. `stream` tells apart purposes that share the rest.
    The kernel and the reference give the same bits. Raises ValueError for tensors that are not of integers, a stream
    that is not in 0 to 2**32 - 2, and a backend that cannot run there.
    """
    _check_stream(stream)
    for name, part in (("seed", seed), ("request", request), ("position", position)):
        if part.is_floating_point() or part.is_complex():
            raise ValueError(f"{name} has the dtype {part.dtype}; allowed: integers")
    seed, request, position = torch.broadcast_tensors(seed.long(), request.long(), position.long())
    if choose("uniform", backend, seed) == "triton":
        return _uniform(seed, request, position, stream)
    return reference(seed, request, position, stream)


def reference(seed: Tensor, request: Tensor, position: Tensor, stream: int) -> Tensor:
    """`uniform` in plain torch, on int64 tensors of one shape."""
    key = torch.stack((seed & WORD, seed >> 32 & WORD), dim=-1)
    words = (position & WORD, torch.full_like(position, stream), request & WORD, request >> 32 & WORD)
    drawn = philox4x32(key, torch.stack(words, dim=-1))[..., 0]
    return (drawn >> 8).float() * 2.0**-24  # 24 bits: all that float32 holds without ever rounding up to 1


@triton.jit(do_not_specialize=["size", "stream"])
def _uniform_kernel(seed, request, position, draws, size, stream, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    named, place = tl.load(request + at, inside, other=0), tl.load(position + at, inside, other=0)
    c0, c1 = place.to(tl.int32), (tl.zeros([BLOCK], tl.int64) + stream).to(tl.int32)
    c2, c3 = named.to(tl.int32), (named >> 32).to(tl.int32)
    word, _, _, _ = tl.philox(tl.load(seed + at, inside, other=0), c0, c1, c2, c3)
    tl.store(draws + at, (word >> 8).to(tl.float32) * 5.9604644775390625e-08, inside)  # 2**-24


@torch.library.custom_op("bylaw::uniform", mutates_args=())
def _uniform(seed: Tensor, request: Tensor, position: Tensor, stream: int) -> Tensor:
    draws = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    if draws.numel():
        keys = (seed.contiguous(), request.contiguous(), position.contiguous())
        settings = config("uniform", seed.device)
        grid = (triton.cdiv(draws.numel(), settings["BLOCK"]),)
        _uniform_kernel[grid](*keys, draws, draws.numel(), stream, **settings)
    return draws


@_uniform.register_fake
def _(seed: Tensor, request: Tensor, position: Tensor, stream: int) -> Tensor:
    return torch.empty(seed.shape, dtype=torch.float32, device=seed.device)


def uniform_scalar(seed: int, request: int, position: int, stream: int = 0) -> float:
    """The draw of `uniform` for one row of plain integers, without a tensor. ValueError for a seed past 64 bits."""
    _check_stream(stream)
    _check_int64(seed=seed, request=request)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    c0, c1, c2, c3 = position & WORD, stream, request & WORD, request >> 32 & WORD
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & WORD, first >> 32 ^ c3 ^ k1, first & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return (c0 >> 8) * 2.0**-24


def request_id(*parts: str | int) -> int:
    """A number from 0 to 2**63 - 1 that names these parts, in this order, on every machine and Python.

    Each part is hashed with its type and length, so ("ab", "c") and ("a", "bc"), or 1 and "1", differ. Raises
    ValueError without parts, and for a part that is neither text nor a whole number.
    """
    if not parts:
        raise ValueError("request_id() got no parts; give at least one text or whole number")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise ValueError(f"request_id() got {part!r} ({type(part).__name__}); allowed: text and whole numbers")
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "big") >> 1


def permutation(seed: int, n: int, epoch: int) -> Tensor:
    """The numbers 0 to n - 1 shuffled by (seed, epoch): int64 [n] on the CPU. ValueError for n past 32 bits."""
    _check_int64(seed=seed, epoch=epoch)
    if not 0 <= n <= WORD:
        raise ValueError(f"permutation() got n = {n}; allowed: 0 to {WORD}")
    key = torch.tensor((seed & WORD, seed >> 32 & WORD))
    counters = torch.tensor((0, PERMUTATION_STREAM, epoch & WORD, epoch >> 32 & WORD)).repeat(n, 1)
    counters[:, 0] = torch.arange(n)
    words = philox4x32(key, counters)
    draws = words[:, 0] << 31 | words[:, 1] >> 1  # 63 bits: next to no ties
    return torch.argsort(draws, stable=True)


def _check_stream(stream: int) -> None:
    if not 0 <= stream < PERMUTATION_STREAM:
        raise ValueError(f"stream is {stream}; allowed: 0 to {PERMUTATION_STREAM - 1}")


def _check_int64(**values: int) -> None:
    for name, value in values.items():
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {value}; allowed: a 64-bit number, -2**63 to 2**63 - 1")
