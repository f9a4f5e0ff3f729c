"""The other side of the training benchmark: Transformers' Trainer, TRL's RewardTrainer, and the PPO of trl 1.12.

The same weights, data, order and settings as ours. Everything that TRL sets by itself and that costs time for memory
(gradient checkpointing) is off, as it is off in ours.
"""

import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.training_config import OPTIM, PPO, WAYS, Way
from bylaw.benchmarks.training_side import Run, Side, Task, Told
from bylaw.benchmarks.training_workloads import (
    EOS,
    FIRST,
    PAD,
    as_shuffled,
    episodes,
    filled,
    ordered,
    pairs,
    questions,
    restorer,
)

INSTALL = "pip install transformers accelerate datasets trl"
PPO_VERSION = "1.12.0"  # among the last with PPO
INSTALL_PPO = f"pip install --no-deps --target FOLDER trl=={PPO_VERSION}, and --trl-ppo FOLDER"
PLAIN = {"weight_decay": 0.0, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": OPTIM["beta2"]}


def versions() -> dict[str, str]:
    """Of the packages that the peers need. Raises ValueError naming what to install where one is missing."""
    names = ("transformers", "accelerate", "datasets", "trl")
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the peer is not installed ({error}): {INSTALL}; or --peer none") from error


def ppo_version(folder: Path | None) -> str:
    """Of the TRL whose PPO is measured. Raises ValueError naming what to install if it is another than PPO_VERSION."""
    if folder is None:
        where, found = "the installed one", [importlib.metadata.version("trl")]
    else:
        where, found = str(folder), [one.stem.removeprefix("trl-") for one in folder.glob("trl-*.dist-info")]
    if found != [PPO_VERSION]:
        told = ", ".join(found) or "none"
        raise ValueError(f"PPO is measured against trl {PPO_VERSION}, and {where} is {told}: {INSTALL_PPO}")
    return PPO_VERSION


def sft(task: Task) -> Side:
    """Trainer in one of its ways."""
    import transformers

    model: Any = _load(task.folder / "policy", transformers.AutoModelForCausalLM)
    restore, sizes, way = restorer(model), task.sizes, WAYS[task.way]

    def prepare(repeat: int) -> Run:
        restore()
        texts = ordered(sizes, model.config.vocab_size, repeat, way)
        args = transformers.TrainingArguments(
            **_arguments(),
            per_device_train_batch_size=sizes.batch // way.micro,
            gradient_accumulation_steps=way.micro,
        )
        trainer = transformers.Trainer(
            model=model,
            args=args,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],  # pyright: ignore
            data_collator=_collator(way),
        )
        efficiency = 1.0 if way.flat else filled([len(ids) for ids in texts], sizes.batch // way.micro)
        told = {"useful": sum(map(len, texts)), "efficiency": efficiency}
        return Run(trainer.train, lambda done: told | {"loss": _first_loss(trainer)})

    return Side(prepare, lambda about: {})


def reward(task: Task) -> Side:
    """TRL's RewardTrainer."""
    import datasets  # pyright: ignore[reportMissingImports]
    import transformers
    import trl  # pyright: ignore[reportMissingImports]

    model: Any = _load(task.folder / "value", transformers.AutoModelForSequenceClassification)
    restore, sizes = restorer(model), task.sizes

    def prepare(repeat: int) -> Run:
        restore()
        drawn = as_shuffled(pairs(sizes, model.config.vocab_size, repeat), repeat)
        columns = {f"{name}_ids": [one.prompt + getattr(one, name) for one in drawn] for name in ("chosen", "rejected")}
        args = trl.RewardConfig(
            **_arguments(), per_device_train_batch_size=sizes.pair_batch, gradient_checkpointing=False, bf16=False,
            max_length=None,
        )  # fmt: skip
        data, words = datasets.Dataset.from_dict(columns), _words(model.config.vocab_size)
        trainer = trl.RewardTrainer(model=model, args=args, train_dataset=data, processing_class=words)
        both = [len(one.prompt) + len(answer) for one in drawn for answer in (one.chosen, one.rejected)]
        told = {"useful": len(drawn), "efficiency": filled(both, 2 * sizes.pair_batch)}
        return Run(trainer.train, lambda done: told | {"loss": _first_loss(trainer)})

    return Side(prepare, lambda about: {})


def ppo(task: Task) -> Side:
    """One iteration of trl 1.12's PPOTrainer; its check is one on given episodes, as ours."""
    import transformers

    folder, sizes = task.folder, task.sizes
    language, scalar = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    policy, reference = _load(folder / "policy", language), _load(folder / "reference", language)
    value, judge = _load(folder / "value", scalar), _load(folder / "reward", scalar)
    policy.generation_config.pad_token_id = PAD
    models = {"model": policy, "ref_model": reference, "value_model": value, "reward_model": judge}
    restore = restorer(policy, value)

    asked = questions(sizes, policy.config.vocab_size, 0)

    def prepare(repeat: int) -> Run:
        restore()
        trainer = _ppo_trainer(models, task, asked, repeat)
        drawn = _watch()

        def told(done: Any) -> Told:
            responses = drawn()  # [n, R]
            text = sum(map(len, asked)) + int((responses != PAD).sum())
            return {
                "useful": len(asked),
                "response": float((responses != PAD).sum(1).float().mean()),
                "ended": float((responses == EOS).any(1).float().mean()),
                "efficiency": text / (len(asked) * (max(map(len, asked)) + responses.shape[1])),
            }

        return Run(trainer.train, told)

    def check(about: Any) -> Told:
        restore()
        given = episodes(sizes, policy.config.vocab_size, 0)
        changes = {"num_ppo_epochs": 2, "num_mini_batches": 1, "lam": 1.0}
        trainer = _ppo_trainer(models, task, [one.prompt for one in given], 0, **changes)
        _answer_with({tuple(one.prompt): one.response for one in given})
        trainer.train()
        done = trainer.state.log_history[-1]
        # TRL's whitening divides by n - 1 tokens, ours by n; the policy's loss is in proportion to the advantages.
        tokens = sum(len(one.response) for one in given)
        loss = done["loss/policy_avg"] * (tokens / (tokens - 1)) ** 0.5
        return {"kl": done["objective/kl"], "score": done["objective/scores"], "policy_loss": loss}

    return Side(prepare, check)


def _ppo_trainer(models: dict[str, Any], task: Task, asked: Sequence[list[int]], seed: int, **changes: Any) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    sizes, count = task.sizes, task.sizes.episodes
    settings: dict[str, Any] = _arguments() | {
        "learning_rate": PPO["learning_rate"], "adam_epsilon": PPO["adam_epsilon"], "cliprange": PPO["clip"],
        "cliprange_value": PPO["value_clip"], "gamma": PPO["gamma"], "lam": PPO["gae_lambda"], "temperature": 1.0,
        "kl_coef": PPO["kl_coef"], "missing_eos_penalty": PPO["missing_eos_penalty"], "stop_token": "eos",
        "per_device_train_batch_size": count, "local_rollout_forward_batch_size": count, "total_episodes": count,
        "num_ppo_epochs": sizes.epochs, "num_mini_batches": sizes.minibatches, "response_length": sizes.response[1],
        "num_sample_generations": 0, "gradient_checkpointing": False, "bf16": False, "seed": seed,
    }  # fmt: skip
    words = _words(models["model"].config.vocab_size)
    data: Any = [{"input_ids": list(ids)} for ids in asked]
    return PPOTrainer(
        args=PPOConfig(**settings | changes), processing_class=words, train_dataset=data, eval_dataset=None, **models
    )


def _watch() -> Any:
    """Let TRL's sampling show what it drew: gives a function of the responses [n, R] of the last batch."""
    from trl.experimental.ppo import ppo_trainer as module  # pyright: ignore[reportMissingImports]

    seen: list[Tensor] = []
    inner = getattr(module.batch_generation, "inner", module.batch_generation)

    def watched(model: Any, queries: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        found = inner(model, queries, *args)
        seen[:] = [found[0][:, queries.shape[1] :]]
        return found

    watched.inner = inner  # pyright: ignore[reportFunctionMemberAccess]
    module.batch_generation = watched
    return lambda: seen[0]


def _answer_with(given: dict[tuple[int, ...], list[int]]) -> None:
    """Let TRL take given responses for drawn ones."""
    from trl.experimental.ppo import ppo_trainer as module  # pyright: ignore[reportMissingImports]

    def answered(model: Any, queries: Tensor, batch: int, pad: int, config: Any) -> tuple[Tensor, Tensor]:
        longest = max(map(len, given.values()))
        said = [given[tuple(row[row != pad].tolist())] for row in queries]
        responses = torch.tensor([one + [pad] * (longest - len(one)) for one in said])
        both = torch.cat([queries, responses], 1)
        logits = module.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits

    answered.inner = getattr(module.batch_generation, "inner", module.batch_generation)  # pyright: ignore
    module.batch_generation = answered


def _load(folder: Path, kind: Any) -> Any:
    """A checkpoint as a Transformers model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


@functools.cache
def _words(vocab_size: int) -> Any:
    """A tokenizer that knows how to pad; the texts are ids already."""
    import tokenizers
    import transformers

    names = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(FIRST, vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token=f"w{FIRST}"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _collator(way: Way) -> Any:
    """Of a step's examples: without padding, or padded on the right."""
    import transformers

    return transformers.DataCollatorWithFlattening() if way.flat else _padded


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Ids, labels and mask [n, longest]; Transformers' own collators do no less."""
    width = max(len(row["input_ids"]) for row in rows)
    missing = [width - len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [PAD] * n for row, n in zip(rows, missing, strict=True)]
    labels = [row["labels"] + [-100] * n for row, n in zip(rows, missing, strict=True)]
    mask = [[1] * (width - n) + [0] * n for n in missing]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def _arguments() -> dict[str, Any]:
    """What all of the peer's trainers are told."""
    return PLAIN | {
        "output_dir": tempfile.mkdtemp(prefix="bylaw-bench-"), "num_train_epochs": 1, "use_cpu": True,
        "learning_rate": OPTIM["learning_rate"], "adam_epsilon": OPTIM["adam_epsilon"],
        "max_grad_norm": OPTIM["max_grad_norm"], "train_sampling_strategy": "sequential", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _first_loss(trainer: Any) -> float:
    """The loss of the first step."""
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)
