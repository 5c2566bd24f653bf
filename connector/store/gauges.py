"""What `/metrics` and `status` show of the database, at a cost that does not grow with the outbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from connector.outbox import Status
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables

EXACT_BELOW_BYTES = 32 * 1024 * 1024
"""A table up to this size is counted at every scrape; of a larger one, consumed rows are estimated."""

COUNT_BOUND = 100_000
"""Rows of one status are counted up to this many; beyond it the number shown is this one."""


NO_SLOT = "missing"
"""Stands where the server would say how a slot's WAL is, if there were a slot."""

WAITING_BOUND = 10_000
"""Rows that wait for an attempt are counted up to this many."""

_LATEST_ROWS = 5_000
_LATENCY_SAMPLE = 500
_LATEST_DEAD = 1_000


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

    def _fetch(self, name: str, **arguments: object) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        try:
            return self._connection.execute(self._tables.query("gauges", name), arguments).fetchall()
        except psycopg.OperationalError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def rows_by_status(self, exact_below: int = EXACT_BELOW_BYTES) -> tuple[dict[str, int], bool]:
        """Return the number of rows of each status, and whether all of them are exact."""
        outbox = str(self._tables.outbox)
        ((size,),) = self._fetch("outbox_size", outbox=outbox)
        counts = {status.value: 0 for status in Status}
        if size <= exact_below:
            counts.update(self._fetch("count_by_status"))
            return counts, True
        ((pending, published, dead),) = self._fetch("count_live_rows", bound=COUNT_BOUND)
        ((total,),) = self._fetch("estimate_all_rows", outbox=outbox)
        counts |= {
            "pending": pending,
            "published": published,
            "dead": dead,
            "consumed": max(0, total - pending - published - dead),
        }
        return counts, False

    def oldest_unconsumed_age(self) -> float | None:
        """Return the age in seconds of the oldest row that is neither consumed nor dead; None where there is none."""
        ((age,),) = self._fetch("oldest_unconsumed_age")
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
