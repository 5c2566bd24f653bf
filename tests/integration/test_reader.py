"""The reader as a process: what it publishes, when, what it writes to the table, and how it lives and ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from psycopg.types.json import Jsonb

from connector.outbox import Failure, Table
from connector.store.bookkeeping import settle_failures, wake_reader
from connector.store.queries import Tables
from tests.integration.scenario import (
    OUTBOX,
    Connection,
    Tap,
    all_published,
    enqueue,
    enqueue_many,
    in_order,
    is_streaming,
    metric,
    one,
    readiness,
    set_up,
    statuses,
)
from tests.services import Database, Kafka, Process, environment, eventually

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))

Start = Callable[..., Process]

# Computed with org.apache.kafka.common.utils.Utils of the Java client.
MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
    "Gespräch-ß": -753848745,
    "6f9619ff-8b86-d011-b42d-00c04fc964ff": 1923431403,
}


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


@pytest.fixture
def reader(app: Connection, connector: Start) -> Process:
    """A reader that streams."""
    return is_streaming(connector("reader"))


# --- what it publishes -----------------------------------------------------------------------------------------------


def test_a_message_is_what_the_contract_says(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """Key, value and headers are the row's, the payload to the last digit, and the attempt is 0."""
    text = '{"text": "Grüße \\u0001 👋", "price": 1.10, "big": 12345678901234567890123, "none": null, "list": [1, {}]}'
    outbox_id = one(
        app,
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, headers) values (%s, %s, %s, %s::jsonb, %s)"
        " returning id",
        ["chat_history_persist", topic, "Gespräch 1", text, Jsonb({"traceparent": "00-ab-cd-01", "leer": ""})],
    )
    (sent,) = tap.has([outbox_id])
    assert sent.key == "Gespräch 1"
    assert json.loads(sent.value) == {
        "outbox_id": outbox_id,
        "biz_type": "chat_history_persist",
        "attempt": 0,
        "payload": json.loads(text),
    }
    assert '"price": 1.10' in sent.value.decode()
    assert sorted(sent.headers) == [("leer", b""), ("traceparent", b"00-ab-cd-01")]


def test_any_json_is_a_payload(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """Whether a payload has the right shape is the handler's business, not the reader's."""
    insert = f"insert into {OUTBOX} (biz_type, topic, message_key, payload) values (%s, %s, '', %s) returning id"
    payloads = ["null", '"text"', "[]", "0", "{}"]
    ids = {one(app, insert, ['it\'s "x"', topic, payload]): payload for payload in payloads}
    for sent in tap.has(ids):
        assert (sent.envelope["biz_type"], sent.envelope["payload"]) == ('it\'s "x"', json.loads(ids[sent.outbox_id]))
        assert sent.headers == []


def test_a_key_goes_where_the_java_client_puts_it(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """The partition is murmur2 of the key, as other producers of the same key compute it."""
    ids = {enqueue(app, topic, key, 1)[0]: key for key in MURMUR2}
    for sent in tap.has(ids):
        assert sent.key == ids[sent.outbox_id]
        assert sent.partition == (MURMUR2[sent.key] & 0x7FFFFFFF) % 6, sent.key


def test_each_row_names_its_topic(reader: Process, app: Connection, kafka: Kafka) -> None:
    """A row goes to the topic that it names, whether or not the reader's settings name it too."""
    with kafka.topic() as other, Tap(kafka, other) as tap:
        (outbox_id,) = enqueue(app, other, "key", 5)
        (sent,) = tap.has([outbox_id])
        assert sent.number == 5


def test_nothing_that_is_rolled_back_is_published(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """A message is sent if and only if its transaction commits, savepoints included."""
    app.execute("begin")
    rolled_back = enqueue(app, topic, "key", 1)
    app.execute("rollback")
    app.execute("begin")
    (first,) = enqueue(app, topic, "key", 2)
    app.execute("savepoint s")
    rolled_back += enqueue(app, topic, "key", 3)
    app.execute("rollback to savepoint s")
    (last,) = enqueue(app, topic, "key", 4)
    app.execute("commit")
    assert [sent.outbox_id for sent in tap.has([first, last])] == [first, last]
    assert not set(rolled_back) & {sent.outbox_id for sent in tap.sent}


def test_a_key_keeps_its_order_over_many_transactions(
    reader: Process, app: Connection, database: Database, tap: Tap, topic: str
) -> None:
    """Commits of two connections in turn arrive in the order of the commits."""
    with database.connect() as other:
        ids = [enqueue(connection, topic, "key", n)[0] for n in range(100) for connection in (app, other)]
    assert [sent.outbox_id for sent in tap.has(ids)] == ids


def test_a_row_of_several_megabytes_is_published(reader: Process, app: Connection, kafka: Kafka) -> None:
    """A large payload passes where its topic allows it."""
    with kafka.topic(config={"max.message.bytes": "10000000"}) as wide, Tap(kafka, wide) as tap:
        text = "".join(str(n) for n in range(900_000))
        insert = f"insert into {OUTBOX} (biz_type, topic, message_key, payload) values ('b', %s, 'k', %s) returning id"
        (sent,) = tap.has([one(app, insert, [wide, Jsonb({"text": text})])])
        assert sent.envelope["payload"]["text"] == text


# --- what it writes --------------------------------------------------------------------------------------------------


def test_what_kafka_has_is_marked_published(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """An acknowledged row becomes `published` with its time, and keeps the rest."""
    (outbox_id,) = enqueue(app, topic, "key", 1)
    tap.has([outbox_id])
    all_published(app)
    row = one(app, f"select to_jsonb(o) from {OUTBOX} as o where id = %s", [outbox_id])
    assert (row["status"], row["retry_count"], row["next_retry_at"], row["last_error"]) == ("published", 0, None, None)
    assert row["created_at"] <= row["published_at"] <= row["updated_at"]


def test_a_late_mark_changes_nothing_that_changed_since_the_row_was_read(
    reader: Process, app: Connection, tap: Tap, topic: str
) -> None:
    """Whatever the sink has written before the reader's mark lands stays as it is."""
    changes = [
        "retry_count = 1, next_retry_at = clock_timestamp() + interval '1 hour', updated_at = clock_timestamp()",
        "next_retry_at = clock_timestamp() + interval '1 hour', updated_at = clock_timestamp()",
        "next_retry_at = clock_timestamp() + interval '1 hour'",
        "retry_count = 1",
        "updated_at = updated_at + interval '1 microsecond'",
        "status = 'consumed', consumed_at = clock_timestamp()",
        "status = 'dead', last_error = 'no'",
    ]
    ids = enqueue(app, topic, "key", *range(len(changes)))
    for outbox_id, change in zip(ids, changes, strict=True):
        app.execute(f"update {OUTBOX} set {change} where id = %s", [outbox_id])
    query = f"select to_jsonb(o) from {OUTBOX} as o where id = any (%s) order by id"
    changed = app.execute(query, [ids]).fetchall()
    tap.has(ids)
    (later,) = enqueue(app, topic, "key", 100)
    status = f"select status from {OUTBOX} where id = %s"
    eventually(lambda: one(app, status, [later]) == "published", what="a later mark")
    assert app.execute(query, [ids]).fetchall() == changed


@pytest.mark.usefixtures("complete_kafka")
def test_a_message_too_large_for_its_topic_is_dead_at_once(
    reader: Process, app: Connection, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """The reason names size and limit; the neighbours, of the same key too, are published."""
    with kafka.topic(config={"max.message.bytes": "2000"}) as narrow, Tap(kafka, narrow) as narrow_tap:
        before = enqueue(app, narrow, "key", 1)
        insert = (
            f"insert into {OUTBOX} (biz_type, topic, message_key, payload) select 'b', %s, 'key', to_jsonb(string_agg"
        )
        insert += "(md5(n::text), '')) from generate_series(1, 200) as n returning id"
        outbox_id = one(app, insert, [narrow])
        after = enqueue(app, narrow, "key", 2)
        narrow_tap.has(before + after)
        query = f"select status, last_error, retry_count from {OUTBOX} where id = %s"
        eventually(lambda: one(app, query, [outbox_id]) == "dead", what="the row's death")
        record = app.execute(query, [outbox_id]).fetchone()
        assert record is not None
        assert "2000" in record[1]
        assert "6" in record[1]
        eventually(lambda: metric(reader, 'dead_total{reason="message_too_large"}') == 1, what="the count")
        assert metric(reader, "publish_failures_total") >= 1
        all_published(app)
    assert tap.has(enqueue(app, topic, "key", 3))


@pytest.mark.usefixtures("complete_kafka")
def test_an_unknown_topic_is_retried_with_backoff(
    reader: Process, app: Connection, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """The failure is on the row with its due time and its reason; the next rows of other topics are not kept."""
    (outbox_id,) = enqueue(app, f"{topic}-nowhere", "key", 1)
    tap.has(enqueue(app, topic, "key", 2))
    query = f"select last_error from {OUTBOX} where id = %s and status = 'pending' and retry_count >= 1"
    error = eventually(lambda: one(app, query, [outbox_id]), within=20, what="the scheduled retry")
    assert f"{topic}-nowhere" in error
    assert one(app, f"select next_retry_at > updated_at from {OUTBOX} where id = %s", [outbox_id])
    assert metric(reader, "retries_scheduled_total") >= 1


@pytest.mark.usefixtures("complete_kafka")
def test_rows_are_not_lost_to_a_batch_that_the_topic_refuses(
    reader: Process, app: Connection, kafka: Kafka, topic: str, tap: Tap
) -> None:
    """When a topic's limit is lowered below the size of a batch, its small messages still arrive."""
    tap.has(enqueue(app, topic, "key", 0))
    limit = ConfigEntry("max.message.bytes", "3000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[limit])
    admin = kafka.admin()
    for changed in admin.incremental_alter_configs([resource]).values():
        changed.result(20)
    # These go the way of retries, where no stream would bring them again.
    with app.transaction():
        ids = enqueue(app, topic, "key", *range(2_000), due_in=3600)
        app.execute(f"update {OUTBOX} set next_retry_at = clock_timestamp() where next_retry_at is not null")
        wake_reader(app, TABLES, 0)
    tap.has(ids)
    reader.wait_for_log("producer_replaced")
    all_published(app)
    assert statuses(app) == {"published": 2_001}


# --- when it publishes -----------------------------------------------------------------------------------------------


def test_a_row_enqueued_for_later_is_published_then(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """A future `next_retry_at` keeps a row until that time, and not much longer."""
    (later,) = enqueue(app, topic, "key", 1, due_in=1.5)
    (now,) = enqueue(app, topic, "key", 2)
    due = one(app, f"select extract(epoch from next_retry_at)::float from {OUTBOX} where id = %s", [later])
    sent = {message.outbox_id: message for message in tap.has([now, later])}
    assert sent[now].at < due
    assert due - 0.002 < sent[later].at < due + 0.7
    all_published(app)


def test_a_row_with_a_due_time_of_its_own_overtakes_nothing_that_was_enqueued_before_it(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """Due already when a reader begins, it is published after the rows that the stream has still to bring."""
    enqueue_many(app, topic, 3_000, keys=1)
    (due,) = enqueue(app, topic, "key-0", 0, due_in=-60)
    enqueue_many(app, topic, 10, keys=1)
    connector("reader")
    arrived = [message.outbox_id for message in tap.has(range(1, due + 11))]
    assert [outbox_id for outbox_id in arrived if outbox_id <= due] == list(range(1, due + 1))
    all_published(app)
    assert len(tap.read(0.5)) == due + 10


def test_a_retry_that_the_sink_schedules_is_published_when_it_is_due(
    reader: Process, app: Connection, tap: Tap, topic: str
) -> None:
    """Woken through the stream, the reader publishes the next attempt once, and not before its time."""
    (outbox_id,) = enqueue(app, topic, "key", 1)
    tap.has([outbox_id])
    all_published(app)
    with app.transaction():
        (settled,) = settle_failures(app, TABLES, [Failure(outbox_id, 0, "no", "test")])
        assert settled.due_in is not None
        wake_reader(app, TABLES, settled.due_in)
    due = one(app, f"select extract(epoch from next_retry_at)::float from {OUTBOX} where id = %s", [outbox_id])
    _, again = tap.until(lambda sent: len(sent) == 2)
    assert again.envelope["attempt"] == 1
    assert due - 0.002 < again.at < due + 0.7
    all_published(app)
    tap.has(enqueue(app, topic, "key", 2))
    assert [message.envelope["attempt"] for message in tap.sent if message.outbox_id == outbox_id] == [0, 1]


def test_due_rows_are_published_in_the_order_of_their_due_times(
    reader: Process, app: Connection, tap: Tap, topic: str
) -> None:
    """Of the rows that are due at once, the one that was due first goes first; of equals, the one enqueued first."""
    with app.transaction():
        ids = enqueue(app, topic, "key", *range(1_500), due_in=3600)
        app.execute(f"update {OUTBOX} set next_retry_at = now() - (id / 10) * interval '1 second'")
        wake_reader(app, TABLES, 0)
    tap.has(ids)
    order = sorted(ids, key=lambda outbox_id: (-(outbox_id // 10), outbox_id))
    assert [message.outbox_id for message in tap.sent] == order


def test_rows_that_were_due_while_no_reader_ran_are_published_at_the_start(
    app: Connection, connector: Start, tap: Tap, topic: str
) -> None:
    """A new leader looks at the table once, whatever hints it has missed."""
    (outbox_id,) = enqueue(app, topic, "key", 1)
    app.execute(
        f"update {OUTBOX} set retry_count = 4, next_retry_at = clock_timestamp(), updated_at = clock_timestamp()"
    )
    connector("reader")
    tap.until(lambda sent: any(message.envelope["attempt"] == 4 for message in sent))
    all_published(app)
    assert {message.outbox_id for message in tap.sent} == {outbox_id}


def test_an_idle_reader_asks_the_table_nothing(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """Soon asleep until something is due: no statement on the outbox in seconds, though a row waits for its time."""
    enqueue(app, topic, "key", 1, due_in=3600)
    tap.has(enqueue(app, topic, "key", 2))
    eventually(lambda: statuses(app) == {"pending": 1, "published": 1}, what="the mark")
    statements = (
        "select query_start, query from pg_stat_activity where datname = current_database()"
        " and application_name like 'outbox-connector%' and backend_type = 'client backend'"
        " and query ~ 'agent_outbox_messages'"
    )
    seen: set[tuple[object, ...]] = set()
    asleep_since = began = time.monotonic()
    while time.monotonic() < asleep_since + 4:
        if new := set(app.execute(statements).fetchall()) - seen:
            assert time.monotonic() < began + 25, new
            seen |= new
            asleep_since = time.monotonic()
        time.sleep(0.02)


@pytest.mark.slow
def test_what_no_hint_announces_is_found_by_the_sweep(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """Rows that somebody has set back by hand, with and without a due time, are published within a sweep."""
    ids = enqueue(app, topic, "key", 1, 2)
    tap.has(ids)
    all_published(app)
    app.execute(f"update {OUTBOX} set status = 'pending', updated_at = clock_timestamp() where id = %s", [ids[0]])
    app.execute(
        f"update {OUTBOX} set status = 'pending', next_retry_at = now(), retry_count = 1 where id = %s", [ids[1]]
    )
    tap.until(lambda sent: len(sent) == 4, within=60, what="the sweep")
    all_published(app)
    assert sorted(message.outbox_id for message in tap.sent[2:]) == ids


# --- how it lives and ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transactions", "rows"), [(20, 500), (1, 30_000)], ids=["many small", "one large"])
def test_a_reader_that_is_told_to_stop_leaves_nothing_to_repeat(  # noqa: PLR0917 - fixtures
    app: Connection, connector: Start, tap: Tap, topic: str, transactions: int, rows: int
) -> None:
    """SIGTERM in the middle of the work, or of a transaction: exit 0, and the next reader publishes just the rest."""
    for _ in range(transactions):
        enqueue_many(app, topic, rows)
    reader = connector("reader")
    eventually(lambda: metric(reader, "published_total") > 0, what="the first messages")
    assert reader.stop() == 0
    assert reader.wait_for_log("drained")["undelivered"] == 0
    is_streaming(connector("reader"))
    (last,) = enqueue(app, topic, "key-1", 0)
    tap.has(range(1, last + 1))
    all_published(app)
    assert len(tap.read(0.5)) == last
    assert in_order(tap.sent)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_reader_ends_quickly_on_a_signal(reader: Process, how: signal.Signals) -> None:
    """Either signal ends it with exit code 0 within seconds."""
    reader._running().send_signal(how)
    assert reader.wait(5) == 0


def test_a_reader_that_streams_is_ready_and_one_without_a_publication_is_not(
    database: Database, kafka: Kafka, connector_env: dict[str, str], connector: Start, app: Connection
) -> None:
    """Ready only when it can do its work; alive all along; and it goes on by itself once setup has run."""
    publication = connector_env["CONNECTOR_PUBLICATION_NAME"]
    app.execute(f"drop publication {publication}")
    process = connector("reader")
    process.wait_for_log("reader_interrupted")
    answer = process.http("/readyz")
    assert answer.status == 503
    assert publication in answer.body
    assert process.http("/livez").status == 200
    set_up(connector_env)
    eventually(lambda: readiness(process) == 200, within=15, what="readiness")
    # Standing by is being ready too, as long as the server has not let go of the last session's lock.
    eventually(lambda: metric(process, "leader") == 1, within=15, what="leading")


def test_without_a_publication_the_reader_gives_up_at_its_deadline(
    app: Connection, connector_env: dict[str, str], connector: Start
) -> None:
    """What `setup` makes is missing: exit 78, and the words name the remedy."""
    app.execute(f"drop publication {connector_env['CONNECTOR_PUBLICATION_NAME']}")
    process = connector("reader", CONNECTOR_START_DEADLINE_SECONDS="1")
    assert process.wait(20) == 78
    assert "outbox-connector setup" in process.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
        {"CONNECTOR_DATABASE_URL": "postgresql://postgres@127.0.0.1:1/none"},
        {"CONNECTOR_REPLICATION_URL": "postgresql://postgres@127.0.0.1:1/none"},
    ],
    ids=["Kafka", "PostgreSQL", "the replication address"],
)
def test_a_service_that_stays_away_past_the_deadline_ends_the_reader(
    app: Connection, connector: Start, variables: dict[str, str]
) -> None:
    """Exit 69, after having been alive and not ready until then."""
    process = connector("reader", CONNECTOR_START_DEADLINE_SECONDS="1", **variables)
    assert process.http("/readyz").status == 503
    assert process.http("/livez").status == 200
    assert process.wait(20) == 69


def test_metrics_tell_what_happened(reader: Process, app: Connection, tap: Tap, topic: str) -> None:
    """After a run the numbers are those of the run, in the units that their names say."""
    tap.has(enqueue(app, topic, "key", *range(100)))
    all_published(app)
    enqueue(app, topic, "key", 101, due_in=3600)
    eventually(lambda: metric(reader, "published_total") == 100, what="the count")
    assert metric(reader, "commit_to_ack_seconds_count") == 100
    assert 0 < metric(reader, "commit_to_ack_seconds_sum") / 100 < 2
    assert metric(reader, "publish_failures_total") == 0
    assert metric(reader, "in_flight_messages") == 0
    assert metric(reader, "leader") == 1
    assert metric(reader, 'outbox_rows{status="published"}') == 100
    assert metric(reader, 'outbox_rows{status="pending"}') == 1
    assert metric(reader, "oldest_unconsumed_age_seconds") > 0
    page = reader.http("/metrics").body
    for name in ("replication_lag_bytes", "slot_retained_wal_bytes", "build_info"):
        assert f"\noutbox_connector_{name}" in page
    retained = one(
        app,
        "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) from pg_replication_slots"
        " where database = current_database()",
    )
    assert metric(reader, "slot_retained_wal_bytes") == pytest.approx(float(retained), abs=64 * 2**20)
    assert metric(reader, "replication_lag_bytes") <= metric(reader, "slot_retained_wal_bytes")


def test_a_transaction_of_fifty_thousand_rows_stays_small_in_memory(
    reader: Process, app: Connection, tap: Tap, topic: str
) -> None:
    """Rows go out as they arrive; resident memory stays below 120 MB, and every row arrives in order."""
    enqueue_many(app, topic, 50_000, bytes_each=320)
    tap.until(lambda sent: len(sent) >= 50_000, within=60)
    all_published(app, within=60)
    assert reader.peak_rss_mb < 120
    assert len({message.outbox_id for message in tap.sent}) == len(tap.sent) == 50_000
    assert in_order(tap.sent)


def test_a_schema_of_ones_own_is_served(database: Database, kafka: Kafka, topic: str) -> None:
    """Table, slot and publication have the names that the settings give them."""
    env = environment(database, kafka, topic) | {"CONNECTOR_OUTBOX_TABLE": '"My Schema"."out box"'}
    with database.connect() as connection, Tap(kafka, topic) as tap:
        connection.execute('create schema "My Schema"')
        set_up(env)
        process = is_streaming(Process("reader", env=env).start())
        insert = "select \"My Schema\".outbox_enqueue('b', %s, 'k', '{\"number\": 1}')"
        tap.has([one(connection, insert, [topic])])
        query = 'select count(*) from "My Schema"."out box" where status = \'published\''
        eventually(lambda: one(connection, query) == 1, what="the mark")
        assert process.stop() == 0
