"""`bylaw check`: is a run folder as it was written, and does every part of it come from the parts before it?"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bylaw.check_records import check_records
from bylaw.constitution.asked import stage_hash
from bylaw.constitution.examples import load_examples
from bylaw.constitution.schema import Constitution
from bylaw.layout import RECIPE, SUMS
from bylaw.ledger import Ledger
from bylaw.model.records import Record, sha256_file
from bylaw.recipe import asked_at
from bylaw.rlaif.config import is_server
from bylaw.runs import output_hash
from bylaw.sums import files_of, links_of, open_files, read_sums, render_sums, unfinished
from bylaw.words import printable

_UPSTREAM = {
    "finetune": {"chains": "revise/chains.jsonl", "helpful": "revise/helpful.jsonl"},
    "compare": {"sl-cai": "finetune/sl-cai"},
    "label": {"pairs": "compare/pairs.jsonl"},
    "reward": {"preferences": "label/preferences.jsonl", "sl-cai": "finetune/sl-cai"},
    "ppo": {"sl-cai": "finetune/sl-cai", "reward-model": "reward/reward-model", "adapter": "reward/adapter"},
    "dpo": {"preferences": "label/preferences.jsonl", "sl-cai": "finetune/sl-cai"},
}
"""What a stage reads of the stages before it."""
_SETTINGS = ("limits", "judging")
"""Inputs that are settings of the recipe, and no hashes."""


@dataclass
class Findings:
    """`problems` are corruption; `notes` are what a person should know beside: stages that go on, inputs from outside
    the run that are no longer what they were.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    records: int = 0


def check(run: Path) -> Findings:
    """Read everything in a run folder. Raises FileNotFoundError for what is no run folder."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    if not any((run / name).exists() for name in (RECIPE, SUMS)):  # one of them may be what was lost
        raise FileNotFoundError(f"{run}: not a run folder (it has neither {RECIPE} nor {SUMS})")
    found = Findings(files=len(files_of(run)))
    found.problems += check_sums(run)
    for folder in unfinished(run):
        count = len([name for name in open_files(run) if name.startswith(f"{folder}/")])
        found.notes.append(f"{folder} has begun and not finished: its {count} files are not checked")
    try:
        ledger = Ledger(run)
        hashes = _Hashes(run)
        for name, manifest in ledger.manifests.items():
            _check_stage(ledger, name, manifest, hashes, found)
        problems, found.records = check_records(ledger)
        found.problems += problems
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:  # whatever a spoiled file can do
        said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__} {error}"
        found.problems.append(f"{said}; what comes after it, stages and records, is not checked")
    return found


def report(run: Path, found: Findings) -> str:
    """The findings as lines that a person reads."""
    lines = [f"wrong: {problem}" for problem in found.problems] + [f"note: {note}" for note in found.notes]
    count = len(found.problems)
    if count:
        lines.append(f"{run}: {count} thing{'s' if count > 1 else ''} wrong")
    else:
        lines.append(f"{run}: {found.files} files and {found.records} records, all as they were written")
    return "\n".join(printable(line.replace("\n", " ")) for line in lines)


def check_sums(run: Path) -> Iterator[str]:
    """What differs between the files of a run and its SHA256SUMS, and between that and the form that bylaw gives it."""
    if not (run / SUMS).exists():
        yield f"{SUMS} is gone, so no change can be seen; run any stage again to take all files as they are now"
        return
    try:
        sums = read_sums(run)
    except ValueError as error:
        yield str(error)
        return
    there = set(files_of(run))
    if (run / SUMS).read_bytes() != render_sums(sums).encode():
        yield f"{SUMS} was changed: it is not in the form in which it is written"
    for name, hash in sums.items():
        if not (run / name).is_file():
            yield f"{name} is gone"
        elif (now := sha256_file(run / name)) != hash:
            yield f"{name} was changed: its SHA-256 was {hash[:16]}..., and is {now[:16]}..."
    for name in links_of(run):
        yield f"{name} is a link, and what it leads to is no part of the run"
    for path in sorted(run.rglob(".*lock")):
        if path.is_file() and path.stat().st_size:
            yield f"{path.relative_to(run)} holds something; bylaw locks by it, and leaves it empty"
    for name in sorted(there - sums.keys()):
        why = "bylaw did not write it (other files belong elsewhere), or was killed as it did (run again, it adds it)"
        yield f"{name} is not in {SUMS}: {why}"


class _Hashes:
    """Hashes of files and checkpoints as they are now, each taken once. None for what is gone or cannot be read."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._known: dict[Path, str | None] = {}

    def of(self, path: Path) -> str | None:
        path = self.run / path  # an absolute path stays as it is
        if path not in self._known:
            try:
                self._known[path] = output_hash(path)
            except (ValueError, OSError):
                self._known[path] = None
        return self._known[path]


def _check_stage(ledger: Ledger, name: str, manifest: Record, hashes: _Hashes, found: Findings) -> None:
    for output, hash in manifest["outputs"].items():
        if hashes.of(Path(name, output)) != hash:
            found.problems.append(f"{name}/{output} is not what its manifest says: {hash[:16]}...")
    known = _UPSTREAM.get(name, {})
    for input, hash in manifest["inputs"].items():
        if input in known:
            if hashes.of(Path(known[input])) != hash:
                found.problems.append(f"stage {name} was made from another {known[input]} ({hash[:16]}...)")
        elif input == "constitution":
            hashes_there = {_asked(ledger, one, name) for one in ledger.constitutions.values()}
            if hash not in hashes_there:
                found.problems.append(f"stage {name} went by a constitution ({hash}) that is not in constitutions/")
        elif input in _OUTSIDE:
            _check_outside(ledger, name, input, hash, hashes, found)
        elif input == "examples":
            _check_examples(ledger, name, hash, found)
        elif input.startswith("reward "):
            _note(name, Path(input.removeprefix("reward ")), hash, hashes, found)
        elif input not in _SETTINGS:
            found.notes.append(f"stage {name}: its input {input!r} is not one that this check knows")


def _asked(ledger: Ledger, constitution: Constitution, name: str) -> str | None:
    try:
        return stage_hash(constitution, *asked_at(ledger.recipe, name))
    except ValueError:  # it has no principle for the stage, so it was another's
        return None


_OUTSIDE: Mapping[str, Callable[[Any], Path]] = {
    "base": lambda recipe: recipe.base,
    "prompts": lambda recipe: recipe.prompts,
    "helpful": lambda recipe: Path(recipe.helpful),
    "helpful_preferences": lambda recipe: Path(recipe.helpful_preferences),
    "judge": lambda recipe: recipe.base if recipe.judge == "base" else Path(recipe.judge),
}
"""What comes from outside the run, by the recipe."""


def _check_outside(ledger: Ledger, name: str, input: str, hash: str, hashes: _Hashes, found: Findings) -> None:
    if input == "judge" and ledger.recipe.judge == "sl-cai":
        if hashes.of(Path("finetune/sl-cai")) != hash:
            found.problems.append(f"stage {name} was judged by another finetune/sl-cai ({hash[:16]}...)")
        return
    if hash and not (input == "judge" and is_server(ledger.recipe.judge)):
        _note(name, ledger.outside(_OUTSIDE[input](ledger.recipe)), hash, hashes, found)


def _check_examples(ledger: Ledger, name: str, hash: str, found: Findings) -> None:
    place = ledger.run / "examples" / f"{hash}.toml"
    if not any(_examples_hash(place, one) == hash for one in ledger.constitutions.values()):
        found.problems.append(f"stage {name} went by examples ({hash}) that are not in examples/, or were changed")


def _examples_hash(place: Path, constitution: Constitution) -> str | None:
    try:
        return load_examples(place, constitution).hash
    except (ValueError, OSError):  # gone, or an amended constitution has not all of the principles that they go by
        return None


def _note(name: str, path: Path, hash: str, hashes: _Hashes, found: Findings) -> None:
    now = hashes.of(path)
    if now != hash:
        state = "has changed since, or is another now" if now else "is gone, or cannot be read"
        found.notes.append(f"stage {name} read {path}, which {state}; the run itself is not touched by that")
