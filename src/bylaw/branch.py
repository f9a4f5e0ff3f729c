"""A run that begins with stages that another has made."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from bylaw.layout import MANIFEST, STATE
from bylaw.model.records import write_atomic


def branch(source: Path, out: Path, stages: Sequence[str]) -> None:
    """Copy the finished `stages` of the run in `source` into `out`, where they then count as done; those that stand
    there already are left alone.

    Each is copied beside its place and renamed, so a killed copy is made again. Raises ValueError for a stage that is
    not finished.
    """
    for name in stages:
        here, there = source / name, out / name
        if not (here / MANIFEST).exists():
            raise ValueError(f"{here} is not finished; run its stage first: bylaw {name}")
        if there.exists():
            continue
        beside = out / f".{name}.copy"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(here, beside, ignore=shutil.ignore_patterns(STATE))
        beside.rename(there)
    for kept in ("constitutions", "examples"):  # by which the copied records were made
        for path in sorted((source / kept).glob("*.toml")):
            if not (out / kept / path.name).exists():
                write_atomic(out / kept / path.name, path.read_text(encoding="utf-8"))
