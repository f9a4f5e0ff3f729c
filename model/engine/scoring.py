"""Log-probs of candidates after a prompt, teacher-forced, with the head computed only where it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.kernels.upload import upload
from bylaw.model.engine.request import Query

IDS = tuple[int, ...]


@dataclass(eq=False)
class Scored:
    """A query, and its candidates' log-probs as they come in."""

    query: Query
    logprobs: list[float] = field(init=False)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.logprobs = [0.0] * len(self.query.candidates)
        self.missing = len(self.query.candidates)


@dataclass(eq=False)
class Reading:
    """A text to run for its scores: a prompt and what candidates share with it, all but their last tokens.

    `lasts` are the last tokens, each with the candidate that it ends.
    """

    ids: IDS
    prompt: int  # tokens of `ids` that are the prompt
    keys: list[bytes] = field(default_factory=list)
    lasts: list[tuple[int, Scored, int]] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """Last tokens whose hidden states say something of a candidate."""
        return len(self.ids) - self.prompt + 1


def readings(scored: Scored) -> list[Reading]:
    """The texts to run for a query: candidates that differ only in their last token share one."""
    found: dict[IDS, Reading] = {}
    prompt = tuple(scored.query.prompt)
    for c, candidate in enumerate(scored.query.candidates):
        ids = (*prompt, *candidate[:-1])
        found.setdefault(ids, Reading(ids, len(prompt))).lasts.append((candidate[-1], scored, c))
    return list(found.values())


def score(head: Tensor, hidden: Tensor, ends: Sequence[tuple[Reading, int]]) -> list[Scored]:
    """Give readings their log-probs; returns the queries that are complete now.

    `hidden` [n, H] holds each reading's wanted states, up to `end` of (reading, end).
    """
    places, targets = zip(*(asked for reading, end in ends for asked in _asked(reading, end)), strict=True)
    state_of = {place: i for i, place in enumerate(places)}
    device = head.device
    states = hidden[upload(torch.tensor(places), device)]
    read = linear_logprob(states, head, upload(torch.tensor(targets), device))
    # Further candidates at the same place: their columns alone, against the normaliser that is there.
    more = [(state_of[end - 1], token) for reading, end in ends for token, _, _ in reading.lasts]
    rows, columns = (upload(torch.tensor(x), device) for x in zip(*more, strict=True))
    logits = (states[rows].float() * head[columns].float()).sum(-1)
    lasts = iter((logits - read.log_normalizer[rows]).tolist())
    logprobs = read.logprobs.tolist()
    done = []
    for reading, end in ends:
        before = sum(logprobs[state_of[place]] for place, _ in _asked(reading, end)[:-1])
        for _, one, candidate in reading.lasts:
            one.logprobs[candidate] = before + next(lasts)
            one.missing -= 1
            if not one.missing:
                done.append(one)
    return done


def _asked(reading: Reading, end: int) -> list[tuple[int, int]]:
    """(place, next token) of the text after the prompt, and of the first of the last tokens."""
    following = [*reading.ids[reading.prompt :], reading.lasts[0][0]]
    return list(enumerate(following, start=end - len(following)))
