"""The trainers on one process, on two and on four (two data ranks of two tensor ranks): the same curves, weights that
are read and written in parts, and training checkpoints that go on at another number of ranks.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from bylaw.benchmarks.village.base import SHIPPED, to_example
from bylaw.benchmarks.village.corpus import Corpus
from bylaw.benchmarks.village.evaluate import prompts
from bylaw.constitution.load import load_constitution
from bylaw.model.checkpoint import load_model, load_reward, load_scalar, save_model, save_reward
from bylaw.model.engine import Engine
from bylaw.model.parallel import Parallel, parallel_program
from bylaw.model.records import read_records
from bylaw.model.supervised import Example, train_supervised
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import DPOConfig, PPOConfig, RewardConfig
from bylaw.rlaif.dpo import train_dpo
from bylaw.rlaif.pairs import Pair
from bylaw.rlaif.ppo import Models, ppo, shared_value
from bylaw.rlaif.ppo_scores import Reward
from bylaw.rlaif.reward import train_reward
from bylaw.sl_cai.config import FinetuneConfig

WORLDS = {"one": (1, 1), "two": (2, 1), "two by two": (4, 2)}
STEPS = 6
OPTIM: dict[str, Any] = {"learning_rate": 3e-4, "weight_decay": 0.1, "save_every": STEPS // 2}


def texts() -> tuple[list[Example], Tokenizer]:
    corpus, tokenizer = Corpus(load_constitution("village"), random.Random(3)), Tokenizer.load(SHIPPED)
    return [to_example(corpus.draw(), tokenizer) for _ in range(STEPS * 3 - 1)], tokenizer


def pairs() -> list[Pair]:
    """Of texts that have little in common, with labels on both sides, none of them sure."""
    ids, rng = [example.ids for example in texts()[0]], random.Random(4)
    return [Pair(a, b, rng.random()) for a, b in itertools.islice(itertools.cycle(itertools.pairwise(ids)), STEPS * 2)]


def sft(folder: Path, parallel: Parallel) -> None:
    model = load_model(SHIPPED, parallel=parallel)
    config = FinetuneConfig(micro_batch_tokens=200, activation_checkpointing="selective", **OPTIM)
    train_supervised(
        model, texts()[0], config, epochs=1, batch_size=3, seed=1, folder=folder, stage="sft", parallel=parallel
    )
    save_model(model, folder / "model", parallel=parallel)


def reward(folder: Path, parallel: Parallel) -> None:
    model = load_scalar(SHIPPED, 5, parallel=parallel)
    config = RewardConfig(micro_batch_tokens=250, batch_size=2, **OPTIM)
    measures = train_reward(model, pairs(), pairs()[:7], folder, config, 1, parallel)
    save_reward(model, folder / "model", extras=measures, parallel=parallel)


def dpo(folder: Path, parallel: Parallel) -> None:
    model = load_model(SHIPPED, parallel=parallel)
    asked = [Pair(one.a[:4] + one.a, one.a[:4] + one.b, one.p_a, prompt=4) for one in pairs()]
    config = DPOConfig(micro_batch_tokens=250, batch_size=2, **OPTIM)
    train_dpo(model, asked, asked[:5], folder, config, 1, parallel)
    save_model(model, folder / "model", parallel=parallel)


def rl(value: Any) -> Callable[[Path, Parallel], None]:
    def train(folder: Path, parallel: Parallel) -> None:
        policy, reference = (load_model(SHIPPED, parallel=parallel) for _ in range(2))
        scorer = load_scalar(SHIPPED, 5, parallel=parallel)
        critic = shared_value(policy) if value == "shared" else load_scalar(SHIPPED, 6, parallel=parallel)
        config = PPOConfig(
            value=value, iterations=STEPS, rollouts=6, max_tokens=12, minibatches=2, micro_batch_tokens=90,
            kl_coef=0.05, score_stats="running", value_learning_rate=3e-4, **OPTIM,
        )  # fmt: skip
        models = Models(policy, critic, reference, [Reward(scorer)])
        ppo(models, Engine(policy, texts()[1]), prompts(True, True), folder, config, 7, parallel=parallel)
        save_model(policy, folder / "model", parallel=parallel)

    return train


TRAINERS: dict[str, Callable[[Path, Parallel], None]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": rl("separate"),
    "ppo shared": rl("shared"),
}


def run_rank(rank: int, ranks: int, tensor_ranks: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if ranks > 1:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
    with parallel_program("cpu", tensor_ranks) as parallel:
        for name, train in TRAINERS.items():
            train(folder / name, parallel)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(world: str, folder: Path) -> None:
    ranks, tensor_ranks = WORLDS[world]
    arguments = (ranks, tensor_ranks, free_port(), folder)
    start_processes(run_rank, arguments, nprocs=ranks, start_method="forkserver")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each world, in which all have trained. Ranks are forks of one process that has imported torch."""
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    folders = {world: tmp_path_factory.mktemp("world") for world in WORLDS}
    for world, folder in folders.items():
        launch(world, folder)
    return folders


def curve(folder: Path, names: tuple[str, ...]) -> torch.Tensor:
    return torch.tensor([[record[name] for name in names] for record in read_records(folder / "metrics.jsonl")])


NAMES = {
    "sft": ("loss", "grad_norm"),
    "reward": ("loss", "accuracy", "grad_norm"),
    "dpo": ("loss", "rewards/accuracies"),  # the others are differences of sums of hundreds of nats
    "ppo": ("loss/policy", "loss/value", "objective/kl", "objective/scores"),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("world", ["two", "two by two"])
def test_curves_do_not_depend_on_the_number_of_ranks(runs: dict[str, Path], trainer: str, world: str) -> None:
    names = NAMES[trainer.split()[0]]
    alone, together = (curve(runs[name] / trainer, names) for name in ("one", world))
    assert alone.shape == (STEPS, len(names))
    assert alone[:, 0].unique().numel() > STEPS // 2
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_model_is_written_from_its_parts(runs: dict[str, Path], trainer: str) -> None:
    start = load_file(SHIPPED / "model.safetensors")
    alone = load_file(runs["one"] / trainer / "model" / "model.safetensors")
    assert max(float((alone[name] - start[name]).abs().max()) for name in start) > 1e-4
    for world in ("two", "two by two"):
        together = load_file(runs[world] / trainer / "model" / "model.safetensors")
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=0)
    if trainer == "reward":
        load_reward(runs["two by two"] / trainer / "model")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_another_number_of_ranks_goes_on_with_the_same_data(
    runs: dict[str, Path], trainer: str, tmp_path: Path
) -> None:
    """Killed halfway on four ranks, and gone on with on one: as one process would have."""
    shutil.copytree(runs["two by two"] / trainer, tmp_path / trainer)
    shutil.rmtree(tmp_path / trainer / "model")
    (tmp_path / trainer / "state" / "latest.json").write_text(json.dumps({"state": f"step-{STEPS // 2}"}))
    with parallel_program("cpu") as parallel:
        TRAINERS[trainer](tmp_path / trainer, parallel)
    names = NAMES[trainer.split()[0]]
    torch.testing.assert_close(
        curve(tmp_path / trainer, names), curve(runs["one"] / trainer, names), atol=1e-4, rtol=1e-4
    )
