"""The producer, with its batches small enough for the topics it writes to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from confluent_kafka import KafkaError

from connector.kafka.clients import PRODUCER_DEFAULTS, Kafka
from connector.kafka.deliveries import RECORD_OVERHEAD

PARTITION_BY_KEY = -1
"""Instead of a partition's number: the partitioner decides."""

_ANSWER_SECONDS = 2


class Publisher:
    """A producer, with what is known of the topics' limits."""

    def __init__(
        self, kafka: Kafka, topics: Iterable[str], on_error: Callable[[KafkaError], None], wary_of: Collection[str] = ()
    ) -> None:
        """Make the producer, its batches small enough for each of the topics, as far as they can be asked.

        Topics to be `wary_of` have refused a batch: if they do not tell their limit, each message goes alone.
        """
        self._admin = kafka.admin()
        self._limits: dict[str, int | None] = {}
        names = list(topics)
        self._ask(names)
        limits = [limit for topic in names if (limit := self._limits[topic]) is not None]
        if any(self._limits.get(topic) is None for topic in wary_of):
            limits.append(0)
        wanted = int(
            kafka.producer_options.get("batch.size")
            or kafka.options.get("batch.size")
            or PRODUCER_DEFAULTS["batch.size"]
        )
        # A broker refuses a whole batch that exceeds its topic's limit, with all of the small messages in it.
        self.batch_size = max(1, min([wanted, *(limit - RECORD_OVERHEAD for limit in limits)]))
        own = {**kafka.producer_options, "batch.size": str(self.batch_size)}
        self.producer = kafka._replace(producer_options=own).producer(on_error)
        self.produce = self.producer.produce
        self.poll = self.producer.poll

    def limit_of(self, topic: str, *, again: bool = False) -> int | None:
        """Return the topic's `max.message.bytes`, or None where the broker does not tell."""
        if again or topic not in self._limits:
            self._ask([topic])
        return self._limits[topic]

    def _ask(self, topics: list[str]) -> None:
        told = self._admin.topic_settings(topics, _ANSWER_SECONDS)
        for topic in topics:
            limit = told.get(topic, {}).get("max.message.bytes")
            self._limits[topic] = None if limit is None else int(limit)

    def suits(self, limit: int) -> bool:
        """Tell whether every batch stays below a topic's `max.message.bytes`."""
        return self.batch_size <= max(1, limit - RECORD_OVERHEAD)

    def abandon(self) -> None:
        """Throw away what is not delivered. None of it was confirmed, so all of it will be read again."""
        self.producer.purge(in_queue=True, in_flight=True, blocking=True)
        while self.producer.poll(0):
            pass  # reports of what was thrown away, which hold on to it
