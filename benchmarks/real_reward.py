"""A reward model on real dialogues: how fast, how full the micro-batches are, and what shared prompts save.

    python benchmarks/real_reward.py --data hh-harmless-base-test.jsonl.gz [--out FILE.jsonl]

Trains a byte-level BPE tokenizer on the dialogues of an hh-rlhf file, and `steps` steps of a random Qwen2 of 10 M
parameters with a scalar head on its pairs, whose chosen answer is labelled 1. The record says of the training steps
`packing_efficiency`, tokens over micro-batches times the largest of their step (model/packing.py); `budget_filled`,
tokens over micro-batches times the budget, which a step of few pairs cannot fill; `budget_filled_at_once`, the same if
all pairs were one step; and `saved_by_shared_prompts`, the share of the pairs' tokens that were not
computed, as they stand in a prompt that had been.
"""

import gzip
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bylaw.benchmarks.kernels import commit, device_name, versions
from bylaw.benchmarks.script import script
from bylaw.kernels.philox import permutation
from bylaw.model.config import ModelConfig
from bylaw.model.data import parse_dialogue, read_prompts
from bylaw.model.heads import scalar_model
from bylaw.model.packing import packing_efficiency
from bylaw.model.records import Record, read_records
from bylaw.model.settings import require
from bylaw.model.step import micro_batches
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize
from bylaw.rlaif.config import RewardConfig
from bylaw.rlaif.pairs import Pair, is_heldout
from bylaw.rlaif.reward import train_reward

EOS = "<|endoftext|>"
HELDOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train on, and how long."""

    data: Path
    """An hh-rlhf file (.jsonl or .jsonl.gz)."""
    out: Path | None = None
    """The record is appended here, as a JSON line."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 10
    """Pairs in each."""
    micro_batch_tokens: int = 2048
    """Budget of a forward and backward pass."""
    learning_rate: float = 3e-4
    """Peak, after ten steps; then down to 0 in a line."""
    vocabulary: int = 8192
    """Tokens of the tokenizer."""
    max_tokens: int = 1024
    """Pairs with a longer dialogue are left out, and counted."""
    threads: int = 1
    """Of torch."""
    seed: int = 0
    """Draws the weights, the order and what is held out."""
    quick: bool = False
    """A tiny model and four steps: to test the benchmark itself."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_tokens", "max_tokens", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.vocabulary >= 300, "vocabulary", self.vocabulary, "300 (the bytes, and some pairs) or more")

    @property
    def planned(self) -> int:
        return 4 if self.quick else self.steps


def main(config: Config) -> int:
    """Read, train, print and append; returns 0. Raises ValueError for a file that is no hh-rlhf or has few pairs."""
    torch.set_num_threads(config.threads)
    began, load = time.time(), os.getloadavg()[0]
    dialogues, counts = read_dialogues(config.data)
    tokenizer = trained_tokenizer([text for both in dialogues.values() for text in both], config.vocabulary)
    train, heldout, lengths = split(dialogues, tokenizer, config)
    model = scalar_model(initialize(Transformer(shape(tokenizer, config)), config.seed), config.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(train)} pairs to train on, {len(heldout)} held out; {parameters / 1e6:.1f} M parameters", flush=True)
    settings = RewardConfig(
        learning_rate=config.learning_rate,
        warmup_steps=min(10, config.planned),
        batch_size=config.batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        save_every=10**9,
    )
    with tempfile.TemporaryDirectory() as folder:
        measures = train_reward(model, train, heldout, Path(folder), settings, config.seed)
        lines = read_records(Path(folder) / "metrics.jsonl")
    record = {"workload": "real_reward"} | counts | lengths | measures | figures(train, lines, config)
    record |= {
        "first_loss": mean([line["loss"] for line in lines[:20]]),
        "last_loss": mean([line["loss"] for line in lines[-20:]]),
        "parameters": parameters,
        "vocabulary": tokenizer.vocab_size,
        "wall_seconds": time.time() - began,
        "load": [load, os.getloadavg()[0]],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "batch_size": config.batch_size,
        "micro_batch_tokens": config.micro_batch_tokens,
        "threads": config.threads,
        "device": device_name(torch.device("cpu")),
        "versions": versions(torch.device("cpu")),
        "commit": commit(),
        "command": shlex.join(arg.replace(str(config.data), config.data.name) for arg in sys.argv),
    }
    print(json.dumps(record, indent=2))
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return 0


def read_dialogues(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """The texts of both dialogues of each line by its prompt's id; how many lines there are, and how many make no pair:
    those that `read_prompts` leaves out, and those with an empty answer.
    """
    prompts = read_prompts(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        lines = file.readlines()
    pairs = {}
    for prompt in prompts:
        record = json.loads(lines[int(prompt.id.rsplit("-", 1)[1]) - 1])  # its id ends in the line's number
        if "rejected" not in record:
            raise ValueError(f"{path}: {sorted(record)} in a line; allowed: chosen and rejected, as in hh-rlhf")
        if all(parse_dialogue(record[side])[-1]["content"] for side in ("chosen", "rejected")):
            pairs[prompt.id] = record["chosen"], record["rejected"]
    return pairs, {"lines": len(prompts) + len(prompts.skipped), "pairs": len(pairs)}


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the dialogues' own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer.from_parts(backend, eos_token=EOS)


def split(
    dialogues: dict[str, tuple[str, str]], tokenizer: Tokenizer, config: Config
) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """As many pairs as the steps take, those held out, and how long they are. The chosen answer is a, its label 1."""
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for id, texts in dialogues.items():
        chosen, rejected = map(parse_dialogue, texts)
        prompt = tokenizer.prompt_ids(chosen[:-1])
        a, b = ([*prompt, *tokenizer.encode(one[-1]["content"]), tokenizer.eos_id] for one in (chosen, rejected))
        sides[is_heldout(id, HELDOUT, config.seed)].append(Pair(a, b, 1.0, len(prompt)))
    fitting = [[pair for pair in side if max(len(pair.a), len(pair.b)) <= config.max_tokens] for side in sides]
    wanted = config.planned * config.batch_size
    if len(fitting[0]) < wanted or not fitting[1]:
        raise ValueError(
            f"{config.data}: {len(fitting[0])} pairs to train on and {len(fitting[1])} held out; allowed: at least "
            f"steps x batch_size = {wanted}, and one. Take fewer steps, or smaller batches"
        )
    train, heldout = fitting[0][:wanted], fitting[1][: 16 if config.quick else None]
    lengths = {
        "too_long": sum(map(len, sides)) - sum(map(len, fitting)),
        "train_pairs": len(train),
        "heldout_pairs": len(heldout),
        "mean_prompt_tokens": mean([pair.prompt for pair in train]),
        "mean_answer_tokens": mean([(len(pair.a) + len(pair.b)) / 2 - pair.prompt for pair in train]),
    }
    return train, heldout, lengths


def shape(tokenizer: Tokenizer, config: Config) -> ModelConfig:
    """Qwen2's, of 10 M parameters with an embedding of 8192 rows."""
    sizes: dict[str, Any] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
        if config.quick
        else {"hidden_size": 320, "intermediate_size": 1280, "num_layers": 5, "num_heads": 8, "num_kv_heads": 2,
              "head_dim": 40}
    )  # fmt: skip
    return ModelConfig(
        family="qwen2",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=config.max_tokens,
        tie_word_embeddings=True,
        attention_bias=True,
        eos_token_ids=tokenizer.stop_ids,
        **sizes,
    )


def figures(train: Sequence[Pair], lines: Sequence[Record], config: Config) -> dict[str, float]:
    """Speed and packing of the training steps, which took the pairs in this order."""
    order = [int(i) for i in permutation(config.seed, len(train), 0)]
    steps = [[train[i] for i in order[n : n + config.batch_size]] for n in range(0, len(order), config.batch_size)]
    lengths = [[pair.tokens for pair in step] for step in steps]
    runs = [[batch.items for batch in micro_batches(step, config.micro_batch_tokens)] for step in lengths]
    tokens, batches = [sum(step) for step in lengths], [len(step) for step in runs]
    together = micro_batches([pair.tokens for pair in train], config.micro_batch_tokens)
    # What each step's micro-batches would hold if all were as full as its largest.
    rooms = [count / packing_efficiency(step, run) for count, step, run in zip(tokens, lengths, runs, strict=True)]
    seconds = sum(count / line["tokens_per_second"] for count, line in zip(tokens, lines, strict=True))
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "pairs_per_second": len(train) / seconds,
        "step_seconds": seconds / len(steps),
        "micro_batches": sum(batches),
        "packing_efficiency": sum(tokens) / sum(rooms),
        "budget_filled": sum(tokens) / (sum(batches) * config.micro_batch_tokens),
        "budget_filled_at_once": sum(tokens) / (len(together) * config.micro_batch_tokens),
        "saved_by_shared_prompts": 1 - sum(tokens) / sum(len(pair.a) + len(pair.b) for pair in train),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    # Python has put this folder first on its path: a package called `kernels` would be found in it.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    script(main, Config, __doc__)
