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
_SILENCE_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 10.0


class Record(NamedTuple):
    """A message as it lies in the log; `at` is in seconds since 1970, by the producer's clock."""

    partition: Partition
    offset: int
    at: float | None
    value: bytes | None


class LogScan:
    """A consumer that is given its partitions and offsets, and remembers none."""

    def __init__(self, kafka: Kafka, group_id: str) -> None:
        """Connect; `group_id` is only what librdkafka insists on, and what access rights may be bound to.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        self._troubles: list[KafkaError] = []
        self._consumer: Consumer = kafka.log_reader(group_id, self._troubles.append)

    def close(self) -> None:
        """Let go of the connections."""
        self._consumer.close()

    def offsets_at(self, partitions: Mapping[Partition, tuple[int, int]], moment: float) -> dict[Partition, int]:
        """Return each partition's first offset that is not older than a moment, given its first and end offset.

        Raises:
            KafkaException: a partition cannot be asked.
        """
        if not partitions:
            return {}
        asked = [TopicPartition(topic, number, max(0, round(moment * 1000))) for topic, number in partitions]
        found: dict[Partition, int] = {}
        for place in self._consumer.offsets_for_times(asked, timeout=_ANSWER_SECONDS):
            if place.error is not None:
                raise KafkaException(place.error)
            first, end = partitions[place.topic, place.partition]
            # Negative where every message is older.
            found[place.topic, place.partition] = end if place.offset < 0 else max(first, place.offset)
        return found

    def read(self, stretches: Mapping[Partition, tuple[int, int]]) -> Iterator[list[Record]]:
        """Yield everything between each partition's two offsets, the second one excluded, a few messages at a time.

        Raises:
            KafkaException: a partition cannot be read.
            ServiceUnavailable: Kafka says nothing for half a minute.
        """
        left = {partition: end for partition, (first, end) in stretches.items() if first < end}
        places = [TopicPartition(*partition, stretches[partition][0]) for partition in left]
        self._consumer.assign(places)
        # Some may still be paused since they were read before.
        self._consumer.resume(places)
        heard = time.monotonic()
        while left:
            messages = self._consumer.consume(_AT_ONCE, _POLL_SECONDS)
            if not messages and time.monotonic() > heard + _SILENCE_SECONDS:
                told = self._troubles[-1].str() if self._troubles else "no message came"
                raise ServiceUnavailable(f"Kafka stopped answering: {told}")
            if records := self._records(messages, left):
                yield records
            if messages:
                heard = time.monotonic()

    def _records(self, messages: Iterable[Message], left: dict[Partition, int]) -> list[Record]:
        """Return what is in the stretches, and take those out of `left` that are read."""
        records: list[Record] = []
        over: list[Partition] = []
        for message in messages:
            partition = message.topic() or "", message.partition() or 0
            if partition not in left:
                continue
            offset, error = message.offset() or 0, message.error()
            if error is None and offset < left[partition]:
                records.append(_record(partition, offset, message))
            elif error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - it has no public name
                raise KafkaException(error)
            # At the end of the log also where its last offsets hold no message.
            if offset + 1 >= left[partition] or error is not None:
                del left[partition]
                over.append(partition)
        if over:
            self._consumer.pause([TopicPartition(*partition) for partition in over])
        return records


def _record(partition: Partition, offset: int, message: Message) -> Record:
    kind, milliseconds = _timestamp(message)
    return Record(partition, offset, milliseconds / 1000 if kind else None, message.value())


def _timestamp(message: Message) -> tuple[int, int]:
    stamp: Any = message.timestamp()
    return stamp[0], stamp[1]
