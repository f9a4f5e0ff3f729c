"""Settings of the SL-CAI stages, at the paper's values (arXiv 2212.08073, section 3)."""

from dataclasses import dataclass

from bylaw.model.settings import OptimSettings, SamplingSettings, require

LEAVABLE = ("preamble", "repetition", "unchanged")
"""Marks of revisions that can still be learned from (sl_cai/guards.py has all)."""


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
    critiques: bool = True
    """Criticise each answer before it is revised; false revises it straight away."""
    shots: int = 0
    """Examples shown before each critique and revision, drawn anew for each prompt; base models want 3 to 5."""
    guards: bool = True
    """Cut phrases such as "Sure, here is a revised answer:" off critiques and revisions, and mark what went wrong in
    others (sl_cai/guards.py).
    """
    max_repetition: float = 0.5
    """Share of repeated 4-grams above which the guards mark a text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", self.rounds, "1 or more")
        require(self.shots >= 0, "shots", self.shots, "0 (none) or more")
        require(0 < self.max_repetition <= 1, "max_repetition", self.max_repetition, "above 0, up to 1 (no limit)")
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
    leave_out: tuple[str, ...] = ("repetition",)
    """Marks (`preamble`, `repetition`, `unchanged`) of the revisions that are not learned. Empty ones never are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        known = set(self.leave_out) <= set(LEAVABLE)
        require(known, "leave_out", list(self.leave_out), f"a list of {', '.join(LEAVABLE)}")
