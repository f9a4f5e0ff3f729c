"""Words for people, on the page and in the terminal: texts made visible, what a revision changed, numbers."""

import difflib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

Change = Literal["same", "gone", "new"]
TEXT_LIMIT = 4000
"""Characters of one text that the page shows; a longer one says how many more there are."""
FEW = 20
"""A share of fewer says of how many."""

_WORDS = re.compile(r"\s+|[^\s\w]|\w+")
_HARMLESS = frozenset("\n\t\u200d")  # the joiner is part of many emoji


def visible(value: Any) -> Any:
    """Text with every character that a reader could not see, or that turns others round, written as its code point.

    Control characters, bidirectional overrides (Unicode UAX 9), other formatting characters, lone surrogates. HTML
    cannot hold some of them; the others can hide or forge what a page says. Other values pass as they are.
    """
    if type(value) is not str or value.replace("\n", "").isprintable():
        return value
    return "".join(_shown(letter) for letter in value)


def printable(text: str) -> str:
    """Text that steers no terminal: characters that do not print are spelled out, but for line breaks, tabs and the
    joiners of emoji and of scripts that need them. Of what goes on a page, see `visible`.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t\u200c\u200d" else _spelled(letter) for letter in text
    )


def _spelled(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= limit else f"{text[:limit]} … [{len(text) - limit:,} more characters]"


def word_diff(old: str, new: str) -> list[tuple[Change, str]]:
    """Runs of words that both texts have, that only `old` has, that only `new` has, in reading order."""
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    return list(_joined(_pieces(before, after)))


def _pieces(before: list[str], after: list[str]) -> Iterator[tuple[Change, str]]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind == "equal":
            yield "same", "".join(after[b:b_end])
            continue
        if a < a_end:
            yield "gone", "".join(before[a:a_end])
        if b < b_end:
            yield "new", "".join(after[b:b_end])


def _joined(pieces: Iterator[tuple[Change, str]]) -> Iterator[tuple[Change, str]]:
    """White space and punctuation alone between two changes are no island to read: they go with both of them."""
    gone = new = ""
    kept = list(pieces)
    for place, (kind, text) in enumerate(kept):
        island = kind == "same" and not any(map(str.isalnum, text)) and 0 < place < len(kept) - 1
        if kind == "same" and not island:
            yield from _flush(gone, new)
            gone = new = ""
            yield kind, text
            continue
        gone += text if kind == "gone" or island else ""
        new += text if kind == "new" or island else ""
    yield from _flush(gone, new)


def _flush(gone: str, new: str) -> Iterator[tuple[Change, str]]:
    if gone:
        yield "gone", gone
    if new:
        yield "new", new


def _shown(letter: str) -> str:
    if letter in _HARMLESS:
        return letter
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"⟨U+{ord(letter):04X}⟩" if hidden else letter


def number(value: Any) -> str:
    """A figure as people read it: thousands apart, three digits that count, a real minus sign; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if abs(value) < 1e-9:
        return "0"  # what sums of floats leave
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent; a dash for none. What is above 0 is never shown as 0 %, nor what is below 1 as 100 %."""
    if value is None:
        return "–"
    least = 10.0 ** (-2 - digits)
    if 0 < abs(value) < 0.5 * least:
        return f"under {percent(least, digits)}"
    if 1 - 0.5 * least <= value < 1:
        return f"over {percent(1 - least, digits)}"
    return f"{value:.{digits}%}".replace("-", "−").replace("%", "\u202f%")


def share(value: float | None, of: float | None, digits: int = 0) -> str:
    """A share of so many, None where that is not known: a dash for a share of none, and of few, of how many."""
    if value is None or of == 0:
        return "–"
    few = of is not None and of < FEW
    return f"{percent(value, digits)} of\u00a0{of:,.0f}" if few else percent(value, digits)


def points(value: float) -> str:
    """The size of a difference of probabilities in percentage points."""
    size = abs(100 * value)
    return "under 0.1 points" if 0 < size < 0.05 else f"{size:.1f} points".replace(".0 ", " ")


def signed(value: float | None) -> str:
    """A difference of probabilities in percentage points, with its sign; a dash for none."""
    if value is None:
        return "–"
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def many(count: int, thing: str, things: str = "") -> str:
    """`1 pair`, `2,345 pairs`."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
