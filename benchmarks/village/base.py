"""Make the village's base model again from its seed, the one that ships in checkpoint/:

    python -m bylaw.benchmarks.village.base --out checkpoint --seed 0

A word-level tokenizer over the village's vocabulary, a small Llama, and supervised training on village talk
(corpus.py).
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import tyro

from bylaw.benchmarks.village.corpus import BaseText, Corpus
from bylaw.constitution.load import load_constitution
from bylaw.model.checkpoint import save_model
from bylaw.model.config import ModelConfig
from bylaw.model.settings import OptimSettings
from bylaw.model.supervised import Example, train_supervised
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer, initialize

EOS, UNKNOWN = "<|end|>", "<|unknown|>"
SHIPPED = Path(__file__).parent / "checkpoint"


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """How the base model is made."""

    out: Path
    """Folder to write the checkpoint to."""
    seed: int = 0
    """Draws the texts, the initial weights and the order."""
    texts: int = 140_000
    """Dialogues drawn; each is seen once."""
    batch_size: int = 96
    """Dialogues per step."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            learning_rate=2e-3, schedule="cosine", warmup_steps=50, weight_decay=0.01, beta2=0.98, save_every=10_000
        )
    )


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Word level, lower case, punctuation apart; spaces before punctuation are taken out again on decoding."""
    words = tokenizers.pre_tokenizers.Whitespace()
    found = {word for text in texts for word, _ in words.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate([EOS, UNKNOWN, *sorted(found)])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = words
    # WordPiece's decoder is the one that closes the gaps before punctuation; no village word begins with its prefix.
    backend.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens([EOS, UNKNOWN])
    return Tokenizer.from_parts(backend, eos_token=EOS)


def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """0.67 million parameters: 4 layers of width 128.

    Weights begin near 1 / sqrt(width). From the customary 0.02, attention of this width has not learned to find a word
    in a list after 450 steps; from 0.08 it has after 75.
    """
    return ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=288,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=True,
        eos_token_ids=tokenizer.stop_ids,
    )


def to_example(text: BaseText, tokenizer: Tokenizer) -> Example:
    """Token ids, with the assistant's turns after the given messages learned."""
    ids, learned = tokenizer.training_ids(text.messages)
    given = len(tokenizer.training_ids(text.messages[: text.given])[0]) if text.given else 0
    return Example(ids, [flag and i >= given for i, flag in enumerate(learned)])


def make_base(config: BaseConfig) -> Path:
    """Draw the texts, train, and write the checkpoint to `config.out`."""
    constitution = load_constitution("village")
    corpus = Corpus(constitution, random.Random(config.seed))
    texts = [corpus.draw() for _ in range(config.texts)]
    spoken = [turn["content"] for text in texts for turn in text.messages]
    statements = [principle.statement for principle in constitution.principles]
    marks = " ".join(map(str, range(1, 11)))
    tokenizer = build_tokenizer([*spoken, *statements, "Human: Assistant:", marks])
    examples = [to_example(text, tokenizer) for text in texts]
    model = initialize(Transformer(model_config(tokenizer)), config.seed)
    train_supervised(
        model,
        examples,
        config.optim,
        epochs=1,
        batch_size=config.batch_size,
        seed=config.seed,
        folder=config.out.with_name(config.out.name + ".training"),
        stage="base",
    )
    save_model(model, config.out, tokenizer)
    return config.out


if __name__ == "__main__":
    print(make_base(tyro.cli(BaseConfig)))
