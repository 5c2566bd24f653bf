"""How each kind of client is configured: what the environment may say, and what the guarantees fix."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from connector.errors import ConfigurationError
from connector.kafka.admin import Admin
from connector.kafka.deliveries import LARGEST_MESSAGE
from connector.kafka.tokens import for_librdkafka

T = TypeVar("T")

PRODUCER_DEFAULTS: Final[dict[str, str | int | bool]] = {
    "enable.idempotence": True,
    "acks": "all",
    "partitioner": "murmur2_random",  # as the Java client: other producers of a key meet ours in one partition
    "compression.type": "lz4",
    "linger.ms": 0,
    "batch.size": 256 * 1024,
    "message.max.bytes": LARGEST_MESSAGE,
    "message.timeout.ms": 0,
    "retries": (1 << 31) - 1,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 2 * LARGEST_MESSAGE // 1024,
    "topic.metadata.refresh.interval.ms": 10_000,
    "topic.metadata.propagation.max.ms": 5_000,
}
_TRANSACTION_SECONDS: Final = 10
"""After so long the broker ends a transaction whose producer is gone; until then consumers wait before its messages."""

_TRANSACTIONS: Final[dict[str, str | int | bool]] = {
    "transaction.timeout.ms": _TRANSACTION_SECONDS * 1_000,
    # librdkafka takes neither to be longer than the transaction.
    "message.timeout.ms": _TRANSACTION_SECONDS * 1_000,
    "socket.timeout.ms": _TRANSACTION_SECONDS * 1_000 - 1_000,
}
CONSUMER_DEFAULTS: Final[dict[str, str | int | bool]] = {
    "enable.auto.offset.store": False,
    "enable.auto.commit": True,
    "auto.commit.interval.ms": 1_000,
    "auto.offset.reset": "earliest",
    "partition.assignment.strategy": "cooperative-sticky",
    "queued.max.messages.kbytes": 8 * 1024,
    "queued.min.messages": 2_000,
    "fetch.max.bytes": 1024 * 1024,
    "fetch.message.max.bytes": 64 * 1024,  # compressed: what a partition yields at once may be many times that
    "fetch.wait.max.ms": 100,
    "fetch.queue.backoff.ms": 10,  # a partition whose queue was full would rest for a second, with the queue long empty
}
LOG_READER_DEFAULTS: Final[dict[str, str | int | bool]] = {
    **CONSUMER_DEFAULTS,
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    # As much as a batch of ours, and room for one of every partition: it reads them side by side.
    "fetch.message.max.bytes": 256 * 1024,
    "fetch.max.bytes": 8 * 1024 * 1024,
}
CLIENT_DEFAULTS: Final[dict[str, str | int | bool]] = {
    "client.id": "outbox-connector",
    "socket.keepalive.enable": True,
    "socket.connection.setup.timeout.ms": 10_000,
    "reconnect.backoff.ms": 2,  # librdkafka also rests for half of it before its very first connection
    "reconnect.backoff.max.ms": 2_000,
    "log_level": 4,
}


class Kafka(NamedTuple):
    """How to reach Kafka: bootstrap servers, and librdkafka options for both sides and for either."""

    bootstrap_servers: str
    options: Mapping[str, str]
    producer_options: Mapping[str, str] = {}
    consumer_options: Mapping[str, str] = {}

    def _configuration(
        self, *layers: Mapping[str, str | int | bool], log: logging.Logger | None = None
    ) -> dict[str, Any]:
        merged: dict[str, Any] = {**CLIENT_DEFAULTS, "bootstrap.servers": self.bootstrap_servers}
        for layer in layers:
            merged.update(layer)
        merged["logger"] = log or logging.getLogger("librdkafka")
        return for_librdkafka(merged)

    def _consuming(
        self, defaults: Mapping[str, str | int | bool], own: Mapping[str, str | int | bool]
    ) -> dict[str, Any]:
        return for_consumers(self._configuration(defaults, own, self.options, self.consumer_options))

    def producer(self, on_error: Callable[[KafkaError], None], transactional_id: str | None = None) -> Producer:
        """Make a producer; `on_error` hears of trouble with the brokers from within `poll`.

        With a `transactional_id` everything is sent in transactions, which must end within ten seconds.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        configuration = self._configuration(PRODUCER_DEFAULTS, self.options, self.producer_options)
        if transactional_id is not None:
            configuration.pop("delivery.timeout.ms", None)  # another name of message.timeout.ms
            configuration |= {"transactional.id": transactional_id, **_TRANSACTIONS}
        configuration["error_cb"] = on_error
        return _made("CONNECTOR_KAFKA_* or CONNECTOR_PRODUCER_*", Producer, configuration)

    def consumer(
        self,
        group_id: str,
        instance_id: str | None,
        on_error: Callable[[KafkaError], None],
        on_commit: Callable[[KafkaError | None, list[TopicPartition]], None],
    ) -> Consumer:
        """Make a consumer of a group; `instance_id` makes its membership static.

        `on_commit` hears of offsets that were committed, or could not be, from within `poll`.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        own: dict[str, str | int | bool] = {"group.id": group_id}
        if instance_id:
            own["group.instance.id"] = instance_id
        configuration = self._consuming(CONSUMER_DEFAULTS, own)
        configuration.update(error_cb=on_error, on_commit=on_commit)
        # Whatever the environment says, and by either name: what is stored is committed.
        configuration["enable.auto.commit"] = True
        configuration.pop("auto.commit.enable", None)
        return _made("CONNECTOR_KAFKA_* or CONNECTOR_CONSUMER_*", Consumer, configuration)

    def log_reader(self, group_id: str, on_error: Callable[[KafkaError], None]) -> Consumer:
        """Make a consumer that is assigned its partitions, joins no group and commits nothing.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        configuration = self._consuming(LOG_READER_DEFAULTS, {"group.id": group_id})
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


def for_consumers(configuration: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a producer may send, where librdkafka would not have a consumer that fetches less at once.

    A message of any size is read all the same.
    """
    most = configuration.get("message.max.bytes", 0)
    if int(most) <= int(configuration.get("fetch.max.bytes", most)):
        return configuration
    return {name: value for name, value in configuration.items() if name != "message.max.bytes"}


def _made(variables: str, client: Callable[[dict[str, Any]], T], configuration: dict[str, Any]) -> T:
    try:
        return client(configuration)
    except KafkaException as error:
        raise ConfigurationError([f"{variables}: librdkafka says: {error.args[0].str()}"]) from None
    except (TypeError, ValueError) as error:
        raise ConfigurationError([f"{variables}: librdkafka says: {error}"]) from None
