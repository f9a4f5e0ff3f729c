"""Training checkpoints: what a killed trainer needs to go on with the same bits. No pickles.

This is not the checkpoint that other programs load (model/checkpoint.py); it is deleted when its stage is done.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bylaw.model.records import write_atomic


def save_state(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], progress: Mapping[str, Any]
) -> None:
    """Write parameters, the optimisers' tensors and `progress` (JSON values: step, controllers) to `folder`.

    Written beside its place and then named by `folder`/latest.json, so that a kill at any instant leaves a whole state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{progress['step']}"
    place, beside = folder / name, folder / f"{name}.part"
    for old in (beside, place):
        shutil.rmtree(old, ignore_errors=True)
    beside.mkdir()
    for key, model in models.items():
        save_file(_parameters(model), beside / f"{key}.safetensors")
    for key, optimizer in optimizers.items():
        save_file(_tensors(optimizer), beside / f"{key}.optimizer.safetensors")
    (beside / "progress.json").write_text(json.dumps(dict(progress)))
    os.replace(beside, place)
    write_atomic(folder / "latest.json", json.dumps({"state": name}))
    for old in folder.glob("step-*"):
        if old.name != name:
            shutil.rmtree(old)


def load_state(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> dict[str, Any] | None:
    """Put the newest state in `folder` into `models` and `optimizers`; returns its progress, None without one."""
    latest = folder / "latest.json"
    if not latest.exists():
        return None
    place = folder / json.loads(latest.read_text())["state"]
    for key, model in models.items():
        _restore_parameters(model, load_file(place / f"{key}.safetensors"))
    for key, optimizer in optimizers.items():
        _restore_tensors(optimizer, load_file(place / f"{key}.optimizer.safetensors"))
    return json.loads((place / "progress.json").read_text())


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


@torch.no_grad()
def _restore_parameters(model: nn.Module, saved: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])


def _tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{key}": value for i, held in state.items() for key, value in held.items()}
    return {name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}


def _restore_tensors(optimizer: Optimizer, saved: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
