"""The sink: from Kafka to the destination, one transaction a batch, and the offsets after it.

One thread owns the consumer and the database connection; of a backlog it decodes the next batch while the database is
at work on one. While the database is away the partitions are paused and the batch at hand is kept: the group keeps its
member, no message is retried for an outage, and no offset moves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import psycopg

from connector.envelope import Unreadable, decode_envelope
from connector.errors import EnvelopeError, PayloadError, ServiceUnavailable, SetupRequired
from connector.failpoints import Point, reach
from connector.handlers import Handler
from connector.kafka import (
    DeadLetters,
    DeadLetterUndelivered,
    Kafka,
    KafkaException,
    Message,
    Reachability,
    Subscription,
    ends_of,
    headers_of,
)
from connector.observability.logs import get_logger
from connector.observability.tracing import Subject, Tracing, named, now
from connector.outbox import Failure
from connector.store.connections import connect, describe, is_alive, is_conflict, is_pooler_trouble
from connector.store.offsets import KeptOffsets, Partition, TimelineChanged
from connector.store.queries import Tables
from connector.store.settlement import HELD, STORED, Group, Item, NotVisibleYet, Result, Settlement
from connector.whereabouts import Whereabouts

if TYPE_CHECKING:
    from connector.observability.health import Health
    from connector.observability.metrics import SinkMetrics

BATCH_ROWS: Final = 1_400
_POLL_SECONDS: Final = 0.5
_START_PAUSE: Final = 0.05
_LONGEST_WAIT: Final = 5.0
_LOOK_SECONDS: Final = 2.0
_IDLE_IN_TRANSACTION_SECONDS: Final = 30
_SHARE_OF_SHUTDOWN_FOR_A_BATCH: Final = 0.6
_SHARE_OF_SHUTDOWN_FOR_THE_GROUP: Final = 0.2

_log = get_logger("sink")


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """What the sink is told by the settings."""

    database_url: str
    kafka: Kafka
    tables: Tables
    topics: tuple[str, ...]
    group_id: str
    group_instance_id: str | None
    dead_letter_topic: str
    strict: bool
    shutdown_seconds: float
    start_deadline_seconds: float


@dataclass(slots=True)
class Batch:
    """Messages taken together, sorted by what is to become of them."""

    items: list[Item]
    unparsed: list[Failure]
    letters: list[tuple[Message, str]]
    messages: dict[int, Message]
    ends: dict[Partition, int]
    """The offset behind its last message, by partition."""
    duplicates: int = 0
    lost: int = 0
    """Copies of rows that the database has lost in a failover."""
    prepared: list[Group] | None = None
    """The items as the database takes them, where there was time for that before."""


class Sink:
    """Runs until told to stop; survives the loss of PostgreSQL and of Kafka."""

    def __init__(
        self,
        options: SinkOptions,
        handlers: Mapping[str, Handler],
        metrics: SinkMetrics,
        health: Health,
        *,
        tracing: Tracing | None = None,
    ) -> None:
        """Prepare; nothing is connected before `run`."""
        self._options = options
        self._tracing = tracing
        self._handlers = handlers
        self._metrics = metrics
        self._health = health
        self._stopping = False
        self._settlement: Settlement | None = None
        self._prepare = True
        self._reachability = Reachability(options.kafka)
        self._letters = DeadLetters(options.kafka, options.dead_letter_topic)
        self._subscription: Subscription
        self._whereabouts: Whereabouts
        self._kept: KeptOffsets
        self._database_problem: str | None = "not connected to the database yet"
        self._looked_at = 0.0
        self._ahead: tuple[list[Message], Batch] | None = None
        self._uncounted: tuple[Result, Batch] | None = None
        self.batches = 0
        """How many batches are settled."""

    def stop(self) -> None:
        """Ask the sink to finish its batch and end; fit for a signal handler."""
        self._stopping = True
        # A statement that still runs when most of the time is over is given up: its messages will come again.
        canceller = threading.Timer(self._options.shutdown_seconds * _SHARE_OF_SHUTDOWN_FOR_A_BATCH, self._cancel)
        canceller.daemon = True
        canceller.start()

    def _cancel(self) -> None:
        settlement = self._settlement
        if settlement is not None:
            with suppress(psycopg.Error):
                settlement.connection.cancel_safe(timeout=2.0)

    def run(self) -> None:
        """Consume until stopped.

        Raises:
            ServiceUnavailable: PostgreSQL or Kafka stayed away past the start deadline.
            SetupRequired: the tables are missing, past the start deadline.
        """
        self._health.watch("sink", stuck_after=180)
        self._reachability.start()
        self._await_services(time.monotonic() + self._options.start_deadline_seconds)
        if not self._stopping:
            self._consume()
        self._disconnect()
        self._reachability.close()
        _log.info("drained")

    def _consume(self) -> None:
        options = self._options
        self._subscription = Subscription(
            options.kafka, options.topics, options.group_id, options.group_instance_id, self._reachability.doubt
        )
        self._whereabouts = Whereabouts(self._subscription)
        _log.info("subscribed", topics=list(options.topics), group=options.group_id)
        try:
            while not self._stopping:
                self._report_readiness()
                messages = self._subscription.take(BATCH_ROWS, _POLL_SECONDS)
                if messages:
                    reach(Point.BATCH_CONSUMED)
                    self._settle(messages)
                else:
                    self._count_last()
                    self._subscription.pass_by()
                    self._look_at_database()
        finally:
            self._count_last()
            self._subscription.close(self._options.shutdown_seconds * _SHARE_OF_SHUTDOWN_FOR_THE_GROUP)

    def _await_services(self, deadline: float) -> None:
        said = None
        while not self._stopping:
            self._health.beat("sink")
            problem = self._reachability.problem
            missing: list[str] = []
            try:
                missing = self._connected().missing_tables()
            except psycopg.Error as error:
                problem = f"PostgreSQL: {self._problem_of(error)}"
            if problem is None and missing:
                problem = f"there is no table {', '.join(missing)}: run `outbox-connector setup`"
            self._database_problem = problem
            if problem is None:
                return
            self._health.ready("sink", problem)
            if problem != said:
                said = problem
                _log.warning("waiting_for_service", problem=problem)
            if time.monotonic() > deadline:
                kind = SetupRequired if missing and self._reachability.problem is None else ServiceUnavailable
                raise kind(f"past the start deadline: {problem}")
            if self._reachability.problem is None:
                time.sleep(_START_PAUSE)
            else:
                self._reachability.await_answer(_START_PAUSE)

    def _report_readiness(self) -> None:
        self._health.beat("sink")
        unassigned = None if self._subscription.assigned is not None else "no partitions are assigned yet"
        self._health.ready(
            "sink",
            self._database_problem or self._reachability.problem or self._subscription.problem or unassigned,
        )

    # --- the database ------------------------------------------------------------------------------------------------

    def _connected(self) -> Settlement:
        if self._settlement is None or self._settlement.connection.closed:
            options = self._options
            # Nothing is waited for within a transaction, so that one which is idle is that of a sink that hangs:
            # until the server ends it, it keeps its rows from the sink that took over.
            connection = connect(
                options.database_url,
                name="outbox-connector sink",
                idle_in_transaction_seconds=_IDLE_IN_TRANSACTION_SECONDS,
                prepare=self._prepare,
                by_index=True,
            )
            try:
                self._kept = KeptOffsets(connection, options.tables, options.group_id)
            except psycopg.Error:
                connection.close()
                raise
            self._settlement = Settlement(connection, options.tables, self._handlers, strict=options.strict)
        self._database_problem = None
        return self._settlement

    def _look_at_database(self) -> None:
        """While idle, find out whether the database is there, so that readiness need not wait for a message."""
        if time.monotonic() < self._looked_at + _LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        if self._settlement is not None and not is_alive(self._settlement.connection):
            self._disconnect()
        try:
            self._connected()
            self._whereabouts.agree(self._kept)
        except TimelineChanged:
            self._disconnect()
        except KafkaException as error:
            _log.warning("offsets_not_compared", error=error.args[0].str())
        except psycopg.Error as error:
            known = self._database_problem
            if self._problem_of(error) != known:
                _log.warning("database_away", error=self._database_problem)

    def _disconnect(self) -> None:
        if self._settlement is not None:
            self._settlement.connection.close()
            self._settlement = None

    # --- a batch -----------------------------------------------------------------------------------------------------

    def _settle(self, messages: list[Message]) -> None:
        """Settle a batch, however long the database is away, then let its offsets be committed."""
        wait = 0.1
        began = now() if self._tracing is not None else 0
        posted: set[int] = set()
        while messages:
            try:
                if messages := self._still_at_hand(messages):
                    batch, result = self._attempt(messages, posted)
                break
            except TimelineChanged:
                self._disconnect()
            except (psycopg.Error, KafkaException, DeadLetterUndelivered, NotVisibleYet) as error:
                if isinstance(error, psycopg.Error) and is_conflict(error):
                    continue
                if isinstance(error, psycopg.errors.QueryCanceled) and len(messages) > 1 and not self._stopping:
                    # Too much for the time that a statement has: half of it may do.
                    half = len(messages) // 2
                    _log.warning("batch_halved", error=describe(error), messages=len(messages))
                    self._subscription.put_back(messages[half:])
                    messages = messages[:half]
                    continue
                problem = self._problem_of(error)
                _log.warning("batch_postponed", error=problem, messages=len(messages))
                self._health.ready("sink", problem)
                if self._stopping:
                    return
                messages = self._pause(messages, wait)
                wait = min(wait * 2, _LONGEST_WAIT)
        self._subscription.resume()
        if not messages:
            return
        reach(Point.BATCH_COMMITTED)
        self.batches += 1
        self._keep_count(result, batch)
        if self._tracing is not None:
            self._trace(self._tracing, result, batch, began)
        self._subscription.store(batch.ends)
        reach(Point.OFFSET_STORED)

    def _still_at_hand(self, messages: list[Message]) -> list[Message]:
        """Return what need not be read again because the database is behind Kafka, as after a failover."""
        self._connected()
        gone_back = self._whereabouts.agree(self._kept)
        if not gone_back:
            return messages
        return [message for message in messages if (message.topic(), message.partition()) not in gone_back]

    def _attempt(self, messages: list[Message], posted: set[int]) -> tuple[Batch, Result]:
        """Settle a batch now; `posted` are the messages, by identity, whose dead letters are sent already."""
        settlement, kept = self._connected(), self._kept
        genuine = self._whereabouts.genuine(messages, settlement)
        ahead, self._ahead = self._ahead, None
        batch = ahead[1] if ahead is not None and ahead[0] == genuine else self._sort(genuine)
        batch.lost = len(messages) - len(genuine)
        # Each letter once, however often the database keeps the batch waiting.
        self._letters.send([letter for letter in batch.letters if id(letter[0]) not in posted])
        posted.update(id(message) for message, _ in batch.letters)
        if batch.letters:
            reach(Point.DEAD_LETTER_SENT)
        if batch.lost:
            batch.ends = ends_of(messages)
        offsets = self._whereabouts.behind(batch.ends)
        # While there is no backlog it is better to wait: what comes meanwhile then goes into one batch.
        look_ahead = partial(self._look_ahead, settlement) if self._subscription.more_waiting else None
        result = settlement.settle(
            batch.items, batch.unparsed, lambda: kept.keep(offsets), look_ahead, prepared=batch.prepared
        )
        return batch, result

    def _look_ahead(self, settlement: Settlement) -> None:
        """Count the last batch, and prepare the next one.

        That stays with the subscription, which lets go of what may not be ours any more.
        """
        self._count_last()
        messages = self._subscription.take(BATCH_ROWS, 0)
        self._subscription.put_back(messages)
        batch = self._sort(messages)
        batch.prepared = settlement.prepare(batch.items)
        self._ahead = messages, batch

    def _problem_of(self, error: psycopg.Error | KafkaException | DeadLetterUndelivered | NotVisibleYet) -> str:
        """Return what is wrong; a database connection that is of no use any more is closed."""
        if isinstance(error, KafkaException):
            return str(error.args[0].str())
        if not isinstance(error, psycopg.Error):
            return str(error)
        if is_pooler_trouble(error):
            self._prepare = False
        self._disconnect()
        self._database_problem = describe(error)
        return self._database_problem

    def _pause(self, messages: list[Message], seconds: float) -> list[Message]:
        """Stay a member of the group for a while without taking more; return what is still ours of the batch."""
        until = time.monotonic() + seconds
        self._subscription.pause()
        while time.monotonic() < until and not self._stopping:
            self._health.beat("sink")
            self._subscription.idle(0.1)
        return [message for message in messages if self._subscription.owns(message)]

    def _sort(self, messages: Sequence[Message]) -> Batch:
        batch = Batch([], [], [], {}, ends_of(messages))
        places: dict[int, int] = {}
        for message in messages:
            try:
                envelope = decode_envelope(message.value())
            except EnvelopeError as error:
                batch.letters.append((message, str(error)))
                continue
            key = message.key() or b""
            outbox_id, attempt = envelope.outbox_id, envelope.attempt
            batch.messages[outbox_id] = message
            handler = self._handlers.get(envelope.biz_type)
            if handler is None:
                text = f"no handler for biz_type {envelope.biz_type!r}: known are {', '.join(sorted(self._handlers))}"
                batch.unparsed.append(Failure(outbox_id, attempt, text, "unknown_biz_type", final=True))
                continue
            try:
                values = _values(handler, envelope.payload)
            except PayloadError as error:
                batch.unparsed.append(Failure(outbox_id, attempt, str(error), "payload", final=True))
                continue
            except Exception as error:  # noqa: BLE001 - another package's code may raise anything
                # Its next release may do better, so this is no verdict on the message.
                text = f"the handler of {envelope.biz_type!r} failed: {error!r}"
                batch.unparsed.append(Failure(outbox_id, attempt, text, "handler_failed"))
                continue
            item = Item(outbox_id, attempt, envelope.biz_type, key, values)
            place = places.get(outbox_id)
            if place is None:
                places[outbox_id] = len(batch.items)
                batch.items.append(item)
            else:
                # Two copies of one message: the row is stored once, and what counts is its newest attempt.
                batch.items[place] = max(batch.items[place], item, key=lambda copy: copy.attempt)
                batch.duplicates += 1
        return batch

    def _keep_count(self, result: Result, batch: Batch) -> None:
        """Count what became of a batch; of a backlog later, while the database is at work on the next one."""
        self._count_last()
        self._uncounted = result, batch
        if result.failures or batch.letters or not self._subscription.more_waiting:
            self._count_last()

    def _count_last(self) -> None:
        if self._uncounted is not None:
            result, batch = self._uncounted
            self._uncounted = None
            self._count(result, batch)

    def _count(self, result: Result, batch: Batch) -> None:
        metrics = self._metrics
        stored = held = 0
        outcomes = result.outcomes
        metrics.end_to_end.observe_each(
            outcome.age for outcome in outcomes if outcome.what == STORED and outcome.age is not None
        )
        for outcome in outcomes:
            if outcome.what == STORED:
                stored += 1
            elif outcome.what == HELD:
                held += 1
            else:
                metrics.skipped.labels(reason=outcome.what).inc()
        if batch.duplicates:
            metrics.skipped.labels(reason="duplicate").inc(batch.duplicates)
        if batch.lost:
            metrics.skipped.labels(reason="lost_row").inc(batch.lost)
        metrics.consumed.inc(stored)
        metrics.sink_batch_rows.observe(len(outcomes) + len(result.failures))
        metrics.dead_letters.inc(len(batch.letters))
        for message, reason in batch.letters:
            _log.warning(
                "dead_letter",
                reason=reason,
                topic=message.topic(),
                partition=message.partition(),
                offset=message.offset(),
                **_named(message),
            )
        if held:
            _log.info("messages_held", messages=held)
        self._count_failures(result, batch.messages)

    def _trace(self, tracing: Tracing, result: Result, batch: Batch, began: int) -> None:
        """Let each message's trace know what became of it, from the taking of its batch to now."""
        failures = {failure.outbox_id: failure for failure in result.failures}
        outcomes = {outcome.outbox_id: outcome.what for outcome in result.outcomes}
        for outbox_id, message in batch.messages.items():
            headers = headers_of(message)
            if not headers:
                continue
            topic = message.topic() or ""
            subject = Subject(outbox_id, topic, _key(message), headers, message.partition(), message.offset())
            failure = failures.get(outbox_id)
            if failure is not None:
                tracing.failed(subject, began, self._options.group_id, failure.reason, failure.error)
            else:
                tracing.processed(subject, began, self._options.group_id, outcomes.get(outbox_id, ""))

    def _count_failures(self, result: Result, messages: Mapping[int, Message]) -> None:
        settled = {row.outbox_id: row for row in result.settled}
        for failure in result.failures:
            # Taken out: a second copy of the same message changed nothing.
            row = settled.pop(failure.outbox_id, None)
            if row is None:
                self._metrics.skipped.labels(reason="stale").inc()
                continue
            if row.dead:
                self._metrics.dead.labels(reason=failure.reason).inc()
            else:
                self._metrics.retries_scheduled.inc()
            _log.warning(
                "message_dead" if row.dead else "retry_scheduled",
                outbox_id=failure.outbox_id,
                **_named(messages[failure.outbox_id]),
                attempt=failure.attempt,
                error=failure.error,
                due_in_seconds=row.due_in,
            )


def _named(message: Message) -> dict[str, str]:
    return named(_key(message), headers_of(message))


def _key(message: Message) -> str:
    return (message.key() or b"").decode("utf-8", "replace")


def _values(handler: Handler, payload: object) -> Sequence[object]:
    if isinstance(payload, Unreadable):
        raise PayloadError(f"payload: cannot be read: {payload.why}")
    values = handler.parse(payload)
    if len(values) != len(handler.columns):
        raise TypeError(f"{len(values)} values for {len(handler.columns)} columns")
    return values
