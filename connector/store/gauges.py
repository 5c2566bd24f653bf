"""What `/metrics` and `status` show of the database, at a cost that does not grow with the outbox."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from connector.outbox import Status
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables

EXACT_BELOW_BYTES = 32 * 1024 * 1024
"""A table up to this size is counted at every scrape; of a larger one, consumed rows are estimated."""

COUNTING_SECONDS = 2.0
"""How long it may take to count what is not consumed in a larger table: enough for some millions of rows."""

COUNT_BOUND = 100_000
"""Where that is not enough, and of held rows, so many are counted."""

_NONE = dict.fromkeys(map(str, Status), 0)
_LIVE = ("pending", "published", "dead")
_SHARE_OF_TIME = 0.05
_OLDEST_ROWS = 2_000


NO_SLOT = "missing"
"""Stands where the server would say how a slot's WAL is, if there were a slot."""

WAITING_BOUND = 10_000
"""Rows that wait for an attempt are counted up to this many."""

_LATEST_ROWS = 5_000
_LATENCY_SAMPLE = 500
_LATEST_DEAD = 1_000


class RowCounts(NamedTuple):
    """How many rows there are of each status, and of which of them that is an estimate."""

    by_status: dict[str, int]
    estimated: frozenset[str] = frozenset()


class SlotGauges(NamedTuple):
    """How far the slot is behind the server's WAL, and how much of it the slot pins, in bytes.

    `wal_status` is PostgreSQL's own: reserved, extended, unreserved or lost; or `NO_SLOT`. Without a slot, or without
    WAL that it could still read, the sizes are None.
    """

    lag: int | None
    retained: int | None
    wal_status: str


class Retries(NamedTuple):
    """How many rows wait for an attempt, how many of them are due, and the seconds to the next of the others."""

    waiting: int
    due: int
    next_in: float | None


class Latency(NamedTuple):
    """How long messages took that were stored lately, in seconds from the row's creation to its history."""

    messages: int
    p50: float
    p99: float


class Death(NamedTuple):
    """A row that is dead: why, and how many seconds ago it was given up."""

    outbox_id: int
    biz_type: str
    key: str
    retry_count: int
    error: str
    age: float | None


class Gauges:
    """Asks on a connection of its own, made when first needed and again after it was lost."""

    def __init__(self, connect: Callable[[], Connection], tables: Tables, slot: str) -> None:
        """Remember how to connect."""
        self._connect = connect
        self._tables = tables
        self._slot = slot
        self._connection: Connection | None = None
        self._live = RowCounts({})
        self._count_again = float("-inf")

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def _fetch(self, name: str, **arguments: object) -> list[tuple[Any, ...]]:
        try:
            return self._connected().execute(self._tables.query("gauges", name), arguments).fetchall()
        except psycopg.errors.QueryCanceled:
            raise
        except psycopg.OperationalError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def rows_by_status(self, exact_below: int = EXACT_BELOW_BYTES) -> RowCounts:
        """Count the rows of each status.

        In a table of more than `exact_below` bytes consumed rows are estimated. The others are counted as often as that
        takes a twentieth of the time, and estimated where it takes longer than `COUNTING_SECONDS`.
        """
        outbox = str(self._tables.outbox)
        ((size,),) = self._fetch("outbox_size", outbox=outbox)
        if size <= exact_below:
            return RowCounts(_NONE | dict(self._fetch("count_by_status")))
        began = time.monotonic()
        if began >= self._count_again:
            self._live = self._count_live_rows()
            ended = time.monotonic()
            self._count_again = ended + (ended - began) / _SHARE_OF_TIME
        live = self._live.by_status
        ((total,),) = self._fetch("estimate_all_rows", outbox=outbox)
        consumed = max(0, round(total) - sum(live.values()))
        return RowCounts(_NONE | live | {"consumed": consumed}, self._live.estimated | {"consumed"})

    def _count_live_rows(self) -> RowCounts:
        try:
            with self._connected().transaction():
                self._fetch("limit_counting", milliseconds=str(round(COUNTING_SECONDS * 1000)))
                (counts,) = self._fetch("count_live_rows", bound=None)
            return RowCounts(dict(zip(_LIVE, counts, strict=True)))
        except psycopg.errors.QueryCanceled:
            (counts,) = self._fetch("count_live_rows", bound=COUNT_BOUND)
        by_status = dict(zip(_LIVE, counts, strict=True))
        estimated = frozenset(status for status, rows in by_status.items() if rows >= COUNT_BOUND)
        return RowCounts(by_status | {status: self._estimate(status) for status in estimated}, estimated)

    def _estimate(self, status: str) -> int:
        query = self._tables.query("gauges", "estimate_rows_of_status", status=sql.Literal(status))
        ((plan,),) = self._connected().execute(query).fetchall()
        return max(COUNT_BOUND, int(plan[0]["Plan"]["Plan Rows"]))

    def oldest_unconsumed_age(self) -> float | None:
        """Return the age in seconds of the oldest row that is neither consumed nor dead; None where there is none.

        Looked for among the lowest ids, a bounded number of them.
        """
        ((age,),) = self._fetch("oldest_unconsumed_age", bound=_OLDEST_ROWS)
        return age  # type: ignore[no-any-return]

    def held(self) -> int:
        """Return how many rows wait for an earlier one of their key, counted up to the bound."""
        ((held,),) = self._fetch("count_held", bound=COUNT_BOUND)
        return int(held)

    def slot(self) -> SlotGauges | None:
        """Return how the slot stands, or None where this server is a standby."""
        ((standby, exists, wal_status, lag, retained),) = self._fetch("slot_gauges", slot=self._slot)
        if standby:
            return None
        return SlotGauges(lag, retained, wal_status if exists else NO_SLOT)

    def latest_id(self) -> int:
        """Return the highest id; 0 where there is no row."""
        ((latest,),) = self._fetch("latest_id")
        return int(latest)

    def retries(self) -> Retries:
        """Return what waits for another attempt, counted up to the bound."""
        ((waiting, due, next_in),) = self._fetch("retries", bound=WAITING_BOUND)
        return Retries(waiting, due, next_in)

    def latency(self, seconds: float) -> Latency | None:
        """Return how long the latest messages took that were stored within so many seconds; None where none was."""
        ((messages, p50, p99),) = self._fetch("latency", bound=_LATEST_ROWS, sample=_LATENCY_SAMPLE, seconds=seconds)
        return Latency(messages, max(0.0, p50), max(0.0, p99)) if messages else None

    def deaths(self, limit: int) -> tuple[Death, ...]:
        """Return the rows that died last, the latest first."""
        return tuple(Death(*record) for record in self._fetch("deaths", bound=_LATEST_DEAD, limit=limit))
