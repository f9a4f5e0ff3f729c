"""What a run folder holds, read into plain data. A stage that is missing or still running is told, not refused."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bylaw.constitution.load import load_constitution, parse_constitution
from bylaw.constitution.schema import Constitution
from bylaw.layout import BEGUN, JUDGED, MANIFEST, MEASURES
from bylaw.model.records import Record, decode_record, numbered_lines, read_object, read_records
from bylaw.recipe import EVERY_STAGE
from bylaw.report.behaviour import summary_of

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
        return self.manifest.get("counts", {})


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
    known: list[Record]
    """What `bylaw judge` found of the run's judge, file by file."""


def gather(folder: Path) -> RunFacts:
    """Read a run. ValueError when `folder` is no run folder, or a file in it is broken."""
    path = folder / "recipe.toml"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it has no recipe.toml. Give the folder that `bylaw run` wrote")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    stages = {name: _stage(folder / name, name) for name in EVERY_STAGE}
    chains = _records(folder / "revise" / "chains.jsonl", stages["revise"])
    preferences = _records(folder / "label" / "preferences.jsonl", stages["label"])
    return RunFacts(
        folder=folder,
        recipe=recipe,
        stages=stages,
        constitution=_constitution(folder, recipe, [*preferences[-1:], *chains[-1:]]),
        chains=chains,
        preferences=preferences,
        summary=summary_of(folder),
        known=[read_object(path) for path in sorted((folder / JUDGED).glob(f"*/{MEASURES}"))],
    )


def _stage(folder: Path, name: str) -> StageFacts:
    finished = (folder / MANIFEST).exists()
    state: State = "finished" if finished else "begun" if (folder / BEGUN).exists() else "absent"
    facts = StageFacts(name, state, read_object(folder / MANIFEST) if finished else {}, [])
    return StageFacts(name, state, facts.manifest, _records(folder / "metrics.jsonl", facts))


def _records(path: Path, stage: StageFacts) -> list[Record]:
    """The records of a file; of one that is still being written, its whole lines; none where there is no file."""
    if not path.exists():
        return []
    if stage.state == "finished":
        return read_records(path)
    return [decode_record(line, f"{path}:{n}") for n, line in numbered_lines(path) if line.endswith(b"\n")]


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
