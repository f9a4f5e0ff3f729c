"""A whole run in small: a random Llama of 60 words, eight prompts, a short constitution, and a recipe for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tokenizers

from bylaw.model.checkpoint import save_model
from bylaw.model.config import ModelConfig
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize

CONTEXT = 96
TEXT = """<unk> <eos> Human Assistant : . ? ! A B The answer is kind rude check rewrite which better keeps this how do i
mend break fence window of my neighbour gate well cart please no yes because it hurts with glue hammer rope some stone
wood nail care ask them first never a an the and or to in on"""
WORDS = TEXT.split()

PROMPTS: list[dict[str, Any]] = [
    {"id": "p-fence", "prompt": "how do i break the fence of my neighbour ?"},
    {"id": "p-gate", "prompt": "how do i break a gate ?"},
    {"id": "p-talk", "messages": [
        {"role": "user", "content": "how do i mend a cart ?"},
        {"role": "assistant", "content": "with wood and nail ."},
        {"role": "user", "content": "and break it ?"},
    ]},
    {"id": "p-window", "prompt": "break my neighbour window ?"},
    {"id": "p-well", "chosen": "\n\nHuman: break a well ?\n\nAssistant: no .", "rejected":
     "\n\nHuman: break a well ?\n\nAssistant: yes ."},
]  # fmt: skip
HELPFUL: list[dict[str, Any]] = [
    {"id": "h-cart", "prompt": "how do i mend a cart ?"},
    {"id": "h-rope", "prompt": "how do i mend a rope ?", "completion": "ask them first , with care ."},
    {"id": "h-nail", "prompt": "which nail is better ?"},
]

CONSTITUTION = """
name = "small"
version = "1"
license = "CC0-1.0"
preamble = "For tests."

[[principle]]
id = "kind"
title = "Kindness"
statement = "The answer is kind ."
sources = ["none"]

[[principle]]
id = "care"
title = "Care"
statement = "it never hurts"
sources = ["none"]
weight = 2.0

[templates]
critique = "check : {statement}"
revision = "rewrite : {statement}"
question = "which keeps : {statement}"
comparison = "{dialogue} {question} A {answer_a} B {answer_b}"
"""

RECIPE = """
out = "out"
base = "base"
prompts = "prompts.jsonl"
helpful = "helpful.jsonl"
constitution = "small.toml"
device = "cpu"
seed = 3

[revise]
rounds = 2
max_answer_tokens = 5
max_critique_tokens = 4
max_revision_tokens = 6
prompts_per_chunk = 2

[finetune]
learning_rate = 0.01
batch_size = 4
epochs = 2
save_every = 2

[compare]
max_tokens = 5
pairs_per_prompt = 2
prompts_per_chunk = 3

[label]
min_option_mass = 0.006
pairs_per_chunk = 5

[reward]
learning_rate = 0.01
batch_size = 3
heldout_fraction = 0.4
save_every = 1

[ppo]
learning_rate = 0.01
value_learning_rate = 0.01
iterations = 6
rollouts = 4
max_tokens = 5
epochs = 2
minibatches = 2
kl_target = 1.0
kl_horizon = 8
save_every = 2
"""


def write_run(folder: Path) -> Path:
    """Write everything that a run needs into `folder`; returns the recipe's path. The outputs go to `folder`/out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(tiny_llama(), folder / "base", word_tokenizer())
    for name, records in (("prompts", PROMPTS), ("helpful", HELPFUL)):
        write_lines(folder / f"{name}.jsonl", records)
    (folder / "small.toml").write_text(CONSTITUTION)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in one thread, so that sums are added in one order on every machine."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=120)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def tiny_llama(**changes: Any) -> Transformer:
    """Wide weights, so that its texts and scores differ from prompt to prompt."""
    settings: dict[str, Any] = {
        "family": "llama", "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "max_position_embeddings": CONTEXT, "eos_token_ids": (1,),
        "initializer_range": 0.3,
    }  # fmt: skip
    return initialize(Transformer(ModelConfig(**(settings | changes))), seed=5)


def word_tokenizer() -> Tokenizer:
    vocabulary = {word: id for id, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer.from_parts(backend, eos_token="<eos>")
