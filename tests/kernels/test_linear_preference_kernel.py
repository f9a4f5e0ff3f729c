"""DPO from hidden states against a float64 formula over whole logits, and against torch in the same dtype."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from precision import DEVICE, DTYPES, assert_all_as_good, assert_op, compiled, gradients, random
from torch import Tensor

from bylaw.kernels import linear_preference as module
from bylaw.kernels.linear_preference import PreferenceLoss, linear_preference

H, V = 8, 20
LENGTHS = [2, 1, 0, 1, 5, 2, 0, 0, 1, 1]  # under the interpreter, sums go in blocks of 4
ONE, SOME, ALL = 1, 4, 1000  # tokens in a chunk; four are too few for the third pair


def inputs(dtype: torch.dtype = torch.float64, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    tokens, pairs = sum(lengths), len(lengths) // 2
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    targets = torch.randint(0, V, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    hidden, weight = random(tokens, H, dtype=dtype), random(V, H, seed=1, dtype=dtype)
    logps = formula(hidden.double(), weight.double(), targets, cu_seqlens)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "cu_seqlens": cu_seqlens,
        "reference_logps": (logps + random(2 * pairs, seed=4)).float(),
        "p_a": torch.linspace(0, 1, pairs, device=DEVICE),
    }


def formula(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, temperature: float = 1.0) -> Tensor:
    rows = torch.log_softmax(hidden @ weight.T / temperature, -1)[torch.arange(len(targets)), targets]
    return torch.stack([rows[a:b].sum() for a, b in pairwise(cu_seqlens.tolist())])


def exact_loss(given: dict[str, Tensor], beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    logps = formula(*(given[k] for k in ("hidden", "weight", "targets", "cu_seqlens")), temperature)  # type: ignore[arg-type]
    ratios = (logps - given["reference_logps"].double()).view(-1, 2)
    margin, p = beta * (ratios[:, 0] - ratios[:, 1]), given["p_a"].double()
    return -(p * F.logsigmoid(margin) + (1 - p) * F.logsigmoid(-margin)).sum(), logps


def budget(tokens: int, dtype: torch.dtype = torch.float32) -> int:
    return tokens * 64 * (8 if dtype == torch.float64 else 4)  # rows of 20 are laid out as 64


def differentiated(function: Any, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    loss, logps = function(given | {"hidden": leaves[0], "weight": leaves[1]})
    return loss.detach(), logps.detach(), *torch.autograd.grad(0.5 * loss, leaves)


def run(given: dict[str, Tensor], **settings: Any) -> PreferenceLoss:
    return linear_preference(**given, **{"beta": 0.4, "temperature": 2.0, "backend": "triton", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chunk", "dtype"), [*((SOME, dtype) for dtype in (torch.float64, *DTYPES)), (ONE, DTYPES[0]), (ALL, DTYPES[0])]
)
def test_values_and_gradients(chunk: int, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    settings = {"logits_bytes": budget(chunk, dtype)}
    ours, torchs = (
        differentiated(lambda g, b=b: run(g, backend=b, **settings), given) for b in ("triton", "reference")
    )
    wide = given | {name: given[name].double() for name in ("hidden", "weight")}
    exact = differentiated(lambda g: exact_loss(g, 0.4, 2.0), wide)
    if dtype == torch.float64:
        for got, same, expected in zip(ours, torchs, exact, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(same, expected, atol=1e-12, rtol=1e-12)
    else:
        assert_all_as_good(ours, torchs, exact)


def test_groups_hold_whole_pairs() -> None:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()  # pairs of 3, 1, 7, 0 and 2 tokens
    assert list(module._groups(bounds, SOME)) == [(0, 2), (2, 3), (3, 5)]
    assert list(module._groups(bounds, 100)) == [(0, 5)]
    assert list(module._groups(bounds, 1)) == [(n, n + 1) for n in range(5)]
    assert list(module._groups([0], 1)) == []


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    given = (
        inputs(lengths=lengths)
        if lengths
        else inputs(lengths=[1, 1])
        | {
            "hidden": random(0, H),
            "targets": torch.zeros(0, dtype=torch.int64, device=DEVICE),
            "cu_seqlens": torch.zeros(1, dtype=torch.int64),
            "reference_logps": random(0),
            "p_a": random(0),
        }
    )
    for backend in ("triton", "reference"):
        loss, logps, *grads = differentiated(lambda g, b=backend: run(g, backend=b), given)
        assert loss.isfinite() and len(logps) == len(lengths) and not any(x.any() for x in grads)


def test_a_confident_pair_keeps_its_small_loss_and_gradient() -> None:
    given = inputs(torch.float32, [1, 1])
    given["reference_logps"] = torch.tensor([-60.0, 0.0], device=DEVICE)
    given["p_a"] = torch.ones(1, device=DEVICE)
    wide = given | {name: given[name].double() for name in ("hidden", "weight")}
    ours = differentiated(lambda g: run(g), given)
    exact = differentiated(lambda g: exact_loss(g, 0.4, 2.0), wide)
    assert 0 < exact[0] < 1e-8
    for got, expected in zip(ours, exact, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradient_numerically() -> None:
    given = inputs(lengths=[1, 1, 1, 0]) | {"weight": random(5, 1, seed=1), "hidden": random(3, 1)}
    given["targets"] %= 5

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return run(given | {"hidden": h, "weight": w}, logits_bytes=budget(1, torch.float64)).loss

    assert torch.autograd.gradcheck(loss, (given["hidden"].requires_grad_(), given["weight"].requires_grad_()))


def test_the_operation_is_registered_in_order() -> None:
    given = inputs(torch.float32, [1, 1])
    columns = [x.requires_grad_(name in ("hidden", "weight")) for name, x in given.items()]
    assert_op(module._forward, *columns, 0.4, 1.0, 1000, True, True)


def test_two_runs_scattered_input_and_torch_compile() -> None:
    given = inputs(torch.float16, [1, 0, 3, 2])
    names = "targets", "reference_logps", "p_a"
    scattered = given | {name: torch.stack([given[name]] * 2, 1)[:, 0] for name in names}

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return run(given | {"hidden": h, "weight": w}, logits_bytes=budget(SOME)).loss

    def loss_scattered(h: Tensor, w: Tensor) -> Tensor:
        return run(scattered | {"hidden": h, "weight": w}, logits_bytes=budget(SOME)).loss

    leaves = torch.tensor(0.3, device=DEVICE), given["hidden"], given["weight"]
    first = gradients(loss, *leaves)
    for other in (loss, loss_scattered, compiled(loss)):
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(other, *leaves), strict=True))


def test_a_gradient_that_nobody_wants_is_not_made() -> None:
    given = inputs(torch.float32, [1, 2])
    outs = module._forward(*given.values(), 0.4, 1.0, 1000, False, False)
    assert [x.numel() for x in outs] == [1, 2, 0, 0]
    result = run(given)
    assert not result.loss.requires_grad
    for name in ("hidden", "weight"):
        leaf = given[name].clone().requires_grad_()
        loss, logps = run(given | {name: leaf})
        assert torch.equal(loss, result.loss) and not logps.requires_grad
        assert torch.autograd.grad(loss, leaf)[0].any()


def test_refusals() -> None:
    given = inputs(torch.float32)
    for changed, message in [
        ({"cu_seqlens": given["cu_seqlens"] + 1}, "cu_seqlens is .*allowed: 0 to T = 13 without falling"),
        ({"cu_seqlens": given["cu_seqlens"][:-1]}, r"allowed: torch.int64 \[2B \+ 1\], \[2B\], \[B\]"),
        ({"cu_seqlens": given["cu_seqlens"].int()}, r"cu_seqlens \(torch.int32\)"),
        ({"p_a": given["p_a"].long()}, "p_a torch.int64; allowed: floating point"),
        ({"weight": given["weight"].double()}, "one floating dtype"),
    ]:
        for backend in ("triton", "reference"):
            with pytest.raises(ValueError, match=message):
                run(given | changed, backend=backend)
    for settings, message in [
        ({"beta": 0.0}, "beta is 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"logits_bytes": 0}, "is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(given, **settings)
    with pytest.raises(ValueError, match=r"p_a holds 1\.5"):
        run(given | {"p_a": given["p_a"] * 2}, backend="reference")
    with pytest.raises(ValueError, match="targets hold"):
        run(given | {"targets": given["targets"] - V}, backend="reference")
