"""Shared prefixes: which tokens' keys and values are kept, found by a hash that holds the weights' version.

A text is cut into pages of PAGE tokens. A page's key is the hash of its tokens and of the key before it; the first
page's is the weights' version, so that what other weights computed is never found. A segment is a run of pages that are
kept together. It is published when it is planned, before it is computed, so that the requests of one batch share it on
their first step.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

PAGE = 16  # tokens: a text shares whole pages, and computes what is left of the last
REMEMBERED = 1 << 16  # keys of pages that were asked for once


@dataclass(eq=False)
class Segment:
    """A run of whole pages: `ids` behind the path `before`, kept by the store as `kept` once it is placed there."""

    before: "Path"
    ids: Sequence[int]
    keys: list[bytes]
    kept: Any = None
    filled: bool = False
    users: int = 0  # rows and segments that stand on it

    @property
    def start(self) -> int:
        return length(self.before)

    @property
    def pages(self) -> int:
        return len(self.keys)

    def key_of(self, tokens: int) -> bytes:
        """The key of the page that the first `tokens` tokens end in."""
        return self.keys[tokens // PAGE - 1]


Path = tuple[tuple[Segment, int], ...]
"""Segments one behind the other, and how many tokens of each (whole pages) belong to the text."""


def length(path: Path) -> int:
    """Tokens of the path."""
    return sum(tokens for _, tokens in path)


def page_keys(ids: Sequence[int], version: bytes) -> list[bytes]:
    """The keys of all whole pages of `ids` but one that holds the last token: that is always computed anew."""
    keys, key, words = [], version, array("q", ids)
    for start in range(0, len(ids) - PAGE, PAGE):
        # 128 bits of a cryptographic hash: two texts never share a key, so tokens need no comparing.
        key = blake2b(words[start : start + PAGE].tobytes(), key=key, digest_size=16).digest()
        keys.append(key)
    return keys


@dataclass(eq=False)
class PrefixIndex:
    """Finds, plans and drops segments. `discard` gives a segment's memory back to the store."""

    discard: Callable[[Segment], None]
    version: bytes = b""
    wanted: Counter[bytes] = field(default_factory=Counter)  # by the texts that wait
    _pages: dict[bytes, tuple[Segment, int]] = field(default_factory=dict)
    _idle: OrderedDict[Segment, None] = field(default_factory=OrderedDict)  # without users, least recently used first
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def begin(self, version: bytes) -> None:
        """Whatever other weights computed can never be found again: give its memory back."""
        if version != self.version:
            while self.evict():
                pass
            assert not self._pages
            self.version = version
            self._seen.clear()

    def want(self, keys: Sequence[bytes]) -> None:
        """A text with these pages waits."""
        self.wanted.update(keys)

    def unwant(self, keys: Sequence[bytes]) -> None:
        """It does not wait any more."""
        for key in keys:
            self.wanted[key] -= 1
            if not self.wanted[key]:
                del self.wanted[key]

    def find(self, keys: Sequence[bytes]) -> Path:
        """The longest path that is there."""
        found: list[tuple[Segment, int]] = []
        for key in keys:
            if key not in self._pages:
                break
            segment, page = self._pages[key]
            if found and found[-1][0] is segment:
                found.pop()
            found.append((segment, (page + 1) * PAGE))
        return tuple(found)

    def plan(self, ids: Sequence[int], keys: Sequence[bytes], path: Path, worth: Callable[[int, int], bool]) -> Path:
        """`path` with new segments behind it, published: runs of pages with the same users, while that is worth it.

        `worth(users, tokens)` says whether to keep a run by itself; a page that was asked for before counts as one user
        more.
        """
        done = length(path) // PAGE
        while done < len(keys):
            users = self._users(keys[done])
            end = done + 1
            while end < len(keys) and self._users(keys[end]) == users:
                end += 1
            if not worth(users, (end - done) * PAGE):
                break
            segment = Segment(path, ids[done * PAGE : end * PAGE], list(keys[done:end]))
            self._publish(segment)
            path = (*path, (segment, segment.pages * PAGE))
            done = end
        return path

    def remember(self, keys: Sequence[bytes]) -> None:
        """Note pages that are computed but not kept: when they are asked for again, they will be."""
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def hold(self, path: Path) -> None:
        """One user more for the path; its last segment stands for the others, which that one holds."""
        if path:
            segment = path[-1][0]
            segment.users += 1
            self._idle.pop(segment, None)

    def release(self, path: Path) -> None:
        """The opposite of `hold`."""
        if path:
            segment = path[-1][0]
            segment.users -= 1
            assert segment.users >= 0
            if not segment.users:
                self._idle[segment] = None

    def evict(self) -> bool:
        """Drop the segment that was left longest without users; whether there was one."""
        if not self._idle:
            return False
        segment, _ = self._idle.popitem(last=False)
        self.withdraw(segment)
        return True

    def withdraw(self, segment: Segment) -> None:
        """Take back a segment that nobody uses."""
        assert not segment.users
        self._idle.pop(segment, None)
        for key in segment.keys:
            del self._pages[key]
        self.release(segment.before)
        self.discard(segment)

    def check(self) -> None:
        """Raise AssertionError if users, keys or order are not consistent. For tests."""
        segments = {segment for segment, _ in self._pages.values()}
        for segment in segments:
            assert [self._pages[key] for key in segment.keys] == [(segment, i) for i in range(segment.pages)]
            assert len(segment.ids) == segment.pages * PAGE and segment.filled and segment.kept is not None
            children = sum(bool(other.before) and other.before[-1][0] is segment for other in segments)
            assert segment.users >= children, "a segment is used, but free to go"
            assert (segment in self._idle) == (segment.users == 0)
            assert segment.keys == page_keys([*self._text(segment), -1], self.version)[-segment.pages :]
        assert set(self._idle) <= segments

    def segments(self) -> set[Segment]:
        return {segment for segment, _ in self._pages.values()}

    def _text(self, segment: Segment) -> list[int]:
        return [*(t for before, n in segment.before for t in before.ids[:n]), *segment.ids]

    def _users(self, key: bytes) -> int:
        return self.wanted[key] + (key in self._seen)

    def _publish(self, segment: Segment) -> None:
        self.hold(segment.before)
        self._idle[segment] = None
        for page, key in enumerate(segment.keys):
            self._pages[key] = (segment, page)
