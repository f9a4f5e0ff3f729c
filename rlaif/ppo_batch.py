"""An iteration's episodes as columns over their response tokens, and the packed streams that models read them in.

A micro-batch is packed once; policy, reference, value and reward models all read that stream, in the update too.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bylaw.kernels.linear_logprob import linear_logprob
from bylaw.kernels.linear_loss import linear_loss
from bylaw.kernels.philox import permutation
from bylaw.kernels.upload import upload
from bylaw.model.heads import ScalarModel
from bylaw.model.packing import Packed, pack
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.step import MicroBatch, micro_batches
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.rollout import Rollout


class Policy(Protocol):
    """What a policy or a reference is asked for: hidden states of a stream, and the vocabulary head. A Transformer, or
    a view of one under an adapter.
    """

    def __call__(self, stream: Any) -> Tensor: ...
    @property
    def head_weight(self) -> Tensor: ...
    @property
    def device(self) -> torch.device: ...


class Run(NamedTuple):
    """Some episodes, packed. n counts their response tokens."""

    before: Packed  # wants the state [n] that each response token is chosen in, which ends one token before it
    last: Packed  # wants the last token of each episode
    targets: Tensor  # [n], the response tokens
    rows: Tensor  # [n], where they stand in the batch's columns


class Minibatch(NamedTuple):
    """Episodes of one optimiser step, by their places in the batch, and this rank's micro-batches of them."""

    items: list[int]
    runs: list[MicroBatch]


class Batch:
    """All episodes of an iteration. `columns` are [N] over their response tokens, in the episodes' order."""

    def __init__(self, rollouts: Sequence[Rollout], device: torch.device) -> None:
        self.rollouts, self.device = rollouts, device
        self.lengths = [len(rollout.response) for rollout in rollouts]
        self.ends = list(accumulate(self.lengths))
        self.cu_seqlens = torch.tensor([0, *self.ends], device=device)
        sampler = np.concatenate([np.asarray(r.sampler_logprobs, np.float32) for r in rollouts])
        self.columns: dict[str, Tensor] = {"sampler": torch.from_numpy(sampler).to(device)}
        self._runs: dict[tuple[int, ...], Run] = {}

    @property
    def tokens(self) -> int:
        return self.ends[-1]

    def run(self, items: Sequence[int]) -> Run:
        """The episodes at `items`, packed. Packed once: the plan of attention over them is kept with the stream."""
        key = tuple(items)
        if key not in self._runs:
            self._runs[key] = self._pack(key)
        return self._runs[key]

    def _pack(self, items: tuple[int, ...]) -> Run:
        rollouts = [self.rollouts[i] for i in items]
        packed = pack([rollout.ids for rollout in rollouts], self.device)
        ends = np.cumsum([len(r.prompt) + len(r.response) for r in rollouts])
        places = np.concatenate([np.arange(end - self.lengths[i], end) for i, end in zip(items, ends, strict=True)])
        rows = np.concatenate([np.arange(self.ends[i] - self.lengths[i], self.ends[i]) for i in items])
        at, rows = (upload(torch.from_numpy(x), self.device) for x in (places, rows))
        return Run(packed.asking(at - 1), packed.asking(packed.last), packed.tokens[at], rows)

    def at(self, run: Run, name: str) -> Tensor:
        """A column [n] over the response tokens of `run`."""
        return self.columns[name][run.rows]

    def minibatches(
        self, config: PPOConfig, seed: int, iteration: int, epoch: int, parallel: Parallel = ALONE
    ) -> list[Minibatch]:
        """The episodes in a new order: minibatches of near-equal size, each cut into micro-batches by tokens."""
        order = permutation(seed + 1, len(self.rollouts), iteration * config.epochs + epoch)
        parts = [[int(i) for i in part] for part in order.tensor_split(config.minibatches)]
        tokens = [[len(self.rollouts[i].ids) for i in part] for part in parts]
        return [
            Minibatch(part, micro_batches(lengths, config.micro_batch_tokens, parallel))
            for part, lengths in zip(parts, tokens, strict=True)
        ]


@torch.no_grad()
def fill_columns(
    batch: Batch,
    plan: Sequence[Minibatch],
    policy: Policy,
    reference: Policy,
    value: ScalarModel,
    config: PPOConfig,
    parallel: Parallel = ALONE,
) -> None:
    """Set the columns logprobs, reference, values and entropy.

    `plan` is that of the first update, so that its first ratio is exactly 1. Each rank works on its micro-batches.
    """
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for items, runs in plan:
        for micro_batch in runs:
            run = batch.run([items[i] for i in micro_batch.items])
            columns = _columns(run, policy, reference, value, config)
            if micro_batch.counts:
                found.append((run.rows, columns))
    mine = {name: torch.cat([columns[name] for _, columns in found]).cpu() for name in found[0][1]} if found else {}
    rows = torch.cat([rows for rows, _ in found]).cpu() if found else torch.zeros(0, dtype=torch.int64)
    batch.columns |= _joined(parallel.gather((rows, mine)), batch.device)


def _columns(run: Run, policy: Policy, reference: Policy, value: ScalarModel, config: PPOConfig) -> dict[str, Tensor]:
    hidden = policy(run.before)
    # Not linear_logprob: on a GPU that is another kernel than the update's, and old and new would differ in last bits.
    zero = torch.zeros(len(hidden), device=hidden.device)
    terms: Any = {"nll": zero, "entropy": zero, "temperature": config.temperature, "ignore_index": None}
    _, logprobs, entropy = linear_loss(hidden, policy.head_weight, run.targets, **terms)
    assert entropy is not None
    values = value.read(hidden) if config.value == "shared" else value(run.before)
    other = linear_logprob(reference(run.before), reference.head_weight, run.targets, config.temperature)
    return {"logprobs": logprobs, "entropy": entropy, "values": values, "reference": other.logprobs}


def _joined(parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]], device: torch.device) -> dict[str, Tensor]:
    """Whole columns of what the ranks found, each at rows of its own."""
    rows = torch.cat([rows for rows, _ in parts])
    order = rows.argsort()
    names = next(columns for _, columns in parts if columns)
    whole = {name: torch.cat([columns[name] for _, columns in parts if columns]) for name in names}
    return {name: column[order].to(device) for name, column in whole.items()}
