"""Run folders: each stage has a folder and a manifest, is skipped when done, and goes on when it was killed."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bylaw.model.checkpoint import checkpoint_hash
from bylaw.model.records import sha256_file, write_atomic
from bylaw.recipe import as_table

BEGUN, MANIFEST = "begun.json", "manifest.json"
PACKAGES = ("bylaw", "torch", "triton", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the pipeline: what it reads (by hash), how it is set, and the folder that it writes."""

    name: str
    folder: Path
    inputs: Mapping[str, str]
    config: Any
    seed: int
    device: str

    @property
    def terms(self) -> dict[str, Any]:
        """What decides the stage's output. Another folder with the same terms holds the same files."""
        return {"stage": self.name, "inputs": dict(self.inputs), "config": as_table(self.config), "seed": self.seed}


def run_stage(stage: Stage, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `work(folder)`, which returns counts, unless it was done before by the same terms; returns the manifest.

    Raises ValueError, before any work, when the folder was begun by other terms, naming them, or when an output of a finished
    stage is gone or changed.
    """
    finished = stage.folder / MANIFEST
    check_terms(stage)
    if finished.exists():
        manifest = json.loads(finished.read_text())
        _check_outputs(stage.folder, manifest)
        print(f"{stage.name}: done before, in {stage.folder}")
        return manifest
    resumed = (stage.folder / BEGUN).exists()
    write_atomic(stage.folder / BEGUN, json.dumps(stage.terms, indent=2))
    start = time.time()
    counts = work(stage.folder)
    shutil.rmtree(stage.folder / "state", ignore_errors=True)
    manifest = stage.terms | {
        "counts": counts,
        "outputs": _outputs(stage.folder),
        "seconds": round(time.time() - start, 3),
        "resumed": resumed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": stage.device,
        "versions": _versions(),
    }
    write_atomic(finished, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def check_terms(stage: Stage) -> None:
    """Raise ValueError if the stage's folder was begun by other terms than these, naming each that differs."""
    begun = stage.folder / BEGUN
    if not begun.exists():
        return
    there, here = _flat(json.loads(begun.read_text())), _flat(stage.terms)
    changed = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if changed:
        raise ValueError(
            f"{stage.folder} was begun by another recipe: {'; '.join(changed)}. Give another output folder, or delete "
            f"{stage.folder} and the stages after it to make them again"
        )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _outputs(folder: Path) -> dict[str, str]:
    """Each output by name and hash: files, and checkpoint folders."""
    entries = sorted(p for p in folder.iterdir() if p.name not in (BEGUN, MANIFEST, "state"))
    return {p.name: checkpoint_hash(p) if p.is_dir() else sha256_file(p) for p in entries}


def _check_outputs(folder: Path, manifest: Mapping[str, Any]) -> None:
    missing = [name for name in manifest["outputs"] if not (folder / name).exists()]
    changed = [] if missing else [n for n, h in _outputs(folder).items() if manifest["outputs"].get(n, h) != h]
    if missing or changed:
        what = f"{missing[0]} is gone" if missing else f"{changed[0]} was changed"
        raise ValueError(f"{folder} is finished, but its {what}; delete {folder} to make the stage again")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def text_hash(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
