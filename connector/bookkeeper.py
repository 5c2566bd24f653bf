"""The reader's bookkeeping, beside the stream: marks, failures, confirmed positions, and rows that fall due.

A thread of its own with a connection of its own, so that no write ever slows reading. What it is given is kept until it
is written, however long the database is away; what it holds is bounded by the reader, which stops reading first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import psycopg

from connector.failpoints import Point, reach
from connector.ledger import Lot
from connector.observability.logs import get_logger
from connector.outbox import Fences, OutboxRow
from connector.retries import UNSEEN_SECONDS, Agenda
from connector.store.bookkeeping import Bookkeeping, Connection, Settled
from connector.store.connections import describe, is_conflict, is_pooler_trouble
from connector.store.queries import Tables
from connector.store.timelines import timeline_of

MARK_DELAY_SECONDS = 0.3
"""Marks wait a moment: a row that the sink has consumed meanwhile needs none."""

DUE_AT_ONCE = 250
"""So many rows of the table are taken at a time, in this order, to be marked before the next are looked for."""

# What has to be marked so soon is marked with what is due: a statement for each row costs more than the row.
_MARKED_WITH_SECONDS = 0.1
_MARKS_AT_ONCE = 2_000
_MARKS_IN_A_HURRY = 20_000
_MOST_POSTPONED = 400_000
_PROGRESS_SECONDS = 1.0
_QUIET_SECONDS = 10.0
_UNSEEN_PAUSE = 0.02
_BEHIND_OTHERS_PAUSE = 0.2
_LONGEST_RECONNECT_WAIT = 5.0
_AWAY_SECONDS = 2.0

_log = get_logger("reader")


class Bookkeeper(threading.Thread):
    """Writes what the reader learns, and finds what falls due."""

    def __init__(
        self,
        connect: Callable[[bool], Connection],
        tables: Tables,
        slot: str,
        *,
        on_settled: Callable[[Sequence[Settled], Lot], None],
        wake: Callable[[], None],
        beat: Callable[[], None],
    ) -> None:
        """Prepare the thread.

        `connect` is told whether statements may be prepared; `wake` is called when the reader should look at
        `recorded_lsn` or `due`.
        """
        super().__init__(name="bookkeeper", daemon=True)
        self._connect = connect
        self._prepare = True
        self._tables = tables
        self._slot = slot
        self._on_settled = on_settled
        self._wake = wake
        self._beat = beat
        self._condition = threading.Condition()
        self._books: Bookkeeping | None = None
        self._failed: deque[Lot] = deque()
        self._due_answered: deque[Lot] = deque()
        self._marks: deque[tuple[float, Lot]] = deque()
        self._unmarked = 0
        self._target_lsn = 0
        self._published_since: float | None = None
        self._leading_on = 0
        self._clean = False
        self._recorded_at = 0.0
        self._agenda = Agenda(time.monotonic())
        self._timeline: str | None = None
        self._serving = False
        self._idle = False
        self._postponing = False
        self._due_in_flight = 0
        self._draining = False
        self._closed = False
        self.recorded_lsn = 0
        """How far the slot may be confirmed: recorded, durably."""
        self.due: deque[OutboxRow] = deque()
        """Rows for the reader to publish, in this order."""
        self.problem: str | None = "not connected to the database yet"
        """Why nothing can be written at the moment."""
        self.defect: Exception | None = None
        """What ended the thread, if anything has but `close`: the reader cannot go on without it."""

    # --- what the reader calls ---------------------------------------------------------------------------------------

    @property
    def unmarked(self) -> int:
        """How many acknowledged rows wait for their mark."""
        return self._unmarked

    def serve(self, recorded_lsn: int, timeline: int) -> None:
        """Begin to look for due rows: we lead, on that timeline of the server.

        `recorded_lsn` is what the database has recorded of the slot.
        """
        with self._condition:
            self._leading_on = timeline
            self.recorded_lsn = recorded_lsn
            self._target_lsn = recorded_lsn
            self._clean = False
            self._agenda = Agenda(time.monotonic())
            self._serving = True
            self._condition.notify()

    def stand_down(self) -> None:
        """Stop looking for due rows: we do not lead any more."""
        with self._condition:
            self._serving = False
            self._due_in_flight -= len(self.due)
            self.due.clear()

    def abandon(self) -> None:
        """Forget which due rows are on their way: their messages were thrown away."""
        with self._condition:
            self._due_in_flight = sum(lot.rows for lot in self._due_answered)
            self.due.clear()

    def answered(self, lot: Lot, *, due: bool) -> None:
        """Take over a lot for whose every row Kafka has answered; `due` lots are marked at once."""
        lot.pack()
        with self._condition:
            if lot.failures:
                self._failed.append(lot)
            self._unmarked += lot.rows
            awaited = not self._marks or self._unmarked > _MOST_POSTPONED
            if due:
                self._due_answered.append(lot)
            else:
                self._marks.append((time.monotonic(), lot))
            if lot.failures or due or awaited:
                self._condition.notify()

    def confirm(self, lsn: int, published_since: float) -> None:
        """Ask for a position to be recorded, so that it may be confirmed to the server.

        What is behind it was sent at `published_since` or later, in seconds since 1970.
        """
        if lsn > self._target_lsn:
            with self._condition:
                if self._target_lsn == self.recorded_lsn:
                    self._condition.notify()
                self._target_lsn, self._published_since = lsn, published_since

    def end_clean(self, lsn: int) -> None:
        """Ask for the last position to be recorded: nothing behind it was sent."""
        with self._condition:
            self._target_lsn, self._published_since, self._clean = max(lsn, self._target_lsn), None, True
            self._condition.notify()

    def postpone(self, *, postponing: bool) -> None:
        """Say whether marks may wait, because a backlog is being read: the sink may consume the rows meanwhile."""
        if self._postponing and not postponing:
            with self._condition:
                self._condition.notify()
        self._postponing = postponing

    def hint(self, due_in: float) -> None:
        """Pass on that a row may fall due in so many seconds."""
        with self._condition:
            self._agenda.hint(time.monotonic(), due_in)
            self._condition.notify()

    def set_idle(self, idle: bool) -> None:
        """Say whether the stream is caught up with nothing in flight; only then are overlooked rows looked for."""
        self._idle = idle

    def drain(self, within: float) -> bool:
        """Write everything now, and wait for it; tell whether all of it is written.

        A database that is away is not waited for: what it has not recorded comes again, and changes nothing.
        """
        began = time.monotonic()
        deadline = began + within
        with self._condition:
            self._draining = True
            self._serving = False
            self._condition.notify()
            while self._pending_writes() and self.is_alive():
                now = time.monotonic()
                if now >= deadline or (self.problem is not None and now > began + _AWAY_SECONDS):
                    return False
                self._condition.wait(min(deadline - now, 0.2))
            return not self._pending_writes()

    def close(self) -> None:
        """End the thread after what it is doing."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self.join(5.0)

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until closed; reconnect for as long as it takes."""
        try:
            self._keep_books()
        except Exception as error:  # noqa: BLE001 - whatever it is, the reader raises it
            self.defect = error
            self._wake()

    def _keep_books(self) -> None:
        wait = 0.1
        while not self._closed:
            try:
                if self._books is None:
                    self._books = self._opened()
                self._work(self._books)
                self.problem = None
                wait = 0.1
                self._sleep()
            except psycopg.Error as error:
                if is_conflict(error):
                    continue
                if is_pooler_trouble(error):
                    self._prepare = False
                self.problem = describe(error)
                _log.warning("bookkeeping_interrupted", error=self.problem, unmarked=self._unmarked)
                self._disconnect()
                self._rest(wait)
                wait = min(wait * 2, _LONGEST_RECONNECT_WAIT)
                self._beat()
        self._disconnect()

    def _opened(self) -> Bookkeeping:
        """Connect; on another timeline, forget what was to be written: its rows are not those of this one."""
        connection = self._connect(self._prepare)
        try:
            timeline = timeline_of(connection, self._tables)
        except psycopg.Error:
            connection.close()
            raise
        if self._timeline is not None and timeline not in {None, self._timeline}:
            with self._condition:
                self._due_in_flight -= sum(lot.rows for lot in self._due_answered)
                for lots in (self._failed, self._due_answered, self._marks):
                    lots.clear()
                self._unmarked = 0
                self._target_lsn = self.recorded_lsn
            _log.warning("failover_noticed", timeline=timeline)
        self._timeline = timeline or self._timeline
        return Bookkeeping(connection, self._tables, self._slot)

    def _rest(self, seconds: float) -> None:
        """Wait before the next attempt, whatever comes in meanwhile; not for long once the time is running out."""
        began = time.monotonic()
        with self._condition:
            while not self._closed:
                left = began + (min(seconds, 0.1) if self._draining else seconds) - time.monotonic()
                if left <= 0:
                    return
                self._condition.wait(left)

    def _disconnect(self) -> None:
        if self._books is not None:
            self._books.connection.close()
            self._books = None

    def _pending_writes(self) -> bool:
        return bool(self._failed or self._marks or self._due_answered or self._unrecorded)

    @property
    def _unrecorded(self) -> bool:
        return self._target_lsn > self.recorded_lsn or self._clean

    def _sleep(self) -> None:
        self._beat()
        with self._condition:
            if self._closed or self._failed or self._due_answered:
                return
            wait = self._next_moment() - time.monotonic()
            if wait > 0:
                # Bounded, so that the loop shows that it lives.
                self._condition.wait(min(wait, 5.0))

    def _next_moment(self) -> float:
        moments = [time.monotonic() + 5.0]
        if self._marks:
            moments.append(self._marks[0][0] + self._mark_delay())
        if self._unrecorded:
            moments.append(0.0 if self._draining else self._recorded_at + _PROGRESS_SECONDS)
        if self._serving:
            if not self._due_in_flight:
                moments.append(self._agenda.look_at())
            if self._idle:
                moments.append(self._agenda.sweep_at())
        return min(moments)

    def _mark_delay(self) -> float:
        """Return for how long marks wait now, in seconds."""
        if self._draining or self._unmarked > _MOST_POSTPONED:
            return 0.0
        if self._postponing:
            return float("inf")
        return 0.0 if self._unmarked > _MARKS_IN_A_HURRY else MARK_DELAY_SECONDS

    def _work(self, books: Bookkeeping) -> None:
        # Taken before the failures are written, so that the failures among these lots are.
        due_answered = list(self._due_answered)
        self._write_failures(books)
        self._write_due_marks(books, due_answered)
        self._write_marks(books)
        now = time.monotonic()
        if self._unrecorded and (self._draining or now >= self._recorded_at + _PROGRESS_SECONDS):
            with self._condition:
                target, published_since = self._target_lsn, self._published_since
            books.record_progress(target, published_since, self._leading_on)
            reach(Point.LSN_RECORDED)
            with self._condition:
                self.recorded_lsn = target
                self._clean = self._clean and published_since is not None
            self._recorded_at = now
            self._wake()
        if self._serving and not self._due_in_flight:
            self._look(books, now)

    def _write_failures(self, books: Bookkeeping) -> None:
        while self._failed:
            lot = self._failed[0]
            with books.transaction():
                settled = books.settle_failures(lot.failures)
                absent = books.not_seen(lot.failures) if len(settled) < len(lot.failures) else []
            with self._condition:
                for row in settled:
                    if row.due_in is not None:
                        self._agenda.expect(time.monotonic(), row.due_in)
            self._on_settled(settled, lot)
            if absent and time.monotonic() < lot.opened_at + UNSEEN_SECONDS:
                # Kafka has refused a row before its commit was seen by all; it will be in a moment.
                with self._condition:
                    self._condition.wait(_UNSEEN_PAUSE)
                continue
            reach(Point.FAILURES_WRITTEN)
            with self._condition:
                self._failed.popleft()
                lot.written = True
            self._wake()

    def _write_due_marks(self, books: Bookkeeping, lots: list[Lot]) -> None:
        """Mark due rows before they can be looked for again."""
        for lot in lots:
            books.mark_published(lot.acknowledged)
            reach(Point.RETRY_MARKED)
            with self._condition:
                self._due_answered.popleft()
                lot.marked = True
                self._unmarked -= lot.rows
                self._due_in_flight -= lot.rows
                self._condition.notify_all()

    def _write_marks(self, books: Bookkeeping, *, at_once: bool = False) -> bool:
        """Write the marks of some lots whose time has come; tell whether there were any."""
        fences = Fences()
        lots: list[Lot] = []
        with self._condition:
            ripe = time.monotonic() - (0.0 if at_once else self._mark_delay()) + _MARKED_WITH_SECONDS
            for queued_at, lot in self._marks:
                if len(fences) >= _MARKS_AT_ONCE or queued_at > ripe:
                    break
                fences.extend(lot.acknowledged)
                lots.append(lot)
        if not lots:
            return False
        books.mark_published(fences)
        reach(Point.ROWS_MARKED)
        with self._condition:
            for lot in lots:
                self._marks.popleft()
                lot.marked = True
                self._unmarked -= lot.rows
            self._condition.notify_all()
        self._wake()
        return True

    def _look(self, books: Bookkeeping, now: float) -> None:
        rows: list[OutboxRow] = []
        if now >= self._agenda.look_at():
            with self._condition:
                self._agenda.looking()
            rows = books.due_rows(DUE_AT_ONCE)
            # A full batch says nothing about the next: look again when this one is done.
            next_due = 0.0 if rows else books.seconds_to_next_due()
            if not rows and next_due is not None and next_due <= 0:
                next_due = _BEHIND_OTHERS_PAUSE
            with self._condition:
                self._agenda.looked(time.monotonic(), next_due)
        elif self._idle and now >= self._agenda.sweep_at():
            # What is acknowledged and not marked yet would look as if nothing had brought it.
            while self._write_marks(books, at_once=True):
                pass
            rows = books.overlooked_rows(_QUIET_SECONDS, DUE_AT_ONCE)
            next_due = books.seconds_to_next_due()
            with self._condition:
                self._agenda.swept(time.monotonic())
                if next_due is not None:
                    self._agenda.expect(time.monotonic(), next_due)
            if rows:
                _log.info("overlooked_rows_found", rows=len(rows), first_outbox_id=rows[0].fence.outbox_id)
        if rows:
            reach(Point.RETRY_PICKED)
            with self._condition:
                if not self._serving:
                    return
                self._due_in_flight += len(rows)
                self.due.extend(rows)
            self._wake()
