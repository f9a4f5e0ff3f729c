"""What a run folder holds, read into plain data. A stage that is missing or still running is told, not refused."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bylaw.constitution.load import load_constitution, parse_constitution
from bylaw.constitution.schema import Constitution
from bylaw.layout import BEGUN, BEHAVIOUR, FOUND, JUDGED, MANIFEST, MEASURES
from bylaw.model.records import Record, decode_record, numbered_lines, read_object
from bylaw.recipe import EVERY_STAGE
from bylaw.report import forms
from bylaw.report.behaviour import Evaluation, evaluations
from bylaw.report.forms import check_form
from bylaw.report.marks import Marks, marks_of
from bylaw.sums import altered

State = Literal["finished", "begun", "absent"]


@dataclass(frozen=True)
class StageFacts:
    """One stage: how far it came, its manifest (empty until it finishes), and its curves."""

    name: str
    state: State
    manifest: Record
    metrics: list[Record]

    @property
    def counts(self) -> Record:
        return self.manifest.get("counts") or {}


@dataclass(frozen=True)
class RunFacts:
    """All that the report is made of. Records of a stage that is still running are those written so far."""

    folder: Path
    recipe: Mapping[str, Any]
    stages: Mapping[str, StageFacts]
    constitution: Constitution
    chains: list[Record]
    preferences: list[Record]
    summary: Record
    """What a world's oracle found, as summary.json has it; empty without one."""
    evaluations: list[Evaluation]
    """What the models do: as the oracle reads their answers, as rules read them, or both."""
    known: list[Record]
    """What `bylaw judge` found of the run's judge, file by file."""
    altered: list[str]
    """Files that this page is made from and that are not as SHA256SUMS has them."""
    marks: list[Marks]
    """Of a recipe in which the judge itself gives the rewards: its marks by principle."""


def gather(folder: Path) -> RunFacts:
    """Read a run. ValueError when `folder` is no run folder, or a file in it is broken or has not the form that bylaw
    gives it; it names the file.
    """
    if not (folder / "recipe.toml").is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        raise ValueError(f"{folder} is no run folder: it has no recipe.toml. Give the folder that `bylaw run` wrote")
    try:
        return _gather(folder)
    except ValueError as error:
        raise ValueError(f"{error}; the run is damaged, and `bylaw check {folder}` tells more") from error


def _gather(folder: Path) -> RunFacts:
    recipe = _recipe(folder / "recipe.toml")
    stages = {name: _stage(folder / name, name) for name in EVERY_STAGE}
    chains = list(_records(folder / "revise" / "chains.jsonl", stages["revise"].state, forms.CHAIN))
    preferences = list(_records(folder / "label" / "preferences.jsonl", stages["label"].state, forms.LABEL))
    rollouts = _records(folder / "ppo" / "rollouts.jsonl", stages["ppo"].state, forms.ROLLOUT)  # not yet read
    summary = _object(folder / "summary.json", forms.SUMMARY)
    constitution = _constitution(folder, recipe, [*preferences[-1:], *chains[-1:]])
    ids = [principle.id for principle in constitution.principles]
    return RunFacts(
        folder=folder,
        recipe=recipe,
        stages=stages,
        constitution=constitution,
        chains=chains,
        preferences=preferences,
        summary=summary,
        evaluations=evaluations(summary, _each(folder / BEHAVIOUR, FOUND, forms.EVALUATION)),
        known=_each(folder / JUDGED, MEASURES, forms.KNOWN),
        altered=altered(folder),
        marks=marks_of(rollouts, ids) if rewards_by_judge(recipe) else [],
    )


def rewards_by_judge(recipe: Mapping[str, Any]) -> bool:
    """Whether the judge's marks score PPO's answers, without pairs, labels or a reward model."""
    return recipe.get("last", "ppo") == "ppo" and recipe.get("ppo", {}).get("reward") == "judge"


def _recipe(path: Path) -> Record:
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    check_form(recipe, forms.RECIPE, str(path))
    return recipe


def _stage(folder: Path, name: str) -> StageFacts:
    finished = (folder / MANIFEST).exists()
    state: State = "finished" if finished else "begun" if (folder / BEGUN).exists() else "absent"
    manifest = _object(folder / MANIFEST, forms.MANIFEST)
    return StageFacts(name, state, manifest, list(_records(folder / "metrics.jsonl", state, forms.METRICS)))


def _object(path: Path, form: Any) -> Record:
    """The object in a small file; empty where there is no file."""
    found = read_object(path) if path.exists() else {}
    if found:
        check_form(found, form, str(path))
    return found


def _each(top: Path, name: str, form: Any) -> list[Record]:
    """The objects in files of one name, from the folders in `top`."""
    return [_object(path, form) for path in sorted(top.glob(f"*/{name}"))]


def _records(path: Path, state: State, form: Any) -> Iterator[Record]:
    """The records of a file; of one that is still being written, its whole lines; none where there is no file."""
    for number, line in numbered_lines(path) if path.exists() else ():
        if state == "finished" or line.endswith(b"\n"):
            record = decode_record(line, f"{path}:{number}")
            check_form(record, form, f"{path}:{number}")
            yield record


def _constitution(folder: Path, recipe: Mapping[str, Any], records: Sequence[Record]) -> Constitution:
    """The one that the newest records name, as the run folder keeps it; else the recipe's."""
    for record in records:
        kept = folder / "constitutions" / f"{Path(str(record['by'].get('constitution'))).name}.toml"
        if kept.is_file():
            return parse_constitution(kept.read_text(encoding="utf-8"), str(kept))
    others = sorted((folder / "constitutions").glob("*.toml"))
    if not records and len(others) == 1:
        return parse_constitution(others[0].read_text(encoding="utf-8"), str(others[0]))
    return load_constitution(str(recipe.get("constitution", "default")))
