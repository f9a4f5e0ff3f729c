"""Hugging Face's config.json to ModelConfig and back.

A field that would change the mathematics and is not implemented is refused by name, never skipped.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from bylaw.model.config import Family, ModelConfig, RopeConfig

Head = Literal["ForCausalLM", "ForSequenceClassification"]
Built = TypeVar("Built")

CLASS_NAMES: Mapping[Family, str] = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Fields that change the mathematics, with the values at which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (None, 1.0),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "attention_dropout": (None, 0.0),
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "add_cross_attention": (None, False),
}

# The keys of each rope kind: those without which Transformers cannot build it, then the optional ones.
_ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings", "beta_fast", "beta_slow",
            "attention_factor", "mscale", "mscale_all_dim", "truncate",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Fields:
    """One JSON object and the file it stands in, so that every error names both. A null counts as absent."""

    values: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} = {value!r} is not a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} = {value!r} is not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} = {value!r} is not true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.source}: {key} is missing{_did_you_mean(key, self.values)}")
        return value


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """The config that the fields of a Hugging Face config.json describe, as Transformers 5 reads them.

    `source` is the file's name, for messages. Raises ValueError naming the field, its value and what is allowed: for an
    unknown architecture, a missing or malformed field, and a field that changes the mathematics and is not supported.
    """
    read = _Fields(fields, source)
    family = _family(read)
    _refuse_unsupported(read)
    heads, layers = read.integer("num_attention_heads"), read.integer("num_hidden_layers")
    attention_bias = read.flag("attention_bias", family == "qwen2")
    settings: dict[str, Any] = {
        name: read.integer(name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    }
    settings |= {
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(read, family, heads),
        "head_dim": _head_dim(read, family, heads),
        "rms_norm_eps": read.number("rms_norm_eps"),
        "rope": _rope(read),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "attention_bias": attention_bias,
        "output_bias": attention_bias and family in ("llama", "qwen3"),
        "mlp_bias": read.flag("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "windows": _windows(read, family, layers),
        "initializer_range": read.number("initializer_range", 0.02),
        "bos_token_id": read.integer("bos_token_id", -1),
        "eos_token_ids": _eos(read),
        "pad_token_id": read.integer("pad_token_id", -1),
    }
    return _built(ModelConfig, source, family=family, **settings)


def _refuse_unsupported(read: _Fields) -> None:
    for name, allowed in _NEUTRAL.items():
        value = read.values.get(name)
        if value not in allowed:
            usable = " or ".join(repr(item) for item in allowed if item is not None) or "null"
            raise ValueError(f"{read.source}: {name} = {value!r} is not supported; allowed: {usable}, or leave it out")


def _built(made: Callable[..., Built], source: str, /, **settings: Any) -> Built:
    try:
        return made(**settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _family(read: _Fields) -> Family:
    """The family, by `architectures` and `model_type`; a config saved without a model has only the latter."""
    known: dict[str, Family] = {name + head: family for family, name in CLASS_NAMES.items() for head in get_args(Head)}
    names, kind = read.values.get("architectures") or [], read.values.get("model_type")
    if not isinstance(names, list) or len(names) > 1 or not all(name in known for name in names):
        allowed = f"one of {', '.join(known)}"
        raise ValueError(f"{read.source}: architectures = {names!r} is not supported; allowed: {allowed}")
    families: tuple[Family, ...] = tuple(known[name] for name in names) or tuple(CLASS_NAMES)
    for family in families:
        if family == kind:
            return family
    raise ValueError(f"{read.source}: model_type = {kind!r} is not supported here; allowed: {' or '.join(families)}")


def _kv_heads(read: _Fields, family: Family, heads: int) -> int:
    """Null stands for as many as query heads; an absent field does so in Llama only, which once had no such field."""
    spelt = family == "llama" or "num_key_value_heads" in read.values
    return read.integer("num_key_value_heads", heads if spelt else None)


def _head_dim(read: _Fields, family: Family, heads: int) -> int:
    """Without the field, Transformers takes 128 in Qwen3 and hidden / heads in the others."""
    return read.integer("head_dim", 128 if family == "qwen3" else read.integer("hidden_size") // max(heads, 1))


def _windows(read: _Fields, family: Family, layers: int) -> tuple[int, ...]:
    """One window per layer. `layer_types`, where given, says which layers have one (Qwen2, Qwen3)."""
    if family == "mistral" and "sliding_window" not in read.values:
        raise ValueError(f"{read.source}: sliding_window is missing; write null for full attention")
    window, first = read.integer("sliding_window", 0), 0
    if window < 0 or (window and family == "llama"):
        allowed = "null in llama" if family == "llama" else "null, or 1 and more"
        raise ValueError(f"{read.source}: sliding_window = {window} is not supported; allowed: {allowed}")
    if family in ("qwen2", "qwen3"):
        window = window if read.flag("use_sliding_window", False) else 0
        first = read.integer("max_window_layers", 0 if "layer_types" in read.values or not window else None)
    derived = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    types = read.values.get("layer_types") or derived
    if family in ("llama", "mistral") and types != derived:
        raise ValueError(f"{read.source}: layer_types = {types!r} is not supported in {family}; allowed: {derived}")
    if not set(types) <= {"full_attention", "sliding_attention"} or len(types) != layers:
        allowed = f"a list of {layers}, each full_attention or sliding_attention"
        raise ValueError(f"{read.source}: layer_types = {types!r} is not supported; allowed: {allowed}")
    if "sliding_attention" in types and not window:
        raise ValueError(f"{read.source}: layer_types asks for sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _eos(read: _Fields) -> tuple[int, ...]:
    value = read.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_Fields({"eos_token_id": item}, read.source).integer("eos_token_id") for item in ids)


def _rope(read: _Fields) -> RopeConfig:
    """`rope_theta` and `rope_scaling` (Transformers 4) and `rope_parameters` (5) may stand together if they agree."""
    table = _Fields(_rope_table(read), read.source)
    kind = table.values.get("rope_type", "default")
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{read.source}: rope_type = {kind!r} is not supported; allowed: {', '.join(_ROPE_KEYS)}")
    required, optional = _ROPE_KEYS[kind]
    settings: dict[str, Any] = {"kind": kind, "theta": table.number("rope_theta", 10000.0)}
    settings |= {name: table.number(name) for name in required}
    for name in table.values.keys() - settings.keys() - {"rope_type", "rope_theta"}:
        if name == "original_max_position_embeddings":
            settings[name] = table.integer(name)
        elif name not in optional:
            hint = _did_you_mean(name, (*required, *optional))
            raise ValueError(f"{read.source}: rope key {name} is not supported with rope_type {kind}{hint}")
        else:
            settings[name] = table.flag(name, True) if name == "truncate" else table.number(name)
    if kind in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", read.integer("max_position_embeddings"))
    return _built(RopeConfig, read.source, **settings)


def _rope_table(read: _Fields) -> dict[str, Any]:
    """All rope fields of every generation in one table; ValueError where two of them disagree."""
    fields = read.values
    outside = {name: fields.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    table: dict[str, Any] = {}
    for place in (outside, fields.get("rope_scaling") or {}, fields.get("rope_parameters") or {}):
        if not isinstance(place, Mapping):
            raise ValueError(f"{read.source}: rope_scaling or rope_parameters = {place!r} is not an object")
        for key, value in place.items():
            name = "rope_type" if key == "type" else key  # "type" is the name before Transformers 4.43
            if value is None or (name == "partial_rotary_factor" and value == 1):
                continue
            if table.setdefault(name, value) != value:
                raise ValueError(f"{read.source}: {name} is {table[name]!r} in one place and {value!r} in another")
    return table


def config_to_hf(config: ModelConfig, *, dtype: str = "float32", head: Head = "ForCausalLM") -> dict[str, Any]:
    """The fields of a config.json that Transformers 4.57 and 5 read alike. `dtype` is that of the saved weights.

    Rope and dtype are written under both generations' names: 4.57 takes theta as 10000 in silence where only
    rope_parameters stands.
    """
    fields: dict[str, Any] = {
        "architectures": [CLASS_NAMES[config.family] + head],
        "model_type": config.family,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id if config.bos_token_id >= 0 else None,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id if config.pad_token_id >= 0 else None,
    }
    return fields | _family_fields(config) | _rope_fields(config.rope)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _family_fields(config: ModelConfig) -> dict[str, Any]:
    window = max(config.windows)
    if config.family == "llama":
        return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if config.family == "mistral":
        return {"sliding_window": window or None}
    types = ["sliding_attention" if size else "full_attention" for size in config.windows]
    fields: dict[str, Any] = {"attention_bias": config.attention_bias} if config.family == "qwen3" else {}
    return fields | {
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "max_window_layers": types.index("sliding_attention") if window else config.num_layers,
        "layer_types": types,
    }


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    required, optional = _ROPE_KEYS[rope.kind]
    values = {name: getattr(rope, name) for name in (*required, *optional)}
    unset = {"attention_factor", "mscale", "mscale_all_dim"} - {name for name, value in values.items() if value}
    scaling = {"rope_type": rope.kind} | {name: value for name, value in values.items() if name not in unset}
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": scaling | {"rope_theta": rope.theta}}
    return written if rope.kind == "default" else written | {"rope_scaling": scaling}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
