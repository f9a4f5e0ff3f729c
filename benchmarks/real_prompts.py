"""`bylaw run` on 200 real prompts, whole or killed on the way: is every record, count, limit and checkpoint right?

    python benchmarks/real_prompts.py --data hh-harmless-base-test.jsonl.gz --out DIR [--kills 2]

Trains a byte-level BPE tokenizer on the dialogues of an hh-rlhf file, makes a random Qwen2 of 10 M parameters with
Transformers, and runs all stages on it in a process of its own. The texts are noise; all else is as in a real run. The
report, DIR/report.json, holds counts, seconds, peak memory, and hashes: a killed run has those of a whole one.
"""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bylaw.constitution import load_constitution
from bylaw.model.data import read_prompts
from bylaw.model.records import read_records
from bylaw.model.tokenizer import Tokenizer
from bylaw.recipe import STAGES, Recipe, load_recipe
from bylaw.sums import SUMS

CONTEXT, VOCABULARY, MAX_PROMPT_TOKENS = 1024, 4096, 256
TIMES = ("seconds", "finished", "resumed", "engine", "tokens_per_second", "eps/s", "tok/s")
# About as likely as a random model finds the letters A and B together, so that some labels are read and some abstain.
OPTION_MASS = 0.0004
RECIPE = f"""\
out = "run"
base = "base"
prompts = "prompts.jsonl"
helpful = "helpful.jsonl"
device = "cpu"
max_prompt_tokens = {MAX_PROMPT_TOKENS}

[revise]
max_answer_tokens = 40
max_critique_tokens = 40
max_revision_tokens = 40
prompts_per_chunk = 50

[finetune]
learning_rate = 1e-3
batch_size = 32
micro_batch_tokens = 4096
save_every = 4

[compare]
max_tokens = 40
prompts_per_chunk = 50

[label]
min_option_mass = {OPTION_MASS}
pairs_per_chunk = 50

[reward]
learning_rate = 1e-4
batch_size = 16
micro_batch_tokens = 4096
save_every = 2

[ppo]
learning_rate = 1e-5
iterations = 4
rollouts = 32
max_tokens = 40
minibatches = 2
micro_batch_tokens = 4096
kl_target = 1.0
save_every = 2
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """`bylaw run` on real prompts."""

    data: Path
    """An hh-rlhf file (.jsonl or .jsonl.gz)."""
    out: Path
    """A new folder for the run and its report."""
    prompts: int = 200
    """Prompts, half of them to revise, half of them helpful ones with the answers that they bring."""
    kills: int = 0
    """How often the run is killed (SIGKILL, at random instants) and started again."""
    kill_within: float = 120.0
    """A life that ends in a kill lasts at most so many seconds, and at least a third of that."""
    seed: int = 0
    """Draws the weights. The instants of the kills are not drawn from it."""


def main(config: Config) -> dict[str, Any]:
    """Make the inputs, run, check, and write report.json."""
    config.out.mkdir(parents=True)  # a folder of its own: what an earlier run made would be skipped
    write_inputs(config)
    lives, memory = run_to_the_end(config)
    out = config.out / "run"
    manifests = {stage: json.loads((out / stage / "manifest.json").read_text()) for stage in STAGES}
    check_records(load_recipe(config.out / "recipe.toml"))
    check_checkpoints(out)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents(out).items()}
    report = {
        "counts": {stage: manifest["counts"] for stage, manifest in manifests.items()},
        "seconds": {stage: manifest["seconds"] for stage, manifest in manifests.items()},
        "lives_seconds": lives,
        "wall_seconds": round(sum(lives), 1),
        "peak_memory_gib": round(memory / 2**30, 3),
        "hash_of_all": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        "hashes": hashes,
    }
    (config.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def write_inputs(config: Config) -> None:
    """Tokenizer, checkpoint, recipe, and the first prompts that fit, as the very lines that the data file holds."""
    with gzip.open(config.data, "rt") if config.data.suffix == ".gz" else config.data.open() as file:
        lines = file.readlines()
    base = config.out / "base"
    make_checkpoint(base, [json.loads(line)["chosen"] for line in lines], config.seed)
    tokenizer = Tokenizer.load(base)
    usable = [p for p in read_prompts(config.data) if p.answer]
    fitting = [p for p in usable if len(tokenizer.prompt_ids(p.messages)) <= MAX_PROMPT_TOKENS][: config.prompts]
    if len(fitting) < config.prompts:
        raise ValueError(f"{config.data}: {len(fitting)} prompts fit; {config.prompts} are wanted")
    numbers = [int(prompt.id.rsplit("-", 1)[1]) for prompt in fitting]  # an id without one in the file ends in its line
    for name, chosen in (("prompts", numbers[::2]), ("helpful", numbers[1::2])):
        (config.out / f"{name}.jsonl").write_text("".join(lines[number - 1] for number in chosen))
    (config.out / "recipe.toml").write_text(RECIPE)


def make_checkpoint(folder: Path, texts: list[str], seed: int) -> None:
    """A byte-level BPE tokenizer trained on `texts`, and a random Qwen2, both written by Transformers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)


def run_to_the_end(config: Config) -> tuple[list[float], int]:
    """Start `bylaw run`, kill it as often as asked, let it end; returns the seconds of each life, and the most bytes of
    memory that any of them held. Raises RuntimeError if it ends before it can be killed, or fails.
    """
    instants = [random.uniform(config.kill_within / 3, config.kill_within) for _ in range(config.kills)]
    lives, memory = [], 0
    for instant in [*instants, float("inf")]:
        start = time.monotonic()
        status, held = one_life(config.out, instant)
        lives.append(round(time.monotonic() - start, 1))
        memory = max(memory, held)
        wanted = -signal.SIGKILL if instant < float("inf") else 0
        if status != wanted:
            raise RuntimeError(f"after {lives} s the run ended with {status}, not {wanted}; see {config.out / 'log'}")
    return lives, memory


def one_life(folder: Path, instant: float) -> tuple[int, int]:
    """Run to the end, or until it is killed `instant` seconds after its start; returns exit status and peak bytes."""
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "bylaw", "run", folder / "recipe.toml"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    end = time.monotonic() + instant
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if time.monotonic() >= end:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)


def check_records(recipe: Recipe) -> None:
    """Every prompt has its records, in order; every text keeps its limit; labels abstain as their masses say."""
    out, tokenizer = recipe.out, Tokenizer.load(recipe.base)
    known = {p.id: p.hash for p in load_constitution(recipe.constitution).principles}
    asked, given = read_prompts(recipe.prompts), read_prompts(recipe.helpful)
    chains = read_records(out / "revise" / "chains.jsonl")
    assert [chain["id"] for chain in chains] == [prompt.id for prompt in asked]
    for chain in chains:
        check_text(chain["answer"], recipe.revise.max_answer_tokens, tokenizer)
        assert [step["round"] for step in chain["rounds"]] == [*range(1, recipe.revise.rounds + 1)]
        for step in chain["rounds"]:
            assert known[step["principle"]["id"]] == step["principle"]["hash"]
            if step["critique"] is not None:
                check_text(step["critique"], recipe.revise.max_critique_tokens, tokenizer)
            check_text(step["revision"], recipe.revise.max_revision_tokens, tokenizer)
    helpful = read_records(out / "revise" / "helpful.jsonl")
    assert [(one["id"], one["given"]) for one in helpful] == [(prompt.id, prompt.answer) for prompt in given]
    pairs = read_records(out / "compare" / "pairs.jsonl")
    assert [pair["prompt_id"] for pair in pairs] == [prompt.id for prompt in [*asked, *given]]
    for pair in pairs:
        check_text(pair["a"], recipe.compare.max_tokens, tokenizer)
        check_text(pair["b"], recipe.compare.max_tokens, tokenizer)
    check_labels(recipe, pairs)
    for stage in ("finetune", "reward", "ppo"):
        steps = [line["step"] for line in read_records(out / stage / "metrics.jsonl")]
        counts = json.loads((out / stage / "manifest.json").read_text())["counts"]
        assert steps == [*range(counts.get("steps", counts.get("iterations")))]


def check_text(text: dict[str, Any], limit: int, tokenizer: Tokenizer) -> None:
    assert len(text["ids"]) <= limit and text["text"] == tokenizer.decode(text["ids"]).strip()
    assert text["finish"] == "stop" or len(text["ids"]) == limit


def check_labels(recipe: Recipe, pairs: list[dict[str, Any]]) -> None:
    labels = read_records(recipe.out / "label" / "preferences.jsonl")
    assert [(label["id"], label["a"], label["b"]) for label in labels] == [(p["id"], p["a"], p["b"]) for p in pairs]
    for label in labels:
        (one,) = label["labels"]
        too_little = min(one[side]["mass"] for side in ("a_first", "b_first")) < recipe.label.min_option_mass
        assert bool(label["abstained"]) == too_little == (label["p_a"] is None)
        assert too_little or 0 < label["p_a"] < 1
    abstained = sum(bool(label["abstained"]) for label in labels)
    counts = {name: json.loads((recipe.out / name / "manifest.json").read_text())["counts"] for name in STAGES}
    assert sum(counts["label"]["abstained"].values()) == counts["reward"]["abstained"] == abstained
    assert counts["reward"]["train_pairs"] + counts["reward"]["heldout_pairs"] == len(labels) - abstained


def check_checkpoints(out: Path) -> None:
    """Transformers loads all three with nothing missing or unexpected, and they give finite numbers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for name in ("finetune/sl-cai", "reward/reward-model", "ppo/rl-cai"):
        kind = AutoModelForSequenceClassification if name == "reward/reward-model" else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(out / name, output_loading_info=True)
        model, found = loaded
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, found)
        with torch.no_grad():
            assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all(), name


def contents(out: Path) -> dict[str, bytes]:
    """What each file of a run's folder holds, but for times and the folder's own path, and the sums, which see both."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != SUMS)
    return {str(path.relative_to(out)): _untimed(path, out.parent) for path in files}


def _untimed(path: Path, root: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return data
    text = data.decode().replace(str(root.absolute()), "")
    if path.name == "metrics.jsonl":
        return json.dumps([_without_times(json.loads(line)) for line in text.splitlines()]).encode()
    if path.name == "manifest.json":
        whole = _without_times(json.loads(text))
        whole["counts"] = _without_times(whole["counts"])
        whole["outputs"].pop("metrics.jsonl", None)  # hashed with its times
        return json.dumps(whole).encode()
    return text.encode()


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES and not key.startswith("time/")}


if __name__ == "__main__":
    summary = main(tyro.cli(Config, description=__doc__))
    print(json.dumps({key: value for key, value in summary.items() if key != "hashes"}, indent=2))
