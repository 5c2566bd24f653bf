"""Brings the schema up to date: migrations, in order, each once; and the publication."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from psycopg import sql

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


# As the server writes `status = 'pending'`, whatever type the column has.
_PENDING_ROWS = re.compile(r"\(*status\)*(::[a-z ]+)? = 'pending'(::[a-z ]+)?\)*")


class Migration(NamedTuple):
    """One file of `sql/migrations`, by the number that its name begins with."""

    version: int
    name: str
    statement: sql.Composed


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
        statement = sql.SQL(path.read_text("utf-8")).format(**tables.identifiers())
        yield Migration(int(version), name, statement)


def migrate(connection: Connection, tables: Tables) -> list[Migration]:
    """Apply the migrations that are not recorded yet, all in one transaction; return them.

    Raises:
        psycopg.Error: the role may not create what is missing, or an object of another kind is in the way.
    """
    outbox = str(tables.outbox)
    applied = []
    with connection.transaction():
        connection.execute(tables.query("setup", "lock_setup"))
        connection.execute(tables.query("setup", "create_migrations"))
        done = {
            version
            for (version,) in connection.execute(tables.query("setup", "applied_migrations"), {"outbox": outbox})
        }
        for migration in migrations(tables):
            if migration.version not in done:
                connection.execute(migration.statement)
                connection.execute(
                    tables.query("setup", "record_migration"),
                    {"outbox": outbox, "version": migration.version, "name": migration.name},
                )
                applied.append(migration)
    return applied


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


def script(
    tables: Tables, publication: str, slot: str, parts: Sequence[str] = ("roles.sql",)
) -> Iterator[sql.Composable]:
    """Yield everything that `setup` does in the database, as SQL to read and run by hand."""
    outbox = sql.Literal(str(tables.outbox))
    yield tables.query("setup", "create_migrations")
    for migration in migrations(tables):
        yield migration.statement
        yield sql.SQL(
            "insert into {migrations} (outbox_table, version, name) values ({table}, {version}, {name})\n"
            "on conflict do nothing"
        ).format(table=outbox, version=migration.version, name=migration.name, **tables.identifiers())
    yield sql.SQL(
        "-- Only inserts of pending rows, and of them only what the reader needs.\n"
        "do $publication$\nbegin\n"
        "    if not exists (select from pg_publication where pubname = {name}) then\n{create};\n    end if;\n"
        "end\n$publication$"
    ).format(name=sql.Literal(publication), create=publication_statement(tables, publication))
    yield sql.SQL(
        "-- The slot. The reader makes it by itself where it is missing. Not in one transaction with what is above.\n"
        "do $slot$\nbegin\n"
        "    if exists (select from pg_replication_slots where slot_name = {slot}) then\n"
        "        null;\n"
        "    elsif current_setting('server_version_num')::integer >= 170000 then\n"
        "        perform pg_create_logical_replication_slot({slot}, 'pgoutput', failover => true);\n"
        "    else\n"
        "        perform pg_create_logical_replication_slot({slot}, 'pgoutput');\n"
        "    end if;\nend\n$slot$"
    ).format(slot=sql.Literal(slot))
    for part in parts:
        yield sql.SQL((sql_directory() / part).read_text("utf-8")).format(**tables.identifiers())
