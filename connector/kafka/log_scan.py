"""Reads a stretch of topics' logs once, in no group's name: nothing is subscribed to, and nothing committed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from connector.errors import ServiceUnavailable
from connector.kafka.clients import Kafka

Partition = tuple[str, int]

_AT_ONCE: Final = 500
_POLL_SECONDS: Final = 0.5
_BEGIN_AGAIN_SECONDS: Final = 8.0


class Record(NamedTuple):
    """A message as it lies in the log; `at` is in seconds since 1970, by the producer's clock."""

    partition: Partition
    offset: int
    at: float | None
    key: bytes | None
    value: bytes | None


class LogScan:
    """A consumer that is given its partitions and offsets, and remembers none.

    It is made once there is something to read: librdkafka may crash where one is closed that has read nothing.
    """

    def __init__(self, kafka: Kafka, group_id: str, silence_seconds: float = 30.0) -> None:
        """Prepare; `group_id` is only what librdkafka insists on, and what access rights may be bound to."""
        self._kafka = kafka
        self._group_id = group_id
        self._silence_seconds = silence_seconds
        self._troubles: list[KafkaError] = []
        self._consumer: Consumer | None = None

    def close(self) -> None:
        """Let go of the connections."""
        if self._consumer is not None:
            self._consumer.close()

    def read(self, stretches: Mapping[Partition, tuple[int, int]]) -> Iterator[list[Record]]:
        """Yield what `messages` does, as records."""
        for messages in self.messages(stretches):
            yield [_record(message) for message in messages]

    def messages(self, stretches: Mapping[Partition, tuple[int, int]]) -> Iterator[list[Message]]:
        """Yield everything between each partition's two offsets, the second one excluded, a few messages at a time.

        Raises:
            ConfigurationError: librdkafka refuses an option.
            KafkaException: a partition cannot be read.
            ServiceUnavailable: Kafka says nothing for so long.
        """
        left = {partition: (first, end) for partition, (first, end) in stretches.items() if first < end}
        if not left:
            return
        if self._consumer is None:
            self._consumer = self._kafka.log_reader(self._group_id, self._troubles.append)
        self._assign(self._consumer, left)
        heard = asked = time.monotonic()
        while left:
            messages = self._consumer.consume(_AT_ONCE, _POLL_SECONDS)
            wanted, over = _sorted_out(messages, left)
            if over:
                self._consumer.pause([TopicPartition(*partition) for partition in over])
            if wanted:
                yield wanted
            now = time.monotonic()
            if wanted or over:
                heard = asked = now
            elif now > heard + self._silence_seconds:
                told = self._troubles[-1].str() if self._troubles else "no message came"
                raise ServiceUnavailable(f"Kafka stopped answering: {told}")
            elif now > asked + _BEGIN_AGAIN_SECONDS:
                # Whatever it is that the consumer waits for: it begins again where it was.
                self._assign(self._consumer, left)
                asked = now

    @staticmethod
    def _assign(consumer: Consumer, left: Mapping[Partition, tuple[int, int]]) -> None:
        places = [TopicPartition(*partition, first) for partition, (first, _) in left.items()]
        consumer.assign(places)
        # Some may still be paused since they were read before.
        consumer.resume(places)


def _sorted_out(
    messages: Iterable[Message], left: dict[Partition, tuple[int, int]]
) -> tuple[list[Message], list[Partition]]:
    """Return what is in the stretches, and the partitions that are read; what is read is taken out of `left`."""
    wanted: list[Message] = []
    over: list[Partition] = []
    for message in messages:
        partition = message.topic() or "", message.partition() or 0
        if partition not in left:
            continue
        first, end = left[partition]
        offset, error = message.offset() or 0, message.error()
        if error is None:
            if first <= offset < end:
                wanted.append(message)
            first = max(first, offset + 1)
        elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - it has no public name
            # The last offsets may hold no message. An end that comes earlier is that of what is certain: behind it is a
            # transaction that is still open.
            first = max(first, offset)
        else:
            raise KafkaException(error)
        left[partition] = first, end
        if first >= end:
            del left[partition]
            over.append(partition)
    return wanted, over


def _record(message: Message) -> Record:
    kind, milliseconds = _timestamp(message)
    partition = message.topic() or "", message.partition() or 0
    at = milliseconds / 1000 if kind else None
    return Record(partition, message.offset() or 0, at, message.key(), message.value())


def _timestamp(message: Message) -> tuple[int, int]:
    stamp: Any = message.timestamp()
    return stamp[0], stamp[1]
