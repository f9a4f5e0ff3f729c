"""A text that is shown while it is sampled: never a piece that a later token could still change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bylaw.model.tokenizer import Tokenizer

HALF = "\ufffd"  # what a decoder makes of a character whose bytes are not all there yet


@dataclass
class Stream:
    """Shows one text by `write`, piece by piece. `shown` is what stands there so far."""

    tokenizer: Tokenizer
    write: Callable[[str], None]
    shown: str = ""

    def hear(self, index: int, ids: Sequence[int]) -> None:
        """Show what the newest token has settled; an `on_token` of the engine."""
        text = settled(ids, self.tokenizer).strip()
        if text.startswith(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text

    def end(self, text: str) -> None:
        """Show the rest of what the whole text came to, and end the line."""
        # A decoder may write its beginning anew once it has seen the end; then the whole text is told again.
        rest = text[len(self.shown) :] if text.startswith(self.shown) else f"\n{text}"
        self.write(f"{rest}\n")


def settled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the first tokens of `ids`, up to one that ends in half a character, or in what may be a stop string.

    A token that runs into a stop string is cut off with it, so only whole tokens count.
    """
    text = tokenizer.decode(ids)
    sure = min(len(text.rstrip(HALF)), *(_before(text, stop) for stop in ("", *tokenizer.stop_strings)))
    count = len(ids)
    while count and len(text) > sure:
        count -= 1
        text = tokenizer.decode(ids[:count])
    return text


def _before(text: str, stop: str) -> int:
    """Where `stop` begins in `text`, or where the text's end may be its beginning."""
    if stop and stop in text:
        return text.index(stop)
    return len(text) - max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
