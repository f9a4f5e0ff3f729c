"""Training checkpoints: what a killed trainer needs to go on with the same bits, at any number of ranks. No pickles.

torch.distributed.checkpoint writes them, each rank its own part, under Hugging Face's names, as safetensors, while
training goes on. This is not the checkpoint that other programs load (model/checkpoint.py); it is deleted when its
stage is done.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bylaw.model.optim import MasterAdamW, trained
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import write_atomic
from bylaw.model.sharding import back_to_shards
from bylaw.model.shards import Block, all_pieces, block


class Learner(NamedTuple):
    """A model and the optimiser that moves it, or some of its parameters: the others are not saved."""

    model: nn.Module
    optimizer: Optimizer


class Checkpoints:
    """The training checkpoints of some learners, in one folder. Leaving it waits for the last one to be written.

    On many ranks every rank makes one and calls the same methods.
    """

    def __init__(
        self, folder: Path, learners: Mapping[str, Learner], parallel: Parallel = ALONE, keep: int = 1
    ) -> None:
        """`keep`: how many of the newest stay on disk."""
        self.folder, self.learners, self.parallel, self.keep = folder, learners, parallel, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint", initializer=_same_device())
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()  # after an error too: who tries again must not meet this writer
        if error is None:
            self.wait()

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write the learners and `progress` (JSON values, with the number of steps done as `step`).

        Returns when they are copied; a thread writes them. What failed in the one before is raised here.
        """
        self.wait()
        copied = {name: _copied(part).spread(self.parallel) for name, part in self._parts()}
        steps = {key: _steps(learner) for key, learner in self.learners.items()}
        text = json.dumps({"progress": dict(progress), "steps": steps})
        self._writing = self._writer.submit(self._write, f"step-{progress['step']}", copied, text)

    def wait(self) -> None:
        """Return once what was saved is on disk. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self) -> dict[str, Any] | None:
        """Put the newest checkpoint of the folder into the learners; returns its progress, None without one.

        Raises ValueError for one of other models: its tensors have other names or shapes.
        """
        found = self.parallel.tell(_newest(self.folder) if self.parallel.first else None)  # one view of the disk
        if found is None:
            return None
        place, saved = found
        for key, learner in self.learners.items():
            back_to_shards(learner.model)
            _make_state(learner, saved["steps"].get(key, {}))
        parts = {name: part.spread(self.parallel) for name, part in self._parts()}
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(place))
        _check(place, parts, reader.read_metadata().state_dict_metadata)
        with torch.no_grad(), _quiet():
            load(parts, storage_reader=reader, **self._together)
        return saved["progress"]

    @property
    def _together(self) -> dict[str, Any]:
        return {"no_dist": self.parallel.alone, "process_group": self.parallel.background}

    def _parts(self) -> Iterator[tuple[str, Block]]:
        """This rank's part of everything that is saved."""
        for key, (model, optimizer) in self.learners.items():
            back_to_shards(model)
            moved = dict(trained(model, optimizer))
            for piece in all_pieces(model):
                parameter = moved.get(piece.parameter)
                if parameter is None:
                    continue
                yield f"{key}.{piece.name}", block(piece, parameter, self.parallel)
                for name, value in optimizer.state.get(parameter, {}).items():
                    if name != "step":
                        yield f"{key}.{name}.{piece.name}", block(piece, value, self.parallel)

    def _write(self, name: str, parts: dict[str, Tensor], progress: str) -> None:
        """Beside its place, then renamed, then named by latest.json: a kill at any instant leaves a whole one."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        place, beside = self.folder / name, self.folder / f"{name}.part"
        if self.parallel.first:  # the others write only when this rank has joined them
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (beside, place):
                shutil.rmtree(old, ignore_errors=True)
        writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        with _quiet():
            save(parts, storage_writer=writer, **self._together)
        if self.parallel.first:
            (beside / "progress.json").write_text(progress)
            os.replace(beside, place)
            write_atomic(self.folder / "latest.json", json.dumps({"state": name}))
            self._prune(name)

    def _prune(self, newest: str) -> None:
        """Remove all but the newest, and what killed writers left."""
        named = [path for path in self.folder.glob("step-*") if path.suffix != ".part" and path.name != newest]
        older = sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
        for path in [*older[self.keep - 1 :], *self.folder.glob("step-*.part")]:
            shutil.rmtree(path)


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Where the newest checkpoint is, and what stands beside its tensors."""
    latest = folder / "latest.json"
    if not latest.exists():
        return None
    place = folder / json.loads(latest.read_text())["state"]
    return place, json.loads((place / "progress.json").read_text())


def _copied(part: Block) -> Block:
    return Block(part.tensor.to("cpu", copy=True), part.by_data, part.by_tensor)


def _steps(learner: Learner) -> dict[str, float]:
    """How often each parameter was moved, those that never were left out."""
    named = trained(learner.model, learner.optimizer)
    return {name: float(learner.optimizer.state[p]["step"]) for name, p in named if learner.optimizer.state.get(p)}


def _make_state(learner: Learner, steps: Mapping[str, float]) -> None:
    """Room for the optimiser's tensors."""
    model, optimizer = learner
    masters = isinstance(optimizer, MasterAdamW)
    names = ("master", "exp_avg", "exp_avg_sq") if masters else ("exp_avg", "exp_avg_sq")
    for name, parameter in trained(model, optimizer):
        if name in steps:
            dtype = torch.float32 if masters else parameter.dtype
            rooms = {kind: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for kind in names}
            where = "cpu" if masters else parameter.device  # torch's fused AdamW reads its steps on the device
            optimizer.state[parameter] = {"step": torch.tensor(steps[name], device=where), **rooms}


def _check(place: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Raise ValueError unless the checkpoint has what is wanted, and nothing else."""
    for name in sorted(wanted.keys() | found.keys()):
        here = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        there = tuple(found[name].size) if name in found else "no such tensor"
        if here != there:
            raise ValueError(
                f"{place} is a training checkpoint of other models: {name} is {there} there, and {here} here. Delete "
                f"{place.parent} to begin anew"
            )


def _same_device() -> Callable[[], None] | None:
    """What gives a new thread this one's GPU, which would else be the first."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its warning that one process saves alone, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
