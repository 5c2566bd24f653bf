"""How an application enqueues a message: in its own transaction, on its own psycopg connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from connector.outbox import DEFAULT_MAX_RETRY

CHAT_HISTORY = "chat_history_persist"
"""The built-in `biz_type`: the message becomes a row of chat history."""


def _statement(schema: str) -> sql.Composed:
    return sql.SQL("select {}(%s::text, %s::text, %s::text, %s::jsonb, %s::integer, %s::jsonb)").format(
        sql.Identifier(schema, "outbox_enqueue")
    )


def _arguments(
    biz_type: str, topic: str, message_key: str, payload: object, max_retry: int, headers: Mapping[str, str] | None
) -> list[object]:
    attempts = max_retry if max_retry > 0 else DEFAULT_MAX_RETRY
    return [biz_type, topic, message_key, Jsonb(payload), attempts, None if headers is None else Jsonb(dict(headers))]


class Outbox:
    """Enqueues on a psycopg connection. It never commits: the message is sent if and when the caller's transaction is.

    Example:
        with psycopg.connect(url) as connection:
            connection.execute("insert into orders …")
            Outbox(connection).create_chat_history_message("smartflow.agent.outbox", chat_id, payload)
    """

    def __init__(self, conn: psycopg.Connection[Any], *, schema: str = "public") -> None:
        """Use a connection; `schema` is the outbox table's."""
        self._connection = conn
        self._statement = _statement(schema)

    def enqueue(
        self,
        biz_type: str,
        topic: str,
        message_key: str,
        payload: object,
        max_retry: int = DEFAULT_MAX_RETRY,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Enqueue a message for the handler of `biz_type` and return its outbox id.

        `payload` is anything that JSON can hold; `headers` are copied to Kafka; `max_retry` of 0 or less means 20.

        Raises:
            psycopg.Error: the database refuses the row (a value too long, text with NUL), or is away.
        """
        arguments = _arguments(biz_type, topic, message_key, payload, max_retry, headers)
        with psycopg.Cursor[tuple[int]](self._connection, row_factory=psycopg.rows.tuple_row) as cursor:
            return _outbox_id(cursor.execute(self._statement, arguments).fetchone())

    def create_chat_history_message(
        self, topic: str, message_key: str, payload: object, max_retry: int = DEFAULT_MAX_RETRY
    ) -> int:
        """Enqueue a message that becomes a row of chat history, and return its outbox id.

        `message_key` is the conversation's id; `payload` holds `user_id`, `chat_id`, and optionally `message_content`,
        `role` and `created_at`. Errors as in `enqueue`.
        """
        return self.enqueue(CHAT_HISTORY, topic, message_key, payload, max_retry)


class AsyncOutbox:
    """The twin of `Outbox` for an asynchronous connection."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], *, schema: str = "public") -> None:
        """Use a connection; `schema` is the outbox table's."""
        self._connection = conn
        self._statement = _statement(schema)

    async def enqueue(
        self,
        biz_type: str,
        topic: str,
        message_key: str,
        payload: object,
        max_retry: int = DEFAULT_MAX_RETRY,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Enqueue a message, as `Outbox.enqueue` does."""
        arguments = _arguments(biz_type, topic, message_key, payload, max_retry, headers)
        async with psycopg.AsyncCursor[tuple[int]](self._connection, row_factory=psycopg.rows.tuple_row) as cursor:
            await cursor.execute(self._statement, arguments)
            return _outbox_id(await cursor.fetchone())

    async def create_chat_history_message(
        self, topic: str, message_key: str, payload: object, max_retry: int = DEFAULT_MAX_RETRY
    ) -> int:
        """Enqueue a message that becomes a row of chat history, as `Outbox.create_chat_history_message` does."""
        return await self.enqueue(CHAT_HISTORY, topic, message_key, payload, max_retry)


def _outbox_id(record: tuple[int] | None) -> int:
    assert record is not None
    return record[0]
