"""The reader when something goes wrong: its slot, its leadership, its WAL budget, PostgreSQL, Kafka. No row is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from psycopg import sql

from connector.cli.composition import reader_options
from connector.envelope import encode_envelope
from connector.kafka import AlreadySent
from connector.kafka import Kafka as Clients
from connector.observability.health import Health
from connector.observability.metrics import ReaderMetrics
from connector.outbox import WAKE_PREFIX, Fence, OutboxRow, Table
from connector.publishing import MOST_IN_FLIGHT
from connector.reader import Reader
from connector.replication import FEEDBACK_SECONDS, SENDER_TIMEOUT_SECONDS, ReplicationConnection
from connector.settings import load_settings
from connector.store.bookkeeping import Bookkeeping, wake_reader
from connector.store.queries import Tables
from connector.store.schema import migrate
from tests.integration.scenario import (
    OUTBOX,
    PROGRESS,
    Connection,
    Tap,
    all_published,
    catch_up_owed,
    enqueue,
    enqueue_many,
    in_order,
    is_streaming,
    metric,
    one,
    readiness,
    set_up,
    statuses,
    write_wal,
)
from tests.services import Database, Kafka, Postgres, Process, environment, eventually

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))

Start = Callable[..., Process]

KEYS = ("key-1", "key-2", "key-3")
A_LOT = 2_500  # rows that may be read together

SESSIONS = (
    "select pg_terminate_backend(pid) from pg_stat_activity"
    " where datname = current_database() and application_name like 'outbox-connector%'"
)


@pytest.fixture
def app(database: Database, connector_env: dict[str, str]) -> Iterator[Connection]:
    """The application's connection to a database that is set up."""
    set_up(connector_env)
    with database.connect() as connection:
        yield connection


@pytest.fixture
def tap(kafka: Kafka, topic: str) -> Iterator[Tap]:
    """What arrives in the topic."""
    with Tap(kafka, topic) as tap:
        yield tap


def some(connection: Connection, topic: str, rows: int = 10) -> list[int]:
    """Enqueue so many rows on each of three keys."""
    return [outbox_id for n in range(rows) for key in KEYS for outbox_id in enqueue(connection, topic, key, n)]


def slot_of(env: dict[str, str]) -> str:
    """Return the name of the slot."""
    return env["CONNECTOR_SLOT_NAME"]


def _drop(app: Connection, slot: str) -> None:
    app.execute("select pg_drop_replication_slot(%s)", [slot])


def _recreate(app: Connection, slot: str) -> None:
    _drop(app, slot)
    app.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])


def _advance(app: Connection, slot: str) -> None:
    app.execute("select pg_replication_slot_advance(%s, pg_current_wal_lsn())", [slot])


def _forget(app: Connection, _slot: str) -> None:
    app.execute(f"delete from {PROGRESS}")


def _of_another_cluster(app: Connection, _slot: str) -> None:
    app.execute(f"update {PROGRESS} set system_identifier = '1'")


# --- the slot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [_drop, _recreate, _advance, _forget, _of_another_cluster])
def test_whatever_was_done_to_the_slot_while_no_reader_ran_no_row_is_lost(  # noqa: PLR0917 - fixtures
    app: Connection,
    connector: Start,
    connector_env: dict[str, str],
    tap: Tap,
    topic: str,
    trouble: Callable[[Connection, str], None],
) -> None:
    """Rows from before and after it all arrive, each key in order, and then nothing is owed."""
    first = is_streaming(connector("reader"))
    ids = some(app, topic)
    tap.has(ids)
    all_published(app)
    assert first.stop() == 0
    ids += some(app, topic)
    trouble(app, slot_of(connector_env))
    ids += some(app, topic)
    second = is_streaming(connector("reader"))
    second.wait_for_log("catch_up_owed")
    ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert in_order(tap.sent)
    assert not catch_up_owed(app)


@pytest.mark.parametrize("trouble", [_drop, _recreate, _advance])
def test_a_slot_that_is_taken_from_a_running_reader_loses_nothing(  # noqa: PLR0917 - fixtures
    app: Connection,
    connector: Start,
    connector_env: dict[str, str],
    tap: Tap,
    topic: str,
    trouble: Callable[[Connection, str], None],
) -> None:
    """Ended by an operator who does something to the slot, the reader notices, catches up, and goes on."""
    reader = is_streaming(connector("reader"))
    ids = some(app, topic)
    tap.has(ids)

    def done() -> bool:
        slot = slot_of(connector_env)
        app.execute("select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = %s", [slot])
        ids.extend(enqueue(app, topic, KEYS[0], 99))
        trouble(app, slot)
        return True

    eventually(done, what="the trouble with the slot", ignoring=(psycopg.errors.ObjectInUse,))
    ids += some(app, topic)
    reader.wait_for_log("slot_made" if trouble is _drop else "catch_up_owed")
    ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert in_order(tap.sent)
    assert not catch_up_owed(app)


def test_rows_from_before_the_first_start_are_published_first(
    database: Database, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """A table that was there before the connector is published from its oldest row on, then the stream goes on."""
    with database.connect() as app:
        migrate(app, TABLES)
        enqueue_many(app, topic, 2_000)
        (dead,) = enqueue(app, topic, "key-1", 1)
        app.execute(f"update {OUTBOX} set status = 'dead' where id = %s", [dead])
        set_up(connector_env)
        assert catch_up_owed(app)
        enqueue_many(app, topic, 100)
        is_streaming(connector("reader"))
        enqueue_many(app, topic, 100)
        ids = {outbox_id for (outbox_id,) in app.execute(f"select id from {OUTBOX} where status <> 'dead'")}
        tap.has(ids)
        all_published(app)
        assert in_order(tap.sent)
        assert {message.outbox_id for message in tap.sent} == ids
        assert not catch_up_owed(app)


def test_a_crash_in_the_catch_up_leaves_it_owed(
    database: Database, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """A reader that is killed half-way has not written the catch-up off, and the next one does all of it."""
    with database.connect() as app:
        migrate(app, TABLES)
        enqueue_many(app, topic, 3_000)
        set_up(connector_env)
        assert connector("reader", CONNECTOR_FAILPOINTS="catch_up_half_way=kill").wait() == -signal.SIGKILL
        assert catch_up_owed(app)
        enqueue_many(app, topic, 100)
        connector("reader").wait_for_log("catch_up_done")
        tap.has(range(1, 3_101))
        all_published(app)
        assert in_order(tap.sent)
        assert not catch_up_owed(app)


def test_a_reader_is_not_ready_before_its_first_catch_up_is_done(
    app: Connection, connector: Start, connector_env: dict[str, str], topic: str
) -> None:
    """It is ready once it streams."""
    _drop(app, slot_of(connector_env))
    enqueue_many(app, topic, 500)
    reader = connector("reader", CONNECTOR_FAILPOINTS="catch_up_half_way=delay:0.6")
    half_way = lambda: [event for event in reader.events if event["event"] == "failpoint_reached"][2:]  # noqa: E731
    eventually(half_way, what="a catch-up that is half-way")
    assert readiness(reader) == 503
    assert "first catch-up" in reader.http("/readyz").body
    assert '"streaming"' not in reader.stderr
    is_streaming(reader)
    eventually(lambda: readiness(reader) == 200, what="readiness")


def test_a_crash_between_owing_and_making_the_slot_is_no_gap(
    app: Connection, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """Every state that a crash can leave behind while a slot is made ends in a catch-up."""
    slot = slot_of(connector_env)
    ids = some(app, topic)
    # Written down, and then the slot made, but how far it reaches not noted any more.
    app.execute(f"update {PROGRESS} set catch_up_owed = true, confirmed_lsn = '0/0', catch_up_through = null")
    _recreate(app, slot)
    ids += some(app, topic)
    connector("reader").wait_for_log("catch_up_done")
    tap.has(ids)
    all_published(app)
    assert in_order(tap.sent)
    assert not catch_up_owed(app)


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_a_publication_made_again_by_setup_loses_nothing(
    app: Connection, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str, *, running: bool
) -> None:
    """The slot is older than the publication, so what was written in between comes from the table, in order."""
    reader = is_streaming(connector("reader"))
    ids = some(app, topic)
    tap.has(ids)
    all_published(app)
    if not running:
        assert reader.stop() == 0
    app.execute(sql.SQL("drop publication {}").format(sql.Identifier(connector_env["CONNECTOR_PUBLICATION_NAME"])))
    ids += some(app, topic)
    set_up(connector_env)
    ids += some(app, topic)
    if not running:
        connector("reader")
    tap.has(ids, within=25)
    all_published(app)
    assert in_order(tap.sent)


def alterations(publication: str) -> dict[str, tuple[str, str]]:
    """Return what somebody may do to a publication, each with what puts it right by hand."""
    table = (
        f"{OUTBOX} (id, biz_type, topic, message_key, payload, headers, status, retry_count, next_retry_at, updated_at)"
    )
    return {
        "dropped": (
            f"drop publication {publication}",
            f"create publication {publication} for table {table} where (status = 'pending') with (publish = 'insert')",
        ),
        "filtered": (
            f"alter publication {publication} set table {table} where (biz_type = 'another')",
            f"alter publication {publication} set table {table} where (status = 'pending')",
        ),
        "emptied": (
            f"alter publication {publication} drop table {OUTBOX}",
            f"alter publication {publication} add table {table} where (status = 'pending')",
        ),
        "silenced": (
            f"alter publication {publication} set (publish = 'delete')",
            f"alter publication {publication} set (publish = 'insert')",
        ),
    }


@pytest.mark.parametrize("what", ["dropped", "filtered", "emptied", "silenced"])
def test_a_publication_that_somebody_spoils_while_the_reader_streams_loses_nothing(
    app: Connection, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str, *, what: str
) -> None:
    """The reader is not ready until it is put right, by hand too; then the rows in between come from the table."""
    spoil, mend = alterations(connector_env["CONNECTOR_PUBLICATION_NAME"])[what]
    reader = is_streaming(connector("reader"))
    ids = some(app, topic)
    tap.has(ids)
    app.execute(spoil)
    ids += some(app, topic)
    eventually(lambda: "setup" in reader.http("/readyz").body, within=20, what="the loss of readiness")
    assert readiness(reader) == 503
    app.execute(mend)
    ids += some(app, topic)
    tap.has(ids, within=20)
    all_published(app)
    assert in_order(tap.sent)
    assert "overlooked_rows_found" not in reader.stderr
    eventually(lambda: readiness(reader) == 200, within=15, what="readiness")


def test_a_publication_made_again_by_hand_at_once_loses_nothing(
    app: Connection, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """Rows that were written while it was away are found as soon as the stream comes to them."""
    drop, create = alterations(connector_env["CONNECTOR_PUBLICATION_NAME"])["dropped"]
    reader = is_streaming(connector("reader"))
    ids = some(app, topic)
    tap.has(ids)
    app.execute(drop)
    ids += some(app, topic)
    app.execute(create)
    ids += some(app, topic)
    tap.has(ids, within=20)
    all_published(app)
    assert in_order(tap.sent)
    assert "overlooked_rows_found" not in reader.stderr


@contextmanager
def keeping_little_wal(app: Connection) -> Iterator[None]:
    """Let the server invalidate a slot that pins more than a segment or two."""
    app.execute("alter system set max_slot_wal_keep_size = '16MB'")
    app.execute("select pg_reload_conf()")
    try:
        yield
    finally:
        app.execute("alter system reset max_slot_wal_keep_size")
        app.execute("select pg_reload_conf()")


@pytest.mark.slow
def test_a_slot_that_the_server_has_invalidated_is_replaced(
    own_postgres: Postgres, own_database: Database, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """Where the server gave the slot's WAL up, what it held comes from the table."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    with own_database.connect() as app, keeping_little_wal(app):
        first = is_streaming(Process("reader", env=env).start())
        ids = some(app, topic)
        tap.has(ids)
        assert first.stop() == 0
        ids += some(app, topic)

        def lost() -> bool:
            write_wal(app, 20)
            app.execute("checkpoint")
            query = "select wal_status = 'lost' from pg_replication_slots where slot_name = %s"
            return bool(one(app, query, [slot_of(env)]))

        eventually(lost, within=60, what="the invalidation")
        ids += some(app, topic)
        second = is_streaming(Process("reader", env=env).start())
        second.wait_for_log("slot_made", remedy="replace")
        ids += some(app, topic)
        tap.has(ids)
        all_published(app)
        assert in_order(tap.sent)
        assert not catch_up_owed(app)


@pytest.mark.slow
def test_a_slot_that_is_invalidated_under_a_reader_that_lags_is_replaced(
    own_postgres: Postgres, own_database: Database, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """While Kafka says nothing the server ends the stream and gives its WAL up; the same reader catches up later."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    with own_database.connect() as app, keeping_little_wal(app), kafka.proxy() as proxy:
        through = {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{proxy.port}"}
        reader = is_streaming(Process("reader", env=env | through).start())
        ids = some(app, topic)
        tap.has(ids)
        all_published(app)
        proxy.black_hole()
        ids += some(app, topic)

        def replaced() -> bool:
            write_wal(app, 20)
            app.execute("checkpoint")
            return any(event["event"] == "slot_made" and event["remedy"] == "replace" for event in reader.events)

        eventually(replaced, within=60, what="the making of another slot")
        ids += some(app, topic)
        proxy.restore()
        tap.has(ids, within=30)
        all_published(app)
        assert in_order(tap.sent)
        eventually(lambda: not catch_up_owed(app), what="the end of the catch-up")
        assert reader.stop() == 0


def test_a_slot_of_another_kind_is_refused(app: Connection, connector: Start, connector_env: dict[str, str]) -> None:
    """A slot name that something else uses is a matter of configuration: exit 78, and the slot is left alone."""
    app.execute("select pg_create_logical_replication_slot(%s, 'test_decoding')", [f"{slot_of(connector_env)}_x"])
    reader = connector(
        "reader", CONNECTOR_SLOT_NAME=f"{slot_of(connector_env)}_x", CONNECTOR_START_DEADLINE_SECONDS="1"
    )
    assert reader.wait(20) == 78
    assert "CONNECTOR_SLOT_NAME" in reader.stderr


# --- leadership ------------------------------------------------------------------------------------------------------


def test_a_second_reader_stands_by_and_takes_over_after_a_crash(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """One leads; the other is ready all along, publishes nothing, and leads within seconds of the leader's SIGKILL."""
    leader = is_streaming(connector("reader"))
    other = connector("reader")
    other.wait_for_log("standing_by")
    eventually(lambda: readiness(other) == 200, what="the readiness of the standby")
    assert (metric(leader, "leader"), metric(other, "leader")) == (1, 0)
    ids = some(app, topic)
    tap.has(ids)
    assert metric(other, "published_total") == 0
    ids += some(app, topic)
    leader.kill()
    ids += some(app, topic)
    started = time.monotonic()
    is_streaming(other, within=5)
    assert time.monotonic() - started < 5
    tap.has(ids)
    assert in_order(tap.sent)
    assert metric(other, "leader") == 1


def test_a_standby_takes_over_at_once_from_a_leader_that_stops(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """On a rolling restart the other one leads within a second or two, and nothing is sent twice."""
    leader = is_streaming(connector("reader"))
    other = connector("reader")
    other.wait_for_log("standing_by")
    ids = some(app, topic)
    tap.has(ids)
    assert leader.stop() == 0
    is_streaming(other, within=3)
    ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert len(tap.read(0.3)) == len(ids)


@pytest.mark.slow
def test_a_leader_that_hangs_is_replaced(app: Connection, connector: Start, tap: Tap, topic: str) -> None:
    """After SIGSTOP of the leader the other leads within 12 seconds and a bit; the old one stands by."""
    leader = is_streaming(connector("reader"))
    other = connector("reader")
    other.wait_for_log("standing_by")
    ids = some(app, topic)
    tap.has(ids)
    leader._running().send_signal(signal.SIGSTOP)
    try:
        ids += some(app, topic)
        is_streaming(other, within=20)
        tap.has(ids)
    finally:
        leader._running().send_signal(signal.SIGCONT)
    leader.wait_for_log("standing_by", within=15)
    ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert in_order(tap.sent)
    assert (metric(leader, "leader"), metric(other, "leader")) == (0, 1)


def test_a_stale_walsender_is_ended_not_waited_for(  # noqa: PLR0917 - fixtures
    app: Connection, database: Database, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """A session that still holds the slot without leading it is ended by the one who leads."""
    stale = ReplicationConnection.open(database.url)
    try:
        stale.start(slot_of(connector_env), connector_env["CONNECTOR_PUBLICATION_NAME"], 0)
        reader = connector("reader")
        assert reader.wait_for_log("stale_walsender_ended", within=5)["pid"] == stale.backend_pid
        is_streaming(reader, within=5)
        ids = some(app, topic)
        tap.has(ids)
    finally:
        stale.close()


# --- outages ---------------------------------------------------------------------------------------------------------


def test_a_terminated_session_is_survived(app: Connection, connector: Start, tap: Tap, topic: str) -> None:
    """`pg_terminate_backend` on any session of the reader, again and again, loses nothing and repeats no order."""
    reader = is_streaming(connector("reader"))
    ids: list[int] = []
    for _ in range(4):
        ids += some(app, topic)
        tap.has(ids[-1:])
        app.execute(SESSIONS)
        ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert in_order(tap.sent)
    assert reader.wait_for_log("reader_interrupted", sqlstate="57P01")
    eventually(lambda: readiness(reader) == 200, what="readiness")
    assert reader.stop() == 0


def test_bookkeeping_that_loses_its_connection_loses_no_mark(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """While marks cannot be written the stream goes on; later all of them are."""
    reader = is_streaming(connector("reader"))
    for _ in range(5):
        ids = some(app, topic)
        app.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like '%(bookkeeping)'"
        )
        tap.has(ids)
    all_published(app)
    assert len(tap.read(0.2)) == 5 * 30
    assert reader.returncode is None


def test_the_slot_is_never_confirmed_further_than_its_record(
    app: Connection, database: Database, connector: Start, tap: Tap, topic: str
) -> None:
    """While the position cannot be recorded it is not confirmed, not even by a stream that has begun anew."""
    reader = is_streaming(connector("reader"))
    further = (
        f"select bool_or(s.confirmed_flush_lsn > p.confirmed_lsn) from {PROGRESS} as p join pg_replication_slots as s"
    )
    further += " using (slot_name)"
    with database.connect() as other, other.transaction():
        other.execute(f"select from {PROGRESS} for update")
        tap.has(some(app, topic))
        app.execute(f"{SESSIONS} and backend_type = 'walsender'")
        reader.wait_for_log("reader_interrupted")
        ids = some(app, topic)
        tap.has(ids)
        assert readiness(reader) == 200
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert not one(app, further)
            time.sleep(0.05)
    all_published(app)
    query = f"select bool_and(confirmed_lsn > '0/0') from {PROGRESS}"
    assert one(app, query)
    assert len(tap.read(0.2)) == 60


@pytest.mark.slow
def test_a_crash_of_the_database_is_survived(
    own_postgres: Postgres, own_database: Database, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """Down and up again in the middle of the work: every committed row arrives, in order, under the same process."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    with own_database.connect() as app:
        enqueue_many(app, topic, 5_000)
        tap.until(lambda sent: sent)
    own_postgres.stop("immediate")
    eventually(lambda: readiness(reader) == 503, within=15, what="readiness lost")
    assert reader.http("/livez").status == 200
    own_postgres.start()
    with own_database.connect() as app:
        enqueue_many(app, topic, 500)
        # A crash makes the sequence skip a few numbers.
        tap.has([outbox_id for (outbox_id,) in app.execute(f"select id from {OUTBOX}")], within=30)
        all_published(app)
        ids = some(app, topic)
        tap.has(ids)
        assert in_order(tap.sent)
    eventually(lambda: readiness(reader) == 200, within=15, what="readiness")
    assert reader.stop() == 0


@pytest.mark.usefixtures("complete_kafka")
@pytest.mark.parametrize("point", ["rows_acknowledged", "rows_marked", "lsn_recorded"])
def test_what_a_reader_has_sent_before_it_crashed_is_not_sent_again(
    app: Connection, connector: Start, tap: Tap, topic: str, point: str
) -> None:
    """The next one finds it in Kafka, by its key and its value, and marks it."""
    ids = some(app, topic)
    assert connector("reader", CONNECTOR_FAILPOINTS=f"{point}=kill").wait() == -signal.SIGKILL
    sent = {message.outbox_id for message in tap.read(1.0)}
    reader = is_streaming(connector("reader"))
    ids += some(app, topic)
    tap.has(ids)
    all_published(app)
    assert sorted(message.outbox_id for message in tap.read(0.5)) == ids
    assert sent
    if point != "lsn_recorded":
        assert reader.wait_for_log("not_sent_twice")["messages"] == len(sent)


def _row(topic: str, outbox_id: int) -> OutboxRow:
    return OutboxRow(Fence(outbox_id, 0, 0, None), "chat", topic, b"key", b"{}", None)


@pytest.mark.usefixtures("complete_kafka")
def test_what_reaches_kafka_only_while_it_is_looked_for_is_found(kafka: Kafka, topic: str) -> None:
    """A broker may still be at work on what a reader sent before it was killed: its log is followed as it grows."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    first, later, never = (_row(topic, number) for number in (1, 2, 3))
    clients = Clients(kafka.bootstrap_servers, {})
    sent = AlreadySent(clients, clients.admin(), "a group", time.time())
    for row in (first, later):
        producer.produce(topic, encode_envelope(row), row.key)
        assert producer.flush(20) == 0
        assert sent.has(row)
    assert not sent.has(never)
    sent.close()


@pytest.mark.usefixtures("complete_kafka")
def test_what_was_sent_is_found_behind_much_that_is_not_asked_for(kafka: Kafka, topic: str) -> None:
    """Of a partition that is read ahead of the others, and of what was sent before the first row that comes again."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "queue.buffering.max.messages": 200_000})
    for number in range(1, 120_001):
        row = _row(topic, number)
        producer.produce(topic, encode_envelope(row), row.key)
    assert producer.flush(20) == 0
    clients = Clients(kafka.bootstrap_servers, {})
    sent = AlreadySent(clients, clients.admin(), "a group", time.time() - 20)
    assert sent.has(row)
    sent.close()


def test_a_row_that_is_due_after_a_crash_is_sent_though_a_copy_of_it_is_in_kafka(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """The sink has read the first copy and held it back: it waits for another one, the same to the byte."""
    ids = some(app, topic)
    assert connector("reader", CONNECTOR_FAILPOINTS="rows_acknowledged=kill").wait() == -signal.SIGKILL
    tap.until(lambda sent: sent)
    held = tap.sent[0].outbox_id
    app.execute(f"update {OUTBOX} set next_retry_at = clock_timestamp(), updated_at = now() where id = %s", [held])
    is_streaming(connector("reader"))
    tap.has(ids)
    tap.until(lambda sent: [message.outbox_id for message in sent].count(held) == 2, what="the second copy")


@pytest.mark.slow
def test_a_reader_that_is_told_to_stop_does_not_wait_for_a_database_that_is_gone(
    own_postgres: Postgres, own_database: Database, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """PostgreSQL ends together with the sidecar: what cannot be written any more is given up in seconds."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    with closing(own_database.connect()) as app, closing(own_database.connect()) as blocker:
        blocker.execute(f"begin; lock table {PROGRESS}")
        tap.has(some(app, topic))
        # Its position cannot be recorded any more.
        own_postgres.stop("immediate")
    reader.wait_for_log("bookkeeping_interrupted")
    assert reader.stop(within=8) == 0
    own_postgres.start()
    is_streaming(Process("reader", env=env).start())


@pytest.mark.slow
def test_a_crash_of_kafka_is_survived(durable_own_kafka: Kafka, database: Database, own_topic: str) -> None:
    """Nothing is lost or out of order, no retry is spent; not ready while Kafka is gone, ready again afterwards."""
    env = environment(database, durable_own_kafka, own_topic)
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    with database.connect() as app:
        enqueue_many(app, own_topic, 5_000)
        durable_own_kafka.kill()
        enqueue_many(app, own_topic, 5_000)
        eventually(lambda: readiness(reader) == 503, within=20, what="readiness lost")
        assert reader.http("/livez").status == 200
        durable_own_kafka.start()
        eventually(lambda: readiness(reader) == 200, within=20, what="readiness")
        with Tap(durable_own_kafka, own_topic) as tap:
            tap.has(range(1, 10_001), within=30)
            all_published(app)
            assert in_order(tap.sent)
        assert one(app, f"select count(*) from {OUTBOX} where retry_count > 0") == 0
        assert reader.stop() == 0


# --- the WAL budget --------------------------------------------------------------------------------------------------

MB = 2**20


def _retained(app: Connection, slot: str) -> int:
    pinned = "pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint"
    query = f"select {pinned} from pg_replication_slots where slot_name = %s"
    # Between the giving up of a slot and the making of the next one there is none, and nothing is pinned.
    return int(one(app, query, [slot]) or 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rows", [10, 4_000], ids=["few rows in flight", "more than may be in flight"])
def test_the_slot_stays_within_its_budget_while_kafka_is_away(
    durable_own_kafka: Kafka, own_database: Database, own_topic: str, rows: int
) -> None:
    """With Kafka gone and writes going on, the slot pins about its budget; then all is stored, each once, in order."""
    env = environment(own_database, durable_own_kafka, own_topic) | {"CONNECTOR_WAL_BUDGET": "64MB"}
    set_up(env)
    slot = slot_of(env)
    reader = is_streaming(Process("reader", env=env).start())
    with own_database.connect() as app:
        enqueue_many(app, own_topic, 10)
        all_published(app)
        durable_own_kafka.stop()
        first, started, peak = one(app, "select pg_current_wal_lsn()"), time.monotonic(), 0
        for _ in range(14):
            enqueue_many(app, own_topic, rows, bytes_each=500)
            write_wal(app, 11)
            app.execute("checkpoint")
            time.sleep(0.9)  # WAL at a steady pace, a few times the budget in all
            peak = max(peak, _retained(app, slot))
        written = int(one(app, "select pg_wal_lsn_diff(pg_current_wal_lsn(), %s::pg_lsn)::bigint", [first]))
        a_second = written / (time.monotonic() - started)

        def within_budget() -> bool:
            return _retained(app, slot) < 64 * MB

        eventually(within_budget, within=15, what="a slot within its budget")
        assert peak < 64 * MB + FEEDBACK_SECONDS * a_second < written
        assert catch_up_owed(app)
        durable_own_kafka.start()
        sink = Process("sink", env=env).start()
        enqueue_many(app, own_topic, 10)
        total = one(app, f"select count(*) from {OUTBOX}")
        eventually(lambda: statuses(app) == {"consumed": total}, within=90, what="the storing of every row")
        eventually(lambda: not catch_up_owed(app), what="the end of the catch-up")
        assert one(app, f"select max(retry_count) from {OUTBOX}") == 0
        history = app.execute(
            "select o.message_key, h.outbox_id from chat_histories as h"
            f" left join {OUTBOX} as o on o.id = h.outbox_id order by h.id"
        ).fetchall()
        assert len(history) == len(dict.fromkeys(history)) == total
        by_key = sorted(history, key=lambda stored: stored[0])
        assert by_key == sorted(history)
        with Tap(durable_own_kafka, own_topic) as tap:
            tap.has(outbox_id for _, outbox_id in history)
            assert in_order(tap.sent)
        assert "overlooked_rows_found" not in reader.stderr
        assert (reader.stop(), sink.stop()) == (0, 0)


@pytest.mark.slow
def test_a_reader_that_starts_without_kafka_keeps_the_slot_within_its_budget(
    durable_own_kafka: Kafka, own_database: Database, own_topic: str
) -> None:
    """Nobody leads before Kafka is there; the slot is given up all the same, and every row comes from the table."""
    env = environment(own_database, durable_own_kafka, own_topic) | {"CONNECTOR_WAL_BUDGET": "64MB"}
    set_up(env)
    durable_own_kafka.stop()
    with own_database.connect() as app:
        ids = some(app, own_topic)
        reader = Process("reader", env=env).start()
        eventually(lambda: readiness(reader) == 503, ignoring=(OSError,), what="a reader that waits for Kafka")
        write_wal(app, 100)
        app.execute("checkpoint")
        reader.wait_for_log("slot_given_up")
        assert _retained(app, slot_of(env)) == 0
        assert catch_up_owed(app)
        ids += some(app, own_topic)
        durable_own_kafka.start()
        is_streaming(reader)
        all_published(app)
        with Tap(durable_own_kafka, own_topic) as tap:
            tap.has(ids)
            assert in_order(tap.sent)


def test_an_idle_outbox_in_a_busy_database_pins_no_wal(
    app: Connection, connector: Start, connector_env: dict[str, str], tap: Tap, topic: str
) -> None:
    """With nothing undelivered the slot follows the server's position, though none of the WAL is ours."""
    reader = is_streaming(connector("reader"))
    tap.has(enqueue(app, topic, "key", 1))
    write_wal(app, 20)
    target = one(app, "select pg_current_wal_lsn()")
    query = "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots where slot_name = %s"
    eventually(lambda: one(app, query, [target, slot_of(connector_env)]), within=15, what="the slot's going forward")
    # What the slot is confirmed to was written down first.
    recorded = f"select p.confirmed_lsn >= %s::pg_lsn from {PROGRESS} as p"
    assert one(app, recorded, [target])
    assert metric(reader, "replication_lag_bytes") < 16 * MB


def test_a_backlog_beyond_the_budget_comes_from_the_table(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """Marks wait while a backlog is read, but not once the slot is given up: the catch-up waits for them."""
    for _ in range(40):
        enqueue_many(app, topic, 1_000)
    old = f"select clock_timestamp() - max(created_at) > interval '2 seconds' from {OUTBOX}"
    eventually(lambda: one(app, old), what="an old backlog")
    reader = connector("reader", CONNECTOR_WAL_BUDGET="8MB")
    reader.wait_for_log("slot_given_up")
    reader.wait_for_log("catch_up_done", within=60)
    tap.has(range(1, 40_001), within=60)
    all_published(app)


def test_a_slot_given_up_while_a_transaction_is_open_is_made_when_it_ends(
    app: Connection, database: Database, connector: Start, tap: Tap, topic: str
) -> None:
    """A new slot waits for the transactions that were open; that is no error, and no row waits longer than they do."""
    for _ in range(40):
        enqueue_many(app, topic, 1_000)
    old = f"select clock_timestamp() - max(created_at) > interval '2 seconds' from {OUTBOX}"
    eventually(lambda: one(app, old), what="an old backlog")
    with database.connect() as other:
        with other.transaction():
            one(other, "select pg_current_xact_id()::text")
            reader = connector("reader", CONNECTOR_WAL_BUDGET="8MB")
            reader.wait_for_log("slot_given_up")
            waits = "select true from pg_stat_activity where backend_type = 'walsender' and wait_event_type = 'Lock'"
            eventually(lambda: one(app, waits), what="a new slot that waits")
        reader.wait_for_log("slot_made")
    reader.wait_for_log("catch_up_done", within=60)
    tap.has(range(1, 40_001), within=60)
    all_published(app)
    assert "reader_interrupted" not in reader.stderr


@pytest.mark.slow
def test_an_idle_database_is_left_alone(own_database: Database, kafka: Kafka, topic: str, tap: Tap) -> None:
    """Where nothing is written the reader does not look at the slot and the publication every few seconds."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    with own_database.connect() as app:
        tap.has(some(app, topic))
        all_published(app)
        last = (
            "select clock_timestamp() - max(query_start) > interval '12 seconds' from pg_stat_activity"
            " where starts_with(application_name, 'outbox-connector reader') and query_start > backend_start"
            " and backend_type = 'client backend'"
        )
        eventually(lambda: one(app, last), within=60, what="a reader that asks nothing")
    assert reader.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("waits_for", ["a table that is altered", "limits of topics"])
def test_the_server_hears_from_a_reader_that_waits(
    database: Database, own_kafka: Kafka, own_topic: str, waits_for: str
) -> None:
    """Neither a lock on the outbox nor a Kafka that does not answer ends the session, and with it the leadership."""
    env = environment(database, own_kafka, own_topic)
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    heard = "select extract(epoch from reply_time)::float from pg_stat_replication where pid = %s"
    with database.connect() as app, database.connect() as other, other.transaction():
        some(app, own_topic)
        all_published(app)
        sender = one(app, "select active_pid from pg_replication_slots where slot_name = %s", [slot_of(env)])
        if waits_for == "a table that is altered":
            other.execute(f"lock table {OUTBOX} in access exclusive mode")
        else:
            own_kafka.stop()
            for n in range(5):
                enqueue(app, f"{own_topic}-{n}", "key", n)
        since = float(one(app, "select extract(epoch from clock_timestamp())"))
        eventually(
            lambda: (one(app, heard, [sender]) or 0) > since + 2 * FEEDBACK_SECONDS + 2,
            within=2 * SENDER_TIMEOUT_SECONDS,
            what="a server that hears from its reader",
        )
        assert "reader_interrupted" not in reader.stderr
        assert "producer_replaced" not in reader.stderr


@pytest.mark.slow
def test_nothing_undelivered_is_ever_confirmed(durable_own_kafka: Kafka, database: Database, own_topic: str) -> None:
    """While Kafka is away the stream goes on, but is confirmed no further than to the rows that Kafka has not got."""
    env = environment(database, durable_own_kafka, own_topic) | {"CONNECTOR_SHUTDOWN_SECONDS": "3"}
    set_up(env)
    reader = is_streaming(Process("reader", env=env).start())
    with database.connect() as app:
        ids = some(app, own_topic, 1)
        all_published(app)
        durable_own_kafka.stop()
        before = one(app, "select pg_current_wal_lsn()")
        ids += some(app, own_topic, 1)
        query = "select confirmed_flush_lsn > %s::pg_lsn from pg_replication_slots where slot_name = %s"
        lasting = 2 * FEEDBACK_SECONDS + 1  # each asks for a keepalive
        until, worked = time.monotonic() + lasting, reader.cpu_seconds
        while time.monotonic() < until:
            write_wal(app, 1)
            assert not one(app, query, [before, slot_of(env)])
            time.sleep(0.2)
        assert reader.cpu_seconds - worked < lasting / 4, "a storm of keepalives"
        assert "reader_interrupted" not in reader.stderr
        assert reader.stop() == 0
        assert reader.wait_for_log("drained")["undelivered"] == 3
        assert not one(app, query, [before, slot_of(env)])
        assert statuses(app)["pending"] == 3
        durable_own_kafka.start()
        is_streaming(Process("reader", env=env).start())
        with Tap(durable_own_kafka, own_topic) as tap:
            tap.has(ids)


def test_what_is_thrown_away_with_a_producer_is_read_again(
    app: Connection, connector: Start, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """A batch beyond a limit that was lowered takes its producer along, and with it all that was on its way."""
    limit = ConfigEntry("max.message.bytes", "3000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[limit])
    with kafka.proxy() as proxy:
        reader = is_streaming(connector("reader", CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{proxy.port}"))
        ids = enqueue(app, topic, "key", 0)
        tap.has(ids)
        all_published(app)
        proxy.black_hole()
        for _ in range(20):
            ids += enqueue(app, topic, "key", *range(100))
        eventually(lambda: metric(reader, "in_flight_messages") == 2_000, what="all of them on their way")
        admin = kafka.admin()
        for changed in admin.incremental_alter_configs([resource]).values():
            changed.result(20)
        proxy.restore()
        reader.wait_for_log("producer_replaced")
        tap.has(ids)
        all_published(app)
        assert in_order(tap.sent)
        assert reader.stop() == 0


@contextmanager
def in_this_process(env: dict[str, str]) -> Iterator[Reader]:
    """A reader whose inside the test can see."""
    settings = load_settings(env, needs=frozenset({"database", "kafka"}))
    reader = Reader(
        replace(reader_options(settings), shutdown_seconds=1),
        ReaderMetrics(),
        Health(),
    )
    thread = threading.Thread(target=reader.run)
    thread.start()
    try:
        yield reader
    finally:
        reader.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_an_outage_does_not_grow_the_ledger(durable_own_kafka: Kafka, database: Database, own_topic: str) -> None:
    """While messages wait for Kafka, thousands of turns of the loop leave nothing behind, and no more are taken."""
    env = environment(database, durable_own_kafka, own_topic)
    set_up(env)
    with in_this_process(env) as reader, database.connect() as app:
        enqueue(app, own_topic, "key", 1)
        all_published(app)
        durable_own_kafka.stop()
        enqueue(app, own_topic, "key", 2)
        eventually(lambda: reader._publishing.in_flight == 1, what="the message on its way")
        until = time.monotonic() + 3
        while time.monotonic() < until:
            write_wal(app, 1)
            time.sleep(0.1)
        assert reader._publishing.in_flight == 1
        assert len(reader._stream.ledger) < 10
        enqueue_many(app, own_topic, MOST_IN_FLIGHT + 5_000)
        eventually(lambda: reader._publishing.in_flight >= MOST_IN_FLIGHT, within=30, what="a full pipe")
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert reader._publishing.in_flight <= MOST_IN_FLIGHT + A_LOT
            time.sleep(0.01)


def test_a_catch_up_without_kafka_takes_no_more_than_may_be_in_flight(
    durable_own_kafka: Kafka, database: Database, own_topic: str
) -> None:
    """The table is read as Kafka takes it, however much is owed."""
    env = environment(database, durable_own_kafka, own_topic)
    set_up(env)
    with in_this_process(env) as reader, database.connect() as app, database.connect() as other:
        enqueue(app, own_topic, "key", 1)
        all_published(app)
        durable_own_kafka.stop()
        with app.transaction():
            enqueue_many(app, own_topic, MOST_IN_FLIGHT + 5_000)
            app.execute(f"update {PROGRESS} set catch_up_owed = true, confirmed_lsn = '0/0', catch_up_through = null")
            other.execute(f"{SESSIONS} and backend_type = 'walsender'")
        eventually(lambda: reader._publishing.in_flight >= MOST_IN_FLIGHT, within=30, what="a full pipe")
        assert catch_up_owed(app)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert reader._publishing.in_flight <= MOST_IN_FLIGHT + A_LOT
            time.sleep(0.01)


def test_marks_that_cannot_be_written_do_not_grow_either(
    database: Database, kafka: Kafka, topic: str, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database keeps the bookkeeping waiting, no more is published than may wait for its marks."""
    monkeypatch.setattr("connector.reader.MOST_UNMARKED", 1_000)
    monkeypatch.setattr("connector.publishing.MOST_IN_FLIGHT", 500)
    env = environment(database, kafka, topic)
    set_up(env)
    with in_this_process(env) as reader, database.connect() as app, database.connect() as other:
        app.execute(
            "create function wait() returns trigger language plpgsql as"
            " $$ begin perform pg_advisory_xact_lock_shared(1); return null; end $$;"
            f"create trigger wait before update on {OUTBOX} for each statement execute function wait()"
        )
        with other.transaction():
            other.execute("select pg_advisory_xact_lock(1)")
            enqueue_many(app, topic, 5_000)
            eventually(lambda: reader._bookkeeper.unmarked >= 1_000, what="as many as may wait")
            until = time.monotonic() + 1
            while time.monotonic() < until:
                assert len(tap.read(0.01)) <= 1_000 + 500 + A_LOT
        all_published(app)
        assert len(tap.has(range(1, 5_001))) == 5_000


def test_nothing_is_looked_for_that_the_stream_has_still_to_bring(
    database: Database, kafka: Kafka, topic: str, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long rows wait for Kafka, the sweep leaves them alone, and Kafka gets them once."""
    monkeypatch.setattr("connector.retries.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("connector.bookkeeper._QUIET_SECONDS", 1.0)
    with kafka.proxy() as proxy, database.connect() as app:
        env = environment(database, kafka, topic)
        set_up(env)
        with in_this_process(env | {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{proxy.port}"}) as reader:
            tap.has(enqueue(app, topic, "key", 1))
            all_published(app)
            proxy.black_hole()
            ids = some(app, topic)
            eventually(lambda: reader._publishing.in_flight >= len(ids), what="the messages on their way")
            until = time.monotonic() + 2  # a few sweeps
            while time.monotonic() < until:
                assert reader._publishing.in_flight == len(ids)
                time.sleep(0.05)
            proxy.restore()
            tap.has(ids)
            all_published(app)
            assert len(tap.read()) == 1 + len(ids)


def test_a_due_row_that_is_on_its_way_is_not_picked_again(
    database: Database, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """However often there is reason to look at the table before Kafka answers, a retry is sent once."""
    with kafka.proxy() as proxy, database.connect() as app:
        env = environment(database, kafka, topic)
        set_up(env)
        with in_this_process(env | {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{proxy.port}"}) as reader:
            ids = enqueue(app, topic, "key", 1)
            tap.has(ids)
            all_published(app)
            proxy.black_hole()
            ids += enqueue(app, topic, "key", 2, 3, due_in=0.1)
            eventually(lambda: reader._publishing.in_flight == 2, what="the retries on their way")
            until = time.monotonic() + 1
            while time.monotonic() < until:
                wake_reader(app, TABLES, 0)
                assert reader._publishing.in_flight == 2
                time.sleep(0.05)
            proxy.restore()
            tap.has(ids)
            all_published(app)
            assert len(tap.read()) == len(ids)


HINTS = (b"", b"0", b"-1", b"-99999999999", b"99999999999", b"9" * 400, b"1e9", b"\x00\xff garbage", b"x" * 100_000)


def test_hints_that_anybody_may_forge_do_no_harm(
    database: Database, kafka: Kafka, topic: str, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they say and however many come, each row is published once, at its time; the table is not besieged."""
    looks: list[float] = []
    due_rows = Bookkeeping.due_rows

    def counted(self: Bookkeeping, limit: int) -> list[OutboxRow]:
        looks.append(time.monotonic())
        return due_rows(self, limit)

    monkeypatch.setattr(Bookkeeping, "due_rows", counted)
    emit = "select count(pg_logical_emit_message(%s, %s, %s::bytea)) from generate_series(1, %s)"
    env = environment(database, kafka, topic)
    set_up(env)
    with in_this_process(env), database.connect() as app, database.connect() as stranger:
        stranger.execute("set role pg_monitor")
        ids = enqueue(app, topic, "key", *range(10)) + enqueue(app, topic, "later", 10, due_in=2)
        began = time.monotonic()
        for transactional in (True, False):
            for hint in HINTS:
                stranger.execute(emit, [transactional, WAKE_PREFIX, hint, 1])
            for hint in HINTS[:5]:
                stranger.execute(emit, [transactional, WAKE_PREFIX, hint, 10_000])
        ids += enqueue(app, topic, "key", *range(11, 20))
        while time.monotonic() < began + 1.5:
            stranger.execute(emit, [False, WAKE_PREFIX, b"0", 100])
        tap.has(ids)
        all_published(app)
        lasted = time.monotonic() - began
        assert len(tap.read()) == len(ids)
        assert one(app, f"select published_at >= next_retry_at from {OUTBOX} where message_key = 'later'")
        assert len([look for look in looks if look > began]) < lasted / 0.05 + 5
