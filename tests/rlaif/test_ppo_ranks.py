"""PPO on two data ranks, played by two threads: the same curves as in one process, and the same weights on both."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_task import PROMPTS, SEED, MakeTask, Task, copied
from torch import Tensor

from bylaw.kernels.policy_loss import merge_stats
from bylaw.model.parallel import DATA, Parallel
from bylaw.model.records import read_records
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo import ppo

SETTINGS: dict[str, Any] = {
    "iterations": 3,
    "rollouts": 9,
    "max_tokens": 6,
    "minibatches": 4,  # of 2 or 3 episodes: where a rank has none of them, it repeats one that does not count
    "epochs": 2,
    "micro_batch_tokens": 12,
    "learning_rate": 3e-3,
    "value_learning_rate": 3e-3,
    "score_stats": "running",
    "kl_target": 0.02,
    "kl_coef": 0.1,
    "kl_horizon": 50,
}


class Table:
    """Where threads lay what they have for the others."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def exchange(self, rank: int, part: Any) -> list[Any]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


@dataclass(frozen=True)
class Thread(Parallel):
    """A data rank of a program that has no process group."""

    table: Table = field(default_factory=lambda: Table(1))

    @property
    def alone(self) -> bool:
        return False

    def meet(self) -> None:
        self.gather(None)

    def gather(self, part: Any) -> list[Any]:
        return self.table.exchange(self.data_rank, part)

    def tell(self, value: Any) -> Any:
        return self.gather(value)[0]

    def add(self, tensor: Tensor, axis: str = DATA) -> Tensor:
        parts = self.gather(tensor.clone())
        return tensor.copy_(torch.stack(parts).sum(0))

    def merge(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return merge_stats(self.gather(dict(stats)))


def in_threads(work: Callable[[int], None], ranks: int) -> None:
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_two_ranks_learn_what_one_process_does(make_task: MakeTask, value: str, tmp_path: Path) -> None:
    alone, tasks, table = make_task(value), [make_task(value), make_task(value)], Table(2)
    config = PPOConfig(**SETTINGS, value=value, save_every=100)  # pyright: ignore[reportArgumentType]

    def train(task: Task, folder: str, parallel: Parallel) -> None:
        task.counts = ppo(task.models, task.engine, PROMPTS, tmp_path / folder, config, SEED, parallel=parallel)

    train(alone, "alone", Parallel())
    ranks = [Thread(data_rank=rank, data_ranks=2, table=table) for rank in range(2)]
    in_threads(lambda rank: train(tasks[rank], f"rank{rank}", ranks[rank]), 2)

    one, two = (read_records(tmp_path / folder / "metrics.jsonl") for folder in ("alone", "rank0"))
    for left, right in zip(one, two, strict=True):
        assert right["val/first_ratio_gap"] == 0
        for name in left.keys() - {"eps/s", "tok/s"}:
            if not name.startswith(("time/", "sampling/")):
                assert right[name] == pytest.approx(left[name], abs=1e-5), name
    texts = [
        [
            (r["iteration"], r["place"], r["prompt_id"], r["ids"])
            for r in read_records(tmp_path / folder / "rollouts.jsonl")
        ]
        for folder in ("alone", "rank0")
    ]
    assert texts[0] == texts[1]
    assert not (tmp_path / "rank1").exists()  # one rank writes
    for name in ("policy", "value"):
        ours, first, second = (copied(getattr(task.models, name)) for task in (alone, *tasks))
        for a, b, c in zip(ours, first, second, strict=True):
            assert torch.equal(b, c)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_fewer_episodes_than_ranks_are_refused(make_task: MakeTask, tmp_path: Path) -> None:
    task, parallel = make_task(), Thread(data_rank=0, data_ranks=9)
    with pytest.raises(ValueError, match="rollouts = 8 is not possible; allowed: at least the number of data ranks, 9"):
        ppo(task.models, task.engine, PROMPTS, tmp_path, PPOConfig(rollouts=8), SEED, parallel=parallel)
