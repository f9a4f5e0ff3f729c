"""The village's pipeline for one seed, and variants that branch off it after some of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bylaw.benchmarks.village.evaluate import behaviour, prompts
from bylaw.branch import branch
from bylaw.demo import ROWS, village_recipe, write_village_prompts
from bylaw.inputs import Run
from bylaw.model.settings import SamplingSettings
from bylaw.model.transformer import Transformer
from bylaw.pipeline import run_pipeline
from bylaw.recipe import STAGES, DemoConfig, Recipe

Row = dict[str, Any]
"""One measurement: `variant` and `seed` name it, numbers are its measures."""


@dataclass(frozen=True)
class Bench:
    """Runs of one seed, each in a folder of its own below `folder`; what is done stays done."""

    folder: Path
    seed: int

    @cached_property
    def recipe(self) -> Recipe:
        """That of the demo."""
        recipe = village_recipe(DemoConfig(out=self.folder / "main", seed=self.seed))
        write_village_prompts(recipe)
        return recipe

    def main(self, stages: Sequence[str] = STAGES) -> Run:
        """The demo's run, up to what `stages` make."""
        run_pipeline(self.recipe, stages)
        return Run(self.recipe)

    def variant(self, name: str, kept: Sequence[str], stages: Sequence[str], **changes: Any) -> Run:
        """A run that takes the stages `kept` over from the main one and makes `stages` by a recipe with `changes`."""
        if kept:
            self.main(kept)
        recipe = replace(self.recipe, out=self.folder / name, **changes)
        branch(self.recipe.out, recipe.out, kept)
        run_pipeline(recipe, stages)
        return Run(recipe)

    def behaviour(self, run: Run, place: Path | Transformer, samples: int = 1) -> dict[str, Any]:
        """What a checkpoint, or a model as it is now, does to held-out asks."""
        folder = place if isinstance(place, Path) else run.recipe.base
        model = run.model(place) if isinstance(place, Path) else place
        return behaviour(run.sampler(model, folder, SamplingSettings(max_rows=ROWS)), samples)


HARMFUL = prompts(heldout=True, harmful=True)


def flat(measured: dict[str, Any]) -> Row:
    """The plain numbers among measures."""
    return {name: value for name, value in measured.items() if isinstance(value, float)}
