"""Debezium's JDBC sink on Kafka Connect: it inserts, and knows neither guard nor status."""

from __future__ import annotations

import json
from typing import Final

from connector.outbox import OutboxRow
from tests.bench.arena import HISTORY, Arena, Running
from tests.bench.peers.connect import database_parts, plugin, start_connect, why_no_plugin

NAME: Final = "Debezium JDBC sink"
VERSION: Final = "3.3.0.Final"
_PLUGIN: Final = "debezium-connector-jdbc"
_BATCH: Final = 5_000

_FIELDS: Final = {
    "user_id": "int64",
    "chat_id": "string",
    "message_content": "string",
    "role": "string",
    "outbox_id": "int64",
}


def why_not() -> str | None:
    """Return why it cannot be had, or None."""
    return why_no_plugin(_PLUGIN, VERSION)


def encode(row: OutboxRow) -> bytes:
    """Return the message it gets: the payload with `outbox_id`, flat, so that it has nothing to transform."""
    return b'{"outbox_id": %d, %b' % (row.fence.outbox_id, row.payload[1:])


def start(place: Arena) -> Running:
    """Start it on the arena's topic."""
    database = database_parts(place.database.url)
    url = f"jdbc:postgresql://{database['hostname']}:{database['port']}/{database['dbname']}?reWriteBatchedInserts=true"
    fields = [{"field": name, "type": kind, "optional": False} for name, kind in _FIELDS.items()]
    settings = {
        "name": "history",
        "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
        "tasks.max": "1",
        "topics": place.topic,
        "connection.url": url,
        "connection.username": database["user"],
        "connection.password": database["password"],
        "insert.mode": "insert",
        "primary.key.mode": "none",
        "schema.evolution": "none",
        "collection.name.format": HISTORY,
        "batch.size": str(_BATCH),
        # The schema is told once, not with each message.
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "true",
        "value.converter.schema.content": json.dumps({"type": "struct", "fields": fields, "optional": False}),
        "consumer.override.max.poll.records": str(_BATCH),
        "consumer.override.auto.offset.reset": "earliest",
    }
    return start_connect(NAME, place, plugin(_PLUGIN, VERSION), settings)
