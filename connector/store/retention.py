"""Rows that have been settled for long enough, removed a window of ids at a time."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from connector.outbox import Status
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables

_BELOW_EVERY_ID = -(1 << 63)


class Window(NamedTuple):
    """What one window held: its last id (None: no row is left), and how many rows were looked at and chosen."""

    last_id: int | None
    looked_at: int
    young: bool
    """Whether all of its rows were enqueued too late to be removed yet."""
    consumed: int
    dead: int

    @property
    def chosen(self) -> int:
        """How many rows were removed, or would be."""
        return self.consumed + self.dead


class Retention:
    """The statements of `prune` on one connection."""

    def __init__(self, connection: Connection, tables: Tables, older_than: float, *, dead: bool) -> None:
        """Mean consumed rows, and `dead` ones too, that have been so for `older_than` seconds as of now."""
        self._connection = connection
        self._tables = tables
        self._older_than = older_than
        self._statuses = [Status.CONSUMED.value, *([Status.DEAD.value] if dead else [])]
        record = connection.execute(tables.query("redrive", "clock")).fetchone()
        assert record is not None
        self._started_at: datetime = record[0]

    def remove(self, after: int | None, window: int) -> Window:
        """Remove what is old enough among the next `window` rows above an id; one short transaction."""
        return self._go("remove_window", after, window)

    def count(self, after: int | None, window: int) -> Window:
        """Count what `remove` would remove; changes nothing."""
        return self._go("count_window", after, window)

    def _go(self, name: str, after: int | None, window: int) -> Window:
        record = self._connection.execute(
            self._tables.query("prune", name, since=self._tables.query("prune", "settled_since")),
            {
                "after": _BELOW_EVERY_ID if after is None else after,
                "window": window,
                "statuses": self._statuses,
                "started_at": self._started_at,
                "older_than": self._older_than,
            },
        ).fetchone()
        assert record is not None
        last_id, looked_at, young, consumed, dead = record
        return Window(last_id, looked_at, bool(young), consumed, dead)
