"""What the page asks of the database and of Kafka when somebody wants to know, a few questions at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final
from uuid import uuid4

import psycopg

from connector.kafka import Copies, Kafka, find_copies
from connector.store.bookkeeping import Connection
from connector.store.connections import connect, is_conflict
from connector.store.messages import DeadGroup, Found, Life, Messages, Page
from connector.store.queries import Tables
from connector.store.redrives import Redrives, Run, Selection

MOST_ROWS: Final = 500
"""So many dead rows of a group are listed, and can be put back at once."""

_AT_ONCE: Final = 4
_ANSWER_SECONDS: Final = 5
# A copy carries its producer's clock, and the mark follows the acknowledgement.
_SECONDS_AFTER_CREATION: Final = 10.0
_SECONDS_BEFORE_MARK: Final = 20.0
_CLOCKS_DIFFER: Final = 2.0


class Busy(Exception):
    """As many questions are being answered as are allowed at once."""


class Questions:
    """Each question has a connection of its own, so that none outlives an outage; safe to use from any thread."""

    def __init__(self, database_url: str, kafka: Kafka, tables: Tables, group_id: str) -> None:
        """Remember whom to ask."""
        self._database_url = database_url
        self._kafka = kafka
        self._tables = tables
        self._group_id = group_id
        self._room = threading.BoundedSemaphore(_AT_ONCE)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._room.acquire(timeout=_ANSWER_SECONDS):
            raise Busy
        try:
            yield
        finally:
            self._room.release()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with (
            self._turn(),
            connect(
                self._database_url,
                name="outbox-connector console",
                statement_seconds=_ANSWER_SECONDS,
                lock_seconds=_ANSWER_SECONDS,
                connect_seconds=_ANSWER_SECONDS,
                prepare=False,
            ) as connection,
        ):
            yield connection

    @contextmanager
    def _messages(self) -> Iterator[Messages]:
        with self._connection() as connection:
            connection.execute("set default_transaction_read_only = on")
            yield Messages(connection, self._tables)

    def life(self, outbox_id: int) -> Life | None:
        """Return what has become of a message; None if there is no such row."""
        with self._messages() as messages:
            return messages.life(outbox_id)

    def of_key(self, key: str, before: int | None) -> Page:
        """Return the messages of a key, below an id if one is given."""
        with self._messages() as messages:
            return messages.of_key(key, before)

    def dead_by_reason(self) -> Sequence[DeadGroup]:
        """Return the dead rows grouped by what they died of."""
        with self._messages() as messages:
            return messages.dead_by_reason()

    def dead_of_reason(self, reason: str, biz_type: str) -> Sequence[Found]:
        """Return the dead rows of one group."""
        with self._messages() as messages:
            return messages.dead_of_reason(reason, biz_type, MOST_ROWS)

    def copies(self, outbox_id: int) -> Copies | None:
        """Look for a message's copies in Kafka around the times in its row; None if there is no such row.

        Raises:
            KafkaException: Kafka does not answer.
            ServiceUnavailable: Kafka stopped answering.
        """
        life = self.life(outbox_id)
        if life is None:
            return None
        message = life.message
        times = []
        if message.created is not None:
            times.append((message.created - _CLOCKS_DIFFER, message.created + _SECONDS_AFTER_CREATION))
        if message.published is not None:
            times.append((message.published - _SECONDS_BEFORE_MARK, message.published + _CLOCKS_DIFFER))
        with self._turn():
            return find_copies(self._kafka, f"{self._group_id}-console", message.topic, outbox_id, times)

    def redrive(self, ids: Sequence[int], by: str, reason: str | None) -> int:
        """Put those of up to `MOST_ROWS` rows back that are dead, all in one transaction; return how many."""
        with self._connection() as connection:
            redrives = Redrives(connection, self._tables)
            run = Run(uuid4(), by, reason, redrives.clock())
            selection = Selection(ids=tuple(dict.fromkeys(ids)))
            while True:
                try:
                    return len(redrives.move(selection, run, None, MOST_ROWS))
                except psycopg.Error as error:
                    if not is_conflict(error):
                        raise
