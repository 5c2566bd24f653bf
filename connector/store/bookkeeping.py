"""The reader's writes and look-ups: marks, failures, due rows, and how far each slot is confirmed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from connector.backoff import DELAYS
from connector.lsn import format_lsn, parse_lsn
from connector.outbox import WAKE_PREFIX, Failure, Fence, Fences, OutboxRow, trim_error
from connector.store.queries import Tables

Connection = psycopg.Connection[tuple[Any, ...]]

_LONGEST_HINT_SECONDS = 86_400.0
_BYTES_AT_ONCE: Final = 4 * 1024 * 1024
_FIRST_LIMIT: Final = 16


class Settled(NamedTuple):
    """What became of a failed row: its status now, and the seconds until its next attempt."""

    outbox_id: int
    dead: bool
    due_in: float | None


class Progress(NamedTuple):
    """How far a slot is confirmed by our own doing, and whether a catch-up is owed.

    What is behind the confirmed position was sent at `published_since` or later, in seconds since 1970 by the reader's
    clock, on that timeline of the server; None where nothing of it was sent.
    """

    system_identifier: str
    confirmed_lsn: int
    catch_up_owed: bool
    catch_up_through: int | None
    catch_up_reason: str | None
    published_since: float | None
    timeline: int | None


class SlotState(NamedTuple):
    """A replication slot as the server shows it. `retained_bytes` is the WAL it pins; null on a standby."""

    active_pid: int | None
    wal_status: str | None
    confirmed_lsn: int | None
    plugin: str | None
    database: str | None
    retained_bytes: int | None


def settle_failures(connection: Connection, tables: Tables, failures: Sequence[Failure]) -> list[Settled]:
    """Write failures to their rows, in the caller's transaction; stale ones change nothing and are not returned."""
    settled: list[Settled] = []
    final = [failure for failure in failures if failure.final]
    if final:
        rows = connection.execute(tables.query("sink", "mark_dead"), _arguments(final))
        settled.extend(Settled(outbox_id, dead=True, due_in=None) for (outbox_id,) in rows)
    passing = [failure for failure in failures if not failure.final]
    if passing:
        costs = [0 if f.blameless else 1 for f in passing]
        rows = connection.execute(
            tables.query("sink", "schedule_retries"), {**_arguments(passing), "costs": costs, "delays": list(DELAYS)}
        )
        settled.extend(Settled(outbox_id, status == "dead", due_in) for outbox_id, status, _, due_in in rows)
    return settled


def _arguments(failures: Sequence[Failure]) -> dict[str, list[Any]]:
    return {
        "ids": [failure.outbox_id for failure in failures],
        "attempts": [failure.attempt for failure in failures],
        "errors": [trim_error(failure.error) for failure in failures],
    }


def wake_reader(connection: Connection, tables: Tables, due_in: float) -> None:
    """Tell the reader, with the commit of the caller's transaction, that something falls due in so many seconds."""
    connection.execute(
        tables.query("sink", "wake_reader"),
        {"prefix": WAKE_PREFIX, "milliseconds": str(max(0, round(min(due_in, _LONGEST_HINT_SECONDS) * 1000)))},
    )


def _array(numbers: Iterable[int | str]) -> str:
    """Return the text of an array: psycopg's own way takes several times as long, element by element."""
    return "{" + ",".join(map(str, numbers)) + "}"


class Bookkeeping:
    """The reader's statements on one connection."""

    def __init__(self, connection: Connection, tables: Tables, slot: str) -> None:
        """Use a connection in autocommit mode, on which nothing else runs meanwhile."""
        self.connection = connection
        self._tables = tables
        self._slot = slot
        self._limit = _FIRST_LIMIT

    def _fetch(self, name: str, **arguments: object) -> psycopg.Cursor[tuple[Any, ...]]:
        return self.connection.execute(self._tables.query("reader", name), {"slot": self._slot, **arguments})

    def mark_published(self, fences: Fences) -> int:
        """Mark acknowledged rows, where nothing has changed them; return how many were marked."""
        if not fences:
            return 0
        return self._fetch(
            "mark_published",
            ids=_array(fences.ids),
            retry_counts=_array(fences.retry_counts),
            updated_ats=_array(fences.updated_ats),
            next_retry_ats=_array("null" if due is None else due for due in fences.next_retry_ats),
        ).rowcount

    def settle_failures(self, failures: Sequence[Failure]) -> list[Settled]:
        """Write failed attempts to publish to their rows."""
        return settle_failures(self.connection, self._tables, failures)

    def not_seen(self, failures: Sequence[Failure]) -> list[int]:
        """Return the ids of failures whose rows this session does not see."""
        ids = [failure.outbox_id for failure in failures]
        rows = self.connection.execute(self._tables.query("sink", "rows_not_seen"), {"ids": ids})
        return [outbox_id for (outbox_id,) in rows]

    def due_rows(self, limit: int) -> list[OutboxRow]:
        """Return rows whose next attempt is due, in publishing order; fewer where they are large."""
        records = self._some("due_rows", limit)
        infinite = [outbox_id for outbox_id, *_, updated_at, due_at in records if None in {updated_at, due_at}]
        if infinite:
            self._fetch("make_times_finite", ids=infinite)
            return self.due_rows(limit)
        return [_row(record) for record in records]

    def seconds_to_next_due(self) -> float | None:
        """Return how long until the next attempt of any row is due (negative: overdue), or None."""
        record = self._fetch("seconds_to_next_due").fetchone()
        return None if record is None else float(record[0])

    def overlooked_rows(self, quiet_seconds: float, limit: int) -> list[OutboxRow]:
        """Return pending rows that neither the stream nor a retry will bring, untouched for `quiet_seconds`."""
        return [_row(record) for record in self._some("overlooked_rows", limit, quiet_seconds=quiet_seconds)]

    def _some(self, name: str, limit: int, **arguments: object) -> list[tuple[Any, ...]]:
        """Return the first rows, in memory that does not depend on their size: none is fetched before it is taken.

        What was asked for is read to its end, so no more is asked for than twice what did fit the last time.
        """
        records: list[tuple[Any, ...]] = []
        taken, all_fit = 0, True
        with self.connection.cursor() as cursor:
            query = self._tables.query("reader", name)
            for record in cursor.stream(query, {"limit": min(limit, self._limit), **arguments}, binary=True):
                if taken < _BYTES_AT_ONCE:
                    records.append(record)
                    taken += _size(record)
                else:
                    all_fit = False
        self._limit = max(self._limit, 2 * len(records)) if all_fit else len(records)
        return records

    def catch_up_rows(self, through: int | None, batch: int) -> Generator[list[OutboxRow]]:
        """Yield every pending row up to an id, oldest first, in batches, all as one snapshot shows them.

        One snapshot, because a row that commits meanwhile comes by the stream, and must not overtake its elders. No row
        is fetched before it is taken, and large ones make small batches. To be closed before the connection is.
        """
        query = self._tables.query("reader", "catch_up_rows")
        arguments = {"through": (1 << 63) - 1 if through is None else through}
        rows: list[OutboxRow] = []
        taken = 0
        with self.connection.cursor() as cursor:
            for record in cursor.stream(query, arguments, binary=True):
                rows.append(_row(record))
                taken += _size(record)
                if len(rows) == batch or taken >= _BYTES_AT_ONCE:
                    yield rows
                    rows, taken = [], 0
            if rows:
                yield rows

    def highest_pending_id(self, snapshot: str | None = None) -> int | None:
        """Return the highest id among pending rows that no retry will bring, as an exported snapshot shows them."""
        with self.connection.transaction():
            if snapshot is not None:
                self.connection.execute("set transaction isolation level repeatable read, read only")
                self.connection.execute(sql.SQL("set transaction snapshot {}").format(snapshot))
            record = self._fetch("highest_pending_id").fetchone()
        return record[0] if record else None

    def read_progress(self) -> Progress | None:
        """Return what was recorded of the slot, or None for a slot never seen."""
        record = self._fetch("read_progress").fetchone()
        if record is None:
            return None
        system, lsn, owed, through, reason, published_since, timeline = record
        return Progress(system, parse_lsn(lsn), owed, through, reason, published_since, timeline)

    def record_progress(self, lsn: int, published_since: float | None, timeline: int) -> None:
        """Record how far the slot is about to be confirmed; the record never goes back."""
        self._fetch("record_progress", lsn=format_lsn(lsn), published_since=published_since, timeline=timeline)

    def owe_catch_up(self, system_identifier: str, lsn: int, through: int | None, reason: str) -> None:
        """Write down that rows up to an id must be published from the table, before the slot is touched."""
        self._fetch(
            "owe_catch_up", system_identifier=system_identifier, lsn=format_lsn(lsn), through=through, reason=reason
        )

    def catch_up_done(self) -> None:
        """Write down that nothing is owed any more."""
        self._fetch("catch_up_done")

    def outbox_oid(self) -> int | None:
        """Return the oid of the outbox table, or None where there is no table of that name."""
        record = self._fetch("outbox_oid", outbox=str(self._tables.outbox)).fetchone()
        return record[0] if record else None

    def slot_state(self) -> SlotState | None:
        """Return the slot as the server shows it, or None if there is none of that name."""
        record = self._fetch("slot_state").fetchone()
        if record is None:
            return None
        active_pid, wal_status, confirmed, _, plugin, database, retained = record
        return SlotState(
            active_pid, wal_status, None if confirmed is None else parse_lsn(confirmed), plugin, database, retained
        )

    def drop_slot(self) -> None:
        """Drop the slot; the caller has written down what is owed for it."""
        self._fetch("drop_slot")

    def end_walsender(self, pid: int) -> None:
        """End a walsender that still holds the slot, by its process id."""
        self._fetch("end_walsender", pid=pid)

    def current_wal_lsn(self) -> int:
        """Return the server's write position."""
        record = self._fetch("current_wal_lsn").fetchone()
        assert record is not None
        return parse_lsn(record[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several of these writes in one transaction."""
        with self.connection.transaction():
            yield


def _size(record: Sequence[Any]) -> int:
    _, _, _, _, payload, headers, *_ = record
    return len(payload) + len(headers or b"")


def _row(record: Iterable[Any]) -> OutboxRow:
    outbox_id, biz_type, topic, key, payload, headers, retry_count, updated_at, next_retry_at = record
    return OutboxRow(
        Fence(outbox_id, retry_count, updated_at, next_retry_at),
        biz_type,
        topic,
        bytes(key),
        bytes(payload),
        None if headers is None else bytes(headers),
    )
