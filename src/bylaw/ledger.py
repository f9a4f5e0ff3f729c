"""What stands in a run folder, read once each: recipe, manifests, records, constitutions, prompt files."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bylaw.constitution.asked import stage_hash
from bylaw.constitution.examples import beside
from bylaw.constitution.load import load_constitution
from bylaw.constitution.schema import Constitution, Stage
from bylaw.layout import MANIFEST, RECIPE, is_run
from bylaw.model.checkpoint import check_model
from bylaw.model.data import prompt_lines
from bylaw.model.records import Record, decode_record, numbered_lines, read_object, sha256_file
from bylaw.model.tokenizer import Tokenizer
from bylaw.recipe import EVERY_STAGE, Recipe, asked_at, load_recipe


@dataclass(frozen=True)
class Ledger:
    """A run folder. Records of stages that have not finished are there too, as far as they were written.

    Raises ValueError, naming file and line, for a record that lacks what its kind has.
    """

    run: Path
    part: str = ""
    """One of `layout.parts`, whose records are then read in place of the stages'."""

    def __post_init__(self) -> None:
        if not is_run(self.run):
            what = "not a run folder (it has no recipe.toml)" if self.run.is_dir() else "no such folder"
            raise FileNotFoundError(f"{self.run}: {what}")

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.run / RECIPE)

    @cached_property
    def manifests(self) -> dict[str, Record]:
        """Those of the finished stages, by name, in the order of the pipeline."""
        paths = {name: self.run / name / MANIFEST for name in EVERY_STAGE}
        return {name: read_object(path) for name, path in paths.items() if path.exists()}

    @cached_property
    def chains(self) -> dict[str, Record]:
        return {one["id"]: one for one in self.records(f"{self.part or 'revise'}/chains.jsonl")}

    @cached_property
    def helpful(self) -> dict[tuple[str, int], Record]:
        """Helpful samples; of a part its answers."""
        name = f"{self.part}.jsonl" if self.part else "revise/helpful.jsonl"
        return {(one["id"], one["sample"]): one for one in self.records(name, "helpful")}

    @cached_property
    def pairs(self) -> dict[str, Record]:
        return {one["id"]: one for one in self.records(f"{self.part or 'compare'}/pairs.jsonl")}

    @cached_property
    def preferences(self) -> dict[str, Record]:
        return {one["id"]: one for one in self.records(f"{self.part or 'label'}/preferences.jsonl")}

    @cached_property
    def questions(self) -> dict[str, Record]:
        """Of a part, what a judge said to questions whose answer is known."""
        return {one["id"]: one for one in self.records(f"{self.part}/answers.jsonl")} if self.part else {}

    @cached_property
    def rollouts(self) -> dict[tuple[int, int], Record]:
        found = [] if self.part else self.records("ppo/rollouts.jsonl")
        return {(one["iteration"], one["place"]): one for one in found}

    @cached_property
    def prompts(self) -> dict[str, list[Record]]:
        """The dialogue of every prompt id in a record; empty where only episodes are there, which do not repeat it."""
        drawn: dict[str, list[Record]] = {one["prompt_id"]: [] for one in self.rollouts.values()}
        drawn |= {id: [] for id in self.questions}
        kept = [*self.chains.values(), *self.helpful.values()]
        rest = [*self.pairs.values(), *self.preferences.values()]
        named = [(one["id"], one) for one in kept] + [(one["prompt_id"], one) for one in rest]
        return drawn | {id: one["prompt"] for id, one in named}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._checkpoint)

    @cached_property
    def context(self) -> int:
        return check_model(self._checkpoint)[0].max_position_embeddings

    @property
    def _checkpoint(self) -> Path:
        """The SL-CAI model's folder, whose tokenizer is the base's; the base's until there is one."""
        tuned = self.run / "finetune" / "sl-cai"
        return tuned if (tuned / "config.json").exists() else self.recipe.base

    @cached_property
    def constitutions(self) -> dict[str, Constitution]:
        """By hash. Raises ValueError for a file that is not the constitution that its name says."""
        found = {}
        for path in sorted((self.run / "constitutions").glob("*.toml")):
            found[path.stem] = load_constitution(path)
            if found[path.stem].hash != path.stem:
                raise ValueError(f"{path}: its constitution has the hash {found[path.stem].hash}; the file was changed")
        return found

    @cached_property
    def constitution(self) -> Constitution:
        """The one by which the run's labels were made, or its chains, where it has no labels; the recipe's without
        either. An amendment's, which a run keeps too, is none of these.
        """
        for records in (self.preferences, self.chains):
            hash = next((one["by"].get("constitution") for one in records.values()), None)
            if hash in self.constitutions:
                return self.constitutions[hash]
        return load_constitution(self.recipe.constitution)

    @cached_property
    def as_made(self) -> Recipe:
        """The recipe as the run was made by it: with the constitution and the examples that the run keeps, whatever has
        become of their files since, and the folder where it lies now.
        """
        recipe, kept = self.recipe, self.constitution_path(self.constitution.hash)
        shots = recipe.label.shots or recipe.revise.shots
        return replace(
            recipe,
            out=self.run,
            constitution=str(kept.absolute()) if kept.exists() else recipe.constitution,
            examples=str(self.examples_path(self._examples).absolute()) if shots else recipe.examples,
        )

    def as_made_on(self, base: Path | None) -> Recipe:
        """`as_made` with its base where that lies now; None is where it lay. FileNotFoundError where the judge is the
        base, and there is none.
        """
        recipe = replace(self.as_made, base=base) if base else self.as_made
        if recipe.judge == "base" and not recipe.base.is_dir():
            raise FileNotFoundError(f"{recipe.base}: this run's base is gone; --base FOLDER says where it lies now")
        return recipe

    @property
    def _examples(self) -> str:
        """The hash of the examples that the labels were made with, else of those of the chains; "" for none."""
        of_chains = self.manifests.get("revise", {"inputs": {}})["inputs"].get("examples", "")
        of_labels = (one["by"]["examples"] for one in self.preferences.values() if "examples" in one["by"])
        return next(of_labels, of_chains)

    @cached_property
    def rated_by(self) -> str:
        """The hash of the constitution by which a judge gave PPO its marks."""
        asked = self.manifests.get("ppo", {"inputs": {}})["inputs"].get("constitution")
        used = asked_at(self.recipe, "ppo")
        found = [hash for hash, one in self.constitutions.items() if _asks(one, used) == asked]
        return found[0] if found else self.constitution.hash

    def constitution_path(self, hash: str) -> Path:
        return self.run / "constitutions" / f"{hash}.toml"

    def examples_path(self, hash: str) -> Path:
        """The examples that the run keeps by that hash; a run of a bylaw that kept none has those of its recipe."""
        kept = self.run / "examples" / f"{hash}.toml"
        return kept if kept.exists() else Path(self.recipe.examples or beside(self.recipe.constitution))

    def principle(self, named: Record, constitution: str) -> dict[str, Any]:
        """A record's principle with its text, from the constitution of that hash; `problem` says why there is none."""
        there = self.constitutions.get(constitution)
        found = {one.id: one for one in there.principles}.get(named["id"]) if there else None
        told = {"id": named["id"], "hash": named["hash"], "constitution": constitution}
        if found is None or found.hash != named["hash"]:
            where = f"constitutions/{constitution}.toml"
            return told | {"problem": f"not in {where}" if there else f"there is no {where}"}
        return told | {"title": found.title, "statement": found.statement}

    def outside(self, path: Path) -> Path:
        """A file that the recipe names; the one of that name in the run, where it is gone: a run that was moved has
        taken along what lay in it.
        """
        here = self.run / path.name
        return here if not path.exists() and here.exists() else path

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """The recipe's prompt files: path, kind, the line of each id, and whether the file is as the run read it."""
        inputs = next((one["inputs"] for one in self.manifests.values() if "prompts" in one["inputs"]), {})
        named = {"prompts": self.recipe.prompts, "helpful": Path(self.recipe.helpful) if self.recipe.helpful else None}
        return [_source(kind, self.outside(path), inputs.get(kind)) for kind, path in named.items() if path]

    def records(self, name: str, kind: str = "") -> list[Record]:
        """Those of a file, none if it is not there; a torn last line, as a writer at work may leave it, is not one.
        `kind`, by default the file's own name, says what a record must have.
        """
        path = self.run / name
        lines = list(numbered_lines(path)) if path.exists() else []
        done = (path.parent / MANIFEST).exists()
        found = [(decode_record(line, f"{path}:{n}"), n) for n, line in lines if done or line.endswith(b"\n")]
        return [formed(one, kind or path.stem, f"{path}:{n}") for one, n in found]


_SIDES = ("id", "prompt_id", "prompt", "a", "b", "by")
_FORMS: dict[str, tuple[str, ...]] = {
    "chains": ("id", "prompt", "answer", "rounds", "by"),
    "rounds": ("round", "principle", "revision"),
    "helpful": ("id", "sample", "prompt", "by"),
    "pairs": _SIDES,
    "preferences": (*_SIDES, "p_a", "abstained", "labels"),
    "labels": ("principle", "p_a", "abstained", "weight"),
    "rollouts": ("iteration", "place", "prompt_id", "ids", "score", "raw"),
}
"""What a record of each kind has, and each of its rounds or labels."""


def formed(record: Record, kind: str, where: str) -> Record:
    """The record, if it has what its kind has. ValueError naming `where` and what it lacks."""
    inner = [(part, one) for part in ("rounds", "labels") for one in _list(record.get(part))]
    for what, one in [(kind, record), *inner]:
        lacks = [key for key in _FORMS.get(what, ()) if not isinstance(one, dict) or key not in one]
        if lacks:
            raise ValueError(f"{where}: no record of {kind}: {what} without {', '.join(lacks)}; see `bylaw check`")
    return record


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _asks(constitution: Constitution, used: tuple[Stage, tuple[str, ...]]) -> str:
    """`stage_hash`, or nothing for a constitution that has no principle for the stage."""
    try:
        return stage_hash(constitution, *used)
    except ValueError:
        return ""


def _source(kind: str, path: Path, hash: str | None) -> dict[str, Any]:
    if not path.is_file():
        return {"file": str(path), "kind": kind, "lines": {}, "note": "the file is gone"}
    note = "" if hash in (None, sha256_file(path)) else "the file has changed since"
    try:
        lines = prompt_lines(path)
    except ValueError as error:
        return {"file": str(path), "kind": kind, "lines": {}, "note": f"the file has changed since: {error}"}
    return {"file": str(path), "kind": kind, "lines": lines, "note": note}
