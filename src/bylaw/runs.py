"""Run folders: each stage has a folder and a manifest, is skipped when done, and goes on when it was killed."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bylaw.layout import BEGUN, MANIFEST, STATE
from bylaw.model.checkpoint import checkpoint_hash
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import sha256_file, write_atomic
from bylaw.sums import write_sums
from bylaw.together import by_first

OWN_FILES = (BEGUN, MANIFEST, STATE)
PACKAGES = ("bylaw", "torch", "triton", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the pipeline: what it reads (by hash), how it is set, and the folder that it writes."""

    name: str
    folder: Path
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    seed: int
    device: str

    @property
    def terms(self) -> dict[str, Any]:
        """What decides the stage's output. Another folder with the same terms holds the same files."""
        return {"stage": self.name, "inputs": dict(self.inputs), "config": dict(self.config), "seed": self.seed}


def run_stage(stage: Stage, work: Callable[[Path], dict[str, Any]], parallel: Parallel = ALONE) -> dict[str, Any]:
    """Run `work(folder)`, which returns counts, unless it was done before by the same terms; returns the manifest.
    Every rank works; the first alone writes what stands here, and SHA256SUMS in the folder above, the run's.

    Raises ValueError, before any work, when the folder was begun by other terms, naming them, or when an output of a
    finished stage is gone or changed. What is killed at any instant, and run again, completes to the same files.
    """
    manifest = by_first(parallel, lambda: _done_before(stage))
    if manifest is not None:
        return manifest
    resumed, start = by_first(parallel, lambda: _begin(stage)), time.time()
    counts = work(stage.folder)
    parallel.meet()
    return by_first(parallel, lambda: _finish(stage, counts, resumed, time.time() - start))


def _done_before(stage: Stage) -> dict[str, Any] | None:
    """The manifest of a stage that is finished, and as it was."""
    finished = stage.folder / MANIFEST
    check_terms(stage)
    if not finished.exists():
        return None
    manifest = json.loads(finished.read_text())
    _check_outputs(stage.folder, manifest["outputs"])
    _forget_state(stage)
    # A kill may have come between the manifest and its sums.
    made = [f"{stage.folder.name}/{name}" for name in (BEGUN, MANIFEST, *manifest["outputs"])]
    write_sums(stage.folder.parent, lacking=made)
    print(f"{stage.name}: done before, in {stage.folder}")
    return manifest


def _begin(stage: Stage) -> bool:
    """Note the terms; whether a run before this one has begun the stage."""
    resumed = is_begun(stage.folder)
    write_atomic(stage.folder / BEGUN, json.dumps(stage.terms, indent=2))
    return resumed


def _finish(stage: Stage, counts: dict[str, Any], resumed: bool, seconds: float) -> dict[str, Any]:
    names = sorted(p.name for p in stage.folder.iterdir() if not p.name.startswith(".") and p.name not in OWN_FILES)
    manifest = stage.terms | {
        "counts": counts,
        "outputs": {name: output_hash(stage.folder / name) for name in names},
        "seconds": round(seconds, 3),
        "resumed": resumed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": stage.device,
        "versions": versions(),
    }
    write_atomic(stage.folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    _forget_state(stage)  # only now: a kill halfway through the removal must not leave a state that cannot be read
    write_sums(stage.folder.parent, stage.name)
    return manifest


def check_terms(stage: Stage, parts: Collection[str] = ("inputs", "config", "seed")) -> None:
    """Raise ValueError if the stage's folder was begun by other terms than these, naming each that differs.

    `parts` are the terms to compare: a stage's inputs are not known before the stages ahead of it are done. A folder in
    which a stage was refused before it wrote anything is taken as not begun.
    """
    if not is_begun(stage.folder):
        return
    begun = json.loads((stage.folder / BEGUN).read_text(encoding="utf-8"))
    there, here = ({_named(stage, k): v for k, v in _flat(t, parts).items()} for t in (begun, stage.terms))
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


def is_begun(folder: Path) -> bool:
    """Whether a stage has written anything into its folder beside the note that it began."""
    return (folder / BEGUN).exists() and any(p.name != BEGUN for p in folder.iterdir())


def _named(stage: Stage, key: str) -> str:
    """A term by the name that it has in the recipe."""
    return f"{stage.name}.{key.removeprefix('config.')}" if key.startswith("config.") else key


def _flat(table: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The values of `table` under `keys`, those of tables within it under dotted names."""
    flat: dict[str, Any] = {}
    for key in keys:
        value = table[key]
        flat |= _flat(value, value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def output_hash(output: Path) -> str:
    """Of a file, a checkpoint folder, or an adapter's folder: as manifests and the inputs in them have it."""
    if not output.is_dir():
        return sha256_file(output)
    return checkpoint_hash(output) if (output / "config.json").exists() else folder_hash(output)


def folder_hash(folder: Path) -> str:
    """SHA-256, in hex, over the names and bytes of a folder's files: of an adapter, which is no checkpoint."""
    named = "".join(f"{path.name} {sha256_file(path)}\n" for path in sorted(folder.iterdir()))
    return hashlib.sha256(named.encode()).hexdigest()


def _check_outputs(folder: Path, outputs: Mapping[str, str]) -> None:
    missing = [name for name in outputs if not (folder / name).exists()]
    changed = [] if missing else [name for name, hash in outputs.items() if output_hash(folder / name) != hash]
    if missing or changed:
        what = f"{missing[0]} is gone" if missing else f"{changed[0]} was changed"
        raise ValueError(f"{folder} is finished, but its {what}; delete {folder} to make the stage again")


def _forget_state(stage: Stage) -> None:
    """Remove the training checkpoints of a finished stage."""
    shutil.rmtree(stage.folder / STATE, ignore_errors=True)


def versions() -> dict[str, str]:
    """Of what computes here, for a manifest."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
