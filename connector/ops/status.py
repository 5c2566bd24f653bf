"""`status`: where the pipeline stands now, as a table for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from connector.kafka import Kafka, KafkaException
from connector.observability.logs import redact
from connector.ops.consumer_lag import PartitionLag, consumer_lag
from connector.ops.findings import size
from connector.ops.slot_debt import catch_up_owed
from connector.store.bookkeeping import Connection
from connector.store.connections import connect, describe
from connector.store.gauges import Gauges
from connector.store.inspection import Inspection, Slot, Untold
from connector.store.queries import Tables

_EXACT_BELOW_BYTES: Final = 1 << 30
_ANSWER_SECONDS: Final = 5
_COUNTING_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """What `status` is told by the settings."""

    database_url: str
    kafka: Kafka
    tables: Tables
    slot_name: str
    topics: tuple[str, ...]
    group_id: str


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """The slot: `lag_bytes` of WAL not confirmed yet, `retained_bytes` of WAL pinned; None where it cannot be told."""

    name: str
    exists: bool
    active: bool
    active_pid: int | None
    wal_status: str | None
    lag_bytes: int | None
    retained_bytes: int | None
    failover: bool | None
    catch_up_owed: bool | None
    catch_up_reason: str | None


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """The sink's group; `lag` is the number of messages to read, None where Kafka gave no answer."""

    group: str
    state: str | None
    members: int | None
    lag: int | None
    partitions: Sequence[PartitionLag]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pipeline at one moment. What could not be asked is None, and `problems` tell why."""

    outbox: dict[str, int] | None
    outbox_estimated: Collection[str]
    oldest_unconsumed_age_seconds: float | None
    slot: SlotStatus | None
    consumer: ConsumerStatus
    problems: tuple[str, ...] = ()
    service_away: bool = False


def is_away(error: psycopg.Error) -> bool:
    """Tell whether the database did not answer at all."""
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P"))


def told(error: psycopg.Error) -> str:
    """Return what PostgreSQL says, on one line, and what to do about it where that is known."""
    missing = error.sqlstate in {"42P01", "3F000"}
    reason = " ".join(describe(error).split())
    return f"PostgreSQL: {reason}" + ("; run `outbox-connector setup`" if missing else "")


class Status:
    """Takes snapshots, on connections that it keeps between them."""

    def __init__(self, options: StatusOptions) -> None:
        """Prepare; nothing is connected before the first look.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        self._options = options
        self._admin = options.kafka.admin()
        self._connection: Connection | None = None
        self.gauges = Gauges(self._connected, options.tables, options.slot_name)
        """What else the database can be asked, on the same connection."""

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(
                self._options.database_url,
                name="outbox-connector status",
                statement_seconds=_COUNTING_SECONDS,
                lock_seconds=_ANSWER_SECONDS,
                connect_seconds=_ANSWER_SECONDS,
                prepare=False,
            )
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def look(self, exact_below: int = _EXACT_BELOW_BYTES) -> Snapshot:
        """Take a snapshot; a service that is away is a problem in it, not an error.

        Rows are counted one by one in a table of less than `exact_below` bytes.
        """
        problems = []
        away = False
        counts: dict[str, int] | None = None
        estimated: Collection[str] = frozenset()
        age, slot = None, None
        try:
            slot = self._slot()
            counts, estimated = self.gauges.rows_by_status(exact_below)
            age = self.gauges.oldest_unconsumed_age()
        except psycopg.Error as error:
            away = is_away(error)
            problems.append(told(error))
        consumer = ConsumerStatus(self._options.group_id, None, None, None, [])
        try:
            consumer = self._consumer()
        except KafkaException as error:
            away = True
            problems.append(f"Kafka: {self._admin.trouble() or error.args[0].str()}")
        age = None if age is None else max(0.0, age)
        return Snapshot(counts, estimated, age, slot, consumer, tuple(map(redact, problems)), away)

    def _slot(self) -> SlotStatus:
        name = self._options.slot_name
        slot: Slot = Inspection(self._connected(), self._options.tables).slot(name)
        gauges, state = self.gauges.slot(), slot.state
        owed = catch_up_owed(slot)
        return SlotStatus(
            name=name,
            exists=state is not None,
            active=slot.active,
            active_pid=state.active_pid if state else None,
            wal_status=state.wal_status if state else None,
            lag_bytes=gauges.lag if gauges else None,
            retained_bytes=state.retained_bytes if state else None,
            failover=slot.failover,
            catch_up_owed=None if isinstance(owed, Untold) else owed is not None,
            catch_up_reason=owed.reason if isinstance(owed, Untold) else owed,
        )

    def _consumer(self) -> ConsumerStatus:
        options = self._options
        topics = self._admin.topics(_ANSWER_SECONDS)
        partitions = [
            (topic, partition)
            for topic in options.topics
            if topic in topics and not topics[topic].leaderless
            for partition in range(topics[topic].partitions)
        ]
        lags = consumer_lag(self._admin, options.group_id, partitions, _ANSWER_SECONDS)
        group = self._admin.group(options.group_id, _ANSWER_SECONDS)
        lag = sum(partition.lag for partition in lags)
        return ConsumerStatus(options.group_id, group.state, len(group.members), lag, lags)


def as_json(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of JSON."""
    return json.dumps(as_document(snapshot), ensure_ascii=False)


def as_document(snapshot: Snapshot) -> dict[str, Any]:
    """Return what a snapshot's JSON says."""
    slot, consumer = snapshot.slot, snapshot.consumer
    return {
        "outbox": snapshot.outbox,
        "outbox_exact": snapshot.outbox is not None and not snapshot.outbox_estimated,
        "outbox_estimated": sorted(snapshot.outbox_estimated),
        "oldest_unconsumed_age_seconds": snapshot.oldest_unconsumed_age_seconds,
        "slot": None if slot is None else {name: getattr(slot, name) for name in SlotStatus.__slots__},
        "consumer": {
            "group": consumer.group,
            "state": consumer.state,
            "members": consumer.members,
            "lag": consumer.lag,
            "partitions": [
                {
                    "topic": partition.topic,
                    "partition": partition.partition,
                    "committed": partition.committed,
                    "end": partition.end,
                    "lag": partition.lag,
                }
                for partition in consumer.partitions
            ],
        },
    }


def as_lines(snapshot: Snapshot) -> list[str]:
    """Return a snapshot as a table."""
    rows = [
        ("outbox", counted(snapshot)),
        ("oldest waiting", oldest(snapshot)),
        *_slot_rows(snapshot.slot),
        *_consumer_rows(snapshot.consumer),
    ]
    lines = [f"{name:<15} {text}" for name, text in rows]
    busy = [partition for partition in snapshot.consumer.partitions if partition.lag]
    if busy:
        width = max(len(partition.topic) for partition in busy)
        lines.append(f"  {'topic':<{width}}  partition     committed           end           lag")
        lines += [
            f"  {lag.topic:<{width}}  {lag.partition:>9}  {_number(lag.committed):>12}  {lag.end:>12,}  {lag.lag:>12,}"
            for lag in busy
        ]
    return [*lines, *(f"{'problem':<15} {problem}" for problem in snapshot.problems)]


def counted(snapshot: Snapshot) -> str:
    """Say how many rows there are of each status."""
    if snapshot.outbox is None:
        return "unknown"
    return "   ".join(
        f"{status} {'about ' if status in snapshot.outbox_estimated else ''}{rows:,}"
        for status, rows in snapshot.outbox.items()
    )


def oldest(snapshot: Snapshot) -> str:
    """Say how old the oldest row is that is neither consumed nor dead."""
    age = snapshot.oldest_unconsumed_age_seconds
    if age is None:
        return "unknown" if snapshot.outbox is None else "nothing waits"
    return f"{age:.1f} s" if age < 60 else f"{int(age // 3600)}:{int(age // 60 % 60):02}:{int(age % 60):02} h"  # noqa: PLR2004 - a minute


def _slot_rows(slot: SlotStatus | None) -> list[tuple[str, str]]:
    if slot is None:
        return [("slot", "unknown")]
    if not slot.exists:
        return [("slot", f"{slot.name}: there is none")]
    active = f"read by process {slot.active_pid}" if slot.active else "NO READER"
    lag, retained = _bytes(slot.lag_bytes), _bytes(slot.retained_bytes)
    rows = [("slot", f"{slot.name}: {active}, WAL {slot.wal_status}, lag {lag}, retains {retained}")]
    if slot.catch_up_owed:
        rows.append(("catch-up", f"owed: {slot.catch_up_reason}"))
    elif slot.catch_up_owed is None:
        rows.append(("catch-up", f"unknown: {slot.catch_up_reason}"))
    return rows


def _consumer_rows(consumer: ConsumerStatus) -> list[tuple[str, str]]:
    if consumer.lag is None:
        return [("consumer", f"{consumer.group}: unknown")]
    members = f"{consumer.members} members" if consumer.members else "NO MEMBERS"
    return [("consumer", f"{consumer.group}: {consumer.state}, {members}, lag {consumer.lag:,}")]


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def _number(count: int | None) -> str:
    return "never" if count is None else f"{count:,}"
