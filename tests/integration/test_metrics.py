"""What `/metrics` says of a run is what PostgreSQL and Kafka say of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Producer
from prometheus_client.parser import text_string_to_metric_families

from connector.store.connections import connect
from connector.store.gauges import Gauges, SlotGauges
from tests.integration.outbox_table import TABLES, OutboxTable
from tests.integration.scenario import OUTBOX, Connection, Tap, is_streaming, one, set_up, statuses, write_wal
from tests.services import Database, Kafka, Process, eventually

GOOD = 300
REFUSED = 4  # messages of one key: the first is refused, the others are held behind it


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """An empty outbox and an empty history."""
    table = OutboxTable(database)
    yield table
    table.close()


def page(process: Process) -> dict[str, float]:
    """Return every sample of a page by its name without the prefix, with the values of its labels."""
    found = {}
    for family in text_string_to_metric_families(process.http("/metrics").body):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            name = sample.name.removeprefix("outbox_connector_")
            found[f"{name} {labels}".strip()] = sample.value
    return found


def enqueue(connection: Connection, topic: str, key: str, text: str, rows: int = 1, **instead: Any) -> None:
    """Enqueue chat messages; `instead` replaces parts of the payload, or `biz_type`."""
    biz_type = instead.pop("biz_type", "chat_history_persist")
    payload = {"user_id": 1, "chat_id": key, "role": "user", "message_content": text} | instead
    connection.execute(
        "select outbox_enqueue(%s, %s, %s, %s) from generate_series(1, %s)",
        [biz_type, topic, key, json.dumps(payload), rows],
    )


def test_every_metric_is_true_of_a_run(
    connector_env: dict[str, str],
    connector: Callable[..., Process],
    database: Database,
    complete_kafka: Kafka,
    topic: str,
) -> None:
    """Counters, gauges and histograms of both processes are what tables and topics show, with failures of each kind."""
    set_up(connector_env)
    reader, sink = is_streaming(connector("reader")), connector("sink")
    with database.connect() as connection, Tap(complete_kafka, topic) as tap:
        connection.execute("alter table chat_histories add constraint refused check (message_content <> 'refused')")
        enqueue(connection, topic, "good", "good", GOOD)
        enqueue(connection, topic, "poison", "a text for a number", user_id="one")
        enqueue(connection, topic, "poison", "nobody's", biz_type="nobody_knows")
        enqueue(connection, topic, "large", secrets.token_hex(1_000_000))
        enqueue(connection, topic, "refused", "refused")
        enqueue(connection, topic, "refused", "held", REFUSED - 1)
        producer = Producer({"bootstrap.servers": complete_kafka.bootstrap_servers})
        producer.produce(topic, b"no envelope")
        payload = {"user_id": 1, "chat_id": "gone", "role": "user", "message_content": "gone"}
        gone = {"outbox_id": 10**12, "biz_type": "chat_history_persist", "payload": payload}
        producer.produce(topic, json.dumps(gone).encode())
        producer.flush(10)

        eventually(lambda: page(sink)["held_messages"] == REFUSED - 1, within=20, what="the holding of messages")
        waiting = f"from {OUTBOX} where status in ('pending', 'published')"
        age = page(sink)["oldest_unconsumed_age_seconds"]
        assert 0 < age <= one(connection, f"select extract(epoch from clock_timestamp() - min(created_at)) {waiting}")
        connection.execute("alter table chat_histories drop constraint refused")
        settled = {"consumed": GOOD + REFUSED, "dead": 3}
        eventually(lambda: statuses(connection) == settled, within=60, what="the settling of every message")
        eventually(lambda: page(sink)["skipped_total missing"] == 1, within=20, what="the skipping of what has no row")

        eventually(lambda: page(reader)["in_flight_messages"] == 0, within=20, what="an idle reader")
        of_reader = page(reader)
        of_sink = page(sink)
        retries = one(connection, f"select sum(retry_count) from {OUTBOX}")
        published = [sent for sent in tap.read(1.0) if sent.key]

    assert of_reader["published_total"] == len(published)
    # Each row comes by the stream once; what is published again comes from the table.
    assert of_reader["commit_to_ack_seconds_count"] == sum(settled.values())
    assert of_reader["publish_failures_total"] == of_reader["dead_total message_too_large"] == 1
    assert of_reader["leader"] == 1
    assert of_reader["retries_scheduled_total"] == 0
    assert of_sink["consumed_total"] == of_sink["end_to_end_seconds_count"] == GOOD + REFUSED
    assert of_sink["retries_scheduled_total"] == retries >= 1
    assert of_sink["dead_letters_total"] == 1
    assert of_sink["dead_total payload"] == of_sink["dead_total unknown_biz_type"] == 1
    assert of_sink["sink_batch_rows_sum"] == len(published) + 1
    assert of_sink["held_messages"] == 0
    for shown in (of_reader, of_sink):
        assert {status: shown[f"outbox_rows {status}"] for status in ("pending", "published", "consumed", "dead")} == {
            "pending": 0,
            "published": 0,
        } | settled
        assert shown["oldest_unconsumed_age_seconds"] == 0
        assert [name for name in shown if name.startswith("build_info")]


def test_the_gauges_of_the_slot_are_what_the_server_says(
    connector_env: dict[str, str], connector: Callable[..., Process], database: Database
) -> None:
    """What the slot pins, what of it is not confirmed, the state of its WAL, and the budget."""
    set_up(connector_env)
    slot = connector_env["CONNECTOR_SLOT_NAME"]
    reader = is_streaming(connector("reader", CONNECTOR_WAL_BUDGET="96MB"))
    with database.connect() as connection:
        connection.execute("begin")
        connection.execute("select pg_current_xact_id()")
        write_wal(connection, 3)
        query = (
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), wal_status"
            "  from pg_replication_slots where slot_name = %s"
        )
        least, status = connection.execute(query, [slot]).fetchall()[0]
        shown = page(reader)
        assert shown["wal_budget_bytes"] == 96 << 20
        most = one(connection, query, [slot])
        assert least <= shown["slot_retained_wal_bytes"] <= most
        assert 0 <= shown["replication_lag_bytes"] <= shown["slot_retained_wal_bytes"]
        states = {name.removeprefix("slot_wal_status "): value for name, value in shown.items() if "wal_status" in name}
        assert [name for name, value in states.items() if value == 1] == [status]
        connection.execute("rollback")


def test_a_slot_that_is_gone_is_missing_and_pins_nothing(connector_env: dict[str, str], database: Database) -> None:
    """Its last sizes do not pass for today's."""
    set_up(connector_env)
    slot = connector_env["CONNECTOR_SLOT_NAME"]
    gauges = Gauges(lambda: connect(database.url, name="test"), TABLES, slot)
    try:
        there = gauges.slot()
        assert there is not None
        assert there.wal_status == "reserved"
        assert there.retained is not None
        assert there.retained >= (there.lag or 0) >= 0
        with database.connect() as connection:
            connection.execute("select pg_drop_replication_slot(%s)", [slot])
        assert gauges.slot() == SlotGauges(None, None, "missing")
    finally:
        gauges.close()


def test_a_date_of_creation_in_the_future_is_no_negative_age(
    connector_env: dict[str, str], connector: Callable[..., Process], database: Database, topic: str
) -> None:
    """Clocks differ, and rows may be imported with dates of their own."""
    set_up(connector_env)
    sink = connector("sink")
    with database.connect() as connection:
        enqueue(connection, topic, "key", "text")
        for hours, least, most in ((-1, 3600, 3700), (1, 0, 0)):
            connection.execute(f"update {OUTBOX} set created_at = now() + %s * interval '1 hour'", [hours])
            assert least <= page(sink)["oldest_unconsumed_age_seconds"] <= most


def test_the_rows_of_a_large_table_are_counted_or_estimated_well(
    outbox: OutboxTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog is counted to the last row; consumed rows are estimated from the start; what takes too long is, too."""
    database, connection = outbox.database, outbox.connection
    connection.execute(f"alter table {OUTBOX} set (autovacuum_enabled = false)")
    connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status)"
        " select 'b', 't', 'k', '1',"
        "        case when n <= 20000 then 'consumed' when n % 1000 = 0 then 'dead' else 'pending' end"
        "   from generate_series(1, 140000) as n"
    )
    monkeypatch.setattr("connector.store.gauges._SHARE_OF_TIME", 1e-6)
    exact = {"pending": 119_880, "published": 0, "consumed": 20_000, "dead": 120}
    gauges = Gauges(lambda: connect(database.url, name="test"), TABLES, "")
    try:
        assert gauges.rows_by_status() == (exact, frozenset())
        for _ in range(2):  # before the table was ever analyzed, and after
            counts, estimated = gauges.rows_by_status(exact_below=0)
            assert estimated == {"consumed"}
            assert counts == exact | {"consumed": pytest.approx(20_000, rel=0.2)}
            connection.execute(f"analyze {OUTBOX}")
        # Not counted again before its time has come.
        connection.execute(f"update {OUTBOX} set status = 'dead' where status = 'pending' and id < 21000")
        assert gauges.rows_by_status(exact_below=0).by_status["dead"] == 120
    finally:
        gauges.close()

    monkeypatch.setattr("connector.store.gauges.COUNTING_SECONDS", 0.001)
    gauges = Gauges(lambda: connect(database.url, name="test"), TABLES, "")
    try:
        counts, estimated = gauges.rows_by_status(exact_below=0)
        assert estimated == {"pending", "consumed"}
        assert counts["pending"] == pytest.approx(118_881, rel=0.1)
        assert counts["dead"] == 1_119
    finally:
        gauges.close()


def test_the_oldest_age_is_that_of_the_oldest_row_whatever_its_id(outbox: OutboxTable) -> None:
    """A transaction that began long before it enqueued has the older row; times that are infinite are no age."""
    for age in ("1 minute", "1 hour"):
        outbox.connection.execute(
            f"insert into {OUTBOX} (biz_type, topic, message_key, payload, created_at)"
            " values ('b', 't', 'k', '1', now() - %s::interval), ('b', 't', 'k', '1', '-infinity')",
            [age],
        )
    gauges = Gauges(lambda: connect(outbox.database.url, name="test"), TABLES, "")
    try:
        assert gauges.oldest_unconsumed_age() == pytest.approx(3600, abs=60)
    finally:
        gauges.close()
