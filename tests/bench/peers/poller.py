"""The design that this connector replaces, on the same libraries: poll every second, handle one row at a time.

`python -m tests.bench.peers.poller publish` takes pending rows to Kafka, `… store` takes messages to history; both are
told where by the CONNECTOR_ variables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Final

import psycopg
from confluent_kafka import Consumer, KafkaException, Producer

from tests.bench.arena import HISTORY, OUTBOX, Arena, Running
from tests.bench.child import Child

NAME: Final = "polling"
MOST_ROWS: Final = 5_000
"""More than this is not waited for."""
MOST_A_SECOND: Final = 200.0
"""At a higher rate it falls behind without end, and has no latency to speak of."""
_POLL_SECONDS: Final = 1.0
_AT_ONCE: Final = 100


def start(place: Arena, command: str) -> Running:
    """Start `publish` or `store`."""
    name, module = f"{NAME} {command}", "tests.bench.peers.poller"
    return Child.of_module(name, module, command, folder=place.directory, env=place.env).start()


def publish() -> None:
    """Publish pending rows, each acknowledged and marked before the next is taken."""
    producer = Producer({"bootstrap.servers": os.environ["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"], "acks": "all"})
    with psycopg.connect(os.environ["CONNECTOR_DATABASE_URL"], autocommit=True) as connection:
        while True:
            began = time.monotonic()
            rows = connection.execute(
                f"select id, biz_type, topic, message_key, payload, retry_count from {OUTBOX} where status = 'pending'"
                f" and (next_retry_at is null or next_retry_at <= now()) order by id limit {_AT_ONCE}".encode()
            ).fetchall()
            for outbox_id, biz_type, topic, key, payload, attempt in rows:
                envelope = {"outbox_id": outbox_id, "biz_type": biz_type, "attempt": attempt, "payload": payload}
                producer.produce(topic, json.dumps(envelope).encode(), key, on_delivery=_must_be_delivered)
                producer.flush()
                connection.execute(
                    f"update {OUTBOX} set status = 'published', published_at = now(), updated_at = now()"
                    " where id = %s and status = 'pending'".encode(),
                    [outbox_id],
                )
            if len(rows) < _AT_ONCE:
                time.sleep(max(0.0, began + _POLL_SECONDS - time.monotonic()))


def _must_be_delivered(error: object, _: object) -> None:
    if error is not None:
        raise KafkaException(error)


def store() -> None:
    """Store messages, each in a transaction of its own, and commit its offset after that."""
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": os.environ["CONNECTOR_GROUP_ID"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([os.environ["CONNECTOR_TOPICS"]])
    with psycopg.connect(os.environ["CONNECTOR_DATABASE_URL"]) as connection:
        while True:
            message = consumer.poll(1.0)
            if message is None or message.error() is not None:
                continue
            envelope = json.loads(message.value() or b"{}")
            payload = envelope["payload"]
            with connection.transaction():
                row = connection.execute(
                    f"select status from {OUTBOX} where id = %s for update".encode(), [envelope["outbox_id"]]
                ).fetchone()
                if row is None or row[0] in {"consumed", "dead"}:
                    continue
                connection.execute(
                    f"insert into {HISTORY} (user_id, chat_id, message_content, role, outbox_id)"
                    " values (%s, %s, %s, %s, %s)".encode(),
                    [
                        *(payload[name] for name in ("user_id", "chat_id", "message_content", "role")),
                        envelope["outbox_id"],
                    ],
                )
                connection.execute(
                    f"update {OUTBOX} set status = 'consumed', consumed_at = now(), updated_at = now()"
                    " where id = %s".encode(),
                    [envelope["outbox_id"]],
                )
            consumer.commit(message=message)


if __name__ == "__main__":
    {"publish": publish, "store": store}[sys.argv[1]]()
