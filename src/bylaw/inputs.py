"""A recipe with what it names: constitution, tokenizer, prompts, checkpoints, and the folders of its stages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bylaw.constitution.asked import stage_hash
from bylaw.constitution.examples import Examples, beside, load_examples
from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution
from bylaw.layout import MANIFEST
from bylaw.model.checkpoint import checkpoint_hash, load_model, load_reward
from bylaw.model.data import Prompt, read_prompts
from bylaw.model.engine import Engine
from bylaw.model.engine.store import GIB, budget, page_bytes
from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import ALONE, DATA, TENSOR, Parallel
from bylaw.model.records import sha256_file
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.recipe import TRAINING, Recipe, as_table, asked_at
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.reader import LocalReader, Reader
from bylaw.runs import Stage, run_stage
from bylaw.sl_cai.revise import Reviser
from bylaw.together import by_first
from bylaw.told import stage_line
from bylaw.words import printable


@dataclass(frozen=True)
class Run:
    """A recipe with its inputs, each read and checked once, and this process's place among those that run it."""

    recipe: Recipe
    parallel: Parallel = ALONE

    @cached_property
    def constitution(self) -> Constitution:
        return load_constitution(self.recipe.constitution)

    def asked(self, stage: str) -> str:
        """The hash of all that the constitution has models asked in a stage."""
        return stage_hash(self.constitution, *asked_at(self.recipe, stage))

    @cached_property
    def examples(self) -> Examples:
        """Those of the recipe's file, or of the one beside the constitution; none where no shots are asked for."""
        recipe = self.recipe
        if not (recipe.examples or recipe.revise.shots or recipe.label.shots):
            return Examples()
        return load_examples(self.examples_path, self.constitution)

    @property
    def examples_path(self) -> Path:
        return Path(self.recipe.examples or beside(self.recipe.constitution))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.recipe.base)

    @cached_property
    def device(self) -> str:
        return device_of(self.recipe)

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self._read("prompts", self.recipe.prompts)

    @cached_property
    def helpful(self) -> list[Prompt]:
        return self._read("helpful", Path(self.recipe.helpful)) if self.recipe.helpful else []

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

    @property
    def dtype(self) -> torch.dtype | None:
        """None leaves it to the device."""
        return None if self.recipe.dtype == "auto" else getattr(torch, self.recipe.dtype)

    def hash(self, folder: Path) -> str:
        """`checkpoint_hash`, which the first rank takes for all."""
        return by_first(self.parallel, lambda: checkpoint_hash(folder))

    def model(self, folder: Path) -> Transformer:
        """A model that is trained: all ranks share it out."""
        return load_model(folder, self.device, self.dtype, self.parallel)

    def reward_model(self, folder: Path) -> ScalarModel:
        return load_reward(folder, self.device, self.dtype, self.parallel)[0]

    def sampled_model(self, folder: Path) -> Transformer:
        """A model that is only sampled from: each data rank has all of it, and works at its own pace."""
        return load_model(folder, self.device, self.dtype, self._tensor_group)

    @cached_property
    def _tensor_group(self) -> Parallel:
        """The place among the ranks that share out matrices, as if there were no other data ranks."""
        here = self.parallel
        if here.tensor_ranks == 1:
            return ALONE
        from torch.distributed.device_mesh import init_device_mesh

        kind, shape = torch.device(self.device).type, (here.data_ranks, 1, here.tensor_ranks)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("copy", DATA, TENSOR))
        return replace(here, data_rank=0, data_ranks=1, mesh=mesh[DATA, TENSOR], shares=False)

    def engine(
        self, model: Transformer, cache_gib: float, max_rows: int = 64, tokenizer: Tokenizer | None = None
    ) -> Engine:
        """`cache_gib` as in a recipe, where 0 leaves the choice to the engine; `tokenizer`: None is the base's."""
        if self.parallel.tensor_ranks > 1 and not cache_gib:
            cache_gib = self._smallest_cache(model)
        return Engine(model, tokenizer or self.tokenizer, max_rows, cache_gib=cache_gib or None)

    def _smallest_cache(self, model: Transformer) -> float:
        """In GiB, what every rank has: ranks of a tensor group plan the same steps only with the same memory."""
        pages = torch.tensor(budget(model, None))
        torch.distributed.all_reduce(pages, torch.distributed.ReduceOp.MIN, group=self.parallel.control)
        return int(pages) * page_bytes(model) / GIB

    def reader(self, engine: Engine, hash: str) -> LocalReader:
        """A judge on this machine, whose checkpoint `hash` names."""
        prefix = self.constitution.templates.answer_prefix
        return LocalReader(engine=engine, seed=self.recipe.seed, prefix=prefix, hash=hash)

    def judge(self, reader: Reader) -> Judge:
        """What the recipe has `reader` asked."""
        recipe, harmless = self.recipe, frozenset(prompt.id for prompt in self.helpful)
        return Judge(
            reader=reader,
            constitution=self.constitution,
            config=recipe.label,
            seed=recipe.seed,
            examples=self.examples,
            helpful=harmless,
        )

    def reviser(self, sampler: Sampler) -> Reviser:
        """What the recipe has `sampler` criticise and revise by."""
        return Reviser(
            sampler=sampler, constitution=self.constitution, config=self.recipe.revise, examples=self.examples
        )

    def sampler(self, model: Transformer, folder: Path, settings: SamplingSettings) -> Sampler:
        engine = self.engine(model, settings.cache_gib, settings.max_rows)
        return Sampler(engine=engine, settings=settings, seed=self.recipe.seed, model_hash=self.hash(folder))

    def terms(self, name: str, inputs: dict[str, str]) -> Stage:
        recipe = self.recipe
        config, folder = as_table(getattr(recipe, name)), recipe.out / name
        if recipe.lora.rank and name in TRAINING:
            config["lora"] = as_table(recipe.lora)
        if recipe.dtype != "auto":
            config["dtype"] = recipe.dtype
        return Stage(name=name, folder=folder, inputs=inputs, config=config, seed=recipe.seed, device=self.device)

    def stage(self, name: str, inputs: dict[str, str], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        done = (self.recipe.out / name / MANIFEST).exists()
        manifest = run_stage(self.terms(name, inputs), work, self.parallel)
        if self.parallel.first and not done:  # else `run_stage` has said that it was done before
            print(printable(stage_line(manifest)), flush=True)
        return manifest

    def path(self, *parts: str) -> Path:
        """A file or checkpoint that an earlier stage has made. Raises FileNotFoundError naming the stage to run
        first.
        """
        path = self.recipe.out.joinpath(*parts)

        def check() -> None:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file; run `bylaw {parts[0]}` with this recipe first")

        by_first(self.parallel, check)
        return path

    @property
    def prompt_inputs(self) -> dict[str, str]:
        recipe = self.recipe
        inputs = {"prompts": sha256_file(recipe.prompts), "limits": f"{recipe.prompt_limit} {recipe.max_prompt_tokens}"}
        return inputs | ({"helpful": sha256_file(recipe.helpful)} if recipe.helpful else {})

    def _read(self, key: str, path: Path) -> list[Prompt]:
        require_file(key, path)
        found = read_prompts(path, self.recipe.prompt_limit)
        if found.skipped and self.parallel.first:
            print(found.summary())
        limit = self.recipe.max_prompt_tokens
        kept = [p for p in found if not limit or len(self.tokenizer.prompt_ids(p.messages)) <= limit]
        if len(kept) < len(found) and self.parallel.first:
            print(f"{path}: {len(found) - len(kept)} of {len(found)} prompts left out: over {limit} tokens")
        if not kept:
            raise ValueError(f"{path}: no prompt to work on ({len(found)} read, max_prompt_tokens = {limit})")
        return kept


def require_file(key: str, path: Path) -> None:
    """Raise FileNotFoundError, naming the recipe's key, where no file is."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{key} = {str(path)!r}: {what}; allowed: a file of prompts or records, as JSON lines")


def device_of(recipe: Recipe) -> str:
    """Where a run computes, in torch's terms."""
    if recipe.device != "auto":
        return recipe.device
    return "cuda" if torch.cuda.is_available() else "cpu"
