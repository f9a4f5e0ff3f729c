"""Our trainers by themselves on a device: tokens per second, model FLOP utilisation, memory, and where PPO's time goes.

On a GPU the models are bfloat16, with float32 master weights in the optimiser.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bylaw.benchmarks.kernels import device_name
from bylaw.benchmarks.training_config import OPTIM, Sizes, TrainingConfig
from bylaw.benchmarks.training_flops import forward_flops, peak, training_flops
from bylaw.benchmarks.training_ours import Words, as_prompts, ppo_config
from bylaw.benchmarks.training_workloads import SHAPES, questions, texts
from bylaw.model.engine import Engine
from bylaw.model.heads import scalar_model
from bylaw.model.records import read_records
from bylaw.model.settings import OptimSettings
from bylaw.model.supervised import Example, train_supervised
from bylaw.model.transformer import Transformer, initialize
from bylaw.rlaif.ppo import Models, ppo
from bylaw.rlaif.ppo_scores import Reward

Record = dict[str, Any]
STEPS = 3  # after one that warms up


def measure(config: TrainingConfig, name: str) -> Record:
    """One workload of ALONE."""
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="bylaw-bench-") as place:
        record = (sft_step if name == "sft_step" else ppo_iteration)(config, device, Path(place))
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return record | {"peak_bytes": held}


def sft_step(config: TrainingConfig, device: torch.device, place: Path) -> Record:
    """Steps of `sequences` texts of `length` tokens, every token learned; the first is not counted."""
    sizes, model = config.sizes, random_model(config, device)
    count = sizes.sequences * (1 + STEPS)
    data = texts([sizes.length] * count, model.config.vocab_size, 0)
    settings = OptimSettings(**OPTIM, micro_batch_tokens=max(8192, sizes.length))
    examples = [Example(ids, [True] * len(ids)) for ids in data]
    train_supervised(model, examples, settings, epochs=1, batch_size=sizes.sequences, seed=0, folder=place, stage="sft")
    tokens = sizes.sequences * sizes.length
    # Of all steps together: a step waits for the end of what the optimiser of the one before began.
    seconds = sum(tokens / line["tokens_per_second"] for line in read_records(place / "metrics.jsonl")[1:])
    speed = STEPS * tokens / seconds
    flops = training_flops(model.config, [sizes.length] * sizes.sequences, tokens - sizes.sequences) / tokens
    return {"tokens_per_second": speed} | utilisation(flops * speed, device)


def ppo_iteration(config: TrainingConfig, device: torch.device, place: Path) -> Record:
    """Iterations with a separate value model; the first is not counted. Its parts are fractions of its time."""
    sizes, policy = config.sizes, random_model(config, device)
    reference, value, judge = random_model(config, device), scalar_model(policy, 1), scalar_model(policy, 2)
    asked = [questions(sizes, policy.config.vocab_size, seed) for seed in range(1 + STEPS)]
    prompts = as_prompts([ids for prompts in asked for ids in prompts])
    settings = ppo_config(sizes, "separate", iterations=1 + STEPS)
    engine = Engine(policy, Words(), max_rows=sizes.episodes)  # pyright: ignore[reportArgumentType]
    drawn: list[list[tuple[int, int]]] = []
    ppo(
        Models(policy, value, reference, [Reward(judge)]), engine, prompts, place, settings, 0,
        show=lambda iteration, rollouts: drawn.append([(len(r.prompt), len(r.response)) for r in rollouts]),
    )  # fmt: skip
    lines = read_records(place / "metrics.jsonl")[1:]
    best = max(range(STEPS), key=lambda i: lines[i]["tok/s"])
    seconds = sizes.episodes / lines[best]["eps/s"]
    flops = iteration_flops(policy.config, drawn[1 + best], sizes)
    split = {key: value for key, value in lines[best].items() if key.startswith("time/")}
    told = {"tokens_per_second": lines[best]["tok/s"], "episodes_per_second": lines[best]["eps/s"]}
    return told | {"response": lines[best]["val/response_tokens"]} | split | utilisation(flops / seconds, device)


def iteration_flops(model: Any, drawn: Sequence[tuple[int, int]], sizes: Sizes) -> int:
    """Of sampling, four models that score, and the epochs of policy and value model. `drawn`: prompt, response."""
    whole, said = [prompt + new for prompt, new in drawn], sum(new for _, new in drawn)
    with_head, without = (forward_flops(model, whole, logits) for logits in (said, 0))
    sampling, scoring = with_head, 2 * with_head + 2 * without
    update = sizes.epochs * (training_flops(model, whole, said) + training_flops(model, whole, 0))
    return sampling + scoring + update


def random_model(config: TrainingConfig, device: torch.device) -> Transformer:
    """In bfloat16 on a GPU, made there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return initialize(Transformer(SHAPES[config.model]), seed=0).to(device, dtype)


def utilisation(flops_per_second: float, device: torch.device) -> Record:
    """Model FLOPs per second, and their share of the device's peak."""
    most = peak(device_name(device))
    note = {} if most else {"note": f"no peak is known for {device_name(device)}"}
    return {"flops_per_second": flops_per_second, "mfu": flops_per_second / most if most else None} | note
