"""PPO's losses and their statistics over the tokens of a minibatch. It is really the launches that cost."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.case import Case, Floor, Launch
from bylaw.kernels import policy_loss as module
from bylaw.kernels.policy_loss import policy_loss, reference, value_loss, value_reference


def cases(small: bool) -> Iterator[Case]:
    """`small`: shapes that a CPU runs in a moment, to test the harness."""
    for tokens in [64] if small else [8192, 131072]:
        yield _case("policy_loss", tokens)
        yield _case("value_loss", tokens)


def _case(operation: str, tokens: int) -> Case:
    policy = operation == "policy_loss"
    ours, plain = (policy_loss, reference) if policy else (value_loss, value_reference)
    return Case(
        operation=operation,
        shape={"T": tokens},
        inputs=lambda device, dtype: _inputs(tokens, policy, device),
        ours=partial(_values, ours),
        forward=Floor(bytes=16 * tokens),
        backward=Floor(bytes=8 * tokens),
        differentiable=("logprobs" if policy else "values",),
        peers={"torch": partial(_values, plain), "torch.compile": torch.compile(partial(_values, plain))},
    )


def _values(function: Any, **given: Any) -> tuple[Tensor, ...]:
    """The loss and the statistics, in float32 as the numbers that they add up."""
    loss, stats = function(**given)
    return loss, *(value.float() for value in stats.values())


def launches() -> Iterator[Launch]:
    def run() -> None:
        row = torch.empty(131072, device="meta")
        module._policy(row, row, row, 0.8, 1.2, float("inf"))
        module._value(row, row, row, 0.2)

    yield Launch("float32", run)


def _inputs(tokens: int, policy: bool, device: torch.device) -> dict[str, Any]:
    """In float32 whatever the dtype of the rest: so are log-probs and values in training."""
    old, change, constants = torch.randn(3, tokens, device=device)
    names = ("logprobs", "old_logprobs", "advantages") if policy else ("values", "old_values", "returns")
    columns = dict(zip(names, (old + 0.2 * change, old, constants), strict=True))
    return columns | {"clip": 0.2, "denominator": float(tokens)}
