"""Signs that a policy collapses, read from its answers alone: a reward model may like what it collapses to.

repetition    share of an answer's 4-grams that it has said before, mean over answers
boilerplate   share of answers that contain the batch's commonest 8-gram, where their prompts do not contain it
entropy       nats per token
length        tokens per answer
ended         share of answers that end by themselves
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.rollout import Rollout

REPEATED, COMMON = 4, 8
"""Lengths of the n-grams, in tokens, whose repetition in an answer and over answers is counted."""
Signs = dict[str, float]


def signs_of(rollouts: Sequence[Rollout], entropy: float) -> Signs:
    """The signs above of a batch; `entropy` is its mean over tokens."""
    count = len(rollouts)
    return {
        "repetition": sum(repetition(rollout.response) for rollout in rollouts) / count,
        "boilerplate": boilerplate(rollouts),
        "entropy": entropy,
        "length": sum(len(rollout.response) for rollout in rollouts) / count,
        "ended": sum(rollout.ended for rollout in rollouts) / count,
    }


def repetition(response: Sequence[int]) -> float:
    """1 - distinct / all 4-grams; 0 for a response without any."""
    grams = list(_grams(response, REPEATED))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def boilerplate(rollouts: Sequence[Rollout]) -> float:
    """Share of the responses with the commonest 8-gram that is not taken from their own prompts; 0 if none has two."""
    seen: Counter[tuple[int, ...]] = Counter()
    for rollout in rollouts:
        seen.update(set(_grams(rollout.response, COMMON)) - set(_grams(rollout.prompt, COMMON)))
    most = max(seen.values(), default=0)
    return most / len(rollouts) if most > 1 else 0.0


def baseline_of(first: Sequence[Signs]) -> Signs:
    """Mean of the signs of the first iterations; empty without any."""
    return {name: sum(signs[name] for signs in first) / len(first) for name in first[0]} if first else {}


def alarms(signs: Signs, baseline: Mapping[str, float], config: PPOConfig) -> dict[str, str]:
    """What is wrong, by sign: past a fixed limit, or far from the baseline, if there is one."""
    found = {}
    limits = {"repetition": config.max_repetition, "boilerplate": config.max_boilerplate}
    for name, limit in limits.items():
        if signs[name] > limit:
            found[name] = f"{name} {signs[name]:.3g}, above {limit:.3g}"
    if signs["entropy"] < config.min_entropy:
        found["entropy"] = f"entropy {signs['entropy']:.3g}, below {config.min_entropy:.3g}"
    for name, start in baseline.items():
        if _strays(name, signs[name], start, config):
            found.setdefault(name, f"{name} {signs[name]:.3g}, at first {start:.3g}")
    return found


def _strays(name: str, now: float, start: float, config: PPOConfig) -> bool:
    """Shares by their rise (or fall, of ended answers); entropy and length by their ratio."""
    if name in ("repetition", "boilerplate"):
        return now - start > config.collapse_rise
    if name == "ended":
        return start - now > config.collapse_rise
    return now < config.collapse_fall * start or (name == "length" and now * config.collapse_fall > start)


def _grams(ids: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[i:] for i in range(n)), strict=False)
