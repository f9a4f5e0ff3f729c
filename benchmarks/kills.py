"""Trainers killed at random instants: are the final weights those of a run that was left alone, bit for bit?

    python benchmarks/kills.py --trials 30 --out kills.jsonl

SFT, the reward model and PPO take turns, 20 steps each on the village. A trial runs the stage in a process of its own,
kills it (SIGKILL) one to three times at instants drawn from its running time, starts it again each time, and lets it
end. A line of JSON for each trial says what was done, and the last one sums up. Exit code 1: some weights differ.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

from bylaw.benchmarks.script import script
from bylaw.benchmarks.village.evaluate import prompts
from bylaw.demo import village_recipe, write_prompts
from bylaw.model.checkpoint import checkpoint_hash
from bylaw.model.records import Record
from bylaw.model.settings import require
from bylaw.recipe import DemoConfig, Recipe
from bylaw.runs import versions

STEPS, MOST_KILLS = 20, 3
CHECKPOINTS = {"finetune": "sl-cai", "reward": "reward-model", "ppo": "rl-cai"}
NEEDED = {"finetune": ("revise",), "reward": ("finetune", "label"), "ppo": ("finetune", "reward")}
# What takes seconds to import: once for all lives, which are forks of one process that has it.
IMPORTED = [
    "bylaw.benchmarks.kills",
    "bylaw.pipeline",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.checkpoint.state_dict_saver",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trainers killed at random instants."""

    trials: int = 30
    """In turns, over the three trainers."""
    out: Path | None = None
    """File for the results, in JSON lines."""
    seed: int = 0
    """Draws how often and when a trial is killed."""

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials", self.trials, "1 or more")


class Whole(NamedTuple):
    """The runs of the three trainers that were left alone."""

    recipe: Recipe
    weights: dict[str, str]
    seconds: dict[str, float]


def main(config: Config) -> int:
    """Run the trials, print and write what came of them; returns the exit code."""
    start, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for line in trials(Path(folder), config.trials, config.seed):
            print(json.dumps(line), flush=True)
            lines.append(line)
    differ = sum(not line["equal"] for line in lines)
    lines.append(
        {
            "trials": len(lines),
            "kills": sum(len(line["kills"]) for line in lines),
            "differ": differ,
            "seconds": round(time.monotonic() - start, 1),
            "versions": versions(),
        }
    )
    print(json.dumps(lines[-1]))
    if config.out:
        config.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return int(differ > 0)


def trials(folder: Path, count: int, seed: int = 0, steps: int = STEPS) -> Iterator[Record]:
    """What came of each of `count` trials, whose runs are kept in `folder` while they are needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    whole = run_whole(context, small_village(folder / "whole", steps))
    for number in range(count):
        stage = list(CHECKPOINTS)[number % len(CHECKPOINTS)]
        found = trial(context, whole, stage, folder / "killed", random.Random(f"{seed} {number}"))
        yield {"trial": number, "trainer": stage, "steps": steps, "seed": seed} | found


def small_village(out: Path, steps: int) -> Recipe:
    """The demo's recipe, with so many steps for each trainer and a checkpoint after every third."""
    recipe = village_recipe(DemoConfig(out=out))
    write_prompts(recipe.prompts, prompts(heldout=False, harmful=True))
    write_prompts(Path(recipe.helpful), prompts(heldout=False, harmful=False, forms=3))
    # 36 sequences and 20 pairs, less those that are held out or of equal texts: at least two batches in an epoch.
    return replace(
        recipe,
        prompt_limit=12,
        revise=replace(recipe.revise, rounds=2),
        finetune=replace(recipe.finetune, batch_size=18, epochs=steps // 2, save_every=3),
        reward=replace(recipe.reward, batch_size=11, epochs=steps // 2, save_every=3, heldout_fraction=0.2),
        ppo=replace(recipe.ppo, iterations=steps, rollouts=4, max_rows=4, epochs=1, save_every=3),
    )


def run_whole(context: ForkServerContext, recipe: Recipe) -> Whole:
    """All stages, each left alone; the trainers' weights and seconds."""
    seconds = {}
    life(context, recipe, ("revise",), None)  # which starts the process that the others are forks of
    for stage, before in (("finetune", ()), ("reward", ("compare", "label")), ("ppo", ())):
        if before:
            life(context, recipe, before, None)
        start = time.monotonic()
        life(context, recipe, (stage,), None)
        seconds[stage] = time.monotonic() - start
    return Whole(recipe, {stage: weights(recipe, stage) for stage in CHECKPOINTS}, seconds)


def trial(context: ForkServerContext, whole: Whole, stage: str, out: Path, draws: random.Random) -> dict[str, Any]:
    """Run `stage` anew, killed at least once, and compare its weights."""
    recipe, wanted = replace(whole.recipe, out=out), draws.randint(1, MOST_KILLS)
    kills: list[dict[str, float]] = []
    while not kills:  # a run that was faster than its kill is no trial
        _prepare(whole.recipe.out, out, stage)
        ended = False
        while not ended:
            instant = draws.uniform(0, whole.seconds[stage]) if len(kills) < wanted else None
            ended = life(context, recipe, (stage,), instant)
            if not ended and instant is not None:
                kills.append({"seconds": round(instant, 3), "steps": _steps(out / stage)})
    return {"kills": kills, "equal": weights(recipe, stage) == whole.weights[stage]}


def life(context: ForkServerContext, recipe: Recipe, stages: tuple[str, ...], instant: float | None) -> bool:
    """Run `stages` in a process of their own; whether they ended, or were killed after `instant` seconds.

    Raises RuntimeError if they failed.
    """
    process = context.Process(target=_live, args=(recipe, stages))
    process.start()
    process.join(instant)
    killed = process.is_alive()
    if killed:
        process.kill()
    process.join()
    if process.exitcode and not killed:
        raise RuntimeError(f"{stages} failed: {_log(recipe).read_text()[-2000:]}")
    return process.exitcode == 0


def weights(recipe: Recipe, stage: str) -> str:
    """The hash of what a stage has trained."""
    return checkpoint_hash(recipe.out / stage / CHECKPOINTS[stage])


def _live(recipe: Recipe, stages: tuple[str, ...]) -> None:
    import torch
    from tqdm import tqdm

    from bylaw.pipeline import run_pipeline

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave behind
    with _log(recipe).open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)  # sums are added in one order
    run_pipeline(recipe, stages)


def _log(recipe: Recipe) -> Path:
    return recipe.out.with_suffix(".log")


def _prepare(whole: Path, out: Path, stage: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name in NEEDED[stage]:
        (out / name).symlink_to(whole / name)


def _steps(folder: Path) -> int:
    """Steps that were done when the run was killed."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    # Python has put this folder first on its path, where a library that looks for a package `kernels` finds a file.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    script(main, Config, __doc__)
