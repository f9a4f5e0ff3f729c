"""Where a text ends: stop ids, stop strings, and length."""

from bylaw.model.engine.request import Completion, Request
from bylaw.model.tokenizer import Tokenizer


def finished(
    request: Request, ids: list[int], logprobs: list[float], span: int, tokenizer: Tokenizer | None
) -> Completion | None:
    """The completion if the newest of `ids` ends it, else None. `span` is the most tokens that prompt and text have."""
    if ids[-1] in request.stop_ids:
        return Completion(ids=ids, logprobs=logprobs, finish="stop")
    if request.stop_strings and tokenizer is not None:
        keep = before_stop(ids, request.stop_strings, tokenizer)
        if keep is not None:
            return Completion(ids=ids[:keep], logprobs=logprobs[:keep], finish="stop")
    if len(request.prompt) + len(ids) >= span:
        return Completion(ids=ids, logprobs=logprobs, finish="length")
    return None


def before_stop(ids: list[int], stop_strings: tuple[str, ...], tokenizer: Tokenizer) -> int | None:
    """How many tokens stand before the first stop string (one that runs into it does not); None without one."""
    tail, text = _newest(ids, max(len(stop.encode()) for stop in stop_strings), tokenizer)
    starts = [text.index(stop) for stop in stop_strings if stop in text]
    if not starts:
        return None
    keep = len(tail) - 1
    while keep and len(tokenizer.decode(tail[:keep])) > min(starts):
        keep -= 1
    return len(ids) - len(tail) + keep


def _newest(ids: list[int], size: int, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The newest tokens and their text, which has at least `size` characters before that of the very newest."""
    # A token holds at least one byte, as a rule; special ones are not in the text at all.
    count = size + 8
    while True:
        tail, text = _read_tail(ids[-count:], tokenizer)
        if count >= len(ids) or len(text) >= size + len(tokenizer.decode(tail[-1:])):
            return tail, text
        count *= 2


def _read_tail(tail: list[int], tokenizer: Tokenizer, spare: int = 3) -> tuple[list[int], str]:
    """The tail and its text, from the first character that begins in it: up to 3 tokens may hold the rest of one.

    A byte-fallback decoder reads bytes that follow each other as one, so that half a character spoils them all.
    """
    text = tokenizer.decode(tail)
    if spare and text.startswith("\ufffd"):
        return _read_tail(tail[1:], tokenizer, spare - 1)
    return tail, text
