"""The outbox and the history of a test's database: rows made, looked at, and settled as the processes do it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from connector.handlers import load_handlers
from connector.outbox import Fence, Table
from connector.store.bookkeeping import Bookkeeping
from connector.store.connections import connect
from connector.store.queries import Tables
from connector.store.schema import migrate
from connector.store.settlement import Item, Settlement
from tests.services import Database, eventually

Connection = psycopg.Connection[tuple[Any, ...]]

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))

PAYLOAD = {"user_id": 7, "chat_id": "chat-1", "message_content": "hello", "role": "user"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the outbox; `due_in` is the time between its last change and its next attempt, in seconds."""

    status: str
    retry_count: int
    last_error: str | None
    next_retry_at: datetime | None
    due_in: float | None
    published_at: datetime | None
    consumed_at: datetime | None
    updated_at: datetime


class OutboxTable:
    """The tables of one database, on connections of the kind that the connector itself opens."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.connection: Connection = database.connect(prepare_threshold=None)
        self._opened = [self.connection]
        migrate(self.connection, TABLES)

    def connect(self) -> Connection:
        """Open another connection; a test that would wait for a lock for long fails instead."""
        connection = connect(self.database.url, name="test", statement_seconds=30, lock_seconds=20)
        self._opened.append(connection)
        return connection

    def close(self) -> None:
        """Close every connection."""
        for connection in self._opened:
            connection.close()

    def bookkeeping(self, connection: Connection | None = None) -> Bookkeeping:
        """Return the reader's statements, on a connection of their own unless one is given."""
        return Bookkeeping(connection or self.connect(), TABLES, "slot")

    def settlement(self, connection: Connection | None = None, *, strict: bool = True) -> Settlement:
        """Return the sink's transaction, on a connection of its own unless one is given."""
        return Settlement(connection or self.connect(), TABLES, load_handlers(), strict=strict)

    def new(self, key: str = "key", topic: str = "topic", payload: Any = PAYLOAD, **columns: Any) -> int:
        """Insert a row and return its id; `columns` set more than a fresh row has."""
        biz_type = columns.pop("biz_type", "chat_history_persist")
        given = {"biz_type": biz_type, "topic": topic, "message_key": key, "payload": Jsonb(payload), **columns}
        places = ", ".join(["%s"] * len(given))
        statement = f"insert into agent_outbox_messages ({', '.join(given)}) values ({places}) returning id"
        return int(self._one(statement, *given.values()))

    def in_retry(self, key: str = "key", topic: str = "topic", **columns: Any) -> int:
        """Insert a row that has failed once and is due in a minute."""
        outbox_id = self.new(key, topic, retry_count=1, **columns)
        self.change(outbox_id, "next_retry_at = clock_timestamp() + interval '1 minute'")
        return outbox_id

    def change(self, outbox_id: int, assignments: str) -> None:
        """Update a row behind everybody's back."""
        self.connection.execute(f"update agent_outbox_messages set {assignments} where id = %s", [outbox_id])

    def row(self, outbox_id: int) -> Row:
        """Return a row as it is now."""
        record = self.connection.execute(
            "select status, retry_count, last_error, next_retry_at,"
            " extract(epoch from next_retry_at - updated_at)::double precision,"
            " published_at, consumed_at, updated_at from agent_outbox_messages where id = %s",
            [outbox_id],
        ).fetchone()
        assert record is not None
        return Row(*record)

    def status(self, outbox_id: int) -> str:
        """Return a row's status."""
        return str(self._one("select status from agent_outbox_messages where id = %s", outbox_id))

    def fence(self, outbox_id: int) -> Fence:
        """Return what a copy of the row would show, were it read now."""
        record = self.connection.execute(
            "select id, retry_count,"
            " (extract(epoch from updated_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint,"
            " (extract(epoch from next_retry_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint"
            " from agent_outbox_messages where id = %s",
            [outbox_id],
        ).fetchone()
        assert record is not None
        return Fence(*record)

    def history(self) -> list[int]:
        """Return the outbox ids in the history, in the order in which they were stored."""
        return [row[0] for row in self.connection.execute("select outbox_id from chat_histories order by id")]

    def wait_until_blocked(self, connection: Connection) -> None:
        """Wait until that connection's session waits for a lock."""
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        eventually(lambda: self._one(waits, connection.info.backend_pid), what="a wait for a lock")

    def _one(self, statement: str, *arguments: Any) -> Any:
        record = self.connection.execute(statement, arguments).fetchone()
        assert record is not None
        return record[0]


def item(outbox_id: int, attempt: int = 0, key: str = "key", **payload: Any) -> Item:
    """Return the message of a row as the sink would have it after its handler has parsed it."""
    values = load_handlers()["chat_history_persist"].parse({**PAYLOAD, **payload})
    return Item(outbox_id, attempt, "chat_history_persist", key.encode(), values)
