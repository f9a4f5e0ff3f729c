"""What the engine did, in figures."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts over an engine's life; assign a new one to begin again.

    Seconds are of the host's clock, with its wait for what a GPU has drawn.
    """

    prompt_tokens: int = 0
    """Tokens of prompts as asked, and of rows that were preempted, whose tokens are asked again."""
    cached_tokens: int = 0
    """Of them, those whose keys and values were there already or came from another row of the same batch."""
    prefill_tokens: int = 0
    """Tokens run through the model in packed streams: prompts, shared prefixes, scores, and work done over."""
    generated_tokens: int = 0
    """Tokens that were given back."""
    row_steps: int = 0
    """Tokens drawn, with those that were thrown away: behind a stop, or in a preempted row's last step."""
    decoded_tokens: int = 0
    """Of them, those drawn by steps of decoding; a prompt gives the first one of its text."""
    scored: int = 0
    """Candidates scored."""
    preemptions: int = 0
    """Rows put back in the queue for want of memory."""
    evictions: int = 0
    """Shared prefixes dropped for want of memory."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The part of all prompt tokens that did not have to be computed."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def useful_fraction(self) -> float:
        """The part of all drawn tokens that was given back."""
        return self.generated_tokens / max(1, self.row_steps)

    @property
    def prefill_rate(self) -> float:
        """Tokens per second in packed streams."""
        return self.prefill_tokens / max(1e-9, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        """Tokens per second in steps of decoding."""
        return self.decoded_tokens / max(1e-9, self.decode_seconds)
