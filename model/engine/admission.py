"""Which texts enter the next packed stream, what they share, and whether memory suffices."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from bylaw.model.engine.jobs import Row
from bylaw.model.engine.prefix import PAGE, Path, PrefixIndex, Segment, length
from bylaw.model.engine.scoring import Reading
from bylaw.model.engine.stats import Stats
from bylaw.model.engine.store import Item, Store


@dataclass(eq=False)
class Batch:
    """What one packed stream computes, and where every row of it will stand."""

    paths: dict[Row | Reading, Path] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)  # new ones, each behind those it stands on
    rows: list[Row] = field(default_factory=list)
    forks: dict[Row, Row] = field(default_factory=dict)  # the same tokens as another row of the batch
    going_on: list[Row] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    tokens: int = 0

    @property
    def joining(self) -> list[Row]:
        return [*self.rows, *self.forks]

    def cached(self) -> int:
        """Tokens of the texts that are not computed for them, but new segments are, once."""
        shared = sum(length(path) for text, path in self.paths.items() if text not in self.forks)
        copied = sum(len(row.tokens) - 1 for row in self.forks)
        kept = sum(row.kept for row in self.going_on)
        return shared + copied + kept - sum(len(segment.ids) for segment in self.segments)

    def items(self) -> list[Item]:
        """The stream's pieces: segments, new rows, readings, then rows that go on."""
        return [
            *(Item(segment.ids, segment.before, segment=segment) for segment in self.segments),
            *(self._piece(row, row.tokens, slot=row.slot, wanted=1) for row in self.rows),
            *(self._piece(one, one.ids, wanted=one.wanted) for one in self.readings),
            *(
                Item(row.tokens[row.kept :], row.path, row.kept - length(row.path), slot=row.slot, wanted=1)
                for row in self.going_on
            ),
        ]

    def _piece(self, text: Row | Reading, ids: Sequence[int], wanted: int, slot: int | None = None) -> Item:
        path = self.paths[text]
        return Item(ids[length(path) :], path, slot=slot, wanted=wanted)


@dataclass(eq=False)
class Admission:
    """Plans batches of at most `tokens` tokens, a longer text alone."""

    store: Store
    index: PrefixIndex
    tokens: int
    stats: Stats
    standing: Counter[Segment] = field(default_factory=Counter)  # running rows on each segment

    def plan(
        self,
        going_on: Sequence[Row],
        waiting: deque[Row],
        rows: int,
        readings: Iterable[Reading],
        share: bool = True,
    ) -> Batch:
        """Rows that go on, at most `rows` new ones, and readings, in their order while they fit. Nothing is taken."""
        batch = Batch()
        same: dict[tuple[int, ...], Row] = {}
        for row in going_on:
            if not self._add(batch, len(row.tokens) - row.kept):
                break
            batch.going_on.append(row)
        for row in islice(waiting, rows):
            leader = same.get(tuple(row.tokens))
            if leader is not None:
                batch.forks[row], batch.paths[row] = leader, batch.paths[leader]
                self.index.hold(batch.paths[leader])
            elif not self._take(batch, row, row.tokens, share):
                break
            else:
                same[tuple(row.tokens)] = row
                batch.rows.append(row)
        for reading in readings:
            if not self._take(batch, reading, reading.ids, share):
                break
            batch.readings.append(reading)
        return batch

    def _take(self, batch: Batch, text: Row | Reading, ids: Sequence[int], share: bool) -> bool:
        """Plan one text's path; False, and nothing planned, if the stream would be too long."""
        path = self.index.plan(ids, text.keys, self.index.find(text.keys), self.store.worth) if share else ()
        new = [segment for segment, _ in path if segment.kept is None and segment not in batch.segments]
        fresh = sum(len(segment.ids) for segment in new)
        self.index.hold(path)
        if not self._add(batch, fresh + len(ids) - length(path)):
            self.index.release(path)
            for segment in reversed(new):
                if not segment.users:  # asked here: one that stands on it has perhaps just been withdrawn
                    self.index.withdraw(segment)
            return False
        assert length(path) < len(ids)
        batch.paths[text] = path
        batch.segments += new
        return True

    def _add(self, batch: Batch, tokens: int) -> bool:
        if batch.tokens and batch.tokens + tokens > self.tokens:
            return False
        batch.tokens += tokens
        return True

    def withdraw(self, batch: Batch) -> None:
        """Forget a plan."""
        for path in batch.paths.values():
            self.index.release(path)
        for segment in reversed(batch.segments):
            self.index.withdraw(segment)

    def settle(self, batch: Batch) -> None:
        """The batch is computed: its texts do not wait any more, and pages that were not kept are remembered."""
        for text, path in batch.paths.items():
            self.index.release(path)
            self.index.unwant(text.keys)
            self.index.remember(text.keys[length(path) // PAGE :])

    def stand(self, row: Row) -> None:
        """The row runs, on its path."""
        self.index.hold(row.path)
        self.standing.update(segment for segment, _ in row.path)

    def leave(self, row: Row) -> None:
        """The opposite of `stand`."""
        self.index.release(row.path)
        for segment, _ in row.path:
            self.standing[segment] -= 1
            if not self.standing[segment]:
                del self.standing[segment]

    def make_room(self, batch: Batch, running: Sequence[Row]) -> bool:
        """Choose where the rows will stand, and make room for them and the new segments; whether there is."""
        for row in batch.joining:
            row.path = self.base(batch.paths[row])
        rows = [*running, *batch.joining]
        return self.reserve(rows, sum(segment.pages for segment in batch.segments))

    def reserve(self, rows: Sequence[Row], extra: int = 0) -> bool:
        """Room for all rows, for what other segments can be dropped."""
        own, spans = [row.own for row in rows], [row.own_span for row in rows]
        while not self.store.reserve(own, spans, extra):
            if not self.index.evict():
                return False
            self.stats.evictions += 1
        return True

    def base(self, path: Path) -> Path:
        """The first part of `path`, for as far as rows leave it in its place."""
        for i, (segment, tokens) in enumerate(path):
            users = self.standing[segment] + self.index.wanted[segment.key_of(tokens)]
            if not self.store.in_place(users, tokens):
                return path[:i]
        return path
