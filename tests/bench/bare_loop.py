"""The least that a reader in Python must do: read a row, decode it, produce it. It marks and confirms nothing.

What it takes from a commit to a consumer is what PostgreSQL, Kafka and the turns of a full machine take.
`python -m tests.bench.bare_loop` is told where by the CONNECTOR_ variables.
"""

from __future__ import annotations

import os
import time
from typing import Final

from confluent_kafka import Producer

from connector.envelope import encode_envelope
from connector.outbox import OutboxRow
from connector.replication import ReplicationConnection
from connector.row import RowDecoder
from connector.wire.frames import XLogData, decode_frame
from connector.wire.pgoutput import Insert, Relation, decode
from tests.bench.arena import Arena, Running
from tests.bench.child import Child
from tests.bench.limits import PRODUCER

NAME: Final = "limit: a bare loop"
_FEEDBACK_SECONDS: Final = 3.0
_WAIT_SECONDS: Final = 0.05


def start(place: Arena) -> Running:
    """Start it on the arena's slot."""
    return Child.of_module("bare loop", "tests.bench.bare_loop", folder=place.directory, env=place.env).start()


def run() -> None:
    """Publish until killed."""
    env = os.environ
    replication = ReplicationConnection.open(env["CONNECTOR_DATABASE_URL"])
    replication.start(env["CONNECTOR_SLOT_NAME"], env["CONNECTOR_PUBLICATION_NAME"], 0)
    producer = Producer({**PRODUCER, "linger.ms": 0, "bootstrap.servers": env["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"]})
    decoders: dict[int, RowDecoder] = {}
    feedback_at = 0.0
    while True:
        data = replication.receive()
        if data is not None:
            row = _row(data, decoders)
            if row is not None:
                producer.produce(row.topic, encode_envelope(row), row.key)
            continue
        producer.poll(0)
        if time.monotonic() > feedback_at:
            replication.confirm(0, 0)
            feedback_at = time.monotonic() + _FEEDBACK_SECONDS
        replication.wait([], _WAIT_SECONDS)


def _row(data: bytes, decoders: dict[int, RowDecoder]) -> OutboxRow | None:
    for decoder in decoders.values():
        if (row := decoder.at_once(data)) is not None:
            return row
    frame = decode_frame(data)
    message = decode(frame.payload) if isinstance(frame, XLogData) else None
    if isinstance(message, Relation):
        decoders[message.oid] = RowDecoder(message)
    return decoders[message.relation_oid](message.values) if isinstance(message, Insert) else None


if __name__ == "__main__":
    run()
