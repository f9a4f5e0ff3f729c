"""Direct preference optimisation on the soft labels, without a reward model (Rafailov et al. 2023, arXiv 2305.18290).

reward of an answer y to x = beta log [pi(y | x) / pi_SL-CAI(y | x)]
loss = -[p log sigma(d) + (1 - p) log sigma(-d)],   d = reward of a - reward of b

With the label's probability p as the target, the loss is that of conservative DPO (Mitchell 2023). The reference's
log-probs are taken once, before training, so that one model is in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bylaw.kernels.linear_preference import PreferenceLoss, linear_preference
from bylaw.kernels.policy_loss import Stats
from bylaw.kernels.preference_loss import expected_calibration_error, preference_loss
from bylaw.model.fit import fit
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.step import micro_batches
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import DPOConfig
from bylaw.rlaif.pairs import Pair, hardened, pack_pairs


class Referenced(NamedTuple):
    """A pair, and the log-probs of its answers under the reference, in nats."""

    pair: Pair
    reference_a: float
    reference_b: float


def train_dpo(
    model: Transformer,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    folder: Path,
    config: DPOConfig,
    seed: int,
    parallel: Parallel = ALONE,
) -> dict[str, Any]:
    """Train `model` in place, which as it is given is the reference; metrics and state go to `folder`. Returns its
    held-out measures (`measure`) and counts.

    Goes on from the training checkpoint in `folder`/state if there is one, to the same bits, from the same reference:
    give it the model that training began with. Raises ValueError, before any work, for a pair without a prompt or with
    an answer of no tokens.
    """
    _check([*train, *heldout])
    budget = config.micro_batch_tokens
    items = with_reference(model, hardened(train) if config.hard_labels else train, budget, parallel)
    measured = with_reference(model, heldout, budget, parallel)
    counts = fit(
        model,
        items,
        lambda item: item.pair.tokens,
        lambda batch: lambda run: _objective(model, run, len(batch), config.beta),
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        folder=folder,
        stage="dpo",
        measure=_named,
        parallel=parallel,
    )
    return counts | measure(model, measured, budget, config.beta, parallel)


def with_reference(
    model: Transformer, pairs: Sequence[Pair], budget: int, parallel: Parallel = ALONE
) -> list[Referenced]:
    """Each pair with the log-probs that `model` as it is now gives its answers."""
    logps = answer_logps(model, pairs, budget, parallel)
    return [Referenced(pair, *both) for pair, both in zip(pairs, logps, strict=True)]


@torch.no_grad()
def answer_logps(
    model: Transformer, pairs: Sequence[Pair], budget: int, parallel: Parallel = ALONE
) -> list[tuple[float, float]]:
    """Log-probs of both answers of each pair, in nats, on every rank, whichever of the pairs it worked on."""
    found: dict[int, list[float]] = {}
    for batch in micro_batches([pair.tokens for pair in pairs], budget, parallel):
        blank = [Referenced(pairs[i], 0.0, 0.0) for i in batch.items]
        logps = preference(model, blank, 1.0).logps.view(-1, 2).tolist()
        if batch.counts:
            found |= zip(batch.items, logps, strict=True)
    whole = {i: both for part in parallel.gather(found) for i, both in part.items()}
    return [(whole[i][0], whole[i][1]) for i in range(len(pairs))]


def preference(model: Transformer, run: Sequence[Referenced], beta: float) -> PreferenceLoss:
    """The loss summed over the pairs of `run`, and the log-probs [2B] of their answers, in one packed pass."""
    pairs, device = [item.pair for item in run], model.device
    stream = pack_pairs(pairs, device)
    answers = [ids[pair.prompt :] for pair in pairs for ids in (pair.a, pair.b)]
    prompts = torch.tensor([pair.prompt for pair in pairs for _ in "ab"])
    lengths = torch.tensor([len(ids) for ids in answers])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])  # on the host, which reads them
    # Where each answer token stands among the sequences in full; the state that it is chosen from is one before.
    starts = (lengths + prompts).cumsum(0) - lengths - bounds[:-1]
    places = torch.arange(int(bounds[-1])) + starts.repeat_interleave(lengths)
    hidden = model(stream.asking(stream.source[(places - 1).to(device)]))
    targets = torch.tensor([token for ids in answers for token in ids]).to(device)
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    references = torch.tensor([logp for item in run for logp in item[1:]], dtype=kind, device=device)
    labels = torch.tensor([pair.p_a for pair in pairs], dtype=kind, device=device)
    return linear_preference(hidden, model.head_weight, targets, bounds, references, labels, beta=beta)


def _objective(model: Transformer, run: list[Referenced], pairs: int, beta: float) -> tuple[Tensor, Stats]:
    loss, logps = preference(model, run, beta)
    return loss / pairs, _sums(run, logps.detach().double().view(-1, 2), beta)


def _sums(run: Sequence[Referenced], logps: Tensor, beta: float) -> dict[str, Tensor]:
    """Over pairs whose label decides, sums of what TRL's users know by these names; ties have no chosen answer."""
    p_a = logps.new_tensor([item.pair.p_a for item in run])
    rewards = beta * (logps - logps.new_tensor([item[1:] for item in run]))
    decided = p_a != 0.5
    chosen = (p_a < 0.5).long()[decided, None]

    def sides(both: Tensor) -> tuple[Tensor, Tensor]:
        return both[decided].gather(1, chosen), both[decided].gather(1, 1 - chosen)

    (reward, rejected), (logp, rejected_logp) = sides(rewards), sides(logps)
    columns = {
        "rewards/chosen": reward,
        "rewards/rejected": rejected,
        "rewards/accuracies": (torch.sign(reward - rejected) + 1) / 2,  # equal rewards are half right
        "rewards/margins": reward - rejected,
        "logps/chosen": logp,
        "logps/rejected": rejected_logp,
    }
    return {name: column.sum() for name, column in columns.items()} | {"decided": decided.sum().double()}


def _named(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the pairs whose label decides; nothing where none does."""
    decided = float(stats["decided"])
    return {name: float(value) / decided for name, value in stats.items() if "/" in name} if decided else {}


def measure(
    model: Transformer, items: Sequence[Referenced], budget: int, beta: float, parallel: Parallel = ALONE
) -> dict[str, Any]:
    """Measures on held-out pairs: loss, how often the label's choice has the larger reward, by how much, calibration;
    None where no label decides.
    """
    logps = torch.tensor(answer_logps(model, [item.pair for item in items], budget, parallel), dtype=torch.float64)
    rewards = beta * (logps - logps.new_tensor([item[1:] for item in items]))
    labels = logps.new_tensor([item.pair.p_a for item in items])
    difference = rewards[:, 0] - rewards[:, 1]
    means = _named(_sums(items, logps, beta))
    return {
        "heldout_loss": float(preference_loss(rewards[:, 0], rewards[:, 1], labels).mean()),
        "heldout_accuracy": means.get("rewards/accuracies"),
        "heldout_margin": means.get("rewards/margins"),
        "heldout_ece": float(expected_calibration_error(torch.sigmoid(difference), labels)),
    }


def _check(pairs: Sequence[Pair]) -> None:
    for number, pair in enumerate(pairs):
        lengths = len(pair.a), len(pair.b)
        if not 1 <= pair.prompt < min(lengths) or pair.a[: pair.prompt] != pair.b[: pair.prompt]:
            raise ValueError(
                f"pair {number} has a prompt of {pair.prompt} tokens in sequences of {lengths[0]} and {lengths[1]}; "
                "allowed: at least one token, the same in both, and an answer of at least one behind it"
            )
