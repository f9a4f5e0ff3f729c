"""Supervised fine-tuning on the revisions of all rounds and on helpful samples (arXiv 2212.08073, section 3.1)."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record
from bylaw.model.sampler import answer_ids
from bylaw.model.supervised import Example, train_supervised
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.sl_cai.config import FinetuneConfig


def revision_examples(
    chains: list[Record], tokenizer: Tokenizer, leave_out: Collection[str] = ()
) -> tuple[list[Example], dict[str, int]]:
    """Prompt and revision of every round of every chain; the tokens of the revision are learned.

    Returns the examples, and counts of the revisions used, left out because they are empty or bear one of the marks
    `leave_out`, and kept although they were cut at the token limit (those teach no end).
    """
    counts = {"revisions": 0, "empty_revisions": 0, "marked_revisions": 0, "cut_revisions": 0}
    examples = []
    for chain in chains:
        prompt = tokenizer.prompt_ids(chain["prompt"])
        for round in chain["rounds"]:
            revision = round["revision"]
            if not revision["text"]:
                counts["empty_revisions"] += 1
                continue
            if not set(leave_out).isdisjoint(revision.get("marks", ())):
                counts["marked_revisions"] += 1
                continue
            counts["revisions"] += 1
            counts["cut_revisions"] += revision["finish"] == "length"
            examples.append(_example(prompt, answer_ids(revision, tokenizer)))
    return examples, counts


def helpful_examples(samples: list[Record], tokenizer: Tokenizer) -> tuple[list[Example], dict[str, int]]:
    """Prompt and helpful answer, sampled or given; the tokens of the answer are learned."""
    counts = {"helpful": 0, "empty_helpful": 0, "cut_helpful": 0}
    examples = []
    for sample in samples:
        if "given" in sample:
            turns = [*sample["prompt"], {"role": "assistant", "content": sample["given"]}]
            examples.append(Example(*tokenizer.training_ids(turns, last_only=True)))
        elif sample["answer"]["text"]:
            counts["cut_helpful"] += sample["answer"]["finish"] == "length"
            examples.append(_example(tokenizer.prompt_ids(sample["prompt"]), answer_ids(sample["answer"], tokenizer)))
        else:
            counts["empty_helpful"] += 1
            continue
        counts["helpful"] += 1
    return examples, counts


def finetune(
    model: Transformer,
    tokenizer: Tokenizer,
    chains: list[Record],
    helpful: list[Record],
    folder: Path,
    config: FinetuneConfig,
    seed: int,
    show: Callable[[int, int], None] = lambda step, steps: None,
    parallel: Parallel = ALONE,
) -> dict[str, Any]:
    """Train `model` in place on chains and helpful samples; state and metrics go to `folder`. Returns counts.

    Texts longer than the model's context are left out and counted as `over_context`. Raises ValueError when nothing is
    left to train on.
    """
    revisions, revision_counts = revision_examples(chains, tokenizer, config.leave_out)
    samples, helpful_counts = helpful_examples(helpful, tokenizer)
    context = model.config.max_position_embeddings
    examples = [example for example in revisions + samples if len(example.ids) <= context]
    over = {"over_context": len(revisions) + len(samples) - len(examples)}
    if not examples:
        raise ValueError(
            f"no text to train on: {len(chains)} chains and {len(helpful)} helpful samples, all empty, marked, or "
            f"longer than the model's context of {context}"
        )
    trained = train_supervised(
        model,
        examples,
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        folder=folder,
        stage="finetune",
        show=show,
        parallel=parallel,
    )
    return revision_counts | helpful_counts | over | trained


def _example(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))
