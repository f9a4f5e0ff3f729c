"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Hugging Face's half-split layout.

Queries and keys turn in one launch. Autograd forbids to write into the slices of one projection that they often are, so
there are two operations: one in place for where no gradient is wanted, and one with new outputs, whose gradient is the
rotation backwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bylaw.kernels.backend import choose
from bylaw.kernels.launch import accumulator, config, start


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate each head of `q` [T, Nq, D] and `k` [T, Nk, D] by the angles of its position; returns (q, k).

    Dimension i < D/2 is paired with i + D/2, so both halves of `cos` and `sin` [T, D] hold the same angles. They get no
    gradient. `q` and `k` may be slices of one tensor, and the inputs may be overwritten: do not use them afterwards.

    Raises ValueError for shapes or dtypes that do not fit, and for a backend that cannot run there.
    """
    _check(q, k, cos, sin)
    if choose("rope", backend, q) == "reference":
        return reference(q, cos, sin), reference(k, cos, sin)
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if wants_gradient or q is k or not (_writable(q) and _writable(k)):
        return _rotated(q, k, cos, sin, False)
    _rotate(q, k, cos, sin)
    return q, k


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` of either in plain torch; cos and sin are rounded to x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1).to(x.dtype) + rotated * sin.unsqueeze(1).to(x.dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = q.ndim == k.ndim == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] and q.shape[2] % 2 == 0
    if not fits or q.dtype != k.dtype:
        raise ValueError(
            f"rope: q is {q.dtype} {tuple(q.shape)} and k is {k.dtype} {tuple(k.shape)}; allowed: [T, Nq, D] and "
            "[T, Nk, D] of one dtype, with an even D"
        )
    if cos.shape != (q.shape[0], q.shape[2]) or sin.shape != cos.shape:
        raise ValueError(
            f"rope: cos and sin have the shapes {tuple(cos.shape)} and {tuple(sin.shape)}; allowed: [T, D], here "
            f"{(q.shape[0], q.shape[2])}"
        )


def _writable(x: Tensor) -> bool:
    """Whether the kernel may write `x` in place: heads in one piece, and not one in memory for several, as expanded."""
    return x.stride(2) == 1 and min(x.stride(0), x.stride(1)) >= x.shape[2]


@triton.jit
def turned(source, cos, sin, angle, inside, HALF: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr):
    """Both halves of the heads at `source`, rotated by the angles at place `angle` of the tables."""
    first = tl.load(source, inside, other=0).to(ACC)
    second = tl.load(source + HALF, inside, other=0).to(ACC)
    c = tl.load(cos + angle, inside, other=0).to(ACC)
    s = tl.load(sin + angle, inside, other=0).to(ACC)
    if INVERSE:
        s = -s
    return first * c - second * s, second * c + first * s


@triton.jit
def _turn(
    x, out, cos, sin, token, head, d, inside, token_stride, head_stride, out_token_stride, out_head_stride,
    HALF: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    source = x + token * token_stride + head * head_stride + d
    first, second = turned(source, cos, sin, token * 2 * HALF + d, inside, HALF, INVERSE, ACC)
    target = out + token * out_token_stride + head * out_head_stride + d
    tl.store(target, first.to(out.dtype.element_ty), inside)
    tl.store(target + HALF, second.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T"])
def _kernel(
    q, k, q_out, k_out, cos, sin, T, Q_HEADS, K_HEADS, q_token, q_head, k_token, k_head,
    q_out_token, q_out_head, k_out_token, k_out_head,
    HALF: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times HEADS heads, either of q or of k. A row of the tile is one head of one token."""
    q_blocks = tl.cdiv(Q_HEADS, HEADS)
    blocks = q_blocks + tl.cdiv(K_HEADS, HEADS)
    block = tl.program_id(0) % blocks
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + row // HEADS
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < T) & (d < HALF)
    if block < q_blocks:
        head = block * HEADS + row % HEADS
        inside = inside & (head < Q_HEADS)
        _turn(q, q_out, cos, sin, token, head, d, inside, q_token, q_head, q_out_token, q_out_head, HALF, INVERSE, ACC)
    else:
        head = (block - q_blocks) * HEADS + row % HEADS
        inside = inside & (head < K_HEADS)
        _turn(k, k_out, cos, sin, token, head, d, inside, k_token, k_head, k_out_token, k_out_head, HALF, INVERSE, ACC)


@torch.library.custom_op("bylaw::rope_in_place", mutates_args=("q", "k"))
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    _launch(q, k, q, k, cos, sin, inverse=False)


@torch.library.custom_op("bylaw::rope", mutates_args=())
def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`inverse` turns by the negative angles."""
    out = _empty_like(q), _empty_like(k)
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    _launch(q, k, *out, cos, sin, inverse)
    return out


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    tokens, q_heads, size = q.shape
    if not q.numel() + k.numel():
        return
    settings = config("rope", q.device)
    # A smaller tile would be held by several threads, and one might load after the other has stored in its place.
    assert settings["BLOCK"] >= 64 * settings["num_warps"]
    heads, block_d = settings["HEADS"], triton.next_power_of_2(size // 2)
    settings["TOKENS"] = max(1, settings.pop("BLOCK") // (heads * block_d))
    blocks = triton.cdiv(q_heads, heads) + triton.cdiv(k.shape[1], heads)
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:2]]
    settings |= {"HALF": size // 2, "INVERSE": inverse, "ACC": accumulator(q.dtype), "BLOCK_D": block_d}
    tensors = (q, k, q_out, k_out, cos.contiguous(), sin.contiguous())
    grid = (triton.cdiv(tokens, settings["TOKENS"]) * blocks,)
    start(_kernel, grid, *tensors, tokens, q_heads, k.shape[1], *strides, **settings)


@_rotate.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None: ...


@_rotated.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_like(k)


def _save(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotated(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotated.register_autograd(_differentiate, setup_context=_save)
