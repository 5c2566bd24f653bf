"""Finds in Kafka what was sent before a crash, so that rows that are read again after it are not sent twice.

Rows are read again in the order in which they were sent, so the log is read beside them, no further than they need.
Whatever keeps a copy from being found (a bound, a time-out, a permission that is missing) costs a second copy, no more:
a message counts as sent where one is there with the same key and the same value, which holds its id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from confluent_kafka import KafkaException, Message

from connector.envelope import encode_envelope
from connector.errors import ConfigurationError, ServiceUnavailable
from connector.kafka.admin import Admin
from connector.kafka.clients import Kafka
from connector.kafka.log_scan import LogScan
from connector.observability.logs import get_logger
from connector.outbox import OutboxRow

_ANSWER_SECONDS: Final = 2
_SILENCE_SECONDS: Final = 3.0
# What was read and not asked for yet: about 35 MB. It begins up to a second before the first row that is asked for, and
# a consumer may be far ahead in one partition while it is behind in another.
_MOST_KEPT: Final = 500_000
# Others may write to the topic all the while.
_MOST_LOOKS: Final = 10
# The clocks of two machines differ a little.
_MARGIN_SECONDS: Final = 1.0

_log = get_logger("kafka")


class AlreadySent:
    """What the topics hold since a time, asked for in about the order in which it was sent."""

    def __init__(self, kafka: Kafka, admin: Admin, group_id: str, since: float) -> None:
        """Look for nothing yet; `since` is in seconds since 1970, by the producer's clock.

        `group_id` is only what librdkafka insists on: nothing is subscribed to, and nothing committed.
        """
        self._kafka = kafka
        self._admin = admin
        self._group_id = group_id
        self._since = since - _MARGIN_SECONDS
        self._logs: dict[str, _Log] = {}
        self._found = 0

    def has(self, row: OutboxRow) -> bool:
        """Tell whether a row's message is there. A log that does not answer within seconds counts as empty."""
        log = self._logs.get(row.topic)
        if log is None:
            log = self._logs[row.topic] = _Log(self._messages(row.topic))
        there = log.take(hash((row.key, encode_envelope(row))))
        self._found += there
        return there

    def close(self) -> None:
        """Let go of the connections."""
        for log in self._logs.values():
            log.close()
        if self._found:
            _log.info("not_sent_twice", messages=self._found)

    def _messages(self, topic: str) -> Iterator[list[Message]]:
        scan = LogScan(self._kafka, self._group_id, silence_seconds=_SILENCE_SECONDS)
        try:
            admin = self._admin
            state = admin.topics(_ANSWER_SECONDS).get(topic)
            partitions = [(topic, number) for number in range(0 if state is None else state.partitions)]
            ranges = admin.log_ranges(partitions, _ANSWER_SECONDS)
            reached = admin.offsets_at(ranges, self._since, _ANSWER_SECONDS)
            for _ in range(_MOST_LOOKS):
                ends = {partition: end for partition, (_, end) in ranges.items()}
                if ends == reached:
                    return
                yield from scan.messages({partition: (reached[partition], ends[partition]) for partition in ends})
                # A broker may still have been at work on what was sent last when it was asked where the log ends.
                reached, ranges = ends, admin.log_ranges(partitions, _ANSWER_SECONDS)
        except (KafkaException, ServiceUnavailable, ConfigurationError) as error:
            _log.info("sent_not_looked_for", topic=topic, error=str(error))
        finally:
            scan.close()


class _Log:
    """One topic's messages, by the hash of their key and value, as far as they were read."""

    def __init__(self, messages: Iterator[list[Message]]) -> None:
        self._messages = messages
        self._read: set[int] = set()

    def take(self, wanted: int) -> bool:
        """Tell whether a message is there, once; read on until it is found."""
        while wanted not in self._read:
            messages = next(self._messages, None) if len(self._read) < _MOST_KEPT else None
            if messages is None:
                return False
            self._read.update(hash((message.key() or b"", message.value())) for message in messages)
        self._read.remove(wanted)
        return True

    def close(self) -> None:
        if hasattr(self._messages, "close"):
            self._messages.close()
