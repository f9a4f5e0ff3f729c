"""Training on a fixed set of items, as SFT, the reward model and DPO do: shuffled epochs of packed steps.

for each epoch, for each batch of the shuffled items:
    gradient of sum over the batch of the objective;  clip;  AdamW at the scheduled rate
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from bylaw.kernels.philox import permutation
from bylaw.kernels.policy_loss import Stats
from bylaw.model.metrics import Metrics
from bylaw.model.optim import adamw, scheduled, update
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.prepare import prepare
from bylaw.model.settings import OptimSettings
from bylaw.model.step import Item, Objective, accumulate, micro_batches
from bylaw.model.train_state import Checkpoints, Learner


def fit(
    model: nn.Module,
    items: Sequence[Item],
    tokens: Callable[[Item], int],
    objective: Callable[[list[Item]], Objective[Item]],
    settings: OptimSettings,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
    stage: str,
    measure: Callable[[Stats], dict[str, float]] = lambda stats: {},
    show: Callable[[int, int], None] = lambda step, steps: None,
    parallel: Parallel = ALONE,
) -> dict[str, float]:
    """Train `model` in place, `batch_size` of the items in a step, shuffled anew each epoch from `seed`.

    `objective(batch)` gives the objective (model/step.py) of a step on `batch`; `tokens(item)` is what an item adds to
    a packed stream. Every rank has all items; which of them a step takes depends on nothing but the seed.

    Goes on from the training checkpoint in `folder`/state if there is one: in one process to the same bits. Metrics, of
    which `measure` makes some from the objective's statistics, go to `folder`/metrics.jsonl; `show` is called after
    each step with its number and theirs. Returns the steps, the tokens, and the last step's loss.
    """
    batches = batches_of(len(items), epochs, batch_size, seed)
    prepare(model, settings.activation_checkpointing, settings.compile)
    optimizer = adamw(model, settings)
    learners = {"model": Learner(model, optimizer)}
    with Checkpoints(folder / "state", learners, parallel, settings.keep_checkpoints) as checkpoints:
        progress = checkpoints.load() or {"step": 0, "loss": 0.0}
        first, loss = int(progress["step"]), float(progress["loss"])
        with Metrics(folder / "metrics.jsonl", stage, len(batches), first, parallel.first) as metrics:
            for step in range(first, len(batches)):
                start, batch = time.monotonic(), [items[i] for i in batches[step]]
                lengths = [tokens(item) for item in batch]
                runs = micro_batches(lengths, settings.micro_batch_tokens, parallel)
                stats = accumulate(objective(batch), batch, runs, parallel)
                rate = scheduled(settings, settings.learning_rate, step, len(batches))
                norm = update(model, optimizer, rate, settings.max_grad_norm, parallel)
                loss, speed = float(stats["loss"]), sum(lengths) / (time.monotonic() - start)
                values = {"loss": loss, **measure(stats), "lr": rate, "grad_norm": norm, "tokens_per_second": speed}
                metrics.log(step, values, {"loss": loss, **measure(stats), "lr": rate, "tok/s": speed})
                show(step, len(batches))
                if (step + 1) % settings.save_every == 0 and step + 1 < len(batches):
                    checkpoints.save({"step": step + 1, "loss": loss})
    learned = sum(tokens(items[i]) for batch in batches for i in batch)
    return {"steps": len(batches), "tokens": learned, "last_loss": loss}


def batches_of(count: int, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """Which of `count` items each optimiser step takes: epoch after epoch, each shuffled anew, cut into batches that do
    not stop where an epoch ends.
    """
    order = [int(i) for epoch in range(epochs) for i in permutation(seed, count, epoch)]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
