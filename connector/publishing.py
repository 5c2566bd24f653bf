"""Hands rows to the producer, and hears what becomes of them.

Only delivery reports count: a row is published when Kafka says so, and a refusal is either the row's own failure or
the producer's, never both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from connector.envelope import decode_envelope, decode_headers, encode_envelope, outbox_id_of
from connector.failpoints import Point, armed, reach
from connector.kafka import (
    LARGEST_MESSAGE,
    PARTITION_BY_KEY,
    Admin,
    Fate,
    Kafka,
    KafkaError,
    KafkaException,
    Message,
    Publisher,
    fate_of,
    size_of,
)
from connector.ledger import Lot
from connector.observability.logs import get_logger
from connector.observability.tracing import Headers, OpenSpans, Subject, Tracing, named
from connector.outbox import Failure, OutboxRow

if TYPE_CHECKING:
    from connector.observability.metrics import ReaderMetrics

MOST_IN_FLIGHT: Final = 8_000
MOST_BYTES_IN_FLIGHT: Final = 24 * 1024 * 1024
_ROWS_PER_LOT: Final = 2_500
_BYTES_PER_LOT: Final = 1024 * 1024
_DRAIN_SECONDS: Final = 1.0
_BETWEEN_DRAINS_SECONDS: Final = 10.0

_log = get_logger("reader")


class PublisherBroken(Exception):
    """The producer cannot go on; everything unconfirmed is read and published again with a new one."""


class Shipment:
    """Rows that are published together: their lot, and the one delivery callback of all of its messages."""

    __slots__ = ("_publishing", "asked", "due", "lot", "spans")

    def __init__(self, publishing: Publishing, *, due: bool) -> None:
        """Begin with no row; `due` rows come from the table because their time has come."""
        self._publishing = publishing
        self.due = due
        self.lot = Lot(time.monotonic())
        self.asked = False
        """Whether Kafka was asked something for one of the rows: meanwhile PostgreSQL waited for a word from us."""
        self.spans: OpenSpans | None = None

    @property
    def full(self) -> bool:
        """Whether the next row belongs into the next shipment, after a look at what is in flight."""
        lot = self.lot
        return len(lot.fences) >= _ROWS_PER_LOT or lot.bytes >= _BYTES_PER_LOT or bool(lot.failures) or self.asked

    def add(self, row: OutboxRow) -> None:
        """Hand a row to the producer. Whatever becomes of it, the lot hears of it."""
        lot = self.lot
        lot.fences.append(row.fence)
        if row.fence.outbox_id > 0:
            value = encode_envelope(row)
            lot.bytes += len(value) + len(row.key) + len(row.headers or b"")
            self._publishing.produce(self, row, value)
        else:
            lot.awaited -= 1
            # No consumer would take its message for one of ours, and nothing would ever settle the row.
            text = f"the id of a message must be positive, and this is {row.fence.outbox_id}: enqueue it again"
            attempt = max(0, row.fence.retry_count)
            failure = Failure(row.fence.outbox_id, attempt, text, "id_not_positive", final=True, named=_named(row))
            lot.failed(failure)

    def pass_over(self, row: OutboxRow) -> None:
        """Count a row as acknowledged whose message Kafka has already."""
        self.lot.fences.append(row.fence)
        self.lot.awaited -= 1

    def close(self) -> None:
        """Add no more rows."""
        if self.lot.fences:
            self.lot.close()
            self._publishing.closed(self)

    def __call__(self, error: KafkaError | None, message: Message, headers: Headers = ()) -> None:
        """Take a delivery report; librdkafka calls this from within `Publishing.turn`, and tells no headers."""
        lot = self.lot
        lot.awaited -= 1
        if self.spans is not None:
            self._end_span(self.spans, error, message)
        if error is not None:
            envelope = decode_envelope(message.value())
            key = (message.key() or b"").decode("utf-8", "replace")
            attempt = Failure(envelope.outbox_id, envelope.attempt, "", "", named=named(key, headers))
            size = size_of(message.value(), message.key(), headers)
            self._publishing.refused(lot, error, attempt, message.topic() or "", size)
        if not lot.awaited:
            self._publishing.answered(self)

    def begin_span(self, tracing: Tracing, row: OutboxRow, headers: Headers) -> None:
        """Let a row's trace know that it is handed over."""
        if self.spans is None:
            self.spans = OpenSpans(tracing)
        key = row.key.decode("utf-8", "replace")
        self.spans.begin(Subject(row.fence.outbox_id, row.topic, key, headers))

    def _end_span(self, spans: OpenSpans, error: KafkaError | None, message: Message) -> None:
        outbox_id = outbox_id_of(message.value())
        if error is None:
            spans.end(outbox_id, message.partition(), message.offset())
        else:
            spans.fail(outbox_id, error.name(), error.str())


class Publishing:
    """The producer's side of the reader: what is in flight, within bounds."""

    def __init__(
        self,
        kafka: Kafka,
        admin: Admin,
        topics: Iterable[str],
        metrics: ReaderMetrics,
        *,
        on_error: Callable[[KafkaError], None],
        on_answered: Callable[[Shipment], None],
        tracing: Tracing | None = None,
    ) -> None:
        """Make the producer; `on_answered` gets each shipment for whose every row Kafka has answered."""
        self._tracing = tracing
        self._kafka = kafka
        self._admin = admin
        self._topics = set(topics)
        self._wary_of: set[str] = set()
        self._metrics = metrics
        self._on_error = on_error
        self._on_answered = on_answered
        self._begin()

    def _begin(self) -> None:
        self._broken: str | None = None
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._refused: list[Lot] = []
        self._drain_until = 0.0
        self._publisher = Publisher(self._kafka, self._admin, sorted(self._topics), self._on_error, self._wary_of)
        _log.info("producer_ready", batch_bytes=self._publisher.batch_size)

    def replace(self) -> None:
        """Throw away what is in flight and begin with a new producer."""
        self._publisher.abandon()
        self._begin()

    def pace(self, *, backlog: bool) -> None:
        """Let messages wait a moment for others while there is a backlog, and go at once while there is none.

        Each pace has a producer of its own, and the order of a key holds within one only: before the other one goes on,
        all that is on its way has to arrive. For that there is no room for more, for a moment: Kafka may be away.
        """
        now = time.monotonic()
        if backlog == self._publisher.backlog:
            self._drain_until = 0.0
            return
        if self.in_flight and now < self._drain_until + _BETWEEN_DRAINS_SECONDS:
            return  # It is at it, or was in vain; the other producer is not asked at each turn.
        ready = self._publisher.may_change(backlog=backlog)
        self._drain_until = now + _DRAIN_SECONDS if ready and self.in_flight else 0.0
        if ready and not self.in_flight:
            self._publisher.change(backlog=backlog)

    @property
    def has_room(self) -> bool:
        """Whether a shipment may be handed over; one message of any size always fits into an empty pipe.

        A refusal closes the pipe until it is written to its row: what follows it in its key must find that there.
        """
        if self._refused:
            self._refused = [lot for lot in self._refused if not lot.written]
        if self._drain_until and time.monotonic() < self._drain_until:
            return False
        return self.in_flight < MOST_IN_FLIGHT and self._bytes_in_flight < MOST_BYTES_IN_FLIGHT and not self._refused

    def publish(self, rows: Iterable[OutboxRow]) -> Lot:
        """Publish rows that the table has instead of the stream, in this order."""
        shipment = Shipment(self, due=False)
        for row in rows:
            shipment.add(row)
        shipment.close()
        return shipment.lot

    def turn(self, seconds: float) -> None:
        """Let deliveries come in, waiting for the first of them at most so long.

        Raises:
            PublisherBroken: a delivery failed for no fault of its message.
        """
        self._publisher.poll(seconds)
        if self._broken is not None:
            raise PublisherBroken(self._broken)

    def produce(self, shipment: Shipment, row: OutboxRow, value: bytes) -> None:
        """Hand one message to librdkafka, which copies it."""
        if not self._takes(row.topic, shipment):
            return  # it will be read again
        headers = decode_headers(row.headers) if row.headers is not None else None
        if headers and self._tracing is not None:
            shipment.begin_span(self._tracing, row, headers)
        while True:
            try:
                if headers:
                    report = partial(shipment, headers=headers)
                    self._publisher.produce(row.topic, value, row.key, on_delivery=report, headers=headers)
                else:
                    # By position, and without empty headers: this is the call that is made for each row.
                    self._publisher.produce(row.topic, value, row.key, PARTITION_BY_KEY, shipment)
            except BufferError:
                self._publisher.poll(0.05)
            except KafkaException as error:
                shipment.lot.awaited -= 1
                if shipment.spans is not None:
                    shipment.spans.fail(row.fence.outbox_id, error.args[0].name(), error.args[0].str())
                attempt = Failure(row.fence.outbox_id, row.fence.retry_count, "", "", named=_named(row))
                size = size_of(value, row.key, headers or [])
                self.refused(shipment.lot, error.args[0], attempt, row.topic, size)
                return
            else:
                if armed:
                    reach(Point.ROW_PRODUCED)
                return

    def _takes(self, topic: str, shipment: Shipment) -> bool:
        """Tell whether the producer may go on; a topic that the settings do not name is asked for its limit first.

        Of a producer that is new to a topic a broker may refuse the first batch, and take the second.
        """
        if topic not in self._topics:
            self._topics.add(topic)
            shipment.asked = True
            limit = self._publisher.limit_of(topic)
            if limit is not None and not self._publisher.suits(limit):
                self._broken = f"topic {topic} takes {limit} bytes at most, less than a batch"
        return self._broken is None

    def closed(self, shipment: Shipment) -> None:
        """Count what is on its way."""
        lot = shipment.lot
        self.in_flight += lot.rows
        self._bytes_in_flight += lot.bytes
        if lot.answered:
            self.answered(shipment)

    def answered(self, shipment: Shipment) -> None:
        """Count and pass on a shipment for whose every row an answer came."""
        if self._broken is not None:
            # One of its messages may be among those that failed for no fault of theirs: it must not be marked.
            return
        reach(Point.ROWS_ACKNOWLEDGED)
        lot = shipment.lot
        self.in_flight -= lot.rows
        self._bytes_in_flight -= lot.bytes
        waited = time.monotonic() - lot.opened_at
        ends = [first for _, first in lot.waits[1:]] + [lot.rows]
        for (lag, first), end in zip(lot.waits, ends, strict=False):
            if end > first:
                self._metrics.commit_to_ack.observe(lag + waited, end - first)
        self._metrics.published.inc(lot.rows - len(lot.failures))
        self._on_answered(shipment)

    def refused(self, lot: Lot, error: KafkaError, attempt: Failure, topic: str, size: int) -> None:
        """Decide what a refused message means: its row's failure, or the producer's."""
        self._metrics.publish_failures.inc()
        if self._broken is not None:
            return
        fate = fate_of(error)
        if fate is Fate.TOO_LARGE:
            limit = self._limit(topic, size)
            if self._publisher.batch_size > (1 if limit is None else limit):
                # The broker refused a whole batch; the message alone might pass.
                self._wary_of.add(topic)
                takes = "an unknown number of bytes" if limit is None else f"{limit} bytes"
                self._broken = f"topic {topic} takes {takes} at most, less than a batch"
                return
            text = (
                f"the message takes about {size} bytes, more than topic {topic} allows (max.message.bytes"
                f" {'unknown' if limit is None else limit}): enqueue less, or raise the topic's limit and run"
                f" `outbox-connector redrive --id {attempt.outbox_id} --yes`"
            )
            lot.failed(attempt._replace(error=text, reason="message_too_large", final=True))
        elif fate is Fate.TOPIC_REFUSED:
            text = (
                f"Kafka refuses topic {topic}: {error.str()} ({error.name()})."
                " Create the topic, or let this client write to it"
            )
            lot.failed(attempt._replace(error=text, reason="topic_refused"))
            self._refused.append(lot)
        elif fate is Fate.NEIGHBOUR_REFUSED:
            text = f"Kafka refused another message of the same batch for topic {topic}: {error.str()}"
            lot.failed(attempt._replace(error=text, reason="neighbour_refused", blameless=True))
            self._refused.append(lot)
        else:
            self._broken = f"delivery failed for no fault of the message: {error.str()} ({error.name()})"

    def _limit(self, topic: str, size: int) -> int | None:
        if size > LARGEST_MESSAGE:
            return LARGEST_MESSAGE
        limit = self._publisher.limit_of(topic)
        # What is remembered cannot be why the broker refused it: the limit has changed since.
        return self._publisher.limit_of(topic, again=True) if limit is not None and size <= limit else limit


def _named(row: OutboxRow) -> dict[str, str]:
    headers = decode_headers(row.headers) if row.headers is not None else []
    return named(row.key.decode("utf-8", "replace"), headers)
