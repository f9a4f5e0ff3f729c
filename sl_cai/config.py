"""Settings of the SL-CAI stages, at the paper's values (arXiv 2212.08073, section 3)."""

from dataclasses import dataclass

from bylaw.model.settings import OptimSettings, SamplingSettings, require


@dataclass(frozen=True, kw_only=True)
class ReviseConfig(SamplingSettings):
    """Answer, then rounds of critique and revision."""

    rounds: int = 4
    """Critique-revision rounds per prompt."""
    helpful_samples: int = 2
    """Answers drawn for each helpful prompt that brings none of its own."""
    max_answer_tokens: int = 256
    """Longest answer."""
    max_critique_tokens: int = 256
    """Longest critique."""
    max_revision_tokens: int = 256
    """Longest revision."""
    prompts_per_chunk: int = 64
    """Prompts worked on together and written together; what a killed stage does again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", self.rounds, "1 or more")
        for name in ("max_answer_tokens", "max_critique_tokens", "max_revision_tokens", "prompts_per_chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.helpful_samples >= 0, "helpful_samples", self.helpful_samples, "0 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(OptimSettings):
    """Packed supervised training on the revisions of all rounds, mixed with helpful samples."""

    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 64
    """Sequences per optimiser step (the paper: 1024)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
