"""What each running row draws with, kept on the device: settings, seeds, and the newest token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bylaw.kernels.philox import uniform
from bylaw.kernels.sample import sample
from bylaw.kernels.upload import upload
from bylaw.model.engine.request import Request

AHEAD = 64  # numbers drawn in one go on a CPU, where a call costs more than they do


@dataclass(frozen=True)
class Drawn:
    """One token for each row that drew, on their way to the host, perhaps not computed yet."""

    tokens: Tensor  # [n] int64
    logprobs: Tensor  # [n]
    rows: Sequence[int] | None = None  # which of them are asked for; None: all
    done: torch.cuda.Event | None = None

    @classmethod
    def of(cls, tokens: Tensor, logprobs: Tensor, rows: Sequence[int] | None = None) -> "Drawn":
        """Copies: the tensors given may be overwritten by the next step."""
        if tokens.device.type != "cuda":
            return cls(tokens.clone(), logprobs.clone(), rows)
        sent, done = (_send(tokens), _send(logprobs)), torch.cuda.Event()
        done.record(torch.cuda.current_stream(tokens.device))
        return cls(sent[0], sent[1], rows, done)

    def lists(self) -> tuple[list[int], list[float]]:
        """Waits for them alone, not for what was launched since."""
        if self.done is not None:
            self.done.synchronize()
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        if self.rows is None:
            return tokens, logprobs
        return [tokens[row] for row in self.rows], [logprobs[row] for row in self.rows]


class Draws:
    """The rows' settings by slot; a draw is uniform(seed, request, position in the text)."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # the newest of each row
        self.keys = torch.zeros(3, rows, dtype=torch.int64, device=device)  # seed, request, tokens drawn
        self.prompts = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each prompt
        # temperature, top_p, min_p; rows that never joined are drawn for, too, where all rows of a batch are
        self.limits = torch.tensor([[0.0], [1.0], [0.0]]).repeat(1, rows).to(device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ahead = torch.zeros(rows, AHEAD)
        self.greedy = [True] * rows

    def join(self, slots: Sequence[int], requests: Sequence[Request], drawn: Sequence[int]) -> None:
        """The rows at `slots` draw for `requests` from now on, and have drawn so many tokens."""
        if not slots:
            return
        at = upload(torch.tensor(slots), self.device)
        keys = torch.tensor([[r.seed for r in requests], [r.request for r in requests], list(drawn)])
        names = ("temperature", "top_p", "min_p")
        limits = torch.tensor([[float(getattr(r, name)) for r in requests] for name in names])
        counts = torch.tensor([[r.top_k for r in requests], [len(r.prompt) for r in requests]])
        self.keys[:, at] = upload(keys, self.device)
        self.limits[:, at] = upload(limits, self.device)
        self.top_k[at], self.prompts[at] = upload(counts, self.device)
        for slot, request in zip(slots, requests, strict=True):
            self.greedy[slot] = request.temperature == 0
        if self.device.type == "cpu":
            self._draw_ahead(at, -(keys[2] % AHEAD))

    def move(self, source: int, target: int) -> None:
        for x in (self.tokens, self.top_k, self.prompts, self.keys.T, self.limits.T, self.ahead):
            x[target] = x[source]
        self.greedy[target] = self.greedy[source]

    def draw(self, slots: Sequence[int], logits: Tensor) -> Drawn:
        """The next token of each row at `slots`, which rise, from `logits` [n, V]; it is the row's newest then."""
        at = self._at(slots)
        temperature, top_p, min_p = self.limits[:, at].unbind()
        uniforms = temperature if all(self.greedy[slot] for slot in slots) else self._uniforms(at)
        tokens, logprobs = sample(logits, uniforms, temperature, self.top_k[at], top_p, min_p)
        self.tokens[at] = _embeddable(tokens)
        self.keys[2, at] += 1
        return Drawn.of(tokens, logprobs)

    def positions(self, rows: int) -> Tensor:
        """Where in its text the newest token of each of the first `rows` rows stands."""
        return self.prompts[:rows] + self.keys[2, :rows] - 1

    def advance(self, logits: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """`draw` for the first rows, of which only the `active` ones (bool [n]) change; returns tokens and log-probs.

        Nothing here depends on the host or on what the tensors hold, so it can be captured in a graph.
        """
        rows = len(logits)
        seed, request, drawn = self.keys[:, :rows].unbind()
        temperature, top_p, min_p = self.limits[:, :rows].unbind()
        tokens, logprobs = sample(logits, uniform(seed, request, drawn), temperature, self.top_k[:rows], top_p, min_p)
        newest = self.tokens[:rows]
        newest.copy_(torch.where(active, _embeddable(tokens), newest))
        drawn += active
        return tokens, logprobs

    def newest(self, slots: Sequence[int]) -> Tensor:
        """The newest token of each row at `slots`, which rise."""
        return self.tokens[self._at(slots)]

    def _at(self, slots: Sequence[int]) -> slice | Tensor:
        dense = len(slots) == slots[-1] + 1
        return slice(0, len(slots)) if dense else upload(torch.tensor(slots), self.device)

    def _uniforms(self, at: slice | Tensor) -> Tensor:
        seed, request, drawn = self.keys[:, at].unbind()
        if self.device.type != "cpu":
            return uniform(seed, request, drawn)
        place = drawn % AHEAD
        if (place == 0).any():
            rows = torch.arange(self.keys.shape[1])[at][place == 0]
            self._draw_ahead(rows, torch.zeros_like(rows))
        return self.ahead[at].gather(1, place[:, None])[:, 0]

    def _draw_ahead(self, at: Tensor, shift: Tensor) -> None:
        seed, request, drawn = self.keys[:, at].unbind()
        positions = (drawn + shift)[:, None] + torch.arange(AHEAD)
        self.ahead[at] = uniform(seed[:, None], request[:, None], positions)


def _embeddable(tokens: Tensor) -> Tensor:
    """-1, which stands for broken logits, would be a fault in the next step, launched before the host has read it."""
    return tokens.clamp(min=0)


def _send(x: Tensor) -> Tensor:
    """`x` of a GPU in pinned memory, once the work before has been done."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
