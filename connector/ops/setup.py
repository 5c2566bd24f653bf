"""`setup`: schema, publication, slot and topics. Safe to run again, and beside a running pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psycopg

from connector.catch_up import prepare_slot, require_ours
from connector.errors import SetupRequired
from connector.kafka import Kafka, KafkaException
from connector.ops.awaited import before
from connector.replication import ReplicationConnection
from connector.store.bookkeeping import Bookkeeping, Connection
from connector.store.connections import connect, describe
from connector.store.queries import Tables
from connector.store.schema import build_indexes, migrate, publication_state, publish, script

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SetupOptions:
    """What `setup` is told by the settings."""

    database_url: str
    replication_url: str
    kafka: Kafka
    tables: Tables
    publication_name: str
    slot_name: str
    topics: tuple[str, ...]
    dead_letter_topic: str
    topic_partitions: int
    topic_replication: int
    start_deadline_seconds: float


def print_sql(options: SetupOptions) -> str:
    """Return what `setup` does in the database as a script for psql."""
    statements = script(options.tables, options.publication_name, options.slot_name)
    return "\n\n".join(f"{statement.as_string().strip().removesuffix(';')};" for statement in statements)


def setup(options: SetupOptions, say: Callable[[str], None]) -> None:
    """Make what is missing; `say` gets a line for each thing, also for what was there already.

    Raises:
        ServiceUnavailable: PostgreSQL or Kafka did not answer before the start deadline.
        SetupRequired: something is refused or in the way; the text tells what to do.
    """
    deadline = time.monotonic() + options.start_deadline_seconds
    try:
        _database(options, deadline, say)
    except psycopg.Error as error:
        raise SetupRequired(
            f"PostgreSQL refuses: {describe(error)}. Run `setup` as the owner of the schema, with REPLICATION, or hand"
            " `setup --print-sql` to a database administrator"
        ) from error
    _topics(options, deadline, say)


def _database(options: SetupOptions, deadline: float, say: Callable[[str], None]) -> None:
    connection = before(
        deadline,
        "PostgreSQL",
        lambda: connect(
            options.database_url, name="outbox-connector setup", statement_seconds=0, lock_seconds=5, prepare=False
        ),
    )
    with connection:
        _require_publication_of_ours(options, connection)
        # Who waits for a table's lock makes everybody else wait for it, so not for long, and rather again.
        applied = before(deadline, "PostgreSQL", lambda: migrate(connection, options.tables))
        for migration in applied:
            say(f"schema: applied {migration.version:04} {migration.name}")
        if not applied:
            say("schema: up to date")
        for index in build_indexes(connection, options.tables):
            say(f"schema: built index {index}")
        books = Bookkeeping(connection, options.tables, options.slot_name)
        _publication(options, books, say)
        _slot(options, deadline, books, say)


def _require_publication_of_ours(options: SetupOptions, connection: Connection) -> None:
    """Make sure that the publication is not another outbox's: to mend it for ours would end the other's stream."""
    state = publication_state(connection, options.tables, options.publication_name)
    if state is not None and state.columns is None and state.tables:
        raise SetupRequired(
            f"publication {options.publication_name!r} sends other tables, and not {options.tables.outbox}. Give this"
            " outbox a CONNECTOR_PUBLICATION_NAME and a CONNECTOR_SLOT_NAME of its own; or, if nobody reads it, drop"
            " the publication, and run `setup` again"
        )


def _publication(options: SetupOptions, books: Bookkeeping, say: Callable[[str], None]) -> None:
    """Make or mend the publication; what a slot has missed without it is written down as owed from the table.

    The server says nothing of rows that a publication did not send, and the slot goes past them.
    """
    name = options.publication_name
    progress = books.read_progress()
    state = publication_state(books.connection, options.tables, name)
    missed = progress is not None and (state is None or not state.is_ours)
    if progress is not None and missed:
        reason = "the publication did not send every row"
        books.owe_catch_up(progress.system_identifier, progress.confirmed_lsn, None, reason)
    done = publish(books.connection, options.tables, name)
    say(f"publication {name}: {done}")
    if missed:
        say(f"slot {options.slot_name}: has missed rows, which the reader publishes from the table when it starts")
        _start_reader_anew(books, say)


def _start_reader_anew(books: Bookkeeping, say: Callable[[str], None]) -> None:
    slot = books.slot_state()
    if slot is None or slot.active_pid is None:
        return
    try:
        books.end_walsender(slot.active_pid)
    except psycopg.errors.InsufficientPrivilege:
        say("the reader is running, and this role may not end its session: restart the reader")


def _slot(options: SetupOptions, deadline: float, books: Bookkeeping, say: Callable[[str], None]) -> None:
    slot = books.slot_state()
    if slot is not None:
        require_ours(slot, books, options.slot_name)
        say(f"slot {options.slot_name}: there")
        return
    replication = before(deadline, "PostgreSQL", lambda: ReplicationConnection.open(options.replication_url))
    try:
        if not replication.try_lock(options.slot_name):
            say(f"slot {options.slot_name}: a running reader makes it")
            return
        judgement = prepare_slot(replication, books, options.slot_name)
        owed = "; the reader will first publish the rows that are pending already" if judgement.owed else ""
        say(f"slot {options.slot_name}: created{owed}")
    finally:
        replication.close()


def _topics(options: SetupOptions, deadline: float, say: Callable[[str], None]) -> None:
    admin = options.kafka.admin()
    there = before(deadline, "Kafka", lambda: admin.topics(timeout=5))
    wanted = [*options.topics, options.dead_letter_topic]
    missing = [topic for topic in wanted if topic not in there]
    try:
        made = admin.create_topics(missing, options.topic_partitions, options.topic_replication)
    except KafkaException as error:
        raise SetupRequired(
            f"Kafka refuses to create a topic: {error.args[0].str()}."
            f" Create {', '.join(wanted)} by hand, or let this client"
        ) from error
    # What the controller has made the brokers learn a moment later; until then nobody finds it, and `doctor` fails.
    before(deadline, f"a leader of {', '.join(missing)}", lambda: admin.require_leaders(missing), pause=0.02)
    for topic in wanted:
        say(f"topic {topic}: {'created' if topic in made else 'there'}")
