"""Adapters in PEFT's folder format, to and from a trunk: adapter_config.json and adapter_model.safetensors.

A reward model's head is in the file too, as PEFT keeps it for a sequence classifier (modules_to_save: score).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bylaw.model.checkpoint import replaced_folder
from bylaw.model.config import ModelConfig
from bylaw.model.heads import ScalarModel
from bylaw.model.lora import adapted_parts, adapter_settings, add_adapter
from bylaw.model.lora_settings import LINEARS, LoraSettings
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import read_object
from bylaw.model.transformer import Transformer
from bylaw.model.weight_io import read_weights
from bylaw.model.weights import Piece, check_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEADS = ("score", "classifier")  # PEFT lists both for every sequence classifier, and saves the one that is there
READ = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "modules_to_save")
# They change nothing about what a trained adapter computes: dropout and the way it began are of the training.
NO_MATTER = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision",
)  # fmt: skip
# What a field may also say; any other field has to be empty or false.
ALLOWED: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": ("gaussian", "orthogonal", True)}


def save_adapter(
    model: Transformer | ScalarModel,
    name: str,
    folder: str | Path,
    base_name: str | None = None,
    card: str = "",
    parallel: Parallel = ALONE,
) -> None:
    """Write the adapter `name` (and the head of a ScalarModel) as a folder that PEFT, vLLM and the like load.

    `base_name` is the path or hub name of the model that it belongs to; `card` becomes README.md. All ranks call it.
    Raises ValueError for an adapter that is not there and for a folder that holds something else.
    """
    trunk = _trunk(model)
    settings = adapter_settings(trunk, name)
    parameters: dict[str, Any] = dict(model.named_parameters())
    tensors = {piece.name: _whole(piece, parameters) for piece in _pieces(model, settings, name)}
    with replaced_folder(Path(folder), CONFIG) if parallel.first else nullcontext() as beside:
        if beside is not None:
            fields = _fields(settings, base_name, isinstance(model, ScalarModel))
            (beside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            if card:
                (beside / "README.md").write_text(card, encoding="utf-8")
    parallel.meet()


def load_adapter(
    model: Transformer | ScalarModel,
    folder: str | Path,
    name: str,
    *,
    freeze_base: bool = False,
    parallel: Parallel = ALONE,
) -> None:
    """Put the adapter of a PEFT folder on `model` as `name`; a ScalarModel gets its head too, and runs with it.

    Its dropout is not kept: none is used here. `freeze_base` as for add_adapter. Raises FileNotFoundError for a missing
    folder or file; ValueError, before anything changes, naming the file and what it holds that is not supported (DoRA,
    trained biases, ranks of single modules, ...) or does not fit the model.
    """
    folder, trunk = Path(folder), _trunk(model)
    fields = _read_config(folder)
    path = folder / CONFIG
    _check_fields(fields, path, isinstance(model, ScalarModel))
    settings = _settings(fields, trunk.config, path)
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; pickles (adapter_model.bin) are not read")
    wanted = list(_pieces(model, settings, name))
    check_weights([folder / WEIGHTS], wanted, folder)
    add_adapter(trunk, name, settings, seed=0, freeze_base=freeze_base)
    read_weights([folder / WEIGHTS], wanted, dict(model.named_parameters()), parallel)
    if isinstance(model, ScalarModel):
        model.adapter = name


def _trunk(model: Transformer | ScalarModel) -> Transformer:
    return model.trunk if isinstance(model, ScalarModel) else model


def _pieces(model: Transformer | ScalarModel, settings: LoraSettings, name: str) -> Iterator[Piece]:
    """PEFT's tensors, and the rows of our parameters that hold them."""
    config, trunk = _trunk(model).config, "trunk." if isinstance(model, ScalarModel) else ""
    for linear, parts in adapted_parts(config, settings).items():
        ours, row = f"{trunk}{linear}.lora_{name}", 0
        for i, part in enumerate(parts):
            theirs, (rows, columns) = PREFIX + part.name.removesuffix("weight"), part.shape
            yield Piece(f"{theirs}lora_A.weight", f"{ours}.A", i * settings.rank, (settings.rank, columns))
            yield Piece(f"{theirs}lora_B.weight", f"{ours}.B", row, (rows, settings.rank))
            row += rows
    if isinstance(model, ScalarModel):
        yield Piece(f"{PREFIX}score.weight", "score.weight", 0, (1, config.hidden_size))


def _whole(piece: Piece, parameters: Mapping[str, Any]) -> Tensor:
    parameter = parameters[piece.parameter].detach()
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole[piece.start : piece.start + piece.shape[0]].to("cpu", copy=True)


def _fields(settings: LoraSettings, base_name: str | None, classifier: bool) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": ["score"] if classifier else None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": list(settings.modules),
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "use_rslora": settings.rslora,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; an adapter's folder has one (it is read from a local folder)")
    return read_object(path)


def _check_fields(fields: Mapping[str, Any], path: Path, classifier: bool) -> None:
    """Raise ValueError for a field that asks for something that adapters here do not do."""
    for field, value in fields.items():
        if field not in (*READ, *NO_MATTER) and value and value not in ALLOWED.get(field, ()):
            allowed = ", ".join(map(json.dumps, ALLOWED.get(field, (None,))))
            raise ValueError(f"{path}: {field} = {json.dumps(value)} is not supported; allowed: {allowed}")
    kind, saved = ("SEQ_CLS", HEADS) if classifier else ("CAUSAL_LM", ())
    allowed = {"peft_type": ("LORA",), "task_type": (kind, None)}
    for field, values in allowed.items():
        if fields.get(field) not in values:
            raise ValueError(f"{path}: {field} = {fields.get(field)!r} does not fit this model; allowed: {values[0]}")
    if not set(fields.get("modules_to_save") or ()) <= set(saved):
        what = "score" if classifier else "null, as a language model keeps its head"
        raise ValueError(f"{path}: modules_to_save = {fields['modules_to_save']} is not supported; allowed: {what}")


def _settings(fields: Mapping[str, Any], config: ModelConfig, path: Path) -> LoraSettings:
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r = {rank!r} is no rank; allowed: 1 or more")
    if not isinstance(alpha, int | float):
        raise ValueError(f"{path}: lora_alpha = {alpha!r} is no number; allowed: above 0")
    targets = _targets(fields.get("target_modules"), config, path)
    try:
        return LoraSettings(rank=rank, alpha=alpha, targets=targets, rslora=fields.get("use_rslora") is True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _targets(asked: Any, config: ModelConfig, path: Path) -> tuple[str, ...]:
    """Names of the linear layers that PEFT's target_modules picks: a regular expression, or names and ends of names."""
    if asked == "all-linear":
        return LINEARS
    if isinstance(asked, str):
        try:
            re.compile(asked)
        except re.error as error:
            raise ValueError(f"{path}: target_modules = {asked!r} is no regular expression ({error})") from error
    elif not (isinstance(asked, list) and all(isinstance(one, str) for one in asked)):
        raise ValueError(f"{path}: target_modules = {asked!r} is not supported; allowed: a list of names, or a string")
    everywhere = adapted_parts(config, LoraSettings(rank=1))
    names = [part.name.removesuffix(".weight") for parts in everywhere.values() for part in parts]
    picked = {name for name in names if _picks(asked, name)}
    stray = [] if isinstance(asked, str) else [one for one in asked if not any(_picks([one], name) for name in names)]
    if stray or not picked:
        raise ValueError(
            f"{path}: target_modules {stray or asked} is no linear layer of a block; allowed: {', '.join(LINEARS)}"
        )
    ends = {name.rsplit(".", 1)[1] for name in picked}
    for name in names:
        if name.rsplit(".", 1)[1] in ends and name not in picked:
            raise ValueError(f"{path}: target_modules leaves out {name}; allowed: a layer's name in all blocks or none")
    return tuple(name for name in LINEARS if name in ends)


def _picks(asked: str | list[str], name: str) -> bool:
    if isinstance(asked, str):
        return re.fullmatch(asked, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in asked)
