"""The reader's life: it waits for its turn to lead, catches up from the table where that is owed, and streams.

One thread owns the stream and the producer, and waits for the two together. It reads only while what is in flight is
within bounds, and answers the server all the while. Everything it has to write goes to the bookkeeper.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psycopg

from connector.bookkeeper import Bookkeeper
from connector.catch_up import Judgement, Remedy, prepare_slot
from connector.errors import ServiceUnavailable, SetupRequired
from connector.failpoints import Point, reach
from connector.kafka import AlreadySent, Kafka, Reachability
from connector.ledger import Ledger, Lot
from connector.observability.logs import get_logger
from connector.publishing import PublisherBroken, Publishing, Shipment
from connector.replication import FEEDBACK_SECONDS, PUBLICATION_MISSING, ReplicationConnection, StreamEnded, System
from connector.store.bookkeeping import Bookkeeping, Progress, Settled
from connector.store.connections import connect, describe
from connector.store.queries import Tables
from connector.store.schema import PUBLISHED_COLUMNS, publication_state
from connector.stream import Stream

if TYPE_CHECKING:
    from connector.observability.health import Health
    from connector.observability.metrics import ReaderMetrics
    from connector.observability.tracing import Tracing

MOST_UNMARKED: Final = 500_000

_CATCH_UP_BATCH = 100
_START_PAUSE = 0.1
_CHECK_SECONDS = 2.0
# While a look waits for a lock the stream rests, and the server hears nothing from us.
_LOCK_SECONDS = 1.0
_CHECK_SECONDS_WHEN_IDLE = 5.0
# Longer than the sweep needs to find what was changed last.
_STILL_SECONDS = 45.0
_LONGEST_WAIT = 0.5
_DELIVERY_WAIT = 0.005
_GULP_SECONDS = 0.005
_SLOW_DELIVERY_SECONDS = 10.0
_LONGEST_RECONNECT_WAIT = 5.0
_OVER_BUDGET = "the slot reached its WAL budget"
_YOUNG_PUBLICATION = "the publication is younger than the slot"
_CHANGED_PUBLICATION = "the publication did not send every row"
# The slot is let go a little before its budget, so that it stays within it while that happens.
_BUDGET_MARGIN = 0.9
_SHARE_FOR_MARKS = 8
# Of the shutdown's time, what Kafka may take, and what the database may have taken by then; the rest is for goodbyes.
_SHARE_OF_SHUTDOWN_FOR_KAFKA = 0.6
_SHARE_OF_SHUTDOWN_FOR_WRITING = 0.9

_OBJECT_IN_USE = "55006"

_log = get_logger("reader")


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What the reader is told by the settings."""

    database_url: str
    replication_url: str
    kafka: Kafka
    tables: Tables
    slot_name: str
    publication_name: str
    topics: tuple[str, ...]
    group_id: str
    wal_budget: int
    shutdown_seconds: float
    start_deadline_seconds: float


class Reader:
    """Runs until told to stop; survives the loss of PostgreSQL, of Kafka, and of its leadership."""

    def __init__(
        self, options: ReaderOptions, metrics: ReaderMetrics, health: Health, tracing: Tracing | None = None
    ) -> None:
        """Prepare; nothing is connected before `run`."""
        self._options = options
        self._tracing = tracing
        self._metrics = metrics
        self._health = health
        self._stopping = False
        self._stopped_at = 0.0
        self._ready_once = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._reachability = Reachability(options.kafka)
        self._bookkeeper = Bookkeeper(
            lambda prepare: connect(
                options.database_url, name="outbox-connector reader (bookkeeping)", prepare=prepare, by_index=True
            ),
            options.tables,
            options.slot_name,
            on_settled=self._settled,
            wake=self.wake,
            beat=lambda: health.beat("bookkeeper"),
        )
        self._publishing: Publishing
        self._stream: Stream
        self._system = System("", 0, 0)
        self._next_check = self._checked_at = 0.0

    # --- life --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the reader to drain and end; fit for a signal handler."""
        if not self._stopping:
            self._stopped_at = time.monotonic()
            self._stopping = True
        self.wake()

    def _left_of_shutdown(self, share: float) -> float:
        """Return the seconds until a share of the time for shutting down is over, at least a moment."""
        return max(0.2, self._stopped_at + self._options.shutdown_seconds * share - time.monotonic())

    def wake(self) -> None:
        """Make the loop look around; fit for any thread."""
        try:
            os.write(self._wake_write, b".")
        except BlockingIOError:
            return  # it is awake already

    def run(self) -> None:
        """Lead, or stand by for the one who does, until stopped.

        Raises:
            ServiceUnavailable: PostgreSQL or Kafka stayed away past the start deadline.
            SetupRequired: what `setup` makes is missing, past the start deadline.
            ProtocolError: the server sent what this reader does not understand.
        """
        self._health.watch("reader", stuck_after=60)
        self._health.watch("bookkeeper", stuck_after=120)
        self._reachability.start()
        deadline = time.monotonic() + self._options.start_deadline_seconds
        self._await_kafka(deadline)
        if not self._stopping:
            self._work(deadline)
        self._reachability.close()

    def _work(self, deadline: float) -> None:
        options = self._options
        self._publishing = Publishing(
            options.kafka,
            self._reachability.admin,
            options.topics,
            self._metrics,
            on_error=self._reachability.doubt,
            on_answered=self._answered,
            tracing=self._tracing,
        )
        self._stream = Stream(options.tables.outbox, self._publishing, self._bookkeeper.hint)
        self._metrics.on_scrape(lambda: self._metrics.in_flight_messages.set(self._publishing.in_flight))
        self._bookkeeper.start()
        pause = 0.0
        while not self._stopping:
            try:
                self._rest(pause)
                self._lead()
                pause = 0.0
            except PublisherBroken as error:
                self._health.ready("reader", str(error))
                _log.error("producer_replaced", reason=str(error))
                self._replace_publisher()
                pause = _longer(pause)
            except (StreamEnded, psycopg.Error, SetupRequired) as error:
                self._interrupted(error, deadline)
                # A stream that ended says nothing about how the next attempt will go.
                pause = 0.2 if isinstance(error, StreamEnded) else _longer(pause)
        self._bookkeeper.drain(self._left_of_shutdown(_SHARE_OF_SHUTDOWN_FOR_WRITING))
        self._bookkeeper.close()

    def _interrupted(self, error: StreamEnded | psycopg.Error | SetupRequired, deadline: float) -> None:
        problem = describe(error) if isinstance(error, psycopg.Error) else str(error)
        if isinstance(error, psycopg.errors.UndefinedTable):
            error = SetupRequired(f"{problem}: run `outbox-connector setup`")
        self._health.ready("reader", problem)
        _log.warning("reader_interrupted", error=problem, sqlstate=getattr(error, "sqlstate", None))
        if self._ready_once or time.monotonic() < deadline:
            return
        if isinstance(error, SetupRequired):
            raise error
        raise ServiceUnavailable(f"PostgreSQL stayed away past the start deadline: {problem}") from error

    def _await_kafka(self, deadline: float) -> None:
        next_look = time.monotonic() + _CHECK_SECONDS
        while self._reachability.problem and not self._stopping:
            self._health.ready("reader", self._reachability.problem)
            self._health.beat("reader")
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"past the start deadline: {self._reachability.problem}")
            if time.monotonic() > next_look:
                self._keep_budget_of_nobody()
                next_look = time.monotonic() + _CHECK_SECONDS
            self._reachability.await_answer(_START_PAUSE)

    def _keep_budget_of_nobody(self) -> None:
        """Keep the slot within its budget where nobody leads, because Kafka has been away since we started."""
        with (
            suppress(psycopg.Error),  # it is tried again soon, and reported once Kafka is there
            closing(ReplicationConnection.open(self._options.replication_url)) as replication,
            connect(self._options.database_url, name="outbox-connector reader", prepare=False) as connection,
        ):
            books = Bookkeeping(connection, self._options.tables, self._options.slot_name)
            if not replication.in_recovery() and replication.try_lock(self._options.slot_name):
                self._system = replication.identify()
                self._let_go_over_budget(books)

    def _rest(self, seconds: float) -> None:
        """Wait before the next attempt, while deliveries go on."""
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            self._turn(0.05)

    def _take_wake(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

    def _replace_publisher(self) -> None:
        self._publishing.replace()
        self._bookkeeper.abandon()
        self._stream.forget()

    # --- leading -----------------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        replication = ReplicationConnection.open(self._options.replication_url)
        try:
            if not self._stand_by(replication):
                return
            # What it asks is asked seldom, and behind some poolers prepared statements get lost.
            with connect(
                self._options.database_url,
                name="outbox-connector reader",
                statement_seconds=0,
                lock_seconds=_LOCK_SECONDS,
                prepare=False,
            ) as connection:
                books = Bookkeeping(connection, self._options.tables, self._options.slot_name)
                self._recognise(replication.identify())
                self._metrics.leader.set(1)
                _log.info("leadership_taken", slot=self._options.slot_name)
                reach(Point.LEADERSHIP_TAKEN)
                self._catch_up_and_stream(replication, books)
        finally:
            self._metrics.leader.set(0)
            self._bookkeeper.set_idle(False)
            self._bookkeeper.stand_down()
            self._stream.recall(None)
            replication.close()

    def _recognise(self, system: System) -> None:
        """Forget what we know of another cluster, or of another timeline: positions there are not positions here."""
        if (system.identifier, system.timeline) != (self._system.identifier, self._system.timeline):
            self._stream.forget()
            if self._system.identifier:
                # What is on its way may be of rows that were lost, whose ids this timeline gives to others.
                self._replace_publisher()
        self._system = system

    def _stand_by(self, replication: ReplicationConnection) -> bool:
        """Wait until we may lead; tell whether we do."""
        said = False
        while not self._stopping:
            if not replication.in_recovery() and replication.try_lock(self._options.slot_name):
                return True
            if not said:
                said = True
                _log.info("standing_by", slot=self._options.slot_name)
            self._ready_once = True
            self._report_readiness()
            self._rest(0.5)
        return False

    def _catch_up_and_stream(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        self._require_publication(books)
        judgement = self._prepare_slot(replication, books)
        if judgement.remedy is not Remedy.KEEP:
            _log.warning("slot_made", slot=self._options.slot_name, remedy=judgement.remedy.name.lower())
        progress = books.read_progress()
        assert progress is not None
        if judgement.owed is not None or progress.confirmed_lsn != self._bookkeeper.recorded_lsn:
            # Somebody else has led meanwhile, or the slot is not what it was: what we remember of it does not count.
            self._stream.forget()
        self._bookkeeper.serve(progress.confirmed_lsn, self._system.timeline)
        self._recall(books, progress)
        if judgement.owed is not None:
            _log.warning("catch_up_owed", reason=judgement.owed)
            if not self._catch_up(replication, books):
                return
        self._start_stream(replication, books)
        self._follow(replication, books)

    def _recall(self, books: Bookkeeping, progress: Progress) -> None:
        """Have it looked for in Kafka what was sent already, where the last one who led did not end cleanly."""
        # Another timeline gives the ids of rows that were lost to others.
        if progress.published_since is None or progress.timeline != self._system.timeline:
            books.record_progress(progress.confirmed_lsn, time.time(), self._system.timeline)
        elif not self._stream.received_lsn:
            options = self._options
            admin = self._reachability.admin
            self._stream.recall(AlreadySent(options.kafka, admin, options.group_id, progress.published_since))

    def _require_publication(self, books: Bookkeeping) -> None:
        """Make sure that the publication sends what we need.

        Raises:
            SetupRequired: it does not.
        """
        name, outbox = self._options.publication_name, self._options.tables.outbox
        try:
            found = publication_state(books.connection, self._options.tables, name)
        except psycopg.errors.UndefinedTable as error:
            raise SetupRequired(f"{describe(error)}: run `outbox-connector setup`") from None
        if found is None or found.columns is None or not (found.inserts_only and found.sends_every_pending_row):
            raise SetupRequired(
                f"publication {name!r} does not send every insert of a pending row, and no other change, of {outbox}:"
                " run `outbox-connector setup`"
            )
        missing = sorted(set(PUBLISHED_COLUMNS) - set(found.columns))
        if missing:
            raise SetupRequired(
                f"publication {name!r} lacks columns {', '.join(missing)}: run `outbox-connector setup`"
            )

    def _start_stream(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        options = self._options
        until = time.monotonic() + 30
        while True:
            try:
                # What is recorded is settled, though a crash may have kept the server from hearing of it.
                begin = max(self._stream.received_lsn, self._bookkeeper.recorded_lsn)
                replication.start(options.slot_name, options.publication_name, begin)
                break
            except StreamEnded as error:
                if error.sqlstate != _OBJECT_IN_USE or time.monotonic() > until:
                    raise
                slot = books.slot_state()
                if slot is not None and slot.active_pid is not None:
                    # We hold the lock, so whoever holds the slot is no leader any more.
                    _log.warning("stale_walsender_ended", pid=slot.active_pid)
                    books.end_walsender(slot.active_pid)
                self._rest(0.2)
        self._stream.begin(books.outbox_oid())
        _log.info("streaming", slot=options.slot_name)

    # --- streaming ---------------------------------------------------------------------------------------------------

    def _follow(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        """Read, publish and confirm until stopped, or until the slot is given up for its budget.

        A session that has streamed makes no new slot: to wait there for open transactions is an error of the server's.
        """
        self._ready_once = True
        stream = self._stream
        confirmed = min(self._bookkeeper.recorded_lsn, stream.ledger.flushable_lsn)
        next_feedback = 0.0
        try:
            while not self._stopping:
                caught_up = self._has_room() and stream.read(replication)
                self._publish_due()
                self._turn(0)
                lsn = stream.ledger.settle()
                self._bookkeeper.confirm(lsn, stream.published_since)
                idle = caught_up and stream.idle
                self._publishing.pace(backlog=stream.behind and not idle)
                still = time.monotonic() - stream.wal_moved_at
                self._bookkeeper.set_idle(idle and still < _STILL_SECONDS)
                self._bookkeeper.postpone(postponing=self._may_postpone(caught_up=caught_up))
                confirmable = min(self._bookkeeper.recorded_lsn, lsn)
                now = time.monotonic()
                if now >= next_feedback or confirmable > confirmed or stream.reply_requested:
                    confirmed = max(confirmed, confirmable)
                    replication.confirm(stream.received_lsn, confirmed, ask=now >= next_feedback)
                    reach(Point.LSN_CONFIRMED)
                    stream.reply_requested = False
                    next_feedback = now + FEEDBACK_SECONDS
                    self._report_readiness()
                # Where nothing is written nothing changes: an idle database is not asked.
                unchanged = idle and stream.wal_moved_at < self._checked_at
                if now >= self._next_check and not unchanged and self._must_let_go(books, idle=idle):
                    self._owe_all(books, _OVER_BUDGET)
                    self._leave_stream(replication, books)
                    self._drop_slot(books, _OVER_BUDGET)
                    return
                if caught_up or not self._has_room():
                    self._wait(replication, next_feedback - now, reading=caught_up)
        except StreamEnded as error:
            if error.sqlstate == PUBLICATION_MISSING:
                self._watch_publication(books)
                # It is there now, but not yet at the position the stream starts from: the server cannot read on.
                self._owe_all(books, _YOUNG_PUBLICATION)
                self._drop_slot(books, _YOUNG_PUBLICATION)
            raise
        finally:
            # Only a stream lets marks wait: a catch-up waits for them.
            self._bookkeeper.postpone(postponing=False)
        self._finish(replication, confirmed)

    def _must_let_go(self, books: Bookkeeping, *, idle: bool) -> bool:
        """Take the look that is due at what others may have done; tell whether the slot has reached its budget."""
        self._checked_at = time.monotonic()
        over_budget = self._over_budget(books, idle=idle)
        try:
            self._watch_publication(books)
        except psycopg.errors.LockNotAvailable:
            # The table is being altered, or rewritten; the next look tells how.
            self._checked_at = 0.0
        return over_budget

    def _watch_publication(self, books: Bookkeeping) -> None:
        """Owe a catch-up where the publication is not what it was: the slot goes past the rows that it does not send.

        Raises:
            SetupRequired: it does not send what we need.
        """
        try:
            self._require_publication(books)
        except SetupRequired:
            self._owe_all(books, _CHANGED_PUBLICATION)
            raise

    def _leave_stream(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        """End the stream before its slot is given up; a server too busy to listen is not asked but told."""
        self._stream.forget()
        if not replication.stop(_CHECK_SECONDS):
            books.end_walsender(replication.backend_pid)
            raise StreamEnded("the server did not end the stream when asked, so its session was ended")

    def _may_postpone(self, *, caught_up: bool) -> bool:
        """Tell whether marks may wait: not for long where the WAL that they pin might be missed in the budget."""
        stream = self._stream
        if not stream.behind or (caught_up and not self._publishing.in_flight):
            return False
        return stream.received_lsn - self._bookkeeper.recorded_lsn < self._options.wal_budget // _SHARE_FOR_MARKS

    def _has_room(self) -> bool:
        return self._publishing.has_room and self._bookkeeper.unmarked < MOST_UNMARKED

    def _wait(self, replication: ReplicationConnection, until_feedback: float, *, reading: bool) -> None:
        wait = min(_LONGEST_WAIT, max(0.0, until_feedback))
        if reading and self._stream.flowing:
            # Not for the socket: a walsender that is behind would do little else than wake who waits for it.
            time.sleep(_GULP_SECONDS)
        elif reading:
            if self._publishing.in_flight:
                wait = min(wait, _DELIVERY_WAIT)
            replication.wait([self._wake_read], wait)
        else:
            # Not reading: wait for Kafka to take what it has, not for more to arrive.
            self._turn(min(wait, 0.05))
        self._take_wake()

    def _finish(self, replication: ReplicationConnection, confirmed: int) -> None:
        """Drain: read the transaction at hand to its end, wait for what is in flight, write it down, confirm, leave."""
        until = time.monotonic() + self._left_of_shutdown(_SHARE_OF_SHUTDOWN_FOR_KAFKA)
        stream = self._stream
        next_feedback = 0.0
        while (stream.in_transaction or self._publishing.in_flight) and time.monotonic() < until:
            if stream.in_transaction and self._has_room():
                # Left half read, it would be sent again from its first row.
                if stream.read(replication, to_commit=True):
                    replication.wait([], _DELIVERY_WAIT)
                self._turn(0)
            else:
                self._turn(0.05)
            if time.monotonic() > next_feedback:
                replication.confirm(stream.received_lsn, confirmed)
                next_feedback = time.monotonic() + FEEDBACK_SECONDS
        # Half of what is left for the marks, so that the position is recorded also where they are many.
        left = self._left_of_shutdown(_SHARE_OF_SHUTDOWN_FOR_WRITING)
        self._bookkeeper.drain(left / 2)
        lsn = stream.ledger.settle()
        if stream.idle:
            lsn = max(lsn, stream.received_lsn)
        if stream.idle and not self._publishing.in_flight:
            self._bookkeeper.end_clean(lsn)
        else:
            self._bookkeeper.confirm(lsn, stream.published_since)
        self._bookkeeper.drain(self._left_of_shutdown(_SHARE_OF_SHUTDOWN_FOR_WRITING))
        replication.confirm(stream.received_lsn, max(confirmed, min(lsn, self._bookkeeper.recorded_lsn)))
        replication.stop(self._left_of_shutdown(1.0))
        _log.info("drained", undelivered=self._publishing.in_flight)

    # --- turns -------------------------------------------------------------------------------------------------------

    def _turn(self, seconds: float) -> None:
        self._publishing.turn(seconds)
        if self._bookkeeper.defect is not None:
            raise self._bookkeeper.defect
        self._health.beat("reader")

    def _prepare_slot(self, replication: ReplicationConnection, books: Bookkeeping) -> Judgement:
        """Judge the slot, and make it where it is missing, without neglecting Kafka or seeming to be stuck.

        A slot that is made waits for every transaction that is open; a signal to stop, or trouble with Kafka, does not.
        """
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(prepare_slot, replication, books, self._options.slot_name)
            try:
                while not (future.done() or self._stopping):
                    self._turn(0.005)
            finally:
                if not future.done():
                    replication.cancel()
            return future.result()

    def _publish_due(self) -> None:
        due = self._bookkeeper.due
        if not (due and self._publishing.has_room):
            return
        shipment = Shipment(self._publishing, due=True)
        while due and not shipment.full:
            shipment.add(due.popleft())
        shipment.close()
        reach(Point.RETRY_PRODUCED)

    def _report_readiness(self) -> None:
        oldest = next((lot for lot in self._stream.ledger if lot.awaited), None)
        if oldest is not None and time.monotonic() - oldest.opened_at > _SLOW_DELIVERY_SECONDS:
            self._reachability.doubt()
        starting = None if self._ready_once else "the first catch-up from the table is not done yet"
        self._health.ready("reader", self._reachability.problem or self._bookkeeper.problem or starting)

    def _answered(self, shipment: Shipment) -> None:
        self._bookkeeper.answered(shipment.lot, due=shipment.due)

    def _settled(self, rows: Sequence[Settled], lot: Lot) -> None:
        """Count failures that were written; called by the bookkeeper's thread."""
        reasons = {failure.outbox_id: failure for failure in lot.failures}
        for row in rows:
            failure = reasons[row.outbox_id]
            if row.dead:
                self._metrics.dead.labels(reason=failure.reason).inc()
            else:
                self._metrics.retries_scheduled.inc()
            _log.warning(
                "message_dead" if row.dead else "retry_scheduled",
                outbox_id=row.outbox_id,
                **failure.named,
                attempt=failure.attempt,
                error=failure.error,
                due_in_seconds=row.due_in,
            )

    # --- the table instead of the stream -----------------------------------------------------------------------------

    def _catch_up(self, replication: ReplicationConnection, books: Bookkeeping) -> bool:
        """Publish from the table what the slot cannot bring; tell whether it is done and the stream may start."""
        while True:
            if not self._settle_all(replication, books):
                return False
            progress = books.read_progress()
            if progress is None or not progress.catch_up_owed:
                return True
            sent = Ledger()
            rows_sent = 0
            _log.info("catch_up_started", through=progress.catch_up_through, reason=progress.catch_up_reason)
            with (
                connect(
                    self._options.database_url,
                    name="outbox-connector reader (catch-up)",
                    statement_seconds=0,
                    prepare=False,
                ) as connection,
                closing(
                    Bookkeeping(connection, self._options.tables, self._options.slot_name).catch_up_rows(
                        progress.catch_up_through, _CATCH_UP_BATCH
                    )
                ) as batches,
            ):
                for rows in batches:
                    sent.append(self._publishing.publish(rows))
                    rows_sent += len(rows)
                    reach(Point.CATCH_UP_HALF_WAY)
                    self._tend(replication, books)
                    while not self._has_room():
                        self._tend(replication, books)
                        self._turn(0.02)
                        if self._stopping:
                            return False
                    sent.settle()
            while sent.settle() is not None and not sent.empty:
                self._tend(replication, books)
                self._turn(0.02)
                if self._stopping:
                    return False
            self._turn(0)  # raises if a message failed for no fault of its own
            reach(Point.CATCH_UP_ACKNOWLEDGED)
            now_owed = books.read_progress()
            if now_owed == progress:
                books.catch_up_done()
                reach(Point.CATCH_UP_DONE)
                _log.info("catch_up_done", rows=rows_sent)
                return True
            # The slot was given up once more meanwhile: what was written since then is owed as well.

    def _settle_all(self, replication: ReplicationConnection, books: Bookkeeping) -> bool:
        """Wait until nothing is in flight or unmarked, so that the table shows what is really unsent."""
        while self._publishing.in_flight or self._bookkeeper.unmarked:
            if self._stopping:
                return False
            self._tend(replication, books)
            self._turn(0.05)
        return not self._stopping

    def _tend(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        """While not streaming: keep the session, publish what is due, keep the slot within its budget."""
        self._publish_due()
        if time.monotonic() < self._next_check:
            return
        replication.ping()
        self._report_readiness()
        if self._let_go_over_budget(books):
            self._prepare_slot(replication, books)

    # --- the WAL budget ----------------------------------------------------------------------------------------------

    def _over_budget(self, books: Bookkeeping, *, idle: bool) -> bool:
        """Tell whether the slot pins more than it may, by our fault: an old transaction pins WAL whatever we do.

        The server has to be asked: the stream tells how far it was sent, not how far the WAL goes.
        """
        slot = books.slot_state()
        pinned = (slot and slot.retained_bytes) or 0
        allowed = self._options.wal_budget * _BUDGET_MARGIN
        seldom = idle and pinned < allowed / 2
        self._next_check = time.monotonic() + (_CHECK_SECONDS_WHEN_IDLE if seldom else _CHECK_SECONDS)
        if slot is None or slot.confirmed_lsn is None or pinned <= allowed:
            return False
        return books.current_wal_lsn() - slot.confirmed_lsn > allowed / 2

    def _let_go_over_budget(self, books: Bookkeeping) -> bool:
        """Give the slot up if it has reached its budget; tell whether it had."""
        if not self._over_budget(books, idle=False):
            return False
        self._owe_all(books, _OVER_BUDGET)
        self._drop_slot(books, _OVER_BUDGET)
        return True

    def _owe_all(self, books: Bookkeeping, reason: str) -> None:
        """Write down that the table must be asked for everything, before the slot is given up."""
        books.owe_catch_up(self._system.identifier, 0, None, reason)
        reach(Point.SLOT_OWED)

    def _drop_slot(self, books: Bookkeeping, reason: str) -> None:
        """Drop the slot with all that it pins; the next to lead makes it anew.

        To advance it would not do: what a slot pins follows its confirmed position only slowly.
        """
        books.drop_slot()
        _log.warning("slot_given_up", slot=self._options.slot_name, reason=reason)
        reach(Point.SLOT_DROPPED)


def _longer(pause: float) -> float:
    """Return the pause before the next attempt, in seconds, after one that followed a pause and failed."""
    return min(max(0.2, pause * 2), _LONGEST_RECONNECT_WAIT)
