"""What the integration tests do to an outbox, and what they see of it in the table and in Kafka."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from connector.cli.composition import setup_options
from connector.ops.setup import setup
from connector.settings import load_settings
from tests.services import Kafka, Process, eventually, eventually_none

Connection = psycopg.Connection[tuple[Any, ...]]

OUTBOX = "public.agent_outbox_messages"
PROGRESS = "public.outbox_connector_slots"


def set_up(env: Mapping[str, str]) -> list[str]:
    """Run `setup` in this process and return what it says."""
    said: list[str] = []
    setup(setup_options(load_settings(env, needs=frozenset({"database", "kafka"}))), said.append)
    return said


def enqueue(connection: Connection, topic: str, key: str, *numbers: int, due_in: float | None = None) -> list[int]:
    """Insert one row for each number, in one statement, with the number in its payload; return the ids.

    All of them fall due at the same moment.
    """
    records = connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, next_retry_at)"
        " select 'chat_history_persist', %s, %s, jsonb_build_object('number', n),"
        "        statement_timestamp() + %s::float * interval '1 second'"
        "   from unnest(%s::int[]) as n returning id",
        [topic, key, due_in, list(numbers)],
    )
    return [outbox_id for (outbox_id,) in records]


def enqueue_many(connection: Connection, topic: str, rows: int, keys: int = 20, bytes_each: int = 10) -> None:
    """Insert many rows in one transaction, their keys in turn; `number` counts on from the rows that are there."""
    connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload)"
        f" select 'chat_history_persist', %s, 'key-' || n %% %s,"
        "         jsonb_build_object('number', base + n, 'user_id', n, 'chat_id', 'a chat', 'message_content',"
        "         (select string_agg(md5(n::text || part), '') from generate_series(1, greatest(1, %s / 32)) as part))"
        f"   from (select coalesce(max(id), 0) as base from {OUTBOX}) as b, generate_series(1, %s) as n",
        [topic, keys, bytes_each, rows],
    )


def statuses(connection: Connection) -> dict[str, int]:
    """Count the rows by status."""
    return dict(connection.execute(f"select status, count(*) from {OUTBOX} group by status").fetchall())


def one(connection: Connection, query: str, arguments: Sequence[object] = ()) -> Any:
    """Return the first column of the first record, or None."""
    record = connection.execute(query, arguments).fetchone()
    return None if record is None else record[0]


def all_published(connection: Connection, within: float = 20.0) -> None:
    """Wait until no row is pending."""
    eventually(
        lambda: one(connection, f"select count(*) from {OUTBOX} where status = 'pending'") == 0,
        within=within,
        what="the publishing of every row",
    )


def catch_up_owed(connection: Connection) -> bool:
    """Tell whether a catch-up is written down as owed."""
    return bool(one(connection, f"select bool_or(catch_up_owed) from {PROGRESS}"))


def write_wal(connection: Connection, megabytes: int) -> None:
    """Write so much WAL, a megabyte at a time, that has nothing to do with the outbox."""
    for _ in range(megabytes):
        connection.execute("select pg_logical_emit_message(false, 'elsewhere', repeat('x', 1048576))")


@contextmanager
def forbidden(
    kafka: Kafka, name: str, *operations: AclOperation, kind: ResourceType = ResourceType.TOPIC
) -> Iterator[None]:
    """Forbid everybody some operations on a topic or the like, there or not, or all of them, for a while."""
    admin = kafka.admin()
    resource = (kind, name, ResourcePatternType.LITERAL)
    # Where nothing is said of it all is allowed; where anything is, nothing else.
    rules = [(AclOperation.ALL, AclPermissionType.ALLOW if operations else AclPermissionType.DENY)]
    rules += [(operation, AclPermissionType.DENY) for operation in operations]
    for made in admin.create_acls([AclBinding(*resource, "User:*", "*", *rule) for rule in rules]).values():
        made.result(20)
    try:
        yield
    finally:
        mine = AclBindingFilter(*resource, "User:*", "*", AclOperation.ANY, AclPermissionType.ANY)
        for removed in admin.delete_acls([mine]).values():
            removed.result(20)


def readiness(process: Process) -> int:
    """Return the status of `/readyz`."""
    return process.http("/readyz").status


def metric(process: Process, name: str) -> float:
    """Return the value of a metric, given with its labels and without the prefix; 0 if it is not shown."""
    found = re.search(rf"^outbox_connector_{re.escape(name)} (\S+)$", process.http("/metrics").body, re.MULTILINE)
    return float(found[1]) if found else 0.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One message as it stands in Kafka."""

    partition: int
    offset: int
    key: str
    value: bytes
    headers: list[tuple[str, bytes]]
    at: float
    """When the producer sent it, in seconds since 1970."""

    @property
    def envelope(self) -> dict[str, Any]:
        """The value, decoded."""
        return json.loads(self.value)  # type: ignore[no-any-return]

    @property
    def outbox_id(self) -> int:
        """The row it is a copy of."""
        return int(self.envelope["outbox_id"])

    @property
    def number(self) -> int:
        """The number that the test gave it."""
        return int(self.envelope["payload"]["number"])


class Tap:
    """Reads a topic from its beginning, in no group."""

    def __init__(self, kafka: Kafka, topic: str, partitions: int = 6) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": kafka.bootstrap_servers,
                "group.id": "tap",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 50,
                "reconnect.backoff.max.ms": 500,
                "log_level": 0,
            }
        )
        self._consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in range(partitions)])
        self.sent: list[Sent] = []

    def read(self, seconds: float = 0.1) -> list[Sent]:
        """Take what has arrived, waiting so long for the first; return everything seen so far."""
        for message in self._consumer.consume(5_000, seconds):
            if message.error() is None:
                self.sent.append(
                    Sent(
                        message.partition() or 0,
                        message.offset() or 0,
                        (message.key() or b"").decode(),
                        message.value() or b"",
                        _headers(message),
                        message.timestamp()[1] / 1000,
                    )
                )
        return self.sent

    def until(self, condition: Callable[[list[Sent]], object], within: float = 20.0, what: str = "") -> list[Sent]:
        """Read until the messages seen so far satisfy a condition; return them."""
        eventually(lambda: condition(self.read()), within=within, what=what or "the arrival of the messages")
        return self.sent

    def has(self, ids: Iterable[int], within: float = 20.0) -> list[Sent]:
        """Read until a copy of each of these rows is there; return everything seen so far."""
        missing, looked_at = set(ids), 0

        def not_here() -> set[int]:
            nonlocal looked_at
            sent = self.read()
            missing.difference_update(copy.outbox_id for copy in sent[looked_at:])
            looked_at = len(sent)
            return missing

        eventually_none(not_here, within=within, what=f"the arrival of {len(missing)} messages")
        return self.sent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()


def _headers(message: Message) -> list[tuple[str, bytes]]:
    headers: Any = message.headers()
    return [(name, content or b"") for name, content in headers or []]


def is_streaming(process: Process, within: float = 20.0) -> Process:
    """Wait until a reader streams; return it."""
    process.wait_for_log("streaming", within=within)
    return process


def in_order(sent: Iterable[Sent]) -> bool:
    """Tell whether the first copies of each key's messages came in outbox order."""
    last: dict[str, int] = {}
    seen: set[int] = set()
    for message in sent:
        outbox_id = message.outbox_id
        if outbox_id in seen:
            continue
        seen.add(outbox_id)
        if outbox_id < last.get(message.key, 0):
            return False
        last[message.key] = outbox_id
    return True
