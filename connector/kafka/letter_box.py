"""The dead-letter topic, read from its beginning, and its letters sent back to the topics they came from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, Producer, TopicPartition

from connector.errors import ServiceUnavailable, SetupRequired
from connector.kafka.clients import Kafka
from connector.kafka.dead_letters import HEADER_PREFIX
from connector.kafka.deliveries import Headers, headers_of

_SILENCE_SECONDS: Final = 20.0
_SEND_SECONDS: Final = 20.0
_AT_ONCE: Final = 100


class Letter(NamedTuple):
    """A dead letter: where it lies, the message as it was, why it was refused, and where it came from."""

    partition: int
    offset: int
    time: int
    """When it was written, in milliseconds since 1970."""
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    topic: str
    """Where it came from; empty where it does not tell."""
    complete: bool
    """Whether its value is whole: one too large for the dead-letter topic was left out."""


class LetterBox:
    """Reads the letters in no consumer group, and sends them back with the producer that everything is sent with."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        """Remember the dead-letter topic; nothing is connected yet."""
        self._kafka = kafka
        self._topic = topic
        self._producer: Producer | None = None

    def ends(self) -> dict[int, int]:
        """Return where each partition that holds a letter ends now.

        Raises:
            KafkaException: Kafka does not answer.
            SetupRequired: there is no such topic.
        """
        admin = self._kafka.admin()
        state = admin.topics(timeout=5).get(self._topic)
        if state is None:
            raise SetupRequired(f"there is no dead-letter topic {self._topic}: run `outbox-connector setup`")
        ranges = admin.log_ranges([(self._topic, partition) for partition in range(state.partitions)])
        return {partition: end for (_, partition), (first, end) in ranges.items() if end > first}

    def read(self, ends: dict[int, int]) -> Iterator[list[Letter]]:
        """Yield the letters before those ends, a few at a time, each partition in its order.

        Raises:
            ServiceUnavailable: Kafka brings none of them for long.
        """
        consumer = self._kafka.log_reader(f"{self._topic}.redrive", lambda _error: None)
        try:
            left = set(ends)
            consumer.assign([TopicPartition(self._topic, partition, OFFSET_BEGINNING) for partition in sorted(left)])
            heard = time.monotonic()
            while left:
                letters = []
                first = consumer.poll(0.5)
                for message in [first, *consumer.consume(_AT_ONCE - 1, 0)] if first is not None else []:
                    heard = time.monotonic()
                    partition, offset = message.partition() or 0, message.offset() or 0
                    error = message.error()
                    if error is not None:
                        if error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - it has no public name
                            raise ServiceUnavailable(f"dead-letter topic {self._topic}: {error.str()}")
                        left.discard(partition)
                        continue
                    if offset < ends.get(partition, 0):
                        letters.append(_letter(message))
                    if offset + 1 >= ends.get(partition, 0):
                        left.discard(partition)
                if letters:
                    yield letters
                    heard = time.monotonic()
                elif time.monotonic() > heard + _SILENCE_SECONDS:
                    raise ServiceUnavailable(f"dead-letter topic {self._topic}: Kafka brings nothing")
        finally:
            consumer.close()

    def send_back(self, letters: Sequence[Letter]) -> tuple[list[Letter], str | None]:
        """Send letters to their topics, in this order; return those that Kafka has taken, and what went wrong.

        Where each came from stands in its header `redriven_from`, as topic/partition/offset.
        """
        producer = self._producer = self._producer or self._kafka.producer(lambda _error: None)
        taken: list[Letter] = []
        refused: list[str] = []

        def sent(letter: Letter, error: KafkaError | None, _message: Message) -> None:
            if error is None:
                taken.append(letter)
            else:
                refused.append(f"topic {letter.topic}: {error.str()} ({error.name()})")

        try:
            for letter in letters:
                place = ("redriven_from", f"{self._topic}/{letter.partition}/{letter.offset}".encode())
                producer.produce(
                    letter.topic,
                    letter.value,
                    letter.key,
                    headers=[*letter.headers, place],
                    on_delivery=partial(sent, letter),
                )
        except (KafkaException, BufferError) as error:
            refused.append(str(error))
        if producer.flush(_SEND_SECONDS):
            producer.purge()
            producer.flush(1)
            refused.append("Kafka took no message in time")
        return taken, refused[0] if refused else None


def _letter(message: Message) -> Letter:
    told = {name: value or b"" for name, value in headers_of(message) if name.startswith(HEADER_PREFIX)}

    def text(name: str) -> str:
        value = told.get(HEADER_PREFIX + name, b"")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    return Letter(
        message.partition() or 0,
        message.offset() or 0,
        message.timestamp()[1],
        message.key(),
        message.value(),
        [(name, value) for name, value in headers_of(message) if not name.startswith(HEADER_PREFIX)],
        text("reason"),
        text("topic"),
        complete=f"{HEADER_PREFIX}value_bytes" not in told,
    )
