"""The AdamW kernel against torch.optim.AdamW and float64, and the optimiser of 16-bit models that runs it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from precision import DEVICE, assert_as_good, assert_op, compiled, random
from torch import Tensor, nn

from bylaw.kernels import adamw as module
from bylaw.kernels.adamw import adamw
from bylaw.model import optim
from bylaw.model.optim import MasterAdamW, update
from bylaw.model.parallel import ALONE
from bylaw.model.settings import OptimSettings
from bylaw.model.sharding import gradient_norm
from bylaw.model.train_state import Checkpoints, Learner

NUMBERS: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SETTINGS = OptimSettings(learning_rate=0.01, weight_decay=0.1)
# The interpreter truncates when it stores bfloat16.
LOW = (torch.float16,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)


def tensors(*shape: int, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> dict[str, Tensor]:
    master, grad = random(*shape, dtype=torch.float32).to(wide), random(*shape, seed=1, dtype=dtype)
    exp_avg, exp_avg_sq = random(*shape, seed=2, dtype=torch.float32), random(*shape, seed=3, dtype=torch.float32)
    scale = torch.full((), 0.7, device=DEVICE)
    state = {"exp_avg": exp_avg.to(wide), "exp_avg_sq": exp_avg_sq.to(wide).square(), "grad_scale": scale}
    return {"parameter": master.to(dtype), "master": master, "grad": grad, **state}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("shape", [(1,), (63,), (5, 13), (2, 3, 64), (0, 3), ()])
def test_one_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, torchs = tensors(*shape, dtype=dtype), tensors(*shape, dtype=dtype)
    exact = tensors(*shape, dtype=dtype, wide=torch.float64)
    exact["parameter"] = exact["parameter"].double()
    adamw(**ours, **NUMBERS, step=3, backend="triton")
    adamw(**torchs, **NUMBERS, step=3, backend="reference")
    adamw(**exact, **NUMBERS, step=3, backend="reference")
    for name in ours:
        assert_as_good(ours[name], torchs[name], exact[name].double(), name)
    assert torch.equal(ours["parameter"], ours["master"].to(dtype))
    assert torch.equal(ours["grad"], tensors(*shape, dtype=dtype)["grad"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("shape", [(4096, 4096), (1023, 1025)])
def test_production_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    test_one_step(shape, dtype)


@pytest.mark.parametrize(("backend", "tolerance"), [("reference", 0.0), ("triton", 2e-6)])
def test_it_is_torchs_adamw(backend: str, tolerance: float) -> None:
    own = tensors(5, 13, dtype=torch.float32)
    own["exp_avg"].zero_()
    own["exp_avg_sq"].zero_()
    theirs = nn.Parameter(own["master"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 5):
        own["grad"] = random(5, 13, seed=step, dtype=torch.float32)
        theirs.grad = own["grad"] * own["grad_scale"]
        optimizer.step()
        adamw(**own, **NUMBERS, step=step, backend=backend)
        torch.testing.assert_close(own["parameter"], theirs.detach(), atol=tolerance, rtol=tolerance)


def test_a_gradient_that_is_not_contiguous_and_two_runs() -> None:
    results = []
    for transposed in (False, True, True):
        own = tensors(7, 13, dtype=torch.float32)
        if transposed:
            own["grad"] = own["grad"].T.contiguous().T
        adamw(**own, **NUMBERS, step=2, backend="triton")
        results.append(own["parameter"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_the_operation_is_registered_in_order_and_compiles() -> None:
    own, again = tensors(3, 5, dtype=torch.float16), tensors(3, 5, dtype=torch.float16)
    assert_op(module._step, *own.values(), [0.9, 0.1, 0.95, 0.05, 1e-8, 0.01, 0.3])
    own = tensors(3, 5, dtype=torch.float16)
    adamw(**own, **NUMBERS, step=2, backend="triton")
    compiled(lambda: adamw(**again, **NUMBERS, step=2, backend="triton"))()
    assert all(torch.equal(own[name], again[name]) for name in own)


def test_refusals() -> None:
    own = tensors(2, 3, dtype=torch.float16)
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({"master": own["parameter"]}, "master is torch.float16; allowed: torch.float32"),
        ({"exp_avg": own["exp_avg"].double()}, "exp_avg is torch.float64; allowed"),
        ({"grad": own["grad"][:1]}, r"grad is torch.float16 \(1, 3\); allowed: floating and \(2, 3\)"),
        ({"grad": own["grad"].int()}, "grad is torch.int32"),
        ({"parameter": own["parameter"].T.contiguous().T}, r"parameter has the strides \(1, 2\); allowed: contiguous"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale has the shape \(2,\); allowed"),
        ({"grad": own["grad"].clone().requires_grad_()}, "requires grad"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            adamw(**{**own, **change}, **NUMBERS, step=1)
    with pytest.raises(ValueError, match="step = 0"):
        adamw(**own, **NUMBERS, step=0)


class Trainer:
    """A small model whose gradients are decided by the step, in the parameters' dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 1, bias=False)).to(DEVICE, dtype)
        self.optimizer = optim.adamw(self.model, SETTINGS)
        self.done = 0

    def train(self, steps: int, rate: float = 0.01) -> "Trainer":
        for _ in range(steps):
            self.done += 1
            for i, parameter in enumerate(self.model.parameters()):
                grad = 0.1 + random(*parameter.shape, seed=100 * self.done + i)
                parameter.grad = grad.bfloat16().to(parameter.dtype)  # the same numbers in every dtype
            update(self.model, self.optimizer, rate, max_grad_norm=1.0)
        return self

    def values(self) -> Tensor:
        return torch.cat([parameter.detach().double().flatten() for parameter in self.model.parameters()])


def test_which_optimizer_a_model_gets() -> None:
    assert type(Trainer(torch.float32).optimizer) is torch.optim.AdamW
    assert type(Trainer(torch.bfloat16).optimizer) is type(Trainer(torch.float16).optimizer) is MasterAdamW
    mixed = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    assert type(optim.adamw(mixed, SETTINGS)) is MasterAdamW
    decays = [group["weight_decay"] for group in Trainer(torch.bfloat16).optimizer.param_groups]
    assert decays == [0.1, 0.0]


def test_sixteen_bits_with_masters_follow_a_float32_run() -> None:
    low, wide = Trainer(torch.bfloat16), Trainer(torch.float32)
    for parameter, start in zip(wide.model.parameters(), low.model.parameters(), strict=True):
        parameter.data.copy_(start)
    low.train(20, rate=1e-3)
    wide.train(20, rate=1e-3)
    masters = [low.optimizer.state[parameter]["master"].flatten() for parameter in low.model.parameters()]
    torch.testing.assert_close(torch.cat(masters).double(), wide.values(), atol=1e-6, rtol=1e-6)
    assert torch.equal(low.values(), torch.cat(masters).bfloat16().double())


def test_tiny_steps_add_up_where_plain_bfloat16_stalls() -> None:
    def trained(kind: type[torch.optim.AdamW]) -> Tensor:
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(60):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    assert torch.equal(trained(MasterAdamW), torch.full((3,), 1 - 60e-4, device=DEVICE).bfloat16())
    assert torch.equal(trained(torch.optim.AdamW), torch.ones(3, device=DEVICE).bfloat16())


def test_one_clipped_step_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16, device=DEVICE)
    nn.init.ones_(model.weight)
    optimizer = optim.adamw(model, OptimSettings(adam_epsilon=1.0, weight_decay=0.5))
    model.weight.grad = torch.tensor([[3.0, -4.0]], dtype=torch.bfloat16, device=DEVICE)
    assert update(model, optimizer, 0.125, max_grad_norm=1.0) == pytest.approx(5.0)
    # lr * decay = 1/16 goes; the clipped gradient is (0.6, -0.8), and a first step is lr * g / (|g| + eps).
    expected = torch.tensor([[15 / 16 - 0.125 * 0.6 / 1.6, 15 / 16 + 0.125 * 0.8 / 1.8]], device=DEVICE)
    torch.testing.assert_close(optimizer.state[model.weight]["master"], expected)
    assert torch.equal(model.weight, expected.bfloat16()) and model.weight.grad is None
    assert update(model, optimizer, 0.125, max_grad_norm=1.0) == 0.0, "without gradients nothing happens"
    assert torch.equal(model.weight, expected.bfloat16())


def test_the_norm_of_many_small_gradients_is_not_rounded() -> None:
    model = nn.ParameterList([torch.zeros(257, dtype=torch.bfloat16) for _ in range(3)])
    for parameter in model:
        parameter.grad = torch.ones(257, dtype=torch.bfloat16)
    assert float(gradient_norm(list(model.named_parameters()), ALONE)) == pytest.approx(math.sqrt(3 * 257), rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    trainer = Trainer(torch.bfloat16).train(2)
    before = trainer.values()
    state = {name: x.clone() for name, x in trainer.optimizer.state[next(trainer.model.parameters())].items()}
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(trainer.model.parameters()).grad.view(-1)[1] = bad  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(FloatingPointError, match="no parameter of this model was changed"):
        update(trainer.model, trainer.optimizer, 0.01, 1.0)
    assert torch.equal(trainer.values(), before)
    after = trainer.optimizer.state[next(trainer.model.parameters())]
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight, killed = Trainer(torch.bfloat16).train(7), Trainer(torch.bfloat16).train(4)
    with Checkpoints(tmp_path, {"m": Learner(killed.model, killed.optimizer)}) as checkpoints:
        checkpoints.save({"step": 4})
    resumed = Trainer(torch.bfloat16, seed=1)
    assert Checkpoints(tmp_path, {"m": Learner(resumed.model, resumed.optimizer)}).load() == {"step": 4}
    resumed.done = 4
    resumed.train(3)
    assert torch.equal(resumed.values(), straight.values())
    for parameter, twin in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        one, other = resumed.optimizer.state[parameter], straight.optimizer.state[twin]
        assert one.keys() == other.keys() == {"step", "master", "exp_avg", "exp_avg_sq"}
        for name in one:
            assert one[name].dtype == torch.float32 and torch.equal(one[name], other[name])
