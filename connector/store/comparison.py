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
    `payload` is JSON text, and only there if history has the message.
    """

    outbox_id: int
    status: str
    biz_type: str
    topic: str
    key: str
    key_hash: int
    created: float
    waits: float | None
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
        self._has_redrives, self._has_pruned = (
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
            stored = [Stored(line[9], line[10:14], line[14]) for line in same if line[9] is not None]
            if len(stored) > 1:
                stored.sort()
            yield Message._make((*same[0][:9], stored))

    def places(self, after: int, through: int, since: float, mask: int, bits: int) -> Iterator[tuple[int, int, int]]:
        """Yield key hash, outbox id and place in history, by outbox id, of the keys whose hash ends in `bits`."""
        arguments = {"after": after, "through": through, "since": since, "mask": mask, "bits": bits}
        return self._stream(self._tables.query("reconcile", "places"), arguments)

    def stragglers(self, overtaken: Mapping[int, int]) -> list[Straggler]:
        """Return those that are stragglers indeed, of places in history with the outbox id of an overtaker each."""
        records = self._all("stragglers", places=list(overtaken), overtakers=list(overtaken.values()))
        return [Straggler(*record) for record in records]

    def redriven(self, ids: Sequence[int]) -> set[int]:
        """Return those of these messages that somebody has put back."""
        if not ids or not self._has_redrives:
            return set()
        return {outbox_id for (outbox_id,) in self._all("redriven", ids=list(ids), outbox=str(self._tables.outbox))}

    def pruned_through(self) -> int:
        """Return the highest id that `prune` has removed, or 0."""
        return int(self._one("pruned_through")[0]) if self._has_pruned else 0

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

    def last_id(self) -> int:
        """Return the last id there is, or 0."""
        return int(self._one("last_id")[0])

    def unproved(
        self, again: Sequence[int], after: int, through: int, limit: int, biz_types: Sequence[str]
    ) -> tuple[int | None, dict[int, str]]:
        """Return where a range of at most so many rows ends, and what is not proved of it and of other ids, with why.

        The database compares, without times of creation; `why` is unsettled, missing, duplicated or differing.
        """
        records = self._all(
            "unproved", again=list(again), after=after, through=through, limit=limit, biz_types=list(biz_types)
        )
        *found, (end, _) = sorted(records, key=lambda record: record[1] == "end")
        return end, dict(found)
