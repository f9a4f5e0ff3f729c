"""Our side of the training benchmark: thin adapters between its workloads and the trainers."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from bylaw.benchmarks.training_config import OPTIM, PPO, Sizes
from bylaw.benchmarks.training_side import Run, Side, Task, Told
from bylaw.benchmarks.training_workloads import EOS, Episode, episodes, examples, pairs, questions, restorer
from bylaw.model.checkpoint import load_model, load_reward
from bylaw.model.data import Prompt
from bylaw.model.engine import Completion, Engine, Request
from bylaw.model.records import read_records
from bylaw.model.settings import OptimSettings
from bylaw.model.supervised import Example, supervised_loss, train_supervised
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig, RewardConfig
from bylaw.rlaif.ppo import Models, ppo, shared_value
from bylaw.rlaif.ppo_scores import Reward
from bylaw.rlaif.reward import Pair, train_reward
from bylaw.rlaif.rollout import draw_prompts, sample_rollouts

FINISH: tuple[Literal["length"], Literal["stop"]] = ("length", "stop")
SEEDS = 6
MICRO = 1024  # tokens: what a core's cache likes; the peer has its ways
UNCLIPPED = 1e9  # TRL's PPO clips no gradient


class Words:
    """A tokenizer of numbers: "3 14" is 3, 14."""

    stop_ids = (EOS,)
    stop_strings = ()

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [int(word) for word in messages[-1]["content"].split()]


class Given:
    """An engine that answers with given responses."""

    tokenizer = Words()

    def __init__(self, model: Transformer, given: Sequence[Episode]) -> None:
        self.model = model
        self.given = {tuple(one.prompt): one for one in given}

    def forget(self) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        told = [self.given[tuple(request.prompt)] for request in requests]
        return [
            Completion(ids=one.response, logprobs=[0.0] * len(one.response), finish=FINISH[one.ended]) for one in told
        ]


def fresh() -> Path:
    return Path(tempfile.mkdtemp(prefix="bylaw-bench-"))


def sft(task: Task) -> Side:
    """train_supervised. Its check is the mean loss per token of given texts under the first weights."""
    model, sizes = load_model(task.folder / "policy"), task.sizes
    restore = restorer(model)

    def prepare(repeat: int) -> Run:
        restore()
        folder, drawn = fresh(), examples(sizes, model.config.vocab_size, repeat)
        data = [Example(ids, [True] * len(ids)) for ids in drawn]
        more = {"epochs": 1, "batch_size": sizes.batch, "seed": repeat, "folder": folder, "stage": "sft"}
        return Run(
            lambda: train_supervised(model, data, OptimSettings(**OPTIM, micro_batch_tokens=MICRO), **more),
            lambda done: {"useful": sum(map(len, drawn)), "loss": _first(folder)["loss"], "efficiency": 1.0},
        )

    @torch.no_grad()
    def check(batch: list[list[int]]) -> Told:
        restore()
        losses = [float(supervised_loss(model, [Example(ids, [True] * len(ids))])) for ids in batch]
        return {"loss": sum(losses) / sum(len(ids) - 1 for ids in batch)}

    return Side(prepare, check)


def reward(task: Task) -> Side:
    """train_reward, on hard labels. The few held-out pairs that it measures in the end are its own extra."""
    model, sizes = load_reward(task.folder / "value")[0], task.sizes
    restore = restorer(model)

    def prepare(repeat: int) -> Run:
        restore()
        folder, drawn = fresh(), pairs(sizes, model.trunk.config.vocab_size, repeat)
        data = [Pair(one.prompt + one.chosen, one.prompt + one.rejected, 1.0, len(one.prompt)) for one in drawn]
        read, through = sum(len(one.a) + len(one.b) for one in data), sum(one.tokens for one in data)
        config = RewardConfig(**OPTIM, schedule="constant", batch_size=sizes.pair_batch, micro_batch_tokens=MICRO)
        return Run(
            lambda: train_reward(model, data, data[:1], folder, config, repeat),
            lambda done: {"useful": len(data), "loss": _first(folder)["loss"], "efficiency": read / through},
        )

    return Side(prepare, lambda about: {})


def ppo_side(task: Task) -> Side:
    """One iteration of ppo. Its check is an iteration on given episodes, of two epochs over them as one minibatch."""
    folder, sizes = task.folder, task.sizes
    policy, reference = load_model(folder / "policy"), load_model(folder / "reference")
    value = shared_value(policy) if task.way == "shared" else load_reward(folder / "value")[0]
    models = Models(policy, value, reference, [Reward(load_reward(folder / "reward")[0])])
    restore, config = restorer(policy, value), ppo_config(sizes, task.way)
    engine: Any = Engine(policy, Words(), max_rows=sizes.episodes)  # pyright: ignore[reportArgumentType]
    prompts = as_prompts(questions(sizes, policy.config.vocab_size, 0))
    seed = typical(engine, prompts, config, sizes.response[0])

    def prepare(repeat: int) -> Run:
        restore()
        return Run(lambda: ppo(models, engine, prompts, fresh(), config, seed), told)

    def told(done: dict[str, Any]) -> Told:
        split = {name: value for name, value in done.items() if name.startswith("time/")}
        return {"useful": sizes.episodes, "response": done["val/response_tokens"], "ended": done["val/ended"]} | split

    def check(about: Any) -> Told:
        restore()
        given = episodes(sizes, policy.config.vocab_size, 0)
        plain = replace(config, epochs=2, minibatches=1, gae_lambda=1.0)
        sampler: Any = Given(policy, given)
        done = ppo(models, sampler, as_prompts([one.prompt for one in given]), fresh(), plain, 0)
        return {"kl": done["objective/kl"], "score": done["objective/scores"], "policy_loss": done["loss/policy"]}

    return Side(prepare, check)


def as_prompts(asked: Sequence[Sequence[int]]) -> list[Prompt]:
    """Token ids as dialogues of one turn, for Words to read."""
    words = [" ".join(map(str, ids)) for ids in asked]
    return [Prompt(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(words)]


def typical(engine: Engine, prompts: Sequence[Prompt], config: PPOConfig, wanted: float) -> int:
    """Of some seeds, the one whose responses have most nearly the `wanted` mean length.

    All runs draw by it. With new draws in each, the best would be the run that happened to draw short responses.
    """
    gaps = []
    for seed in range(SEEDS):
        drawn = sample_rollouts(engine, draw_prompts(prompts, config.rollouts, seed, 0), config, seed, 0)
        gaps.append(abs(sum(len(one.response) for one in drawn) / len(drawn) - wanted))
    return gaps.index(min(gaps))


def ppo_config(sizes: Sizes, value: Any, **more: Any) -> PPOConfig:
    """Our settings, of TRL's algorithm. `value` is "separate" or "shared"."""
    settings: dict[str, Any] = PPO | {
        "value": value, "value_learning_rate": PPO["learning_rate"], "beta2": OPTIM["beta2"], "importance_cap": 0.0,
        "max_grad_norm": UNCLIPPED, "score_stats": "none", "iterations": 1, "rollouts": sizes.episodes,
        "max_tokens": sizes.response[1], "epochs": sizes.epochs, "minibatches": sizes.minibatches,
        "max_rows": sizes.episodes,
    }  # fmt: skip
    return PPOConfig(**settings | more)


def _first(folder: Path) -> dict[str, Any]:
    return read_records(folder / "metrics.jsonl")[0]
