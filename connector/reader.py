"""The reader: from the replication stream to Kafka, and the confirmed position back.

One thread owns the stream and the producer, and waits for the two together. It reads only while what is in flight is
within bounds, and answers the server all the while. Everything it has to write goes to the bookkeeper.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psycopg

from connector.bookkeeper import Bookkeeper
from connector.catch_up import Remedy, prepare_slot
from connector.errors import ProtocolError, ServiceUnavailable, SetupRequired
from connector.kafka import LARGEST_MESSAGE, Fate, Kafka, KafkaError, KafkaException, Message, Publisher, Reachability
from connector.kafka import fate_of, size_of
from connector.ledger import Ledger, Lot
from connector.observability.logs import get_logger
from connector.outbox import WAKE_PREFIX, Failure, Fence, OutboxRow, Table, decode_envelope, decode_headers, encode_envelope
from connector.replication import FEEDBACK_SECONDS, ReplicationConnection, StreamEnded
from connector.retries import due_in_seconds
from connector.row import RowDecoder
from connector.store.bookkeeping import Bookkeeping, Settled
from connector.store.connections import connect, describe
from connector.store.queries import Tables
from connector.store.schema import PUBLISHED_COLUMNS, publication_state
from connector.wire.frames import PrimaryKeepalive, XLogData
from connector.wire.pgoutput import Begin, Commit, Insert, LogicalMessage, Relation, decode

if TYPE_CHECKING:
    from connector.observability.health import Health
    from connector.observability.metrics import ReaderMetrics

MOST_IN_FLIGHT: Final = 20_000
MOST_BYTES_IN_FLIGHT: Final = 24 * 1024 * 1024
MOST_UNMARKED: Final = 100_000

_ROWS_PER_LOT = 250
_FRAMES_PER_TURN = 500
_CATCH_UP_BATCH = 500
_IDLE_STEP_BYTES = 256 * 1024
_CHECK_SECONDS = 2.0
_LONGEST_WAIT = 0.5
_DELIVERY_WAIT = 0.005
_SLOW_DELIVERY_SECONDS = 10.0
_LONGEST_RECONNECT_WAIT = 5.0
# The slot is let go a little before its budget, so that it stays within it while that happens.
_BUDGET_MARGIN = 0.9

_PUBLICATION_MISSING = "42704"
_OBJECT_IN_USE = "55006"

_log = get_logger("reader")


class PublisherBroken(Exception):
    """The producer cannot go on; everything unconfirmed is read and published again with a new one."""


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
    wal_budget: int
    shutdown_seconds: float
    start_deadline_seconds: float


class _Delivery:
    """The delivery callback of one lot: one object for all of its messages."""

    __slots__ = ("due", "lot", "reader")

    def __init__(self, reader: Reader, lot: Lot, *, due: bool) -> None:
        self.reader = reader
        self.lot = lot
        self.due = due

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        lot = self.lot
        lot.awaited -= 1
        self.reader.in_flight -= 1
        if error is not None:
            envelope = decode_envelope(message.value())
            self.reader.refused(
                lot, error, envelope.outbox_id, envelope.attempt, message.topic() or "", size_of(message)
            )
        if lot.awaited == 0 and lot.closed:
            self.reader.answered(lot, due=self.due)


class Reader:
    """Runs until told to stop; survives the loss of PostgreSQL, of Kafka, and of its leadership."""

    def __init__(self, options: ReaderOptions, metrics: ReaderMetrics, health: Health) -> None:
        """Prepare; nothing is connected before `run`."""
        self._options = options
        self._metrics = metrics
        self._health = health
        self._stopping = False
        self._ready_once = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._reachability = Reachability(options.kafka)
        self._bookkeeper = Bookkeeper(
            lambda: connect(options.database_url, name="outbox-connector reader (bookkeeping)"),
            options.tables,
            options.slot_name,
            on_settled=self._settled,
            wake=self.wake,
            beat=lambda: health.beat("bookkeeper"),
        )
        self._topics: set[str] = set(options.topics)
        self._publisher: Publisher
        self._ledger = Ledger()
        self._decoders: dict[int, RowDecoder | None] = {}
        self._received_lsn = 0
        self._server_position = 0
        self._in_transaction = False
        self._commit_lag = 0.0
        self._broken: str | None = None
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._checked_at = 0.0
        metrics.on_scrape(lambda: metrics.in_flight_messages.set(self.in_flight))

    # --- life --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the reader to drain and end; fit for a signal handler."""
        self._stopping = True
        self.wake()

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
        if self._stopping:
            return
        self._publisher = self._new_publisher()
        self._bookkeeper.start()
        wait = 0.2
        while not self._stopping:
            try:
                self._lead()
                wait = 0.2
            except PublisherBroken as error:
                _log.error("producer_restarted", reason=str(error))
                self._replace_publisher()
            except (StreamEnded, psycopg.Error, SetupRequired) as error:
                problem = _words(error)
                self._health.ready("reader", problem)
                _log.warning("reader_interrupted", error=problem, sqlstate=getattr(error, "sqlstate", None))
                if not self._ready_once and time.monotonic() > deadline:
                    if isinstance(error, SetupRequired):
                        raise
                    raise ServiceUnavailable(f"PostgreSQL stayed away past the start deadline: {problem}") from error
                if self._ready_once:
                    # A stream that ended says nothing about how the next attempt will go.
                    wait = 0.2 if isinstance(error, StreamEnded) else wait
                self._rest(wait)
                wait = min(wait * 2, _LONGEST_RECONNECT_WAIT)
        self._bookkeeper.drain(self._options.shutdown_seconds)
        self._bookkeeper.close()
        self._reachability.close()

    def _await_kafka(self, deadline: float) -> None:
        while self._reachability.problem and not self._stopping:
            self._health.ready("reader", self._reachability.problem)
            self._health.beat("reader")
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"past the start deadline: {self._reachability.problem}")
            self._wait_for_wake(0.1)

    def _rest(self, seconds: float) -> None:
        """Wait before the next attempt, while deliveries go on."""
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            self._turn(0.05)

    def _wait_for_wake(self, seconds: float) -> None:
        time.sleep(0 if self._take_wake() else seconds)

    def _take_wake(self) -> bool:
        try:
            return bool(os.read(self._wake_read, 4096))
        except BlockingIOError:
            return False

    def _new_publisher(self) -> Publisher:
        publisher = Publisher(self._options.kafka, sorted(self._topics), self._reachability.doubt)
        _log.info("producer_ready", batch_bytes=publisher.batch_size)
        return publisher

    def _replace_publisher(self) -> None:
        self._publisher.abandon()
        self._bookkeeper.abandon()
        self._broken = None
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._ledger = Ledger()
        self._received_lsn = 0
        self._publisher = self._new_publisher()

    # --- leading -----------------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        replication = ReplicationConnection.open(self._options.replication_url)
        try:
            if not self._stand_by(replication):
                return
            with connect(
                self._options.database_url, name="outbox-connector reader", statement_seconds=0
            ) as connection:
                books = Bookkeeping(connection, self._options.tables, self._options.slot_name)
                self._metrics.leader.set(1)
                _log.info("leadership_taken", slot=self._options.slot_name)
                while not self._stopping and self._lead_once(replication, books):
                    pass
        finally:
            self._metrics.leader.set(0)
            self._bookkeeper.set_idle(False)
            self._bookkeeper.stand_down()
            replication.close()

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

    def _lead_once(self, replication: ReplicationConnection, books: Bookkeeping) -> bool:
        """Catch up if that is owed, then stream; tell whether to do it again at once."""
        self._check_publication(books)
        judgement = prepare_slot(replication, books, self._options.slot_name)
        if judgement.remedy is not Remedy.KEEP:
            _log.warning("slot_made", slot=self._options.slot_name, remedy=judgement.remedy.name.lower())
        progress = books.read_progress()
        assert progress is not None
        if judgement.owed is not None or progress.confirmed_lsn != self._bookkeeper.recorded_lsn:
            # Somebody else has led meanwhile, or the slot is not what it was: what we remember of it does not count.
            self._ledger = Ledger()
            self._received_lsn = 0
        self._bookkeeper.serve(progress.confirmed_lsn)
        if judgement.owed is not None:
            _log.warning("catch_up_owed", reason=judgement.owed)
            if not self._catch_up(replication, books):
                return not self._stopping
        self._start_stream(replication, books)
        return self._stream(replication, books)

    def _check_publication(self, books: Bookkeeping) -> None:
        name, outbox = self._options.publication_name, self._options.tables.outbox
        found = publication_state(books.connection, self._options.tables, name)
        if found is None or found.columns is None or not found.inserts_only:
            raise SetupRequired(
                f"publication {name!r} does not send the inserts, and only those, of table {outbox}:"
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
                replication.start(options.slot_name, options.publication_name, self._received_lsn)
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
        self._decoders = {}
        self._in_transaction = False
        _log.info("streaming", slot=options.slot_name)

    # --- streaming ---------------------------------------------------------------------------------------------------

    def _stream(self, replication: ReplicationConnection, books: Bookkeeping) -> bool:
        """Read, publish and confirm until stopped; False then, True where the slot was given up for its budget."""
        self._ready_once = True
        confirmed = self._ledger.flushable_lsn
        next_feedback = 0.0
        self._report_readiness()
        try:
            while not self._stopping:
                caught_up = self._has_room() and self._read(replication)
                self._publish_due()
                self._turn(0)
                lsn = self._ledger.settle()
                self._bookkeeper.confirm(lsn)
                self._bookkeeper.set_idle(caught_up and self._ledger.empty and not self._in_transaction)
                now = time.monotonic()
                confirmable = min(self._bookkeeper.recorded_lsn, lsn)
                if now >= next_feedback or confirmable > confirmed:
                    confirmed = max(confirmed, confirmable)
                    replication.confirm(self._received_lsn, confirmed)
                    next_feedback = now + FEEDBACK_SECONDS
                    self._report_readiness()
                    self._metrics.replication_lag_bytes.set(max(0, self._server_position - confirmed))
                if now >= self._checked_at + _CHECK_SECONDS:
                    self._checked_at = now
                    if self._over_budget(books, confirmed):
                        self._give_up_position(replication, books)
                        return True
                if caught_up or not self._has_room():
                    self._wait(replication, next_feedback - now, reading=caught_up)
        except StreamEnded as error:
            if error.sqlstate == _PUBLICATION_MISSING:
                self._check_publication(books)
                # The stream starts before the publication was made; the server cannot read that part with it.
                self._replace_slot(replication, books, "the publication is younger than the slot")
            raise
        self._finish(replication, confirmed)
        return False

    def _has_room(self) -> bool:
        return (
            self.in_flight < MOST_IN_FLIGHT
            and self._bytes_in_flight < MOST_BYTES_IN_FLIGHT
            and self._bookkeeper.unmarked < MOST_UNMARKED
        )

    def _wait(self, replication: ReplicationConnection, until_feedback: float, *, reading: bool) -> None:
        wait = min(_LONGEST_WAIT, max(0.0, until_feedback))
        if reading:
            if self.in_flight:
                wait = min(wait, _DELIVERY_WAIT)
            replication.wait([self._wake_read], wait)
        else:
            # Not reading: wait for Kafka to take what it has, not for more to arrive.
            self._turn(min(wait, 0.05))
        self._take_wake()

    def _read(self, replication: ReplicationConnection) -> bool:
        """Take what has arrived, up to a turn's worth; tell whether nothing more is waiting."""
        lot = Lot(time.monotonic())
        delivery = _Delivery(self, lot, due=False)
        self._ledger.append(lot)
        caught_up = False
        try:
            for _ in range(_FRAMES_PER_TURN):
                frame = replication.read()
                if frame is None:
                    caught_up = True
                    break
                if isinstance(frame, PrimaryKeepalive):
                    self._keepalive(replication, frame, lot)
                    continue
                self._message(frame, lot, delivery)
                if len(lot.fences) >= _ROWS_PER_LOT:
                    break
        finally:
            self._close(lot, due=False)
        return caught_up

    def _close(self, lot: Lot, *, due: bool) -> None:
        lot.closed = True
        if lot.awaited == 0 and lot.fences:
            self.answered(lot, due=due)

    def _keepalive(self, replication: ReplicationConnection, frame: PrimaryKeepalive, lot: Lot) -> None:
        self._server_position = max(self._server_position, frame.wal_end)
        if not self._in_transaction and not lot.fences:
            lot.closed = True
            self._ledger.settle()
            if frame.wal_end - self._ledger.flushable_lsn >= _IDLE_STEP_BYTES:
                self._ledger.nothing_until(frame.wal_end)
            if self._ledger.empty:
                self._received_lsn = max(self._received_lsn, self._ledger.flushable_lsn)
            lot.closed = False
            self._ledger.append(lot)
        if frame.reply_requested:
            replication.confirm(self._received_lsn, min(self._bookkeeper.recorded_lsn, self._ledger.flushable_lsn))

    def _message(self, frame: XLogData, lot: Lot, delivery: _Delivery) -> None:
        message = decode(frame.payload)
        kind = type(message)
        if kind is Insert:
            decoder = self._decoders.get(message.relation_oid, _unknown)
            if decoder is _unknown:
                raise ProtocolError(f"an insert into relation {message.relation_oid}, which was never described")
            if decoder is None:
                return
            row = decoder(message.values)
            if lot.waits:
                lag, rows = lot.waits[-1]
                lot.waits[-1] = (lag, rows + 1)
            else:
                lot.waits.append((self._commit_lag, 1))
            if row.fence.next_retry_at is not None:
                # Enqueued for later, so the table is what holds it.
                self._bookkeeper.hint(0)
                return
            self._publish(row, lot, delivery)
        elif kind is Begin:
            self._in_transaction = True
            self._commit_lag = max(0.0, (frame.send_time - message.commit_time) / 1_000_000)
            lot.waits.append((self._commit_lag, 0))
            self._server_position = max(self._server_position, frame.wal_end)
        elif kind is Commit:
            self._in_transaction = False
            self._received_lsn = message.end_lsn
            self._server_position = max(self._server_position, message.end_lsn)
            self._ledger.committed(message.end_lsn)
        elif kind is LogicalMessage:
            if message.prefix == WAKE_PREFIX:
                self._bookkeeper.hint(due_in_seconds(message.content))
        elif kind is Relation:
            table = Table(message.schema, message.name)
            ours = table == self._options.tables.outbox
            self._decoders[message.oid] = RowDecoder(message) if ours else None

    def _publish(self, row: OutboxRow, lot: Lot, delivery: _Delivery) -> None:
        """Hand a row to the producer. Whatever becomes of it, the lot hears of it."""
        value = encode_envelope(row)
        headers = decode_headers(row.headers) if row.headers is not None else None
        size = len(value) + len(row.key)
        lot.add(row.fence, size)
        self.in_flight += 1
        self._bytes_in_flight += size
        self._topics.add(row.topic) if row.topic not in self._topics else None
        while True:
            try:
                if headers:
                    self._publisher.produce(row.topic, value, row.key, on_delivery=delivery, headers=headers)
                else:
                    self._publisher.produce(row.topic, value, row.key, on_delivery=delivery)
                return
            except BufferError:
                self._publisher.poll(0.05)
                self._health.beat("reader")
            except KafkaException as error:
                lot.awaited -= 1
                self.in_flight -= 1
                self.refused(lot, error.args[0], row.fence.outbox_id, row.fence.retry_count, row.topic, size)
                return

    # --- what Kafka answers ------------------------------------------------------------------------------------------

    def answered(self, lot: Lot, *, due: bool) -> None:
        """Pass on a lot for whose every row an answer came."""
        self._bytes_in_flight -= lot.bytes
        waited = time.monotonic() - lot.opened_at
        for lag, rows in lot.waits:
            if rows:
                self._metrics.commit_to_ack.observe(lag + waited, rows)
        self._metrics.published.inc(len(lot.fences) - len(lot.failures))
        self._bookkeeper.answered(lot, due=due)

    def refused(self, lot: Lot, error: KafkaError, outbox_id: int, attempt: int, topic: str, size: int) -> None:
        """Decide what a refused message means: its row's failure, or the producer's."""
        self._metrics.publish_failures.inc()
        fate = fate_of(error)
        if fate is Fate.TOO_LARGE:
            limit = self._limit(topic, size)
            if limit is not None and size <= limit < self._publisher.batch_size:
                self._broken = f"topic {topic} takes {limit} bytes at most, less than a batch"
                return
            allowed = "unknown" if limit is None else str(limit)
            text = (
                f"the message takes about {size} bytes, more than topic {topic} allows (max.message.bytes {allowed}):"
                " enqueue less, or raise the topic's limit and redrive"
            )
            lot.failed(Failure(outbox_id, attempt, text, "message_too_large", final=True))
        elif fate is Fate.TOPIC_REFUSED:
            text = (
                f"Kafka refuses topic {topic}: {error.str()} ({error.name()}). Create the topic, or let this client write to it"
            )
            lot.failed(Failure(outbox_id, attempt, text, "topic_refused"))
        else:
            self._broken = f"delivery failed for no fault of the message: {error.str()} ({error.name()})"

    def _limit(self, topic: str, size: int) -> int | None:
        if size > LARGEST_MESSAGE:
            return LARGEST_MESSAGE
        limit = self._publisher.limit_of(topic)
        return self._publisher.limit_of(topic, again=True) if limit is not None and size <= limit else limit

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
                attempt=failure.attempt,
                error=failure.error,
                due_in_seconds=row.due_in,
            )

    # --- turns -------------------------------------------------------------------------------------------------------

    def _turn(self, seconds: float) -> None:
        """Let deliveries come in, waiting for the first of them at most so long."""
        self._publisher.poll(seconds)
        self._health.beat("reader")
        if self._broken is not None:
            raise PublisherBroken(self._broken)

    def _publish_due(self) -> None:
        due = self._bookkeeper.due
        if not due:
            return
        rows = []
        while due and len(rows) < _ROWS_PER_LOT:
            rows.append(due.popleft())
        self._publish_rows(rows, due=True)

    def _publish_rows(self, rows: Iterable[OutboxRow], *, due: bool) -> Lot:
        lot = Lot(time.monotonic())
        delivery = _Delivery(self, lot, due=due)
        for row in rows:
            self._publish(row, lot, delivery)
        self._close(lot, due=due)
        return lot

    def _report_readiness(self) -> None:
        now = time.monotonic()
        oldest = next(iter(self._ledger), None)
        if oldest is not None and oldest.awaited and now - oldest.opened_at > _SLOW_DELIVERY_SECONDS:
            self._reachability.doubt()
        self._health.ready("reader", self._reachability.problem or self._bookkeeper.problem)

    def _finish(self, replication: ReplicationConnection, confirmed: int) -> None:
        """Drain: wait for what is in flight, write it down, confirm it, and leave."""
        until = time.monotonic() + self._options.shutdown_seconds * 0.7
        next_feedback = 0.0
        while self.in_flight and time.monotonic() < until:
            self._turn(0.05)
            if time.monotonic() > next_feedback:
                replication.confirm(self._received_lsn, confirmed)
                next_feedback = time.monotonic() + FEEDBACK_SECONDS
        self._bookkeeper.drain(max(1.0, until - time.monotonic()))
        lsn = self._ledger.settle()
        if self._ledger.empty:
            lsn = max(lsn, self._received_lsn)
        self._bookkeeper.confirm(lsn)
        self._bookkeeper.drain(2.0)
        replication.confirm(self._received_lsn, max(confirmed, min(lsn, self._bookkeeper.recorded_lsn)))
        replication.stop(2.0)
        _log.info("drained", undelivered=self.in_flight)

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
            with connect(
                self._options.database_url,
                name="outbox-connector reader (catch-up)",
                statement_seconds=0,
                idle_in_transaction_seconds=0,
            ) as connection:
                table = Bookkeeping(connection, self._options.tables, self._options.slot_name)
                for rows in table.catch_up_rows(progress.catch_up_through, _CATCH_UP_BATCH):
                    sent.append(self._publish_rows(rows, due=False))
                    rows_sent += len(rows)
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
            now_owed = books.read_progress()
            if now_owed == progress:
                books.catch_up_done()
                _log.info("catch_up_done", rows=rows_sent)
                return True
            # The slot was given up once more meanwhile: what was written since then is owed as well.

    def _settle_all(self, replication: ReplicationConnection, books: Bookkeeping) -> bool:
        """Wait until nothing is in flight or unmarked, so that the table shows what is really unsent."""
        while self.in_flight or self._bookkeeper.unmarked:
            if self._stopping:
                return False
            self._tend(replication, books)
            self._turn(0.05)
        return not self._stopping

    def _tend(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        """While not streaming: keep the session, publish what is due, keep the slot within its budget."""
        self._publish_due()
        now = time.monotonic()
        if now < self._checked_at + _CHECK_SECONDS:
            return
        self._checked_at = now
        replication.ping()
        self._report_readiness()
        slot = books.slot_state()
        if slot is not None and slot.confirmed_lsn is not None and self._over_budget(books, slot.confirmed_lsn):
            self._move_slot(replication, books)

    # --- the WAL budget ----------------------------------------------------------------------------------------------

    def _over_budget(self, books: Bookkeeping, confirmed: int) -> bool:
        """Tell whether the slot pins more than it may, by our fault: an old transaction pins WAL whatever we do."""
        if not self._ledger.empty and self._has_room() and self._server_position - confirmed < self._options.wal_budget / 2:
            return False
        if self._has_room() and self._server_position - confirmed < self._options.wal_budget / 2:
            return False
        slot = books.slot_state()
        if slot is None or slot.retained_bytes is None or slot.confirmed_lsn is None:
            return False
        allowed = self._options.wal_budget * _BUDGET_MARGIN
        behind = books.current_wal_lsn() - slot.confirmed_lsn
        return slot.retained_bytes > allowed and behind > allowed / 2

    def _give_up_position(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        """Let the slot go forward past what is not published; the table is asked for it afterwards."""
        replication.stop(5.0)
        self._ledger = Ledger()
        self._received_lsn = 0
        self._move_slot(replication, books)

    def _move_slot(self, replication: ReplicationConnection, books: Bookkeeping) -> None:
        target = books.current_wal_lsn()
        system = replication.identify()
        books.owe_catch_up(system.identifier, target, books.highest_pending_id(), "the slot reached its WAL budget")
        books.advance_slot(target)
        _log.warning("wal_budget_reached", budget_bytes=self._options.wal_budget, slot=self._options.slot_name)

    def _replace_slot(self, replication: ReplicationConnection, books: Bookkeeping, reason: str) -> None:
        """Drop the slot, so that the next attempt makes it anew and catches up from the table."""
        system = replication.identify()
        books.owe_catch_up(system.identifier, 0, None, reason)
        books.drop_slot()
        _log.warning("slot_dropped", slot=self._options.slot_name, reason=reason)


def _unknown(_values: object) -> OutboxRow:
    raise AssertionError


def _words(error: Exception) -> str:
    return describe(error) if isinstance(error, psycopg.Error) else str(error)
