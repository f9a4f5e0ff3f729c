"""The model's shape and mathematics. hf_config reads it from, and writes it to, a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from bylaw.model.settings import require

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Names and meanings are those of Hugging Face's `rope_parameters`."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """How many times the context is stretched (linear, llama3, yarn)."""
    original_max_position_embeddings: int = 0
    """Context of the first training, in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths beyond original / low are stretched, those below original / high are kept."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: the ramp runs between the dimensions that turn this often within the original context."""
    attention_factor: float = 0.0
    """yarn: scale of cos and sin; 0 derives it from the factor (YaRN, arXiv 2309.00071, section 3.4)."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    """yarn: round the ends of the ramp outwards to whole dimensions."""

    def __post_init__(self) -> None:
        require(self.kind in get_args(RopeKind), "rope kind", self.kind, ", ".join(get_args(RopeKind)))
        require(self.theta > 1, "rope theta", self.theta, "above 1")
        require(self.factor >= 1, "rope factor", self.factor, "1 or more")
        if self.kind in ("llama3", "yarn"):
            original = self.original_max_position_embeddings
            require(original >= 1, "original_max_position_embeddings", original, "1 or more")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, "low_freq_factor", low, f"above 0 and below high_freq_factor ({high})")
        slow, fast = self.beta_slow, self.beta_fast
        require(0 < slow <= fast, "beta_slow", slow, f"above 0 and at most beta_fast ({fast})")
        require(self.attention_factor >= 0, "attention_factor", self.attention_factor, "0 (derive it) or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of one of four families.

    Raises ValueError for a shape that cannot be, and for settings that Transformers' class of the family has no place
    for: what is built here can always be written as a checkpoint.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the gate, up and down projections."""
    qk_norm: bool = False
    """RMSNorm over each query's and key's head dimension, before the rotation (Qwen3)."""
    windows: tuple[int, ...] = ()
    """Per layer, how many tokens a token attends to, itself included; 0 is all. Empty stands for 0 on every layer."""
    initializer_range: float = 0.02
    bos_token_id: int = -1
    """-1 is none."""
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = -1
    """-1 is none."""

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        require(self.family in get_args(Family), "family", self.family, ", ".join(get_args(Family)))
        for name in _SIZES:
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require(heads % kv_heads == 0, "num_kv_heads", kv_heads, f"a divisor of num_heads ({heads})")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: rotary embedding turns pairs")
        require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "above 0")
        windows, layers = self.windows, self.num_layers
        require(len(windows) == layers, "windows", windows, f"one for each of {layers} layers")
        require(min(windows) >= 0, "windows", windows, "0 (attend to everything) or more")
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)
            require(-1 <= token < self.vocab_size, name, token, f"-1 (none), or below vocab_size ({self.vocab_size})")
        eos = self.eos_token_ids
        require(all(0 <= token < self.vocab_size for token in eos), "eos_token_ids", eos, f"below {self.vocab_size}")
        self._check_family()

    def _check_family(self) -> None:
        """Refuse what Transformers' class of this family cannot express."""
        biases = (self.attention_bias, self.output_bias, self.mlp_bias)
        allowed = _BIASES[self.family]
        require(biases in allowed, "(attention_bias, output_bias, mlp_bias)", biases, f"in {self.family}, {allowed}")
        require(self.qk_norm == (self.family == "qwen3"), "qk_norm", self.qk_norm, "True in qwen3, False in the others")
        distinct = set(self.windows)
        if self.family == "llama":
            hidden, heads = self.hidden_size, self.num_heads
            require(hidden % heads == 0, "hidden_size", hidden, f"in llama, a multiple of num_heads ({heads})")
            require(distinct == {0}, "windows", self.windows, "in llama, 0 on every layer")
        elif self.family == "mistral":
            require(len(distinct) == 1, "windows", self.windows, "in mistral, one size on every layer")
        else:
            one = len(distinct - {0}) <= 1
            require(one, "windows", self.windows, f"in {self.family}, 0 or one same size on each layer")


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers",
    "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip

_BIASES: Mapping[str, tuple[tuple[bool, bool, bool], ...]] = {
    "llama": ((False, False, False), (True, True, False), (False, False, True), (True, True, True)),
    "mistral": ((False, False, False),),
    "qwen2": ((True, False, False),),
    "qwen3": ((False, False, False), (True, True, False)),
}
