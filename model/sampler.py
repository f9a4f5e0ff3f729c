"""Turns of dialogue drawn from a model, and the form in which they are recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bylaw.kernels.philox import request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Completion, Engine, Request, Script
from bylaw.model.settings import SamplingSettings
from bylaw.model.tokenizer import Tokenizer

Turn = dict[str, Any]
Dialogue = Sequence[Turn]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws turns with `engine` by `settings`. `model_hash` names the checkpoint in the records."""

    engine: Engine
    settings: SamplingSettings
    seed: int
    model_hash: str

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.engine)

    def request(self, dialogue: Dialogue, key: tuple[str | int, ...], limit: int) -> Request:
        """One turn of at most `limit` tokens after `dialogue`, by the settings. `key` names the draw."""
        tokenizer, settings = self.tokenizer, self.settings
        return Request(
            prompt=tokenizer.prompt_ids(dialogue),
            max_tokens=limit,
            seed=self.seed,
            request=request_id(*key),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            stop_ids=tokenizer.stop_ids,
            stop_strings=tokenizer.stop_strings,
        )

    def turns(
        self,
        dialogues: Sequence[Dialogue],
        keys: Sequence[tuple[str | int, ...]],
        limit: int,
        on_token: Callable[[int, list[int]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Continue each dialogue by one turn, as `request` does, as text records. `on_token` as in Engine.generate."""
        requests = [self.request(dialogue, key, limit) for dialogue, key in zip(dialogues, keys, strict=True)]
        completions = self.engine.generate(requests, on_token=on_token)
        return [text_record(completion, self.tokenizer) for completion in completions]

    def say(self, dialogue: Dialogue, key: tuple[str | int, ...], limit: int) -> Script[dict[str, Any]]:
        """The same for one dialogue, within a script: `answer = yield from sampler.say(...)`."""
        completion = yield self.request(dialogue, key, limit)
        return text_record(completion, self.tokenizer)

    def provenance(self) -> dict[str, Any]:
        """What a record needs for its text to be drawn again: seed, settings, and the hashes of model and tokenizer."""
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = {name: getattr(self.settings, name) for name in names}
        return {"seed": self.seed, "sampling": sampling, "model": self.model_hash, "tokenizer": self.tokenizer.hash}

    def check_lengths(self, prompts: Sequence[Prompt], reserve: int) -> None:
        """Raise ValueError naming the first prompt that does not leave `reserve` tokens of the context free."""
        context = self.engine.model.config.max_position_embeddings
        for prompt in prompts:
            length = len(self.tokenizer.prompt_ids(prompt.messages))
            if length + reserve > context:
                raise ValueError(
                    f"prompt {prompt.id!r} has {length} tokens, and with {reserve} for what this stage adds to it "
                    f"that is more than the model's context of {context}; shorten it, lower the stage's token limits, "
                    "or set max_prompt_tokens in the recipe to leave such prompts out"
                )


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The engine's tokenizer. Raises ValueError for an engine without: it can speak in token ids only."""
    if engine.tokenizer is None:
        raise ValueError("this engine has no tokenizer to read dialogues with; give it one: Engine(model, tokenizer)")
    return engine.tokenizer


def text_record(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """A sampled text as it is kept: words, end, and the very token ids, as training tokenises nothing again."""
    return {"text": tokenizer.decode(completion.ids).strip(), "ids": completion.ids, "finish": completion.finish}


def answer_ids(sampled: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The ids of a sampled text as training sees them: one that ended at a stop string ends with eos instead.

    Raises ValueError for a text that was given, not sampled: it has none.
    """
    if sampled["finish"] == "given":
        raise ValueError("a given text has no sampled ids; allowed: a text that was sampled")
    ids = list(sampled["ids"])
    if sampled["finish"] == "stop" and (not ids or ids[-1] not in tokenizer.stop_ids):
        ids.append(tokenizer.eos_id)
    return ids


def said(sampled: dict[str, Any]) -> Turn:
    """A sampled text as a turn of the dialogue: with its very ids, which no tokenizer reads again."""
    return turn("assistant", sampled["text"]) | {"ids": sampled["ids"]}


def turn(role: str, content: str) -> Turn:
    """One message of a dialogue."""
    return {"role": role, "content": content}
