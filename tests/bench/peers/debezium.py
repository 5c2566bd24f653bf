"""Debezium's PostgreSQL connector with its outbox event router, on Kafka Connect."""

from __future__ import annotations

from typing import Final

from confluent_kafka.admin import NewTopic

from tests.bench.arena import OUTBOX, Arena, Running
from tests.bench.peers.connect import database_parts, plugin, start_connect, why_no_plugin

NAME: Final = "Debezium"
VERSION: Final = "3.6.1.Final"
_PLUGIN: Final = "debezium-connector-postgres"
_HEARTBEAT_MS: Final = 10_000

# (poll.interval.ms, the producer's linger.ms)
THROUGHPUT: Final = (10, 5)
LATENCY: Final = (1, 0)


def why_not() -> str | None:
    """Return why it cannot be had, or None."""
    return why_no_plugin(_PLUGIN, VERSION)


def start(place: Arena, tuned: tuple[int, int]) -> Running:
    """Start it on the arena's slot."""
    poll, linger = tuned
    prefix = f"{place.topic}-debezium"
    heartbeats = f"__debezium-heartbeat.{prefix}"
    admin = place.kafka.admin()
    if heartbeats not in admin.list_topics(timeout=10).topics:
        # It waits for this topic in vain where the broker makes none.
        admin.create_topics([NewTopic(heartbeats, 1, 1)])[heartbeats].result(20)
    settings = {
        "name": "outbox",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "tasks.max": "1",
        "plugin.name": "pgoutput",
        **{f"database.{name}": value for name, value in database_parts(place.database.url).items()},
        "topic.prefix": prefix,
        "slot.name": place.slot,
        "publication.name": place.publication,
        "publication.autocreate.mode": "disabled",
        "table.include.list": OUTBOX,
        "snapshot.mode": "no_data",
        "tombstones.on.delete": "false",
        # Headers that nobody has asked for.
        "extended.headers.enabled": "false",
        "heartbeat.interval.ms": str(_HEARTBEAT_MS),
        "max.batch.size": "4096",
        "max.queue.size": "16384",
        "poll.interval.ms": str(poll),
        "producer.override.acks": "all",
        "producer.override.linger.ms": str(linger),
        "producer.override.batch.size": "262144",
        "producer.override.compression.type": "lz4",
        "transforms": "outbox",
        "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
        "transforms.outbox.predicate": "is_outbox",
        "predicates": "is_outbox",
        "predicates.is_outbox.type": "org.apache.kafka.connect.transforms.predicates.TopicNameMatches",
        "predicates.is_outbox.pattern": f"{prefix}\\\\..*",
        "transforms.outbox.route.by.field": "topic",
        "transforms.outbox.route.topic.replacement": "${routedByValue}",
        "transforms.outbox.table.field.event.id": "id",
        "transforms.outbox.table.field.event.key": "message_key",
        "transforms.outbox.table.field.event.payload": "payload",
    }
    return start_connect(NAME, place, plugin(_PLUGIN, VERSION), settings)
