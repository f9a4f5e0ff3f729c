"""Whether two sides of a training benchmark compute the same."""

import math
from collections.abc import Mapping

TOLERANCE = 1e-4  # nats, or units of score: of means in float32


class Mismatch(RuntimeError):
    """The two sides do not compute the same thing; how fast they are does not matter."""


def agreement(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How far the two sides lie apart in each figure. Raises Mismatch, naming the first that is beyond TOLERANCE."""
    gaps = {name: abs(value - theirs[name]) for name, value in ours.items()}
    for name, gap in gaps.items():
        if not (math.isfinite(gap) and gap <= TOLERANCE):
            raise Mismatch(f"{name} is {ours[name]:.6g}, and the peer's {theirs[name]:.6g}")
    return gaps
