"""What the catalogs say of the outbox, its slot and the server; facts only, `doctor` judges them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import psycopg

from connector.outbox import Table
from connector.store.bookkeeping import Bookkeeping, Connection, Progress, SlotState
from connector.store.connections import describe
from connector.store.queries import Tables
from connector.store.schema import EnqueueTarget, PublicationState, enqueue_target, publication_state

T = TypeVar("T")

_WAITING_ROWS: Final = 1000


@dataclass(frozen=True, slots=True)
class Untold:
    """A fact that the server would not tell, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Server:
    """The server and its limits, in bytes and seconds; None where there is no limit."""

    version: int
    version_text: str
    wal_level: str
    in_recovery: bool
    most_slots: int
    slots: int
    most_walsenders: int
    walsenders: int
    slot_keep_bytes: int | None
    slot_idle_seconds: int | None
    database: str
    system_identifier: str


@dataclass(frozen=True, slots=True)
class Role:
    """The role that is in use."""

    name: str
    superuser: bool
    replication: bool


class Others(NamedTuple):
    """Whether a role other than the one in use may serve the reader, and the sink."""

    serve_reader: bool
    serve_sink: bool


@dataclass(frozen=True, slots=True)
class Session:
    """Whether a server process answers us directly, and if not, whether a pooler shares it with other clients."""

    direct: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger of an application's; `enabled` is PostgreSQL's letter: O, D, R or A."""

    name: str
    enabled: str
    before: bool
    on_insert: bool
    on_update: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite rule, and what it rewrites: insert, update or delete."""

    name: str
    event: str


@dataclass(frozen=True, slots=True)
class Index:
    """An index; `unique` only where it covers all rows."""

    name: str
    valid: bool
    unique: bool
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the catalogs describe it; letters are those of `pg_class`."""

    oid: int
    kind: str
    persistence: str
    replica_identity: str
    row_security: bool
    policies: int
    columns: Mapping[str, str]
    schema_usage: bool
    privileges: frozenset[str]
    forbidden_sequences: tuple[str, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    rules: tuple[Rule, ...] = ()
    indexes: tuple[Index, ...] = ()

    def allows(self, privilege: str) -> bool:
        """Tell whether the role in use may do this to the table."""
        return self.schema_usage and privilege in self.privileges


@dataclass(frozen=True, slots=True)
class Slot:
    """The slot, what is recorded of it, and the cluster it is in; `state` is None where there is no slot."""

    state: SlotState | None
    logical: bool
    active: bool
    failover: bool | None
    invalidation_reason: str | None
    progress: Progress | Untold | None
    system_identifier: str


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """Everything that `doctor` asks of the database."""

    server: Server
    role: Role
    others: Others
    session: Session
    clock_ahead_seconds: float
    clock_uncertainty_seconds: float
    outbox: Relation | None
    history: Relation | None
    slot_progress: Relation | None
    sink_offsets: Relation | None
    applied_migrations: frozenset[int] | Untold
    enqueue: EnqueueTarget | Untold | None
    publication: PublicationState | Untold | None
    slot: Slot
    waiting_topics: tuple[str, ...] | Untold


class Inspection:
    """Asks on one connection. Nothing here writes, or waits long."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        """Use a connection in autocommit mode, with short limits."""
        self._connection = connection
        self._tables = tables

    def _fetch(self, query: str, /, **arguments: object) -> list[tuple[Any, ...]]:
        return self._connection.execute(self._tables.query("doctor", query), arguments).fetchall()

    def database(self, publication: str, slot: str, connect_again: Callable[[], Connection]) -> DatabaseFacts:
        """Ask everything.

        Raises:
            psycopg.Error: the connection broke.
        """
        outbox_table, history_table = self._tables.outbox, self._tables.history
        session = self.session(connect_again)
        ahead, uncertainty = self.clock()
        ((*server,),) = self._fetch("server")
        ((*role,),) = self._fetch("role")
        outbox, history = self.relation(outbox_table), self.relation(history_table)
        migrations = self.relation(Table(outbox_table.schema, "outbox_connector_migrations"))
        slot_progress = self.relation(Table(outbox_table.schema, "outbox_connector_slots"))
        return DatabaseFacts(
            server=Server(*server),
            role=Role(*role),
            others=self._others(outbox, history),
            session=session,
            clock_ahead_seconds=ahead,
            clock_uncertainty_seconds=uncertainty,
            outbox=outbox,
            history=history,
            slot_progress=slot_progress,
            sink_offsets=self.relation(Table(outbox_table.schema, "outbox_connector_offsets")),
            applied_migrations=self._applied(migrations),
            enqueue=_asked(lambda: enqueue_target(self._connection, self._tables)),
            publication=self._publication(outbox, publication),
            slot=self.slot(slot),
            waiting_topics=self._waiting_topics(outbox),
        )

    def _others(self, outbox: Relation | None, history: Relation | None) -> Others:
        if outbox is None or history is None:
            return Others(serve_reader=False, serve_sink=False)
        return Others(*self._fetch("other_roles", outbox=outbox.oid, history=history.oid)[0])

    def session(self, connect_again: Callable[[], Connection]) -> Session:
        """Tell whether a pooler stands between us and the server, and if so whether it shares server sessions.

        The process id that came with the connection is a pooler's invention where there is one. A pooler that shares
        sessions between transactions gives another client the one in which we have just left something.
        """
        token = secrets.token_hex(8)
        self._fetch("remember", token=token)
        pid, _ = self._backend()
        if pid == self._connection.info.backend_pid:
            return Session(direct=True, shared=False)
        with connect_again() as other:
            _, found = Inspection(other, self._tables)._backend()  # noqa: SLF001 - another of our own kind
        _, kept = self._backend()
        return Session(direct=False, shared=found == token or kept != token)

    def _backend(self) -> tuple[int, str]:
        ((pid, remembered),) = self._fetch("backend")
        return pid, remembered

    def clock(self) -> tuple[float, float]:
        """Return by how many seconds the server's clock is ahead of ours, and how far that may be wrong."""
        before = time.time()
        ((theirs,),) = self._fetch("clock")
        after = time.time()
        return theirs - (before + after) / 2, (after - before) / 2

    def relation(self, table: Table) -> Relation | None:
        """Return a table's description, or None if there is no such relation."""
        found = self._fetch("relation", schema=table.schema, name=table.name)
        if not found:
            return None
        oid, kind, persistence, identity, secured, policies, columns, usage, privileges, sequences = found[0]
        return Relation(
            oid,
            kind,
            persistence,
            identity,
            secured,
            policies,
            columns,
            usage,
            frozenset(privileges),
            tuple(sequences),
            tuple(Trigger(*record) for record in self._fetch("triggers", oid=oid)),
            tuple(Rule(*record) for record in self._fetch("rules", oid=oid)),
            tuple(
                Index(name, valid, unique, tuple(names))
                for name, valid, unique, names in self._fetch("indexes", oid=oid)
            ),
        )

    def slot(self, name: str) -> Slot:
        """Return the slot with what is recorded of it."""
        books = Bookkeeping(self._connection, self._tables, name)
        state = books.slot_state()
        found = self._fetch("slot", slot=name)
        slot_type, active, failover, reason = found[0] if found else ("", False, None, None)
        ((system,),) = self._fetch("system_identifier")
        progress = _asked(books.read_progress)
        return Slot(state, slot_type == "logical", active, failover, reason, progress, system)

    def _applied(self, migrations: Relation | None) -> frozenset[int] | Untold:
        if migrations is None:
            return frozenset()
        outbox = str(self._tables.outbox)
        statement = self._tables.query("setup", "applied_migrations")
        return _asked(
            lambda: frozenset(version for (version,) in self._connection.execute(statement, {"outbox": outbox}))
        )

    def _publication(self, outbox: Relation | None, publication: str) -> PublicationState | Untold | None:
        if outbox is None:
            return Untold("there is no outbox table")
        return _asked(lambda: publication_state(self._connection, self._tables, publication))

    def _waiting_topics(self, outbox: Relation | None) -> tuple[str, ...] | Untold:
        if outbox is None:
            return Untold("there is no outbox table")
        return _asked(lambda: tuple(topic for (topic,) in self._fetch("waiting_topics", bound=_WAITING_ROWS)))


def _asked(question: Callable[[], T]) -> T | Untold:
    """Ask for what the role may not be allowed to see; a broken connection still raises."""
    try:
        return question()
    except psycopg.OperationalError as error:
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
            raise
        return Untold(describe(error))
    except psycopg.Error as error:
        return Untold(describe(error))
