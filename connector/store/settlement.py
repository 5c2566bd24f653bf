"""The sink's transaction: store a batch and mark it consumed, or write down why a row could not be stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import psycopg
from psycopg import errors, sql

from connector.failpoints import Point, reach
from connector.outbox import Failure
from connector.store.arrays import SENT_AS_BINARY, array_of, understand_arrays
from connector.store.bookkeeping import Connection, Settled, settle_failures, wake_reader
from connector.store.connections import describe, is_refused_by_policy, is_row_fault, send_all
from connector.store.queries import Tables, index_name

STORED = "stored"
HELD = "held"
ALREADY_STORED = "already_stored"

_VISIBLE_SECONDS: Final = 0.1


class Destination(Protocol):
    """What a batch is stored with: a handler's columns and statement."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Column names with their PostgreSQL types."""

    @property
    def statement(self) -> str:
        """The SQL that stores `accepted`."""


class Item(NamedTuple):
    """One message on its way to its destination: its row, the attempt, its key, and the handler's values."""

    outbox_id: int
    attempt: int
    biz_type: str
    key: bytes
    values: Sequence[object]


class Group(NamedTuple):
    """Messages of one `biz_type` that are stored by one statement, and what that is given."""

    items: list[Item]
    arguments: dict[str, Any]


class Outcome(NamedTuple):
    """What became of one message.

    `what` is stored, held, already_stored, missing, or the terminal status its row had. Times are in seconds: since
    the row was created, and until a held row is due.
    """

    outbox_id: int
    what: str
    age: float | None
    due_in: float | None


@dataclass(slots=True)
class Result:
    """What one transaction did: outcomes of messages, and failures with what became of their rows."""

    failures: list[Failure] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    told: list[Outcome] = field(default_factory=list)
    """Of messages that the database told apart."""
    plain: list[tuple[Group, list[tuple[float | None]]]] = field(default_factory=list)
    """Groups of which every message was stored, with the age of each."""

    @property
    def outcomes(self) -> list[Outcome]:
        """Return what became of each message; put together only now, when no transaction waits for it."""
        stored = (
            Outcome(item.outbox_id, STORED, age, None)
            for group, ages in self.plain
            for item, (age,) in zip(group.items, ages, strict=True)
        )
        return [*self.told, *stored]


class NotVisibleYet(Exception):
    """A message has overtaken the end of the transaction that enqueued it."""


class Settlement:
    """Settles batches on one connection."""

    def __init__(
        self, connection: Connection, tables: Tables, destinations: Mapping[str, Destination], *, strict: bool
    ) -> None:
        """Compose each destination's statement; `strict` holds messages back behind an earlier one of their key."""
        self.connection = connection
        understand_arrays(connection)
        self._tables = tables
        self._strict = strict
        self._destinations = destinations
        self._statements = {
            biz_type: self._compose("store_batch", destination) for biz_type, destination in destinations.items()
        }
        self._plain_statements = {
            biz_type: self._compose("store_plain_batch", destination) for biz_type, destination in destinations.items()
        }
        self._history_key = index_name(tables.history, "outbox_id_key")
        self._hiding: dict[int, set[str]] = {}

    def _compose(self, statement: str, destination: Destination) -> sql.Composed:
        columns = [sql.Identifier(name) for name in destination.columns]
        parameters = [
            sql.SQL("%({}){}::{}[]").format(
                sql.SQL(_parameter(name)), sql.SQL("b" if type_ in SENT_AS_BINARY else "s"), sql.SQL(type_)
            )  # of the handler's code, no input
            for name, type_ in destination.columns.items()
        ]
        elements = [
            sql.SQL("unnest({}) as {}").format(parameter, column)
            for parameter, column in zip(parameters, columns, strict=True)
        ]
        return self._tables.query(
            "sink",
            statement,
            handler_parameters=_each_after_a_comma(parameters),
            handler_columns=_each_after_a_comma(columns),
            handler_elements=_each_after_a_comma(elements),
            handler_statement=self._tables.compose(destination.statement),
        )

    def missing_tables(self) -> list[str]:
        """Return those of the two tables that are not there."""
        names = [str(self._tables.outbox), str(self._tables.history)]
        rows = self.connection.execute(self._tables.query("sink", "missing_tables"), {"names": names})
        return [name for (name,) in rows]

    def prepare(self, items: Sequence[Item]) -> list[Group]:
        """Return a batch as its statements take it; to any settlement of the same destinations."""
        return [self._group(group) for group in waves(items)]

    def settle(
        self,
        items: Sequence[Item],
        unparsed: Sequence[Failure],
        first: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] | None = None,
        prepared: Sequence[Group] | None = None,
    ) -> Result:
        """Settle a batch in one transaction: all rows that can be stored are, the others get their failure.

        `unparsed` are the failures of messages that never got as far as an item; `first` begins the transaction, and
        `meanwhile` is called while the server is at work, at most once. `prepared` are the items as `prepare` returns
        them, where that was done before.

        Raises:
            psycopg.Error: the database could not do it, for no fault of a message; nothing has changed.
            NotVisibleYet: a row's transaction is still at its commit; nothing has changed, and a later call will pass.
        """
        groups = prepared or self.prepare(items)
        if not unparsed and (result := self._store_if_plain(groups, first, meanwhile)) is not None:
            return result
        self._await_rows([*(item.outbox_id for item in items), *(failure.outbox_id for failure in unparsed)])
        try:
            return self._transaction(groups, unparsed, first, isolate=False)
        except psycopg.Error as error:
            if not self._is_about_a_row(error):
                raise
        return self._transaction(groups, unparsed, first, isolate=True)

    def _store_if_plain(
        self, groups: Sequence[Group], first: Callable[[], None], meanwhile: Callable[[], None] | None
    ) -> Result | None:
        """Settle a batch of which every message can be stored; if there is another one, change nothing."""
        result = Result()
        try:
            # It comes through where the connection breaks before all is undone; the next statement says so.
            with suppress(psycopg.Rollback), self.connection.transaction():
                first()
                for group in groups:
                    ages = self._store_plain(group, meanwhile)
                    meanwhile = None
                    if len(ages) < len(group.items):
                        raise psycopg.Rollback
                    result.plain.append((group, ages))
                reach(Point.STATEMENT_RUN)
                return result
        except psycopg.Error as error:
            if not self._is_about_a_row(error):
                raise
        return None

    def _store_plain(self, group: Group, meanwhile: Callable[[], None] | None) -> list[tuple[float | None]]:
        statement = self._plain_statements[group.items[0].biz_type]
        if meanwhile is None:
            return self.connection.execute(statement, group.arguments, binary=True).fetchall()
        with self.connection.pipeline():
            cursor = self.connection.execute(statement, group.arguments, binary=True)
            send_all(self.connection)
            meanwhile()
        return cursor.fetchall()

    def enqueued(self, outbox_ids: list[int]) -> dict[int, tuple[str, str]]:
        """Return `biz_type` and `payload` (JSON text) of the rows that are there.

        Raises:
            psycopg.Error: the database could not do it.
            NotVisibleYet: a row's transaction is still at its commit.
        """
        self._await_rows(outbox_ids)
        rows = self.connection.execute(self._tables.query("sink", "rows_as_enqueued"), {"ids": outbox_ids})
        return {outbox_id: (biz_type, payload) for outbox_id, biz_type, payload in rows}

    def _await_rows(self, outbox_ids: list[int]) -> None:
        """Wait a moment until every row of a batch can be seen, or is known to be gone.

        The stream brings a transaction as soon as its commit is in the WAL, which is before other sessions see its
        rows, and long before where the commit waits for a synchronous standby. A message can be faster than that.
        """
        absent = self._not_seen(outbox_ids)
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while absent:
            writers = self._writers()
            # Only who wrote when a row was first missed can hide it, also at a later call: others come and go for ever.
            self._hiding = {outbox_id: self._hiding.get(outbox_id, writers) & writers for outbox_id in absent}
            absent = self._not_seen(absent)
            hidden = [outbox_id for outbox_id in absent if self._hiding[outbox_id]]
            if not hidden:
                break
            if time.monotonic() > deadline:
                raise NotVisibleYet(f"the transaction that enqueued #{hidden[0]} has not ended its commit")
            time.sleep(0.001)
        self._hiding = {}

    def _not_seen(self, outbox_ids: list[int]) -> list[int]:
        rows = self.connection.execute(self._tables.query("sink", "rows_not_seen"), {"ids": outbox_ids})
        return [outbox_id for (outbox_id,) in rows]

    def _writers(self) -> set[str]:
        rows = self.connection.execute(self._tables.query("sink", "writers"), {"outbox": str(self._tables.outbox)})
        return {transaction for (transaction,) in rows}

    def _transaction(
        self, groups: Sequence[Group], unparsed: Sequence[Failure], first: Callable[[], None], *, isolate: bool
    ) -> Result:
        result = Result(list(unparsed))
        with self.connection.transaction():
            first()
            if isolate:
                # A deferred constraint would speak up only at the commit, when it is too late to tell whose it is.
                self.connection.execute("set constraints all immediate")
            if unparsed:
                result.settled.extend(settle_failures(self.connection, self._tables, unparsed))
            for group in groups:
                if isolate:
                    self._store_each_that_can(group, result)
                else:
                    result.told.extend(self._store(group))
            waits = [*(row.due_in for row in result.settled), *(row.due_in for row in result.told)]
            due = [seconds for seconds in waits if seconds is not None]
            if due:
                wake_reader(self.connection, self._tables, min(due))
            reach(Point.STATEMENT_RUN)
        return result

    def _store(self, group: Group) -> list[Outcome]:
        rows = self.connection.execute(self._statements[group.items[0].biz_type], group.arguments)
        return [Outcome(*row) for row in rows]

    def _group(self, items: list[Item]) -> Group:
        ids = array_of("bigint", [item.outbox_id for item in items])
        arguments: dict[str, Any] = {"outbox_ids": ids, "strict": self._strict}
        columns = zip(*(item.values for item in items), strict=True)
        for (name, type_), values in zip(self._destinations[items[0].biz_type].columns.items(), columns, strict=True):
            arguments[_parameter(name)] = array_of(type_, values)
        return Group(items, arguments)

    def _store_each_that_can(self, group: Group, result: Result) -> None:
        """Halve a group until the rows that the database refuses stand alone; their neighbours are stored."""
        try:
            with self.connection.transaction():
                outcomes = self._store(group)
        except psycopg.Error as error:
            if not self._is_about_a_row(error):
                raise
            if len(group.items) == 1:
                self._refused(group.items[0], error, result)
                return
        else:
            result.told.extend(outcomes)
            return
        half = len(group.items) // 2
        # In this order: an earlier message that fails is in the table before a later one of its key is looked at.
        self._store_each_that_can(self._group(group.items[:half]), result)
        self._store_each_that_can(self._group(group.items[half:]), result)

    def _refused(self, item: Item, error: psycopg.Error, result: Result) -> None:
        if self._holds_it_already(error):
            self.connection.execute(self._tables.query("sink", "mark_already_stored"), {"id": item.outbox_id})
            result.told.append(Outcome(item.outbox_id, ALREADY_STORED, None, None))
            return
        failure = Failure(item.outbox_id, item.attempt, describe(error), "refused_by_database")
        result.failures.append(failure)
        result.settled.extend(settle_failures(self.connection, self._tables, [failure]))

    def _is_about_a_row(self, error: psycopg.Error) -> bool:
        """Tell whether another row might pass; not while the transaction that failed is still open."""
        if not is_refused_by_policy(error):
            return is_row_fault(error)
        # Without a policy that lets some rows in, none passes: as with a privilege that was taken away.
        (has_policy,) = self.connection.execute(self._tables.query("sink", "has_insert_policy")).fetchone() or (False,)
        return bool(has_policy)

    def _holds_it_already(self, error: psycopg.Error) -> bool:
        if not isinstance(error, errors.UniqueViolation):
            return False
        detail = error.diag.message_detail or ""
        return error.diag.constraint_name == self._history_key or "(outbox_id)=" in detail


def waves(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Split a batch into groups of one `biz_type` each, such that messages of one key keep their order.

    Groups are as large as that allows: a new wave begins where a key turns up under another `biz_type`.
    """
    if len({item.biz_type for item in items}) == 1:
        yield list(items)
        return
    groups: dict[str, list[Item]] = {}
    seen: dict[bytes, str] = {}
    for item in items:
        if seen.setdefault(item.key, item.biz_type) != item.biz_type:
            yield from groups.values()
            groups = {}
            seen = {item.key: item.biz_type}
        groups.setdefault(item.biz_type, []).append(item)
    yield from groups.values()


def _each_after_a_comma(parts: Sequence[sql.Composable]) -> sql.Composed:
    return sql.Composed([sql.SQL(", ") + part for part in parts])


def _parameter(column: str) -> str:
    return f"column_{column}"
