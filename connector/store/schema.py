"""Brings the schema up to date: migrations, in order, each once; and the publication."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from psycopg import sql

from connector.errors import SetupRequired
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables, sql_directory

PUBLISHED_COLUMNS = (
    "id",
    "biz_type",
    "topic",
    "message_key",
    "payload",
    "headers",
    "status",
    "retry_count",
    "next_retry_at",
    "updated_at",
)
"""What the publication sends of each row: the message, and what its mark is fenced with."""


_BUILDING_PAUSE: Final = 0.5
_ANOTHER_OUTBOX: Final = (
    "Give each outbox a schema of its own, by CONNECTOR_OUTBOX_TABLE, with a CONNECTOR_PUBLICATION_NAME and a"
    " CONNECTOR_SLOT_NAME of its own; or, if the other one is no longer in use, drop the function and run `setup` again"
)

# As the server writes `status = 'pending'`, whatever type the column has.
_PENDING_ROWS = re.compile(r"\(*status\)*(::[a-z ]+)? = 'pending'(::[a-z ]+)?\)*")


class Migration(NamedTuple):
    """One file of `sql/migrations`, by the number that its name begins with."""

    version: int
    name: str
    statement: sql.Composed


class IndexState(NamedTuple):
    """One of our indexes as the server shows it."""

    schema: str
    name: str
    there: bool
    valid: bool
    being_built: bool


class EnqueueTarget(NamedTuple):
    """The table that `outbox_enqueue` writes to, as its source has it; None where that does not tell."""

    written: str | None
    is_ours: bool
    exists: bool

    @property
    def is_another(self) -> bool:
        """Whether what applications enqueue goes elsewhere for all that can be told."""
        return self.written is not None and not self.is_ours


class PublicationState(NamedTuple):
    """A publication as the server shows it; `columns` is None where the outbox is not in it."""

    inserts_only: bool
    columns: list[str] | None
    row_filter: str | None
    tables: int

    @property
    def is_ours(self) -> bool:
        """Whether it sends just the inserts of pending rows, with the columns that the reader needs."""
        return (
            self.inserts_only
            and self.columns is not None
            and set(self.columns) == set(PUBLISHED_COLUMNS)
            and self.row_filter is not None
            and self.sends_every_pending_row
        )

    @property
    def sends_every_pending_row(self) -> bool:
        """Whether no row filter but ours stands in the way."""
        return self.row_filter is None or _PENDING_ROWS.fullmatch(self.row_filter) is not None


def migrations(tables: Tables) -> Iterator[Migration]:
    """Yield the migrations in order, on the configured tables."""
    for path in sorted((sql_directory() / "migrations").glob("*.sql")):
        version, _, name = path.stem.partition("_")
        yield Migration(int(version), name, tables.script(f"migrations/{path.name}"))


def enqueue_target(connection: Connection, tables: Tables) -> EnqueueTarget | None:
    """Return where applications enqueue to, or None if the function is not there."""
    record = connection.execute(tables.query("setup", "enqueue_target")).fetchone()
    return None if record is None else EnqueueTarget(*record)


def migrate(connection: Connection, tables: Tables) -> list[Migration]:
    """Apply the migrations that are not recorded yet, all in one transaction; return them.

    Raises:
        SetupRequired: the function by which applications enqueue serves another outbox; nothing was changed.
        psycopg.Error: the role may not create what is missing, or an object of another kind is in the way.
    """
    outbox = str(tables.outbox)
    applied = []
    with connection.transaction():
        connection.execute(tables.query("setup", "lock_setup"))
        target = enqueue_target(connection, tables)
        if target is not None and target.is_another and target.exists:
            raise SetupRequired(
                f"function {tables.enqueue} writes to {target.written}, and there is one for each schema: made anew for"
                f" {tables.outbox} it would lead the applications of {target.written} astray. {_ANOTHER_OUTBOX}"
            )
        connection.execute(tables.query("setup", "create_migrations"))
        done = {
            version
            for (version,) in connection.execute(tables.query("setup", "applied_migrations"), {"outbox": outbox})
        }
        for migration in migrations(tables):
            if migration.version not in done or (migration.name == "enqueue" and target is None):
                connection.execute(migration.statement)
                connection.execute(
                    tables.query("setup", "record_migration"),
                    {"outbox": outbox, "version": migration.version, "name": migration.name},
                )
                applied.append(migration)
        if _empty(connection, tables):
            # In the same transaction, so that there is never a table of ours without its indexes.
            build_indexes(connection, tables)
    return applied


def build_indexes(connection: Connection, tables: Tables) -> list[str]:
    """Build the indexes that are missing, or were left half built; return their names.

    On tables with rows they are built concurrently, in no transaction, and one by one: writers do not wait.

    Raises:
        psycopg.Error: one cannot be built; a next call tries again.
    """
    blocks = {name: block for of_table in tables.indexes().values() for name, block in of_table.items()}
    built = []
    while wanted := [index for index in _index_states(connection, tables) if not index.valid]:
        if any(index.being_built for index in wanted):
            # Another setup is at it; its half-built index looks just like one that was left behind.
            time.sleep(_BUILDING_PAUSE)
            continue
        index = wanted[0]
        concurrently = not _empty(connection, tables)
        if index.there:
            connection.execute(
                tables.query(
                    "setup",
                    "drop_index",
                    concurrently=sql.SQL("concurrently" if concurrently else ""),
                    index=sql.Identifier(index.schema, index.name),
                )
            )
        connection.execute(tables.index(blocks[index.name], concurrently=concurrently))
        built.append(index.name)
    return built


def _index_states(connection: Connection, tables: Tables) -> list[IndexState]:
    places = [(table, name) for table, of_table in tables.indexes().items() for name in of_table]
    states = connection.execute(
        tables.query("setup", "state_of_indexes"),
        {"names": [name for _, name in places], "tables": [str(table) for table, _ in places]},
    )
    schemas = {name: table.schema for table, name in places}
    return [IndexState(schemas[name], name, *state) for name, *state in states]


def _empty(connection: Connection, tables: Tables) -> bool:
    (empty,) = connection.execute(tables.query("setup", "is_empty")).fetchone() or (False,)
    return bool(empty)


def publication_state(connection: Connection, tables: Tables, publication: str) -> PublicationState | None:
    """Return the publication as it is, or None if there is none of that name."""
    record = connection.execute(
        tables.query("setup", "publication_state"), {"outbox": str(tables.outbox), "publication": publication}
    ).fetchone()
    return None if record is None else PublicationState(*record)


def publication_statement(tables: Tables, publication: str, name: str = "create_publication") -> sql.Composed:
    """Return a statement of `setup.sql` about the publication."""
    columns = sql.SQL(", ").join(sql.Identifier(column) for column in PUBLISHED_COLUMNS)
    return tables.query("setup", name, publication=sql.Identifier(publication), columns=columns)


def publish(connection: Connection, tables: Tables, publication: str) -> str:
    """Make the publication, or mend it where it is not as it must be; return what was done."""
    with connection.transaction():
        connection.execute(tables.query("setup", "lock_setup"))
        state = publication_state(connection, tables, publication)
        if state is None:
            connection.execute(publication_statement(tables, publication))
            return "created"
        if state.is_ours:
            return "as it should be"
        connection.execute(publication_statement(tables, publication, "replace_publication_table"))
        connection.execute(publication_statement(tables, publication, "publish_inserts_only"))
        return "mended"


def _unless_of_another(tables: Tables, migration: Migration) -> sql.Composed:
    return tables.compose(
        "-- There is one such function for each schema. One that serves another outbox is left alone.\n"
        "do $guard$\ndeclare\n    other text;\nbegin\n"
        "    select e.target into other from (\n{target}\n    ) as e (target, is_ours, is_there)"
        " where not is_ours and is_there;\n"
        "    if other is not null then\n"
        "        raise exception 'function % writes to %', {enqueue_signature}, other using hint = {hint};\n"
        "    end if;\n{create}\nend\n$guard$",
        target=tables.query("setup", "enqueue_target"),
        hint=sql.Literal(_ANOTHER_OUTBOX),
        create=migration.statement,
    )


def script(tables: Tables, publication: str, slot: str) -> Iterator[sql.Composable]:
    """Yield everything that `setup` does in the database, as SQL to read and run by hand."""
    yield tables.query("setup", "create_migrations")
    for migration in migrations(tables):
        yield _unless_of_another(tables, migration) if migration.name == "enqueue" else migration.statement
        yield tables.compose(
            "insert into {migrations} (outbox_table, version, name) values ({outbox_name}, {version}, {name})\n"
            "on conflict do nothing",
            version=sql.Literal(migration.version),
            name=sql.Literal(migration.name),
        )
    yield sql.SQL("-- The indexes. Not in one transaction with anything: so nobody waits for them.")
    for of_table in tables.indexes().values():
        for block in of_table.values():
            yield tables.index(block, concurrently=True)
    yield tables.compose(
        "-- Only inserts of pending rows, and of them only what the reader needs.\n"
        "do $publication$\nbegin\n"
        "    if not exists (select from pg_publication where pubname = {publication}) then\n{create};\n    end if;\n"
        "end\n$publication$",
        publication=sql.Literal(publication),
        create=publication_statement(tables, publication),
    )
    yield tables.compose(
        "-- The slot. The reader makes it by itself where it is missing. Not in one transaction with what is above.\n"
        "do $slot$\nbegin\n"
        "    if exists (select from pg_replication_slots where slot_name = {slot}) then\n"
        "        null;\n"
        "    elsif current_setting('server_version_num')::integer >= 170000 then\n"
        "        perform pg_create_logical_replication_slot({slot}, 'pgoutput', failover => true);\n"
        "    else\n"
        "        perform pg_create_logical_replication_slot({slot}, 'pgoutput');\n"
        "    end if;\nend\n$slot$",
        slot=sql.Literal(slot),
    )
    yield tables.script("roles.sql")
