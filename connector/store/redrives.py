"""Messages that an operator puts back: which rows a selection means, how they are moved, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from connector.outbox import Status, trim_error
from connector.store.bookkeeping import Connection, wake_reader
from connector.store.queries import Tables

_HIGHEST_ID: Final = (1 << 63) - 1
_BELOW_EVERY_ID: Final = -(1 << 63)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows: those for which everything that is given holds. An age is in seconds, in the row's present status."""

    status: Literal[Status.DEAD, Status.PUBLISHED] = Status.DEAD
    ids: tuple[int, ...] | None = None
    key: str | None = None
    biz_type: str | None = None
    error_like: str | None = None
    """A part of `last_error`, in upper or lower case; a per cent sign stands for anything."""
    older_than: float | None = None


class Run(NamedTuple):
    """One redrive, as it is recorded: by whom, why, and when it began by the database's clock."""

    id: UUID
    redriven_by: str
    reason: str | None
    started_at: datetime


class Reason(NamedTuple):
    """An error without what differs from row to row, and how many rows have it; None where none is noted."""

    error: str | None
    rows: int


class Sample(NamedTuple):
    """A row that would be moved. `age` is in seconds, since it has its status; None where nobody can tell."""

    outbox_id: int
    biz_type: str
    key: str
    retry_count: int
    age: float | None
    error: str | None


class Preview(NamedTuple):
    """What a selection holds, all as one snapshot shows it."""

    rows: int
    reasons: list[Reason]
    samples: list[Sample]


class Place(NamedTuple):
    """Where a dead letter lies, and when it was written, in milliseconds since 1970.

    The time tells the letters of a topic that was made anew from those that had their offsets before.
    """

    partition: int
    offset: int
    time: int


class SentBack(NamedTuple):
    """A dead letter that was sent back to its topic, and why it had been refused."""

    place: Place
    topic: str
    key: str | None
    error: str


class Redrives:
    """The statements of `redrive` on one connection."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        """Use a connection in autocommit mode, on which nothing else runs meanwhile."""
        self.connection = connection
        self._tables = tables

    def clock(self) -> datetime:
        """Return the database's time: when a run begins."""
        record = self.connection.execute(self._tables.query("redrive", "clock")).fetchone()
        assert record is not None
        return record[0]  # type: ignore[no-any-return]

    def preview(self, selection: Selection, started_at: datetime, *, reasons: int, samples: int) -> Preview:
        """Count what would be moved, and show some of it; changes nothing."""
        with self.connection.transaction():
            self.connection.execute("set transaction isolation level repeatable read, read only")
            ((rows,),) = self._select("count", selection, started_at).fetchall()
            return Preview(
                rows,
                [Reason(*record) for record in self._select("reasons", selection, started_at, limit=reasons)],
                [Sample(*record) for record in self._select("samples", selection, started_at, limit=samples)],
            )

    def statuses(self, ids: tuple[int, ...]) -> dict[int, str]:
        """Return the status of each of these rows that there is."""
        return dict(self.connection.execute(self._tables.query("redrive", "statuses"), {"ids": list(ids)}).fetchall())

    def move(self, selection: Selection, run: Run, after: int | None, limit: int) -> list[int]:
        """Put up to `limit` rows with ids above `after` back to pending, and wake the reader; return their ids.

        One transaction: rows, record and hint, or nothing. No rows means that the run is done.
        """
        with self.connection.transaction():
            records = self._select(
                "redrive_batch",
                selection,
                run.started_at,
                after=after,
                limit=limit,
                run=run.id,
                redriven_by=run.redriven_by,
                reason=run.reason,
                outbox=str(self._tables.outbox),
            ).fetchall()
            if records:
                wake_reader(self.connection, self._tables, 0.0)
        return [outbox_id for (outbox_id,) in records]

    @contextmanager
    def letters(self) -> Iterator[None]:
        """Keep every other command from sending letters back; a transaction is open on this connection meanwhile."""
        with self.connection.transaction():
            self.connection.execute(self._tables.query("redrive", "lock_letters"))
            yield

    def sent_back(self, topic: str, places: Sequence[Place]) -> set[tuple[int, int]]:
        """Return partition and offset of those letters of a dead-letter topic that were sent back before."""
        records = self.connection.execute(
            self._tables.query("redrive", "letters_sent_back"), {"letter_topic": topic, **_columns(places)}
        )
        return {(partition, offset) for partition, offset in records}

    def under_way(self, topic: str, places: Sequence[Place]) -> dict[tuple[int, int], dict[int, int]]:
        """Return those of these letters that an interrupted run may have sent, by partition and offset.

        Of each it is told where the partitions of its topic ended before.
        """
        records = self.connection.execute(
            self._tables.query("redrive", "letters_under_way"), {"letter_topic": topic, **_columns(places)}
        )
        return {
            (partition, offset): {int(number): end for number, end in ends.items()}
            for partition, offset, ends in records
        }

    def announce_letters(self, topic: str, letters: Sequence[SentBack], ends: Mapping[str, Mapping[int, int]]) -> None:
        """Write down, durably, that these letters are about to be sent, and where each topic ends until then."""
        places = [letter.place for letter in letters]
        texts = {name: json.dumps(of) for name, of in ends.items()}
        arguments = {"letter_topic": topic, "ends": [texts[letter.topic] for letter in letters], **_columns(places)}
        with self.connection.transaction():
            self._forget_letters(topic, places)
            self.connection.execute(self._tables.query("redrive", "announce_letters"), arguments)

    def record_letters(self, run: Run, topic: str, letters: Sequence[SentBack], refused: Sequence[Place] = ()) -> None:
        """Record letters that were sent back, and forget that they, and those refused, were about to be sent."""
        places = [letter.place for letter in letters]
        with self.connection.transaction():
            self._forget_letters(topic, [*places, *refused])
            self.connection.execute(
                self._tables.query("redrive", "record_letters"),
                {
                    **run._asdict(),
                    "run": run.id,
                    "outbox": str(self._tables.outbox),
                    "letter_topic": topic,
                    "errors": [trim_error(letter.error) for letter in letters],
                    "topics": [letter.topic for letter in letters],
                    "keys": [None if letter.key is None else trim_error(letter.key) for letter in letters],
                    **_columns(places),
                },
            )

    def _forget_letters(self, topic: str, places: Sequence[Place]) -> None:
        self.connection.execute(
            self._tables.query("redrive", "forget_letters"), {"letter_topic": topic, **_columns(places)}
        )

    def _select(
        self, name: str, selection: Selection, started_at: datetime, *, after: int | None = None, **more: object
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        status, since = sql.Literal(selection.status.value), f"since_{selection.status.value}"
        since_block = self._tables.query("redrive", since)
        selected = self._tables.query("redrive", "selected", status=status, since=since_block)
        ids = selection.ids
        arguments = {
            # The range of the ids, so that a few of them are found at once among many rows.
            "after": max(_BELOW_EVERY_ID if after is None else after, min(ids) - 1 if ids else _BELOW_EVERY_ID),
            "through": max(ids) if ids else _HIGHEST_ID,
            "ids": None if ids is None else list(ids),
            "key": selection.key,
            "biz_type": selection.biz_type,
            "error_like": None if selection.error_like is None else like(selection.error_like),
            "older_than": selection.older_than,
            "started_at": started_at,
        }
        statement = self._tables.query("redrive", name, status=status, since=since_block, selected=selected)
        return self.connection.execute(statement, {**arguments, **more})


def _columns(places: Sequence[Place]) -> dict[str, object]:
    return {
        "partitions": [place.partition for place in places],
        "offsets": [place.offset for place in places],
        "times": [place.time for place in places],
    }


def like(text: str) -> str:
    r"""Return a LIKE pattern for a part of a text: only `%` is special in it, not `_` or `\`."""
    escaped = text.replace("\\", "\\\\").replace("_", "\\_")
    return f"%{escaped}%"
