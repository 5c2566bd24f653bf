"""Finds a message's copies in Kafka by when they were sent, within bounds."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from connector.envelope import decode_envelope
from connector.errors import EnvelopeError
from connector.kafka.clients import Kafka
from connector.kafka.log_scan import LogScan

_ANSWER_SECONDS: Final = 5
# For each of the times.
_MOST_MESSAGES: Final = 100_000
_MOST_SECONDS: Final = 3.0
_NAMED_WITHIN: Final = 200


class Copy(NamedTuple):
    """Where a copy lies, when it was sent (seconds since 1970, None if Kafka keeps no times), and as which attempt."""

    partition: int
    offset: int
    at: float | None
    attempt: int


class Copies(NamedTuple):
    """Copies in the order of their times; `complete` unless a bound was met in one of the given times."""

    copies: Sequence[Copy]
    looked_at: int
    complete: bool


def find_copies(
    kafka: Kafka, group_id: str, topic: str, outbox_id: int, times: Iterable[tuple[float, float]]
) -> Copies:
    """Look for a message's copies among those sent within `times`, in seconds since 1970.

    `group_id` is only what librdkafka insists on: nothing is subscribed to, and nothing committed.

    Raises:
        KafkaException: Kafka does not answer.
        ServiceUnavailable: Kafka stopped answering.
        ConfigurationError: librdkafka refuses an option.
    """
    admin = kafka.admin()
    state = admin.topics(_ANSWER_SECONDS).get(topic)
    partitions = [(topic, number) for number in range(0 if state is None else state.partitions)]
    ranges = admin.log_ranges(partitions, _ANSWER_SECONDS)
    named = re.compile(rb'"outbox_id"\s*:\s*%d\b' % outbox_id)
    copies: list[Copy] = []
    looked_at, complete = 0, True
    scan = LogScan(kafka, group_id)
    try:
        for since, until in _merged(times):
            first, last = admin.offsets_at(ranges, since), admin.offsets_at(ranges, until)
            bound, deadline = looked_at + _MOST_MESSAGES, time.monotonic() + _MOST_SECONDS
            for records in scan.read({partition: (first[partition], last[partition]) for partition in ranges}):
                looked_at += len(records)
                copies += [
                    Copy(record.partition[1], record.offset, record.at, _attempt(record.value))
                    for record in records
                    if record.value is not None and named.search(record.value, 0, _NAMED_WITHIN)
                ]
                if looked_at > bound or time.monotonic() > deadline:
                    complete = False
                    break
    finally:
        scan.close()
    return Copies(_in_order(copies), looked_at, complete=complete)


def _merged(times: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join times that overlap, so that nothing is read twice."""
    merged: list[tuple[float, float]] = []
    for since, until in sorted(times):
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(until, merged[-1][1]))
        else:
            merged.append((since, until))
    return merged


def _attempt(value: bytes) -> int:
    try:
        return decode_envelope(value).attempt
    except EnvelopeError:
        return 0


def _in_order(copies: list[Copy]) -> list[Copy]:
    return sorted(copies, key=lambda copy: (copy.at or 0, copy.partition, copy.offset))
