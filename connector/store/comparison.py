"""What outbox and history hold of each message, read side by side in bounded ranges and never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple

from psycopg import capabilities, sql

from connector.outbox import Table
from connector.store.bookkeeping import Connection
from connector.store.inspection import Inspection
from connector.store.queries import Tables

_RANGE: Final = 2_000
# Without an index each range reads all of history, so there must be few.
_RANGE_WITHOUT_INDEX: Final = 200_000
_LONGEST_BISECTION: Final = 64


class Stored(NamedTuple):
    """A row of history: its id, what the handler gave it, and `created_at` in microseconds since 1970."""

    place: int
    values: tuple[int, str, str | None, str | None]
    created: int | None


class Message(NamedTuple):
    """A row of the outbox, and what history has of it.

    `created` is in seconds since 1970; `waits` says for how long it has been published, or due (negative: not yet);
    `consumed` is a time as `created` is; `payload` is JSON text, and only there if history has the message.
    """

    outbox_id: int
    status: str
    biz_type: str
    topic: str
    key: str
    key_hash: int
    created: float
    waits: float | None
    retry_count: int
    consumed: float | None
    payload: str | None
    stored: list[Stored]


class Straggler(NamedTuple):
    """A message that history has behind a later one of its key; `created` is when the first of both was."""

    outbox_id: int
    overtaken_by: int
    topic: str
    key: str
    retry_count: int
    created: float


class Content(NamedTuple):
    """What a row of history holds, hashed; when it was made, in microseconds since 1970; and an id."""

    hashed: int
    created: int
    number: int


class Comparison:
    """Reads on one connection in autocommit mode, in read-only transactions."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        """Look at what there is.

        Raises:
            psycopg.Error: the connection broke.
        """
        self._connection = connection
        self._tables = tables
        self._only_read = tables.query("reconcile", "only_read").as_string(connection)
        inspection = Inspection(connection, tables)
        relation = inspection.relation(tables.history)
        indexes = relation.indexes if relation else ()
        self.history_is_indexed = any(i.valid and i.columns[:1] == ("outbox_id",) for i in indexes)
        # Made by later migrations than the rest.
        self._has_redrives, self.knows_what_was_pruned = (
            inspection.relation(Table(tables.outbox.schema, name)) is not None
            for name in ("outbox_connector_redrives", "outbox_connector_pruned")
        )
        self._range = _RANGE if self.history_is_indexed else _RANGE_WITHOUT_INDEX

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._connection.transaction():
            self._connection.execute(self._only_read, prepare=False)
            yield

    def _all(self, name: str, **arguments: object) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._connection.execute(self._tables.query("reconcile", name), arguments).fetchall()

    def _one(self, name: str, **arguments: object) -> tuple[Any, ...]:
        (record,) = self._all(name, **arguments)
        return record

    def _stream(self, statement: sql.Composed, arguments: Mapping[str, object]) -> Iterator[tuple[Any, ...]]:
        """Yield records as they come, so that however large they are only a few of them are in memory."""
        size = 20 if capabilities.has_stream_chunked() else 1
        with self._reading(), self._connection.cursor() as cursor:
            yield from cursor.stream(statement, arguments, binary=True, size=size)

    def span(self) -> tuple[int, int, float] | None:
        """Return the first and the last id and the time in seconds since 1970, or None for an empty outbox."""
        first, last, now = self._one("span")
        return None if first is None else (first, last, now)

    def first_since(self, first: int, last: int, moment: float) -> int:
        """Return an id before which no row was created after a moment, in seconds since 1970.

        Ids grow with time but for the length of a transaction, so this looks at stretches of rows, not at single ones.
        """
        for _ in range(_LONGEST_BISECTION):
            if first >= last:
                break
            middle = (first + last) // 2
            (newest,) = self._one("newest_of", **{"from": middle})
            if newest is not None and newest < moment:
                first = middle + 1
            else:
                last = middle
        return first

    def end_of_range(self, after: int, through: int) -> int | None:
        """Return the last id of the next range, or None where no row is left."""
        (end,) = self._one("end_of_range", after=after, through=through, limit=self._range)
        return None if end is None else int(end)

    def messages(self, after: int, through: int, since: float) -> Iterator[Message]:
        """Yield the messages of one range that were created since a moment, by id."""
        arguments = {"after": after, "through": through, "since": since}
        return self._messages("in_range", "in_range_of_history", arguments)

    def messages_of(self, ids: Sequence[int]) -> Iterator[Message]:
        """Yield the messages of these ids that are there, by id."""
        return self._messages("of_ids", "of_ids_in_history", {"ids": list(ids)})

    def _messages(self, which: str, which_history: str, arguments: Mapping[str, object]) -> Iterator[Message]:
        parts = {
            "which": self._tables.query("reconcile", which),
            "which_history": self._tables.query("reconcile", which_history),
        }
        records = self._stream(self._tables.query("reconcile", "messages", **parts), arguments)
        for _, lines in groupby(records, key=itemgetter(0)):
            same = list(lines)
            stored = [Stored(line[11], line[12:16], line[16]) for line in same if line[11] is not None]
            if len(stored) > 1:
                stored.sort()
            yield Message._make((*same[0][:11], stored))

    def places(self, after: int, through: int, since: float, mask: int, bits: int) -> Iterator[tuple[int, int, int]]:
        """Yield key hash, outbox id and place in history, by outbox id, of the keys whose hash ends in `bits`."""
        arguments = {"after": after, "through": through, "since": since, "mask": mask, "bits": bits}
        return self._stream(self._tables.query("reconcile", "places"), arguments)

    def stragglers(self, overtaken: Mapping[int, int]) -> list[Straggler]:
        """Return those that are stragglers indeed, of places in history with the outbox id of an overtaker each."""
        records = self._all("stragglers", places=list(overtaken), overtakers=list(overtaken.values()))
        return [Straggler(*record) for record in records]

    def end_of_history_range(self, after: int, through: int) -> int | None:
        """Return the last id of the next range of history, or None where none is left that the outbox must have."""
        (end,) = self._one("end_of_history_range", after=after, through=through, limit=self._range)
        return None if end is None else int(end)

    def without_a_message(self, after: int, through: int) -> list[int]:
        """Return the ids of a range of history of which the outbox has no row, and that `prune` has not passed."""
        return [
            outbox_id for outbox_id, _ in self._without_a_message("in_range_of_history", after=after, through=through)
        ]

    def still_without_a_message(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """Return those of these that are without one still, with their conversations."""
        return self._without_a_message("of_ids_in_history", ids=list(ids))

    def _without_a_message(self, which_history: str, **arguments: object) -> list[tuple[Any, ...]]:
        which = self._tables.query("reconcile", which_history)
        query = self._tables.query("reconcile", "without_a_message", which_history=which)
        with self._reading():
            return self._connection.execute(query, arguments).fetchall()

    def rows_without_id(self, limit: int) -> tuple[int, int]:
        """Return how many rows of history name no message, counted up to a limit, and how many blocks history takes."""
        rows, blocks = self._one("rows_without_id", limit=limit, history=str(self._tables.history))
        return rows, blocks

    def count_without_id(self, blocks: range) -> tuple[int, int | None]:
        """Return how many rows of some blocks name no message, and when the newest of them was made."""
        rows, newest = self._one("count_without_id", **_places(blocks))
        return rows, newest

    def content_without_id(self, blocks: range, since: float) -> list[Content]:
        """Return those of them that were made since a moment, with their own ids."""
        return self._contents("content_without_id", _places(blocks) | {"since": since})

    def content_of_range(self, after: int, through: int) -> list[Content]:
        """Return the rows of history of a range of messages, with the messages' ids."""
        return self._contents("content_of_range", {"after": after, "through": through})

    def _contents(self, name: str, arguments: Mapping[str, object]) -> list[Content]:
        query = self._tables.query("reconcile", name, content=self._tables.query("reconcile", "content"))
        return [Content._make(record) for record in self._stream(query, arguments)]

    def redriven(self, ids: Sequence[int]) -> set[int]:
        """Return those of these messages that somebody has put back."""
        if not ids or not self._has_redrives:
            return set()
        return {outbox_id for (outbox_id,) in self._all("redriven", ids=list(ids), outbox=str(self._tables.outbox))}

    def pruned_through(self) -> int:
        """Return the highest id that `prune` has removed, or 0."""
        return int(self._one("pruned_through")[0]) if self.knows_what_was_pruned else 0

    def without_a_trace(self, ids: Sequence[int]) -> list[int]:
        """Return those of these ids that neither the outbox nor history has, in order."""
        return [outbox_id for (outbox_id,) in self._all("without_a_trace", ids=list(ids))]

    def writers(self) -> set[str]:
        """Return the transactions that have written to the outbox: until they have ended, nobody may see their rows."""
        with self._reading():
            query = self._tables.query("sink", "writers")
            return {writer for (writer,) in self._connection.execute(query, {"outbox": str(self._tables.outbox)})}

    def is_standby(self) -> bool:
        """Tell whether the server lags behind another one."""
        return bool(self._one("in_recovery")[0])

    def unsettled(self, most: int) -> tuple[int, list[int]]:
        """Return the last id there is, and the ids of messages that are neither consumed nor dead, within bounds."""
        last, ids = self._one("unsettled", most=most)
        return last, ids

    def first_stored(self) -> int | None:
        """Return the first message that history can be expected to have, or None while it has none at all."""
        found = self._all("first_stored")
        return found[0][0] if found else None

    def last_id(self) -> int:
        """Return the last id there is, or 0."""
        return int(self._one("last_id")[0])

    def unproved(
        self, again: Sequence[int], after: int, through: int, limit: int, biz_types: Sequence[str]
    ) -> tuple[int | None, dict[int, str]]:
        """Return where a range of at most so many rows ends, and what is not proved of it and of other ids, with why.

        The database compares; `why` is unsettled, missing, duplicated or differing.
        """
        query = self._tables.query("reconcile", "unproved", untimely=self._tables.query("reconcile", "untimely"))
        arguments = {
            "again": list(again),
            "after": after,
            "through": through,
            "limit": limit,
            "biz_types": list(biz_types),
        }
        with self._reading():
            records = self._connection.execute(query, arguments).fetchall()
        *found, (end, _) = sorted(records, key=lambda record: record[1] == "end")
        return end, dict(found)


def _places(blocks: range) -> dict[str, str]:
    """Return the places of rows between which these blocks lie."""
    return {"first": f"({blocks.start},0)", "end": f"({blocks.stop},0)"}
