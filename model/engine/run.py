"""One call of the engine: scripts go in, and their results come out.

    while there is work:  admit what waits, as one packed stream, when it is worth it
                          draw one token more for every running row
                          read what was drawn, answer the scripts that wait for it

Rows join and leave at any step. On a GPU what was drawn is read one step late, so that the next step is under way while
the host thinks; a row that has ended has then drawn one token more, which is thrown away.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bylaw.kernels.upload import upload
from bylaw.model.engine.admission import Admission, Batch
from bylaw.model.engine.decode import Decoder
from bylaw.model.engine.draws import Drawn
from bylaw.model.engine.jobs import Job, Row
from bylaw.model.engine.prefix import PrefixIndex, length, page_keys
from bylaw.model.engine.request import Completion, Limits, Query, Request
from bylaw.model.engine.scoring import Reading, Scored, readings, score
from bylaw.model.engine.stats import Stats
from bylaw.model.engine.stops import finished
from bylaw.model.engine.store import Store
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer

Listener = Callable[[int, list[int]], None]


class Unread(NamedTuple):
    """What was drawn for rows, each with its epoch then, and whether by a step of decoding."""

    rows: list[tuple[Row, int]]
    drawn: Drawn
    decoding: bool


@dataclass(eq=False)
class Run:
    """The state of one call. `rows` run together at most, and a stream has `tokens` tokens.

    What was drawn is read `late` steps after it was.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    store: Store
    index: PrefixIndex
    decoder: Decoder
    limits: Limits
    stats: Stats
    rows: int
    tokens: int
    late: int
    on_token: Listener | None = None
    bar: "tqdm[Any] | None" = None
    waiting: deque[Row] = field(default_factory=deque)
    readings: dict[tuple[tuple[int, ...], int], Reading] = field(default_factory=dict)
    running: list[Row] = field(default_factory=list)  # by slot
    going_on: list[Row] = field(default_factory=list)  # of them, those that wait for their next turn
    unread: deque[Unread] = field(default_factory=deque)
    asked: dict[Scored, Job] = field(default_factory=dict)
    full: bool = False  # memory did not suffice for a text more, and nothing has ended since

    def __post_init__(self) -> None:
        self.draws = self.decoder.draws
        self.admission = Admission(self.store, self.index, self.tokens, self.stats)
        self.tickets = count()
        self.since = time.perf_counter()

    def finish(self, jobs: Sequence[Job]) -> None:
        """Run all jobs to their end."""
        for job in jobs:
            self._next(job, job.send(None))
        self._group()
        while self.waiting or self.readings or self.running:
            while self._admit():
                pass
            self._decode()
            self._read(self.late if any(row.drawing for row in self.running) else 0)

    def _next(self, job: Job, ask: Any, row: Row | None = None) -> None:
        """Queue what a script asks next; `row` is the one that its last text stands in."""
        self.full = False
        while not job.done:
            try:
                self.limits.check(ask)
            except ValueError as error:
                ask = job.refuse(error)
                continue
            if isinstance(ask, Request):
                return self._ask(job, ask, row)
            query = Query(*ask)
            if query.candidates:
                return self._query(job, query)
            ask = job.send([])
        if self.bar is not None:
            self.bar.update()

    def _ask(self, job: Job, request: Request, row: Row | None) -> None:
        keys = page_keys(request.prompt, self.index.version)
        span = self.limits.span(request)
        self.stats.prompt_tokens += len(request.prompt)
        kept = row.common(request) if row is not None else 0
        if row is not None and kept > length(row.path) and kept >= length(self.index.find(keys)):
            row.turn(request, span, keys)
            self.going_on.append(row)
        else:
            self._wait(Row(job, request, span, keys), first=row is not None)

    def _query(self, job: Job, query: Query) -> None:
        one = Scored(query)
        self.asked[one] = job
        for reading in readings(one):
            self.stats.prompt_tokens += reading.prompt
            known = self.readings.setdefault((reading.ids, reading.prompt), reading)
            if known is not reading:
                known.lasts += reading.lasts
                self.stats.cached_tokens += reading.prompt
                continue
            reading.keys = page_keys(reading.ids[: reading.prompt], self.index.version)
            self.index.want(reading.keys)

    def _wait(self, row: Row, first: bool) -> None:
        self.index.want(row.keys)
        (self.waiting.appendleft if first else self.waiting.append)(row)

    def _group(self) -> None:
        """Texts with the same beginning one behind the other, in the order of the first of each; among like ones those
        that may draw most tokens first, so that no few long ones are left at the end.
        """
        rank: dict[bytes, int] = {}

        def place(text: Row | Reading) -> list[int]:
            return [rank.setdefault(key, len(rank)) for key in text.keys if self.index.wanted[key] > 1]

        places = {row: (place(row), -row.request.max_tokens) for row in self.waiting}
        self.waiting = deque(sorted(self.waiting, key=places.__getitem__))
        ranks = {reading: place(reading) for reading in self.readings.values()}
        self.readings = dict(sorted(self.readings.items(), key=lambda item: ranks[item[1]]))

    def _admit(self) -> bool:
        """Run one packed stream of what waits, if it is worth it (one for every free row would cost more); whether."""
        free = self.rows - len(self.running)
        ready = len(self.going_on) + min(len(self.waiting), free) + len(self.readings)
        drawing = any(row.drawing for row in self.running)
        if not ready or (drawing and (self.full or ready < max(1, self.rows // 8))):
            return False
        batch = self._plan(free)
        if batch is not None:
            self._prefill(batch)
        self._lap(decoding=False)
        return batch is not None

    def _plan(self, free: int) -> Batch | None:
        """A batch that there is memory for: the fewer new rows, the less it takes."""
        for share in (True, False):
            count = min(free, len(self.waiting))
            while True:
                readings = self.readings.values()
                batch = self.admission.plan(self.going_on, self.waiting, count, readings, share)
                if batch.tokens and self.admission.make_room(batch, self.running):
                    return batch
                self.admission.withdraw(batch)
                if not count:
                    break
                count //= 2
            if any(row.drawing for row in self.running):
                self.full = True  # their ends will bring room
                return None
        assert self.running, "a text that the limits allow does not fit an empty cache"
        self._preempt()
        return None

    def _prefill(self, batch: Batch) -> None:
        for segment in batch.segments:
            self.store.place(segment)
        for row in batch.joining:
            row.slot, row.ticket = len(self.running), next(self.tickets)
            self.store.open(row.slot, row.path)
            self.running.append(row)
        items = batch.items()
        hidden = self.model(self.store.prefill(items))  # [n, H], the wanted states
        self.stats.prefill_tokens += sum(len(item.tokens) for item in items)
        ends = accumulate(item.wanted for item in items[len(batch.segments) :])
        end_of = dict(zip([*batch.rows, *batch.readings, *batch.going_on], ends, strict=True))
        self._settle(batch)
        self._begin(batch, hidden, end_of)
        self._score(batch.readings, hidden, end_of)

    def _settle(self, batch: Batch) -> None:
        """The segments are there now; rows copy what they do not leave in place; the queues go on."""
        for segment in batch.segments:
            segment.filled = True
        for row in batch.rows:
            self.store.take_over(row.slot, batch.paths[row])
        for row, leader in batch.forks.items():
            self.store.copy(leader.slot, [row.slot], len(row.tokens) - length(row.path))
        for row in batch.joining:
            self.waiting.popleft()
            self.admission.stand(row)
        for reading in batch.readings:
            del self.readings[reading.ids, reading.prompt]
        for row in batch.going_on:
            row.parked = False
        self.going_on = self.going_on[len(batch.going_on) :]
        self.stats.cached_tokens += batch.cached()
        self.admission.settle(batch)

    def _begin(self, batch: Batch, hidden: Tensor, end_of: dict[Row | Reading, int]) -> None:
        """Draw each row's first token; rows with the same tokens draw from the same state."""
        rows = sorted([*batch.joining, *batch.going_on], key=lambda row: row.slot)
        if rows:
            for row in rows:
                row.drawn = len(row.tokens) - len(row.request.prompt)
            self.draws.join([row.slot for row in rows], [row.request for row in rows], [row.drawn for row in rows])
            places = torch.tensor([end_of[batch.forks.get(row, row)] - 1 for row in rows])
            logits = self.model.logits(hidden[upload(places, hidden.device)])
            self._drew(rows, self.draws.draw([row.slot for row in rows], logits), decoding=False)
            self._read(self.late)

    def _score(self, batch: Sequence[Reading], hidden: Tensor, end_of: dict[Row | Reading, int]) -> None:
        if not batch:
            return
        for one in score(self.model.head_weight, hidden, [(reading, end_of[reading]) for reading in batch]):
            job = self.asked.pop(one)
            self.stats.scored += len(one.logprobs)
            self._next(job, job.send(one.logprobs))

    def _decode(self) -> None:
        """One token more for every row that has one to draw."""
        self._make_room()
        rows = [row for row in self.running if row.drawing]
        if rows:
            slots = [row.slot for row in rows]
            self._drew(rows, self.decoder.step(slots, [row.size - 1 for row in rows]), decoding=True)

    def _make_room(self) -> None:
        while any(row.drawing and row.own > self.store.room(row.slot) for row in self.running):
            if self.admission.reserve(self.running):
                return
            self._preempt()

    def _drew(self, rows: Sequence[Row], drawn: Drawn, decoding: bool) -> None:
        for row in rows:
            row.drawn += 1
        self.stats.row_steps += len(rows)
        self.stats.decoded_tokens += len(rows) if decoding else 0
        self.unread.append(Unread([(row, row.epoch) for row in rows], drawn, decoding))
        self._lap(decoding)

    def _read(self, leave: int) -> None:
        """Take in what was drawn, but for the newest `leave` steps."""
        while len(self.unread) > leave:
            step = self.unread.popleft()
            for (row, epoch), token, logprob in zip(step.rows, *step.drawn.lists(), strict=True):
                if row.epoch == epoch:
                    self._take(row, token, logprob)
            self._lap(step.decoding)

    def _lap(self, decoding: bool) -> None:
        """Count the time since the last lap as decoding or as prefill. On a GPU, most of it is the wait for a draw."""
        now = time.perf_counter()
        if decoding:
            self.stats.decode_seconds += now - self.since
        else:
            self.stats.prefill_seconds += now - self.since
        self.since = now

    def _take(self, row: Row, token: int, logprob: float) -> None:
        if token < 0:  # how the kernel reports it; the reference has raised by itself
            name = row.request.request
            raise ValueError(f"request {name}: its logits are not finite; the model's output is broken")
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(row.job.index, row.ids)
        completion = finished(row.request, row.ids, row.logprobs, row.span, self.tokenizer)
        if completion is not None:
            self._end(row, completion)

    def _end(self, row: Row, completion: Completion) -> None:
        """Give the script its text; the row goes on with the next turn, or leaves."""
        row.epoch += 1
        self.stats.generated_tokens += len(completion.ids)
        self._next(row.job, row.job.send(completion), row)
        if not row.parked:
            self._leave(row)

    def _leave(self, row: Row) -> None:
        """Free the row's slot: the last one takes its place."""
        self.full = False
        self.admission.leave(row)
        last = self.running.pop()
        if last is not row:
            self.store.move(last.slot, row.slot, last.own)
            self.draws.move(last.slot, row.slot)
            self.running[row.slot] = last
            last.slot = row.slot
        self.store.close(len(self.running))

    def _preempt(self) -> None:
        """Put the row that came last back in the queue: what it has drawn is computed again when it is its turn."""
        if self.unread:  # texts that have ended already may bring room enough
            self._read(0)
            return
        row = max(self.running, key=lambda row: row.ticket)
        if row.parked:
            self.going_on.remove(row)
        else:
            self.stats.prompt_tokens += len(row.tokens)
        self._leave(row)
        row.again()
        if not self.running:
            row.keys = []  # alone, and still too long: without shared pages there is room for it
        self._wait(row, first=True)
        self.stats.preemptions += 1
