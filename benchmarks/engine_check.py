"""Whether two sides gave the same answers, where rounding leaves them a choice and where it does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.engine_workloads import Turn

# Logits of two right programs differ by rounding. Two tokens no further apart than this are equally likely.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
NextLogits = Callable[[Sequence[int]], Tensor]


class Mismatch(RuntimeError):
    """The two sides do not compute the same thing; how fast they are does not matter."""


@dataclass(frozen=True)
class Agreement:
    """How many of all items are the same, and the largest difference in logits or log-probs that was let pass."""

    same: int = 0
    items: int = 0
    gap: float = 0.0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.same + other.same, self.items + other.items, max(self.gap, other.gap))

    def __str__(self) -> str:
        ties = f", the others from a tie of at most {self.gap:.1e} in logits on" if self.same < self.items else ""
        return f"{self.same} of {self.items} alike{ties}"


def compare(ours: Sequence[Any], theirs: Sequence[Any], next_logits: NextLogits, tolerance: float) -> Agreement:
    """Compare what Work.run gave. Raises Mismatch, naming the first item that differs by more than rounding.

    Greedy text may part where the two tokens are within `tolerance`, in logits, of the likeliest; what comes after that
    is not compared. Log-probs may differ by as much.
    """
    total = Agreement()
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one and isinstance(one[0], float):
            total += _scores(number, one, other, tolerance)
        else:
            total += _turns(number, one, other, next_logits, tolerance)
    return total


def _scores(number: int, ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> Agreement:
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if not gap <= tolerance:
        raise Mismatch(f"query {number}: log-probs {list(ours)}, and the peer's {list(theirs)}")
    return Agreement(1, 1, gap)


def _turns(
    number: int, ours: Sequence[Turn], theirs: Sequence[Turn], next_logits: NextLogits, tolerance: float
) -> Agreement:
    for turn, ((prompt, a), (same_prompt, b)) in enumerate(zip(ours, theirs, strict=True)):
        assert list(prompt) == list(same_prompt), "equal turns lead to equal prompts"
        if len(a) != len(b):
            raise Mismatch(f"item {number}, turn {turn}: {len(a)} tokens, and the peer's {len(b)}")
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            logits = next_logits([*prompt, *a[:at]])
            gap = float(logits.max() - logits[[a[at], b[at]]].min())
            if not gap <= tolerance:
                raise Mismatch(f"item {number}, turn {turn}: token {at} is {a[at]}, the peer's {b[at]}; gap {gap:.3g}")
            return Agreement(0, 1, gap)
    return Agreement(1, 1, 0.0)
