"""Losses from hidden states against float64 formulas over whole logits, and against torch in the same dtype."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import linear_loss as module
from bylaw.kernels.linear_head import Head
from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.kernels.linear_loss import TokenLoss, linear_loss

T, H, V = 10, 5, 50  # under the interpreter a row takes four blocks of 16
FIVE_TOKENS = 5 * 4 * 64  # bytes of float32 logits: rows of 50 are laid out as 64
TERMS = {
    "nll": ("nll",),
    "policy": ("old_logprobs", "advantages"),
    "entropy": ("nll", "entropy"),
    "all": ("nll", "old_logprobs", "advantages", "entropy", "reference_logprobs", "kl"),
}
CLIP = (0.25, 0.5)
DUAL = {"dual_clip": 1.2, "kl_estimator": "k2"}


def stream(tokens: int = T, width: int = H, vocabulary: int = V, dtype: torch.dtype = torch.float64):
    hidden, weight = random(tokens, width, dtype=dtype), random(vocabulary, width, seed=1, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return hidden, weight, targets


def columns(names: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """Coefficients, and stored log-probs around the true ones, so that ratios lie on both sides of each bound."""
    count = len(targets)
    logits = hidden.double() @ weight.double().T / temperature
    near = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0].nan_to_num()
    made = {
        "nll": random(count, seed=3).abs(),
        "old_logprobs": near + 0.5 * random(count, seed=4),
        "advantages": random(count, seed=5),
        "entropy": 0.3 * random(count, seed=6).abs(),
        "reference_logprobs": near + 0.7 * random(count, seed=7),
        "kl": random(count, seed=8).abs(),
    }
    return {name: made[name].float() for name in TERMS[names]}


def formula(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    c: dict[str, Tensor],
    temperature: float,
    rows: bool = False,
    dual_clip: float | None = None,
    kl_estimator: str = "k3",
) -> Any:
    log_p = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    logprob, entropy = log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)
    c = {name: x.to(hidden.dtype) for name, x in c.items()}
    loss = (c["nll"] * -logprob).sum() if "nll" in c else torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    if "advantages" in c:
        ratio, a = (logprob - c["old_logprobs"]).exp(), c["advantages"]
        gain = torch.min(ratio * a, ratio.clamp(0.75, 1.5) * a)
        if dual_clip is not None:
            gain = torch.where(a < 0, torch.max(gain, dual_clip * a), gain)
        loss = loss - gain.sum()
    if "entropy" in c:
        loss = loss - (c["entropy"] * entropy).sum()
    if "kl" in c:
        log_r = c["reference_logprobs"] - logprob
        loss = loss + (c["kl"] * (log_r.exp() - 1 - log_r if kl_estimator == "k3" else log_r**2 / 2)).sum()
    return (loss, logprob, entropy) if rows else loss


def run(hidden: Tensor, weight: Tensor, targets: Tensor, c: dict[str, Tensor], **settings: Any) -> TokenLoss:
    return linear_loss(hidden, weight, targets, **c, **{"clip": CLIP, "backend": "triton", **settings})  # type: ignore[arg-type]


def outputs(result: Any, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Loss, what is said of each token, and the gradients of 0.37 times the loss."""
    loss, *rows = result
    return loss.detach(), *torch.autograd.grad(0.37 * loss, leaves), *(x.detach() for x in rows if x is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("names", "temperature", "others"),
    [("nll", 1.0, {}), ("policy", 1.0, {}), ("entropy", 0.7, {}), ("all", 1.5, {}), ("all", 1.5, DUAL)],
)
def test_values_and_gradients(names: str, temperature: float, others: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, targets = stream(dtype=dtype)
    c = columns(names, hidden, weight, targets, temperature)
    settings = {"temperature": temperature, "logits_bytes": FIVE_TOKENS, **others}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    ours, torchs = (outputs(run(*leaves, targets, c, backend=b, **settings), leaves) for b in ("triton", "reference"))
    leaves = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = outputs(formula(*leaves, targets, c, temperature, rows=True, **others), leaves)
    assert len(ours) == (5 if "entropy" in c else 4)
    assert_all_as_good(ours, torchs, exact[: len(ours)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_dual_clip_and_k2_by_hand(backend: str) -> None:
    """Two words of probability 1/2: all three log-probs are -log 2, and the derivative by the logit is half that."""
    hidden = torch.zeros(3, 1, dtype=torch.float64, device=DEVICE)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, device=DEVICE)
    column = {"dtype": torch.float64, "device": DEVICE}
    ratio, log_ratio = torch.tensor([4.0, 2.0, 4.0], **column), torch.tensor([0.0, 2.0, -30.0], **column)
    c = {
        "old_logprobs": -torch.log(2 * ratio),
        "advantages": torch.tensor([-1.0, -1.0, 1.0], **column),
        "reference_logprobs": -torch.tensor(2.0, **column).log() - log_ratio,
        "kl": torch.tensor([1.0, 0.5, 0.1], **column),
    }
    hidden.requires_grad_()
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss = run(hidden, weight, targets, c, dual_clip=3.0, kl_estimator="k2", backend=backend).loss
    # policy: 3 (the dual clip), 2, -1.5 (the clip); k2: 0, 0.5 * 2, 0.1 * 450
    torch.testing.assert_close(float(loss.detach()), 3 + 2 - 1.5 + 0 + 1 + 45)
    loss.backward()
    # d log-prob / d hidden is 1 (half of 1 minus half of -1): 0, ratio + 0.5 * 2, 0.1 * -30
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [3.0], [-3.0]], **column))


@pytest.mark.parametrize(
    ("shape", "tokens"), [((1, 1, 1), 1), ((3, 2, 63), 2), ((2, 3, 65), 1), ((2, 3, 65), 9), ((0, 3, 4), 1)]
)
def test_shapes_and_chunks(shape: tuple[int, int, int], tokens: int) -> None:
    hidden, weight, targets = stream(*shape)
    c = columns("all", hidden, weight, targets)
    budget = tokens * 8 * (-(-shape[2] // 64) * 64)
    exact = gradients(lambda h, w: formula(h, w, targets, c, 1.0), random(), hidden, weight)
    for backend in ("triton", "reference"):
        got = gradients(
            lambda h, w, b=backend: run(h, w, targets, c, backend=b, logits_bytes=budget).loss, random(), hidden, weight
        )
        for x, y in zip(got, exact, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("logits_bytes", [1, 2**20])
def test_on_a_cpu_the_bits_of_cross_entropy(logits_bytes: int) -> None:
    hidden, weight, targets = (x.cpu() for x in stream(dtype=torch.float32))

    def plain(h: Tensor, w: Tensor) -> Tensor:
        pieces = zip(h.split(1 if logits_bytes == 1 else T), targets.split(1 if logits_bytes == 1 else T), strict=True)
        return -torch.cat([-F.cross_entropy(F.linear(a, w).float(), y, reduction="none") for a, y in pieces]).sum()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_loss(h, w, targets, nll=torch.ones(T), logits_bytes=logits_bytes).loss

    for got, expected in zip(
        gradients(ours, torch.tensor(0.3), hidden, weight),
        gradients(plain, torch.tensor(0.3), hidden, weight),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("ignored", [[1, 4, 6], list(range(T))])
@pytest.mark.parametrize("index", [-100, 3])
def test_ignored_tokens_take_part_in_nothing(ignored: list[int], index: int, backend: str) -> None:
    hidden, weight, targets = stream()
    targets = targets.where(targets != index, 5)
    kept = [t for t in range(T) if t not in ignored]
    c = columns("all", hidden, weight, targets)
    grad = torch.ones((), device=DEVICE)
    exact = gradients(
        lambda h, w: formula(h[kept], w, targets[kept], {k: v[kept] for k, v in c.items()}, 1.0), grad, hidden, weight
    )
    hidden[ignored], targets[ignored] = torch.nan, index
    settings = {"ignore_index": index, "logits_bytes": 2 * 8 * 64, "backend": backend}
    got = gradients(lambda h, w: run(h, w, targets, c, **settings).loss, grad, hidden, weight)
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)
    result = run(hidden, weight, targets, c, **settings)
    assert result.entropy is not None
    for rows in (result.logprobs, result.entropy):
        assert not rows[ignored].any() and rows[kept].all()


@pytest.mark.parametrize("others", [{}, DUAL])
def test_gradient_numerically(others: dict[str, Any]) -> None:
    hidden, weight, targets = stream(1, 2, 17)
    c = columns("all", hidden, weight, targets, 0.75)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return run(h, w, targets, c, temperature=0.75, logits_bytes=8 * 64, **others).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of places past the last token, in numpy
def test_the_log_probs_are_those_of_linear_logprob() -> None:
    hidden, weight, targets = stream(5, dtype=torch.float16)
    got = run(hidden, weight, targets, columns("entropy", hidden, weight, targets))
    expected = linear_logprob(hidden, weight, targets, backend="triton")
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=3e-6, rtol=0)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=3e-6, rtol=0)


def test_a_gradient_that_nobody_wants_is_not_made() -> None:
    hidden, weight, targets = stream(2, dtype=torch.float32)
    c = columns("policy", hidden, weight, targets)
    loss = run(hidden, weight.requires_grad_(), targets, c).loss
    loss.backward()
    assert weight.grad is not None
    alone = run(hidden.requires_grad_(), weight.detach(), targets, c)
    assert torch.equal(alone.loss, loss) and not alone.logprobs.requires_grad
    assert torch.autograd.grad(alone.loss, hidden)[0].isfinite().all()
    with torch.no_grad():
        assert torch.equal(run(hidden, weight, targets, c).loss, loss)
    none, *terms = None, 1.0, 1.0, float("inf"), "k3", 1.0, None, FIVE_TOKENS
    outs = module._forward(hidden, weight, targets, c["advantages"], none, none, none, none, none, *terms, False, False)
    assert [x.numel() for x in outs] == [1, 2, 0, 0, 0]


def test_the_logits_of_all_tokens_never_exist() -> None:
    hidden, weight, targets = stream(11, dtype=torch.float16)
    head = Head(hidden, weight, 11, FIVE_TOKENS, (True, True))
    assert head.chunk == 5 and head.buffer.nbytes == FIVE_TOKENS and head.grad_weight.dtype == torch.float32
    assert Head(hidden, weight, 11, 1, (True, True)).chunk == 1
    assert Head(hidden, weight, 4000, 300 * 4 * 64, (True, True)).chunk == 256
    kept: list[int] = []
    c = columns("nll", hidden, weight, targets)
    for backend in ("triton", "reference"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            run(hidden.requires_grad_(), weight, targets, c, logits_bytes=FIVE_TOKENS, backend=backend)
        assert kept and max(kept) < 11 * V


def test_the_operations_are_registered_in_order() -> None:
    hidden, weight, targets = stream(1, 2, 18, torch.float32)
    c = columns("all", hidden, weight, targets)
    rows = [c[name] for name in ("nll", "old_logprobs", "advantages", "entropy", "reference_logprobs", "kl")]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert_op(module._forward, *leaves, targets, *rows, 0.75, 1.5, 3.0, "k2", 0.7, -100, 1000, True, True)
    one_term = leaves[0], weight.detach(), targets, rows[0], *[None] * 5
    assert_op(module._forward, *one_term, 1.0, 1.0, float("inf"), "k3", 1.0, None, 9, True, False)


def test_under_torch_compile() -> None:
    hidden, weight, targets = stream(3, 2, 18, torch.float32)
    c, grad = columns("all", hidden, weight, targets), torch.tensor(0.3, device=DEVICE)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return run(h, w, targets, c, **DUAL).loss

    for got, expected in zip(
        gradients(compiled(loss), grad, hidden, weight), gradients(loss, grad, hidden, weight), strict=True
    ):
        assert torch.equal(got, expected)


def test_input_that_is_not_contiguous_and_two_runs() -> None:
    hidden, weight, targets = stream(4, dtype=torch.float16)
    c, grad = columns("all", hidden, weight, targets), torch.tensor(0.3, device=DEVICE)
    scattered = {name: torch.stack([x, x], 1)[:, 0] for name, x in c.items()}
    pairs = torch.stack([targets, targets], 1)[:, 0]

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return run(h, w, targets, c, logits_bytes=FIVE_TOKENS // 2).loss

    def loss_scattered(h: Tensor, w: Tensor) -> Tensor:
        return run(h.T.contiguous().T, w.T.contiguous().T, pairs, scattered, logits_bytes=FIVE_TOKENS // 2).loss

    first, again = gradients(loss, grad, hidden, weight), gradients(loss, grad, hidden, weight)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for got, expected in zip(gradients(loss_scattered, grad, hidden, weight), first, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, in numpy under the interpreter
def test_what_is_wrong_shows() -> None:
    hidden, weight, targets = stream(3)
    c = columns("all", hidden, weight, targets)
    targets[2] = V  # on a GPU no one looks
    assert run(hidden, weight, targets, c).loss.isnan()
    targets[2], hidden[1, 0] = 0, torch.nan
    assert run(hidden, weight, targets, c).loss.isnan()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # to -inf, in numpy under the interpreter
@pytest.mark.parametrize("temperature", [1e-38, float("inf")])
def test_temperatures_at_the_ends(temperature: float) -> None:
    hidden, weight, _ = stream(3, dtype=torch.float32)
    likeliest = (hidden @ weight.T).argmax(1)
    ones = torch.ones(3, device=DEVICE)
    for backend in ("triton", "reference"):
        result = run(
            hidden, weight, likeliest, {"nll": ones, "entropy": ones}, temperature=temperature, backend=backend
        )
        expected = 0.0 if temperature < 1 else torch.tensor(V).log().item()
        torch.testing.assert_close(-result.logprobs, expected * ones)
        torch.testing.assert_close(result.entropy, expected * ones)


def test_refusals() -> None:
    hidden, weight, targets = stream()
    ones = torch.ones(T, device=DEVICE)
    for bad, message in [
        ({}, "no term"),
        ({"advantages": ones}, "advantages and old_logprobs only one is given"),
        ({"kl": ones}, "kl and reference_logprobs only one is given"),
        ({"nll": ones[:2]}, r"nll is torch.float64 \(2,\); allowed: floating point \(10,\)"),
        ({"nll": ones, "temperature": 0.0}, "temperature = 0.0"),
        ({"nll": ones, "clip": (0.2, 0.0)}, r"clip is \(0.2, 0.0\)"),
        ({"nll": ones, "dual_clip": 1.0}, "dual_clip is 1.0; allowed: above 1"),
        ({"nll": ones, "kl_estimator": "k1"}, "kl_estimator is 'k1'; allowed: k2, k3"),
        ({"nll": ones, "logits_bytes": 0}, "logits_bytes is 0"),
        ({"nll": ones, "backend": "library"}, "no library"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_loss(hidden, weight, targets, **bad)
    with pytest.raises(ValueError, match=r"hidden \(10, 5\), weight \(50, 4\), targets \(10,\); allowed"):
        linear_loss(hidden, weight[:, :4], targets, nll=ones)
    with pytest.raises(ValueError, match=r"weight torch.float32.*one floating dtype"):
        linear_loss(hidden, weight.float(), targets, nll=ones)
    with pytest.raises(ValueError, match=r"targets torch\.int32"):
        linear_loss(hidden, weight, targets.int(), nll=ones)
    with pytest.raises(ValueError, match=r"targets hold -100 to .*allowed: 0 to 49"):
        wrong = torch.full((T,), -100)
        linear_loss(hidden.cpu(), weight.cpu(), wrong, nll=ones.cpu(), ignore_index=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_production_shapes(vocabulary: int) -> None:
    """In place over many blocks, with whole warps apart; and no more memory than promised."""
    tokens, width, budget = 1500, 1024, 256 * 2**20
    hidden = random(tokens, width, dtype=torch.bfloat16)
    weight = (0.05 * random(vocabulary, width, seed=1)).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    c, grad = columns("all", hidden, weight, targets), torch.ones((), device=DEVICE)

    def loss(h: Tensor, w: Tensor, backend: str = "triton", index: int | None = None) -> Tensor:
        return run(h, w, targets, c, backend=backend, logits_bytes=budget, ignore_index=index).loss

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss(*leaves)
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes
    assert extra < budget + 4 * weight.numel() + 32 * 2**20
    got = value.detach(), *torch.autograd.grad(value, leaves, grad)
    torchs = gradients(lambda h, w: loss(h, w, "reference"), grad, hidden, weight)
    exact = gradients(lambda h, w: loss(h, w, "reference"), grad, hidden.double(), weight.double())
    assert_all_as_good(got, torchs, exact)
    again = gradients(loss, grad, hidden, weight)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
