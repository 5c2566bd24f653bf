"""Where a value goes that names no outbox row: copied, with its reason, before its offset is passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from connector.kafka.clients import Kafka
from connector.kafka.deliveries import Delivery, Fate, fate_of, headers_of

HEADER_PREFIX: Final = "dead_letter_"
"""Begins the names of the headers that a letter has beside those of its message."""

_DEAD_LETTER_SECONDS: Final = 10.0


class DeadLetterUndelivered(Exception):
    """Kafka did not take a dead letter; its original must not be skipped."""


class DeadLetters:
    """Copies values that name no outbox row to a topic where somebody can look at them."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        """Remember where to; nothing is connected before the first letter."""
        self._kafka = kafka
        self._topic = topic
        self._producer: Producer | None = None

    def send(self, letters: Sequence[tuple[Message, str]]) -> None:
        """Copy messages, each with its reason, and return once Kafka has them all.

        Raises:
            DeadLetterUndelivered: it has not; send them again later.
        """
        if not letters:
            return
        if self._producer is None:
            self._producer = self._kafka.producer(lambda _error: None)
        failed: list[KafkaError] = []

        def delivered(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failed.append(error)

        try:
            for message, reason in letters:
                self._copy(self._producer, message, reason, delivered)
            left = self._producer.flush(_DEAD_LETTER_SECONDS)
        except (KafkaException, BufferError) as error:
            raise DeadLetterUndelivered(f"dead-letter topic {self._topic}: {error}") from None
        if left:
            self._producer.purge()
            self._producer.flush(1)
            raise DeadLetterUndelivered(f"dead-letter topic {self._topic}: Kafka took no letter in time")
        if failed:
            raise DeadLetterUndelivered(f"dead-letter topic {self._topic}: {failed[0].str()}")

    def _copy(self, producer: Producer, message: Message, reason: str, delivered: Delivery) -> None:
        value = message.value()
        headers = [
            *headers_of(message),
            (f"{HEADER_PREFIX}reason", reason.encode("utf-8", "replace")),
            (f"{HEADER_PREFIX}topic", (message.topic() or "").encode()),
            (f"{HEADER_PREFIX}partition", str(message.partition()).encode()),
            (f"{HEADER_PREFIX}offset", str(message.offset()).encode()),
        ]

        def too_large(error: KafkaError | None, answer: Message) -> None:
            """A copy that the topic cannot hold gives way to a letter that tells where the original lies."""
            if error is not None and fate_of(error) is Fate.TOO_LARGE and value is not None:
                size = (f"{HEADER_PREFIX}value_bytes", str(len(value)).encode())
                producer.produce(self._topic, None, message.key(), on_delivery=delivered, headers=[*headers, size])
            else:
                delivered(error, answer)

        producer.produce(self._topic, value, message.key(), on_delivery=too_large, headers=headers)
