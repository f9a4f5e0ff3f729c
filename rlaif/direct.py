"""A judge's mark as the reward, without pairs, labels or a reward model (direct RLAIF, arXiv 2309.00267, section 2.3).

The judge reads dialogue, answer and principle, and its log-probs of the marks 1 to 10, normalised over the ten, give

    mean = sum_i i P(i),    score = (mean - 5.5) / 4.5, from -1 to 1.

An answer that cannot be rated has no score. In PPO it then counts as an average one of its batch (rlaif/ppo_scores.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bylaw.constitution.render import rating_request
from bylaw.model.engine import Engine
from bylaw.model.sampler import Dialogue, tokenizer_of, turn
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.reader import TOO_LONG
from bylaw.rlaif.rollout import Rollout

MARKS = range(1, 11)
TOO_LITTLE = "too little probability on the marks"


@dataclass(frozen=True, kw_only=True)
class Rater:
    """A judge on this machine, the dialogue of each prompt id, and the tokenizer that the answers' ids are of: that of
    the policy, which need not be the judge's.
    """

    judge: Judge
    engine: Engine
    dialogues: Mapping[str, Dialogue]
    policy: Tokenizer

    def rate(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """For each answer `score`, or None and the reason in `abstained`; and each principle's reading: the
        log-probs of the marks, their share of all probability, and the mean mark.

        Principles are drawn as for labels (label.principles), by the episode's own draw.
        """
        self.engine.forget()
        tokenizer, candidates = tokenizer_of(self.engine), mark_ids(tokenizer_of(self.engine), self._prefix)
        asked = [(rollout, one) for rollout in rollouts for one in self._principles(rollout)]
        prompts = [self._prompt(rollout, one, tokenizer) for rollout, one in asked]
        room = self.engine.model.config.max_position_embeddings - max(map(len, candidates))
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        scores = self.engine.score([(prompts[i], candidates) for i in fitting])
        logprobs = dict(zip(fitting, scores, strict=True))
        least = self.judge.config.min_option_mass
        readings = iter(
            self.judge.named(one) | reading(logprobs.get(i), candidates, least) for i, (_, one) in enumerate(asked)
        )
        return [rating([next(readings) for _ in self._principles(rollout)]) for rollout in rollouts]

    @property
    def _prefix(self) -> str:
        return self.judge.constitution.templates.rating_prefix

    def _principles(self, rollout: Rollout) -> Sequence[Any]:
        key = f"{rollout.prompt_id}@{rollout.request}"
        return self.judge.principles({"id": key, "prompt_id": rollout.prompt_id})

    def _prompt(self, rollout: Rollout, principle: Any, tokenizer: Tokenizer) -> list[int]:
        answer = self.policy.decode(rollout.response).strip()
        request = rating_request(self.judge.constitution, principle, self.dialogues[rollout.prompt_id], answer)
        return tokenizer.prompt_ids([turn("user", request)], prefix=self._prefix)


def mark_ids(tokenizer: Tokenizer, prefix: str) -> list[list[int]]:
    """The ids of " 1" to " 10" as they follow `prefix`; a mark may take several.

    Raises ValueError for a tokenizer that does not know a digit, or that cannot go on after the prefix.
    """
    start = tokenizer.encode(prefix)
    unknown = tokenizer.backend.token_to_id(tokenizer.tokens.get("unk_token", ""))
    found = []
    for mark in MARKS:
        ids = tokenizer.encode(f"{prefix} {mark}")
        if ids[: len(start)] != start or len(ids) == len(start) or unknown in ids[len(start) :]:
            raise ValueError(
                f"the mark {mark} after {prefix!r} has no tokens of its own; allowed: a judge whose tokenizer knows "
                'the digits, and a rating_prefix that ends in a whole word (or ppo.reward = "model")'
            )
        found.append(ids[len(start) :])
    return found


def reading(logprobs: Sequence[float] | None, candidates: Sequence[Sequence[int]], min_mass: float) -> dict[str, Any]:
    """What the log-probs of the ten marks say; None: the question was too long to ask."""
    if logprobs is None:
        return {"mean": None, "abstained": TOO_LONG}
    shares = [math.exp(logprob) for logprob in logprobs]
    # Where 10 is written as 1 and 0, the probability of its 1 is not one of the mark 1.
    alone = [
        max(0.0, p - sum(q for other, q in zip(candidates, shares, strict=True) if _goes_on(other, ids)))
        for ids, p in zip(candidates, shares, strict=True)
    ]
    mass = math.fsum(alone)
    found = {"logprobs": list(logprobs), "mass": mass}
    if mass == 0 or mass < min_mass:
        return found | {"mean": None, "abstained": TOO_LITTLE}
    mean = math.fsum(mark * p for mark, p in zip(MARKS, alone, strict=True)) / mass
    return found | {"mean": mean, "abstained": ""}


def rating(readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score of one answer: the mean over the principles that were read, by weight."""
    read = [one for one in readings if not one["abstained"]]
    if not read:
        return {"score": None, "abstained": readings[0]["abstained"], "readings": list(readings)}
    mean = sum(one["weight"] * one["mean"] for one in read) / sum(one["weight"] for one in read)
    return {"score": (mean - 5.5) / 4.5, "abstained": "", "readings": list(readings)}


def _goes_on(longer: Sequence[int], ids: Sequence[int]) -> bool:
    return len(longer) > len(ids) and list(longer[: len(ids)]) == list(ids)
