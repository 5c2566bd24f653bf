"""The producers, one while there is a backlog and one for later, their batches small enough for their topics."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from confluent_kafka import KafkaError, KafkaException, Producer

from connector.kafka.admin import Admin
from connector.kafka.clients import PRODUCER_DEFAULTS, Kafka
from connector.kafka.deliveries import RECORD_OVERHEAD

PARTITION_BY_KEY = -1
"""Instead of a partition's number: the partitioner decides."""

_ANSWER_SECONDS = 2
# So many milliseconds make few large requests of many small ones, which cost a broker four times as much.
_LINGER_IN_A_BACKLOG = "10"
# A producer gets its id from a broker first, and librdkafka takes half a second for that.
_BEGINNER_SECONDS = 1.0
_READY_ANSWER_SECONDS = 0.1
_LOOK_AGAIN_SECONDS = 10.0
_LINGERS = frozenset({"linger.ms", "queue.buffering.max.ms"})


class Publisher:
    """A producer for a backlog, whose messages wait for each other, and one for later, whose messages go at once.

    With what is known of the topics' limits. It begins with that for a backlog: who starts has one, if a small one.
    """

    def __init__(
        self,
        kafka: Kafka,
        admin: Admin,
        topics: Iterable[str],
        on_error: Callable[[KafkaError], None],
        wary_of: Collection[str] = (),
    ) -> None:
        """Make the first producer, its batches small enough for each of the topics, as far as `admin` can ask.

        Topics to be `wary_of` have refused a batch: if they do not tell their limit, each message goes alone.
        """
        self._admin = admin
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
        self._kafka = kafka._replace(producer_options={**kafka.producer_options, "batch.size": str(self.batch_size)})
        self._on_error = on_error
        self._lingers_as_told = bool(_LINGERS & (kafka.options.keys() | kafka.producer_options.keys()))
        self._topic = next(iter(names), None)
        self._made: dict[bool, tuple[Producer, float]] = {}
        """By whether it is for a backlog: each producer, and from when on it is asked whether it is ready."""
        self.change(backlog=True)

    def may_change(self, *, backlog: bool) -> bool:
        """Tell whether the producer for a backlog, or the one for later, is another one than now, and Kafka answers it.

        There is no other one where the settings say how long messages wait for each other: that holds for both.
        """
        if backlog == self.backlog or self._lingers_as_told:
            return False
        producer, look_at = self._made_for(backlog=backlog)
        now = time.monotonic()
        if now < look_at:
            return False
        try:
            # It may have no connection any more, or none yet, and Kafka another password than when we began.
            producer.list_topics(self._topic, _READY_ANSWER_SECONDS)
        except KafkaException:
            self._made[backlog] = producer, now + _LOOK_AGAIN_SECONDS
            return False
        return True

    def change(self, *, backlog: bool) -> None:
        """Go on with the producer for a backlog, or the one for later; nothing of the other one's may be on its way."""
        self.backlog = backlog
        self._producer, _ = self._made_for(backlog=backlog)
        self.produce = self._producer.produce

    def _made_for(self, *, backlog: bool) -> tuple[Producer, float]:
        if backlog not in self._made:
            kafka = self._kafka
            if backlog and not self._lingers_as_told:
                kafka = kafka._replace(producer_options={**kafka.producer_options, "linger.ms": _LINGER_IN_A_BACKLOG})
            self._made[backlog] = kafka.producer(self._on_error), time.monotonic() + _BEGINNER_SECONDS
        return self._made[backlog]

    def poll(self, seconds: float) -> None:
        """Let deliveries and errors come in, waiting for the first of them at most so long."""
        for producer, _ in self._made.values():
            if producer is not self._producer:
                producer.poll(0)
        self._producer.poll(seconds)

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
        for producer, _ in self._made.values():
            producer.purge(in_queue=True, in_flight=True, blocking=True)
            while producer.poll(0):
                pass  # reports of what was thrown away, which hold on to it
