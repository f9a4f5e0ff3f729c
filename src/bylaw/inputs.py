"""A recipe with what it names: constitution, tokenizer, prompts, checkpoints, and the folders of its stages."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution
from bylaw.model.checkpoint import checkpoint_hash, load_model
from bylaw.model.data import Prompt, read_prompts
from bylaw.model.engine import Engine
from bylaw.model.records import sha256_file
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.recipe import Recipe
from bylaw.runs import Stage, run_stage


@dataclass(frozen=True)
class Run:
    """A recipe with its inputs, each read and checked once."""

    recipe: Recipe

    @cached_property
    def constitution(self) -> Constitution:
        return load_constitution(self.recipe.constitution)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.recipe.base)

    @cached_property
    def device(self) -> str:
        if self.recipe.device != "auto":
            return self.recipe.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self._read(self.recipe.prompts)

    @cached_property
    def helpful(self) -> list[Prompt]:
        return self._read(Path(self.recipe.helpful)) if self.recipe.helpful else []

    @cached_property
    def rl_prompts(self) -> list[Prompt]:
        """The prompts of both kinds: what the pairs and the episodes are drawn from."""
        both = [*self.prompts, *self.helpful]
        seen: set[str] = set()
        for prompt in both:
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} is in both {self.recipe.prompts} and {self.recipe.helpful}")
            seen.add(prompt.id)
        return both

    def model(self, folder: Path) -> Transformer:
        return load_model(folder, self.device, torch.float32)

    def engine(self, model: Transformer, cache_gib: float, max_rows: int = 64) -> Engine:
        """`cache_gib` as in a recipe, where 0 leaves the choice to the engine."""
        return Engine(model, self.tokenizer, max_rows, cache_gib=cache_gib or None)

    def sampler(self, model: Transformer, folder: Path, settings: SamplingSettings) -> Sampler:
        engine = self.engine(model, settings.cache_gib, settings.max_rows)
        return Sampler(engine=engine, settings=settings, seed=self.recipe.seed, model_hash=checkpoint_hash(folder))

    def terms(self, name: str, inputs: dict[str, str]) -> Stage:
        recipe = self.recipe
        config, folder = getattr(recipe, name), recipe.out / name
        return Stage(name=name, folder=folder, inputs=inputs, config=config, seed=recipe.seed, device=self.device)

    def stage(self, name: str, inputs: dict[str, str], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        return run_stage(self.terms(name, inputs), work)

    def path(self, *parts: str) -> Path:
        """A file or checkpoint that an earlier stage has made. Raises FileNotFoundError naming the stage to run
        first.
        """
        path = self.recipe.out.joinpath(*parts)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; run `bylaw {parts[0]}` with this recipe first")
        return path

    @property
    def prompt_inputs(self) -> dict[str, str]:
        recipe = self.recipe
        inputs = {"prompts": sha256_file(recipe.prompts), "limits": f"{recipe.prompt_limit} {recipe.max_prompt_tokens}"}
        return inputs | ({"helpful": sha256_file(recipe.helpful)} if recipe.helpful else {})

    def _read(self, path: Path) -> list[Prompt]:
        found = read_prompts(path, self.recipe.prompt_limit)
        if found.skipped:
            print(found.summary())
        limit = self.recipe.max_prompt_tokens
        kept = [p for p in found if not limit or len(self.tokenizer.prompt_ids(p.messages)) <= limit]
        if len(kept) < len(found):
            print(f"{path}: {len(found) - len(kept)} of {len(found)} prompts left out: over {limit} tokens")
        if not kept:
            raise ValueError(f"{path}: no prompt to work on ({len(found)} read, max_prompt_tokens = {limit})")
        return kept
