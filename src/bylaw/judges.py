"""The judge that a recipe names: a checkpoint of the run, another one on this machine, or a server."""

from pathlib import Path
from typing import Any

from bylaw.inputs import Run
from bylaw.model.tokenizer import Tokenizer
from bylaw.recipe import OWN_JUDGES, Recipe
from bylaw.rlaif.config import is_server
from bylaw.rlaif.reader import LocalReader, Reader
from bylaw.rlaif.remote import RemoteReader


def judge_hash(run: Run) -> str:
    """What names the judge in manifests and records. Reads no weights, and asks no server."""
    return server_reader(run).hash if is_server(run.recipe.judge) else run.hash(judge_folder(run))


def judge_reader(run: Run) -> Reader:
    """The judge, ready to be asked: of a checkpoint, with its weights."""
    if is_server(run.recipe.judge):
        return server_reader(run)
    folder = judge_folder(run)  # with a tokenizer of its own; that of the SL-CAI model is the base's
    engine = run.engine(run.sampled_model(folder), run.recipe.label.cache_gib, tokenizer=Tokenizer.load(folder))
    return run.reader(engine, run.hash(folder))


def other_judge(recipe: Recipe) -> Path | None:
    """The folder of a judge that is none of the run's own checkpoints."""
    return None if recipe.judge in OWN_JUDGES or is_server(recipe.judge) else Path(recipe.judge)


def server_reader(run: Run) -> RemoteReader:
    """The judge behind the recipe's URL."""
    recipe, prefix = run.recipe, run.constitution.templates.answer_prefix
    # Ranks that share out matrices do the same work: one of them asks for all.
    asks = run.parallel.tensor_rank == 0
    return RemoteReader(url=recipe.judge, config=recipe.judge_server, seed=recipe.seed, prefix=prefix, asks=asks)


def server_figures(run: Run, reader: Reader) -> dict[str, Any]:
    """Requests, failed attempts by fault and bounded readings of all ranks, for the manifest; nothing for a checkpoint.

    As an engine's figures, those of a stage that was killed are of its last run only.
    """
    if isinstance(reader, LocalReader):
        return {}
    assert isinstance(reader, RemoteReader)
    parts = run.parallel.gather(reader.counts)
    return {"server": {name: sum(part[name] for part in parts) for name in sorted(set().union(*parts))}}


def judge_folder(run: Run) -> Path:
    """The checkpoint of a judge that is on this machine."""
    other = other_judge(run.recipe)
    return other or (run.recipe.base if run.recipe.judge == "base" else run.path("finetune", "sl-cai"))
