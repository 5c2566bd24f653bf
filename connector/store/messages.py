"""Looks for messages and tells what has become of them; a bounded number of rows are read for any question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from connector.store.bookkeeping import Connection
from connector.store.connections import describe
from connector.store.queries import Tables

LATEST_DEAD: Final = 10_000
"""Only so many of the latest dead rows are grouped by reason, and searched by key or conversation."""

SEARCHED_ROWS: Final = 100_000
"""So many rows are looked at in one search without an index."""

_LONGEST_TEXT: Final = 20_000
_MOST_FOUND: Final = 50
_MOST_GROUPS: Final = 100
_MOST_REDRIVES: Final = 50
_HIGHEST_ID: Final = (1 << 63) - 1


class Message(NamedTuple):
    """A row of the outbox; times as PostgreSQL writes them, in UTC."""

    id: int
    biz_type: str
    topic: str
    key: str
    status: str
    retry_count: int
    max_retry: int
    next_retry_at: str | None
    last_error: str | None
    created_at: str
    published_at: str | None
    consumed_at: str | None
    updated_at: str
    payload: str
    payload_length: int
    """In characters; `payload` is cut after 20,000 of them."""
    headers: str | None
    created: float | None
    """In seconds since 1970, like `published`; None where it is no moment."""
    published: float | None


class HistoryRow(NamedTuple):
    """What the sink has stored for a message."""

    id: int
    user_id: int
    chat_id: str
    role: str | None
    content: str | None
    content_length: int | None
    created_at: str


class Blocker(NamedTuple):
    """An earlier row of the same key that is being retried."""

    id: int
    status: str
    next_retry_at: str


class Redrive(NamedTuple):
    """That a message was put back: when, by whom, why, what it was until then, and as which attempt.

    `moment` is `at` in seconds since 1970.
    """

    at: str
    moment: float
    by: str
    reason: str | None
    was: str
    error: str | None
    attempt: int | None


class Life(NamedTuple):
    """All that the database knows of a message; `untold` names what this role may not see.

    `message` is None where its row is gone from the outbox; `pruned_through_id` then tells how far `prune` has come.
    """

    message: Message | None
    history: Sequence[HistoryRow]
    waits_for: Blocker | None
    redrives: Sequence[Redrive]
    untold: Sequence[str]
    pruned_through_id: int | None = None


class Found(NamedTuple):
    """A row of a list of messages."""

    id: int
    biz_type: str
    topic: str
    key: str
    status: str
    retry_count: int
    created_at: str
    error: str | None


class Page(NamedTuple):
    """Messages, the latest first; `further_id` is the one below which to look on, None at the table's end."""

    messages: Sequence[Found]
    further_id: int | None


class Stored(NamedTuple):
    """A row of history, its content cut; `key` and `status` are of its row in the outbox, None if that is gone."""

    id: int
    outbox_id: int | None
    user_id: int
    role: str | None
    content: str | None
    created_at: str
    key: str | None
    status: str | None


class Conversation(NamedTuple):
    """What history has of a conversation, the latest first, and what is not stored yet under another key.

    `further_id` is the row of history below which to look on, None at the table's end.
    """

    stored: Sequence[Stored]
    waiting: Sequence[Found]
    further_id: int | None


class DeadGroup(NamedTuple):
    """Dead rows that died of the same; `reason` is their error without what differs from row to row."""

    reason: str
    biz_type: str
    rows: int
    keys: int
    first_id: int
    last_id: int
    last_change: str
    example: str | None


class Messages:
    """Asks on one connection, whose time zone it sets to UTC."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        """Use a connection in autocommit mode, with short limits."""
        self._connection = connection
        self._tables = tables
        connection.execute("set timezone = 'UTC'")

    def _fetch(self, query: str, /, *, file: str = "console", **arguments: object) -> list[tuple[Any, ...]]:
        reason = self._tables.query("console", "reason")
        more: dict[str, sql.Composable] = {"reason": reason} if query in {"dead_by_reason", "dead_of_reason"} else {}
        return self._connection.execute(self._tables.query(file, query, **more), arguments).fetchall()

    def life(self, outbox_id: int) -> Life | None:
        """Return what has become of a message, or None if neither outbox nor history has it."""
        if not 0 < outbox_id <= _HIGHEST_ID:
            return None
        found = self._fetch("message", id=outbox_id, longest=_LONGEST_TEXT)
        message = Message(*found[0]) if found else None
        untold: list[str] = []
        history = self._allowed(untold, "history", id=outbox_id, longest=_LONGEST_TEXT)
        outbox = str(self._tables.outbox)
        redrives = self._allowed(untold, "redrives", id=outbox_id, outbox=outbox, limit=_MOST_REDRIVES)
        pruned, blockers = None, []
        if message is None:
            if not history and not redrives:
                return None
            ((pruned,),) = self._allowed(untold, "pruned_through", file="reconcile") or [(None,)]
        elif message.status in {"pending", "published"}:
            blockers = self._fetch("waits_for", id=outbox_id, key=message.key, topic=message.topic)
        return Life(
            message,
            [HistoryRow(*record) for record in history],
            Blocker(*blockers[0]) if blockers else None,
            [Redrive(*record) for record in redrives],
            untold,
            pruned,
        )

    def _allowed(self, untold: list[str], query: str, /, **arguments: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
        """Ask for what this role may not be allowed to see, or what this schema may not have yet."""
        try:
            return self._fetch(query, **arguments)
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable) as error:
            untold.append(describe(error))
            return []

    def of_key(self, key: str, before: int | None = None) -> Page:
        """Return the latest messages of a key below an id.

        Without an id, those that are being retried or are dead are among them however old they are.
        """
        limits: dict[str, Any] = {"key": key, "limit": _MOST_FOUND}
        below = _HIGHEST_ID if before is None else before
        found = {
            record[0]: Found(*record) for record in self._fetch("of_key", before=below, rows=SEARCHED_ROWS, **limits)
        }
        if len(found) == _MOST_FOUND:
            further = min(found)
        else:
            lowest = self._fetch("looked_down_to", before=below, rows=SEARCHED_ROWS)
            further = lowest[0][0] if lowest else None
        if before is None:
            for record in [
                *self._fetch("unsettled_of_key", **limits),
                *self._fetch("dead_of_key", rows=LATEST_DEAD, **limits),
            ]:
                found.setdefault(record[0], Found(*record))
        return Page([found[outbox_id] for outbox_id in sorted(found, reverse=True)], further)

    def of_conversation(self, chat_id: str, before: int | None = None) -> Conversation:
        """Return the latest rows of history of a conversation below an id.

        Without an id, also what is not stored yet though its key is another, among the latest of each status.
        """
        limits: dict[str, Any] = {"chat_id": chat_id, "limit": _MOST_FOUND}
        below = _HIGHEST_ID if before is None else before
        ((has_index,),) = self._fetch("has_conversation_index")
        if has_index:
            records = self._fetch("in_history", before=below, **limits)
        else:
            records = self._fetch("lately_in_history", before=below, rows=SEARCHED_ROWS, **limits)
        stored = [Stored(*record) for record in records]
        further = None
        if len(stored) == _MOST_FOUND:
            further = stored[-1].id
        elif not has_index:
            lowest = self._fetch("looked_down_to_in_history", before=below, rows=SEARCHED_ROWS)
            further = lowest[0][0] if lowest else None
        waiting = [] if before is not None else self._fetch("not_in_history", rows=LATEST_DEAD, **limits)
        return Conversation(stored, [Found(*record) for record in waiting], further)

    def dead_by_reason(self) -> list[DeadGroup]:
        """Return the latest dead rows, grouped by what they died of, the largest group first."""
        return [DeadGroup(*record) for record in self._fetch("dead_by_reason", rows=LATEST_DEAD, limit=_MOST_GROUPS)]

    def dead_of_reason(self, reason: str, biz_type: str, limit: int) -> list[Found]:
        """Return the latest dead rows of one such group."""
        records = self._fetch("dead_of_reason", rows=LATEST_DEAD, reason=reason, biz_type=biz_type, limit=limit)
        return [Found(*record) for record in records]
