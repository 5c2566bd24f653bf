"""Kafka through librdkafka; the only place that imports `confluent_kafka`.

The producer is idempotent and never gives a message up for being slow: an outage is not a message's fault. The consumer
stores an offset only when told to, after the database has the message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, TypeVar, cast

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from connector.errors import ConfigurationError, ServiceUnavailable
from connector.observability.logs import get_logger

__all__ = [
    "Admin",
    "Consumer",
    "DeadLetterUndelivered",
    "DeadLetters",
    "Fate",
    "GroupMember",
    "GroupState",
    "Kafka",
    "KafkaError",
    "KafkaException",
    "Message",
    "Producer",
    "Publisher",
    "Reachability",
    "Subscription",
    "TopicPartition",
    "TopicState",
    "fate_of",
    "size_of",
]

Delivery = Callable[[KafkaError | None, Message], None]
Headers = list[tuple[str, str | bytes | None]]

T = TypeVar("T")

# Below the 100 MB at which a broker drops the connection instead of answering: beyond it no answer would ever come.
LARGEST_MESSAGE: Final = 64 * 1024 * 1024
_RECORD_OVERHEAD: Final = 100
_DEAD_LETTER_SECONDS: Final = 10.0

_log = get_logger("kafka")

_PRODUCER: Final[dict[str, str | int | bool]] = {
    "enable.idempotence": True,
    "acks": "all",
    "partitioner": "murmur2_random",  # as the Java client: other producers of a key meet ours in one partition
    "compression.type": "lz4",
    "linger.ms": 0,
    "batch.size": 256 * 1024,
    "message.max.bytes": LARGEST_MESSAGE,
    "message.timeout.ms": 0,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 2 * LARGEST_MESSAGE // 1024,
    "topic.metadata.refresh.interval.ms": 10_000,
    "topic.metadata.propagation.max.ms": 5_000,
}
_CONSUMER: Final[dict[str, str | int | bool]] = {
    "enable.auto.offset.store": False,
    "enable.auto.commit": True,
    "auto.commit.interval.ms": 1_000,
    "auto.offset.reset": "earliest",
    "partition.assignment.strategy": "cooperative-sticky",
    "queued.max.messages.kbytes": 8 * 1024,
    "queued.min.messages": 2_000,
    "fetch.max.bytes": 1024 * 1024,
    "fetch.message.max.bytes": 128 * 1024,  # compressed: what a partition yields at once may be many times that
    "fetch.wait.max.ms": 100,
}
_CLIENT: Final[dict[str, str | int | bool]] = {
    "client.id": "outbox-connector",
    "socket.keepalive.enable": True,
    "reconnect.backoff.ms": 100,
    "reconnect.backoff.max.ms": 2_000,
    "log_level": 4,
}


# What the guarantees stand on is not for the environment to change.
_FIXED: Final = {
    "enable.idempotence": "a retried produce request would double messages",
    "acks": "an acknowledged message must be on every replica",
    "message.timeout.ms": "an outage is not a message's fault",
    "delivery.timeout.ms": "an outage is not a message's fault",
    "transactional.id": "the reader does not use transactions",
    "group.id": "it has a variable of its own, CONNECTOR_GROUP_ID",
    "group.instance.id": "it has a variable of its own, CONNECTOR_POD_NAME",
    "enable.auto.offset.store": "an offset is committed only after the database has the message",
    "enable.auto.commit": "an offset is committed only after the database has the message",
    "partition.assignment.strategy": "partitions are taken over cooperatively",
}


class Fate(Enum):
    """What a failed delivery means for its message."""

    TOO_LARGE = auto()
    TOPIC_REFUSED = auto()
    NOT_ITS_FAULT = auto()


_COORDINATOR_BUSY: Final = frozenset(
    {
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
    }
)
_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_REFUSED: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001 - librdkafka's local errors have no public name
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.POLICY_VIOLATION,
        KafkaError.INVALID_RECORD,
        KafkaError._INVALID_ARG,  # noqa: SLF001
    }
)


def fate_of(error: KafkaError) -> Fate:
    """Tell what a delivery error means for the message it came for."""
    if error.code() in _TOO_LARGE:
        return Fate.TOO_LARGE
    return Fate.TOPIC_REFUSED if error.code() in _REFUSED else Fate.NOT_ITS_FAULT


class Kafka(NamedTuple):
    """How to reach Kafka: bootstrap servers, and librdkafka options for both sides and for either."""

    bootstrap_servers: str
    options: Mapping[str, str]
    producer_options: Mapping[str, str] = {}
    consumer_options: Mapping[str, str] = {}

    def _configuration(
        self, *layers: Mapping[str, str | int | bool], log: logging.Logger | None = None
    ) -> dict[str, Any]:
        problems = [
            f"CONNECTOR_{side}_{name.upper().replace('.', '_')}: cannot be set: {_FIXED[name]}"
            for side, options in (
                ("KAFKA", self.options),
                ("PRODUCER", self.producer_options),
                ("CONSUMER", self.consumer_options),
            )
            for name in options
            if name in _FIXED
        ]
        if problems:
            raise ConfigurationError(problems)
        merged: dict[str, Any] = {**_CLIENT, "bootstrap.servers": self.bootstrap_servers}
        for layer in layers:
            merged.update(layer)
        merged["logger"] = log or logging.getLogger("librdkafka")
        return merged

    def producer(self, on_error: Callable[[KafkaError], None]) -> Producer:
        """Make a producer; `on_error` hears of trouble with the brokers from within `poll`.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        configuration = self._configuration(_PRODUCER, self.options, self.producer_options)
        configuration["error_cb"] = on_error
        return _made("CONNECTOR_KAFKA_* or CONNECTOR_PRODUCER_*", Producer, configuration)

    def consumer(self, group_id: str, instance_id: str | None, on_error: Callable[[KafkaError], None]) -> Consumer:
        """Make a consumer of a group; `instance_id` makes its membership static.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        own: dict[str, str | int | bool] = {"group.id": group_id}
        if instance_id:
            own["group.instance.id"] = instance_id
        configuration = self._configuration(_CONSUMER, own, self.options, self.consumer_options)
        configuration["error_cb"] = on_error
        return _made("CONNECTOR_KAFKA_* or CONNECTOR_CONSUMER_*", Consumer, configuration)

    def admin(self) -> Admin:
        """Make an admin client.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        configuration = self._configuration(self.options)
        troubles: deque[KafkaError] = deque(maxlen=8)
        configuration["error_cb"] = troubles.append
        return Admin(_made("CONNECTOR_KAFKA_*", AdminClient, configuration), troubles)

    def check_options(self, group_id: str, instance_id: str | None) -> None:
        """Let librdkafka judge every option, without waiting for a broker.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        self.producer(lambda _error: None)
        self.consumer(group_id, instance_id, lambda _error: None).close()


def _made(variables: str, client: Callable[[dict[str, Any]], T], configuration: dict[str, Any]) -> T:
    try:
        return client(configuration)
    except KafkaException as error:
        raise ConfigurationError([f"{variables}: librdkafka says: {error.args[0].str()}"]) from None
    except (TypeError, ValueError) as error:
        raise ConfigurationError([f"{variables}: librdkafka says: {error}"]) from None


class Publisher:
    """A producer, with what is known of the topics' limits."""

    def __init__(self, kafka: Kafka, topics: Iterable[str], on_error: Callable[[KafkaError], None]) -> None:
        """Make the producer, its batches small enough for each of the topics, as far as they can be asked."""
        self._admin = kafka.admin()
        self._limits: dict[str, int | None] = {}
        limits = [limit for topic in topics if (limit := self.limit_of(topic)) is not None]
        wanted = int(
            kafka.producer_options.get("batch.size") or kafka.options.get("batch.size") or _PRODUCER["batch.size"]
        )
        # A broker refuses a whole batch that exceeds its topic's limit, with all of the small messages in it.
        self.batch_size = max(1, min([wanted, *(limit - _RECORD_OVERHEAD for limit in limits)]))
        options = {**kafka.producer_options, "batch.size": str(self.batch_size)}
        self.producer = kafka._replace(producer_options=options).producer(on_error)
        self.produce = self.producer.produce
        self.poll = self.producer.poll

    def limit_of(self, topic: str, *, again: bool = False) -> int | None:
        """Return the topic's `max.message.bytes`, or None where the broker does not tell."""
        if again or topic not in self._limits:
            limit = self._admin.topic_settings([topic]).get(topic, {}).get("max.message.bytes")
            self._limits[topic] = None if limit is None else int(limit)
        return self._limits[topic]

    def refresh(self, topic: str) -> None:
        """Ask anew whether a topic is there; librdkafka remembers an absent one for a while."""
        try:
            self.producer.list_topics(topic, timeout=2)
        except KafkaException:
            return

    def flush(self, seconds: float) -> int:
        """Wait until everything is delivered, at most so long; return how many messages are left."""
        return self.producer.flush(seconds)

    def abandon(self) -> None:
        """Throw away what is not delivered. None of it was confirmed, so all of it will be read again."""
        self.producer.purge(in_queue=True, in_flight=True, blocking=True)


def size_of(message: Message) -> int:
    """Return about how many bytes a message takes on the wire, uncompressed."""
    headers = sum(len(name) + len(value or b"") for name, value in headers_of(message))
    return len(message.value() or b"") + len(message.key() or b"") + headers + _RECORD_OVERHEAD


def headers_of(message: Message) -> Headers:
    """Return a message's headers, none as an empty list."""
    return cast("Headers", message.headers() or [])


class Subscription:
    """A member of a consumer group, cooperative, whose offsets move only when told to."""

    def __init__(
        self,
        kafka: Kafka,
        topics: Sequence[str],
        group_id: str,
        instance_id: str | None,
        on_error: Callable[[KafkaError], None],
    ) -> None:
        """Subscribe; `assigned` is None until the group has answered."""
        self._consumer: Consumer = kafka.consumer(group_id, instance_id, on_error)
        self._on_error = on_error
        self._paused = False
        self._kept: list[Message] = []
        self.assigned: set[tuple[str, int]] | None = None
        self.problem: str | None = None
        """What Kafka has against the subscription, such as a topic that is not there."""
        self._consumer.subscribe(
            list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        self.assigned = (self.assigned or set()) | {(p.topic, p.partition) for p in partitions}
        if self._paused and partitions:
            consumer.pause(partitions)
        self.problem = None
        _log.info("partitions_assigned", new=len(partitions), all=len(self.assigned))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign(partitions)
        self.assigned = (self.assigned or set()) - {(p.topic, p.partition) for p in partitions}
        _log.info("partitions_revoked", gone=len(partitions), all=len(self.assigned))

    def take(self, most: int, seconds: float) -> list[Message]:
        """Return up to so many messages, waiting so long for the first and not at all for the others.

        Raises:
            ServiceUnavailable: the consumer is at its end, for example because another one took its static membership.
        """
        messages, self._kept = self._kept, []
        if not messages:
            first = self._consumer.poll(seconds)
            if first is None:
                return []
            messages = [first, *self._consumer.consume(most - 1, 0)]
        return [message for message in messages if self._is_message(message) and self.owns(message)]

    def _is_message(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.fatal():
            raise ServiceUnavailable(f"the consumer cannot go on: {error.str()} ({error.name()})")
        self.problem = f"topic {message.topic()}: {error.str()} ({error.name()})"
        _log.warning("consumer_error", error=self.problem)
        self._on_error(error)
        return False

    def owns(self, message: Message) -> bool:
        """Tell whether the message's partition is still ours."""
        return (message.topic(), message.partition()) in (self.assigned or ())

    def store(self, messages: Sequence[Message]) -> None:
        """Let the offsets behind these messages be committed: the database has them."""
        last: dict[tuple[str, int], int] = {}
        for message in messages:
            last[message.topic() or "", message.partition() or 0] = (message.offset() or 0) + 1
        for (topic, partition), offset in last.items():
            if (topic, partition) in (self.assigned or ()):
                try:
                    self._consumer.store_offsets(offsets=[TopicPartition(topic, partition, offset)])
                except KafkaException as error:
                    # The partition went away this moment; its next owner reads the messages again.
                    _log.info("offset_not_stored", topic=topic, partition=partition, error=error.args[0].str())
        self.problem = None

    def pause(self) -> None:
        """Take no more messages, of partitions to come either."""
        self._paused = True
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        """Take messages again."""
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())

    def idle(self, seconds: float) -> None:
        """Stay in the group without taking messages; what had arrived before is kept for the next `take`."""
        message = self._consumer.poll(seconds)
        if message is not None:
            self._kept.append(message)

    def close(self) -> None:
        """Commit what is stored and leave the group (a static member keeps its place for a while)."""
        self._consumer.close()


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
            ("dead_letter_reason", reason.encode("utf-8", "replace")),
            ("dead_letter_topic", (message.topic() or "").encode()),
            ("dead_letter_partition", str(message.partition()).encode()),
            ("dead_letter_offset", str(message.offset()).encode()),
        ]

        def too_large(error: KafkaError | None, answer: Message) -> None:
            """A copy that the topic cannot hold gives way to a letter that tells where the original lies."""
            if error is not None and fate_of(error) is Fate.TOO_LARGE and value is not None:
                size = ("dead_letter_value_bytes", str(len(value)).encode())
                producer.produce(self._topic, None, message.key(), on_delivery=delivered, headers=[*headers, size])
            else:
                delivered(error, answer)

        producer.produce(self._topic, value, message.key(), on_delivery=too_large, headers=headers)


class Reachability(threading.Thread):
    """Knows whether Kafka answers; asks only when somebody has a doubt, so that an idle process stays idle."""

    def __init__(self, kafka: Kafka) -> None:
        """Prepare the thread, which begins with a doubt."""
        super().__init__(name="kafka-reachability", daemon=True)
        self._admin = kafka.admin()
        self._doubted = threading.Event()
        self._doubted.set()
        self._closed = False
        self.problem: str | None = "Kafka was not reached yet"
        """Why Kafka counts as away; None while it answers."""

    def doubt(self, _error: object = None) -> None:
        """Ask Kafka whether it is there; fits as librdkafka's `error_cb`."""
        self._doubted.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._doubted.set()

    def run(self) -> None:
        """Ask at each doubt, until an answer comes."""
        while True:
            self._doubted.wait()
            if self._closed:
                return
            self._doubted.clear()
            try:
                self._admin.topics(timeout=3)
                self.problem = None
            except KafkaException as error:
                self.problem = f"Kafka does not answer: {error.args[0].str()}"
                self._doubted.set()
                time.sleep(0.5)


class TopicState(NamedTuple):
    """A topic as the cluster describes it; `in_sync` is the fewest replicas in sync of any of its partitions."""

    partitions: int
    replication: int
    in_sync: int = 0
    leaderless: int = 0


class GroupMember(NamedTuple):
    """A member of a consumer group, and how many partitions it has."""

    client_id: str
    host: str
    instance_id: str | None
    partitions: int


class GroupState(NamedTuple):
    """A consumer group as its coordinator describes it: `stable`, `empty`, or `dead`, which is a group never seen."""

    state: str
    members: list[GroupMember]


class Admin:
    """The few administrative calls: topics, their settings, the group's lag."""

    def __init__(self, client: AdminClient, troubles: deque[KafkaError]) -> None:
        """Use an admin client, and what its `error_cb` puts into `troubles`."""
        self._client = client
        self._troubles = troubles

    def trouble(self) -> str | None:
        """Return what last stood between this client and a broker, such as a refused password; None for nothing."""
        self._client.poll(0)
        told = [error for error in self._troubles if error.code() != KafkaError._ALL_BROKERS_DOWN]  # noqa: SLF001
        return told[-1].str() if told else None

    def topics(self, timeout: float = 10) -> dict[str, TopicState]:
        """Return every topic that this client may see.

        Raises:
            KafkaException: no broker answered in time.
        """
        metadata = self._client.list_topics(timeout=timeout)
        return {
            name: TopicState(
                len(topic.partitions),
                max((len(p.replicas) for p in topic.partitions.values()), default=0),
                min((len(p.isrs) for p in topic.partitions.values()), default=0),
                sum(p.leader < 0 for p in topic.partitions.values()),
            )
            for name, topic in metadata.topics.items()
            if topic.error is None
        }

    def create_topics(self, names: Sequence[str], partitions: int, replication: int, timeout: float = 30) -> list[str]:
        """Make the topics that are not there; return the names of those made.

        Raises:
            KafkaException: the cluster refuses one of them.
        """
        if not names:
            return []
        made = []
        futures = self._client.create_topics(
            [NewTopic(name, num_partitions=partitions, replication_factor=replication) for name in names],
            operation_timeout=timeout,
            request_timeout=timeout,
        )
        for name, future in futures.items():
            try:
                future.result()
                made.append(name)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
        return made

    def topic_settings(self, topics: Iterable[str], timeout: float = 5) -> dict[str, dict[str, str]]:
        """Return the settings of each topic that the cluster tells about; none for those it does not."""
        resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
        settings: dict[str, dict[str, str]] = {}
        if not resources:
            return settings
        for resource, future in self._client.describe_configs(resources, request_timeout=timeout).items():
            try:
                settings[resource.name] = {name: entry.value for name, entry in future.result().items()}
            except KafkaException:
                continue
        return settings

    def group_offsets(self, group_id: str, timeout: float = 10) -> dict[tuple[str, int], int]:
        """Return the committed offset of each partition that the group has committed.

        Raises:
            KafkaException: the group cannot be asked.
        """
        request = confluent_kafka.ConsumerGroupTopicPartitions(group_id)
        ask = self._client.list_consumer_group_offsets
        offsets = _from_coordinator(lambda: ask([request], request_timeout=timeout), timeout)
        return {
            (entry.topic, entry.partition): entry.offset
            for entry in offsets.topic_partitions
            if entry.offset is not None and entry.offset >= 0
        }

    def group(self, group_id: str, timeout: float = 5) -> GroupState:
        """Return a group's state and members.

        Raises:
            KafkaException: the group cannot be asked.
        """
        ask = self._client.describe_consumer_groups
        group = _from_coordinator(lambda: ask([group_id], request_timeout=timeout), timeout)
        members = [
            GroupMember(
                member.client_id,
                member.host,
                member.group_instance_id,
                len(member.assignment.topic_partitions) if member.assignment else 0,
            )
            for member in group.members
        ]
        return GroupState(group.state.name.lower(), members)

    def log_ranges(
        self, partitions: Iterable[tuple[str, int]], timeout: float = 5
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the first offset and the one past the last of each partition.

        Raises:
            KafkaException: a partition cannot be asked.
        """
        wanted = [TopicPartition(topic, partition) for topic, partition in partitions]
        if not wanted:
            return {}
        first, end = (
            self._client.list_offsets(dict.fromkeys(wanted, spec), request_timeout=timeout)
            for spec in (OffsetSpec.earliest(), OffsetSpec.latest())  # type: ignore[no-untyped-call]
        )
        ends = {(place.topic, place.partition): future.result().offset for place, future in end.items()}
        return {
            (place.topic, place.partition): (future.result().offset, ends[place.topic, place.partition])
            for place, future in first.items()
        }


def _from_coordinator(ask: Callable[[], Mapping[Any, Any]], timeout: float) -> Any:  # noqa: ANN401 - the library's own
    """Return the one answer of a group's coordinator, which may need a moment after a broker's start."""
    deadline = time.monotonic() + timeout
    while True:
        (future,) = ask().values()
        try:
            return future.result()
        except KafkaException as error:
            if error.args[0].code() not in _COORDINATOR_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
