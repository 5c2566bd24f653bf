"""A real Prometheus watches a run with faults: every alert fires at its fault, every panel has something to show."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from psycopg.types.json import Jsonb

from connector.demo.embedded import free_port
from tests.deploy.dashboard import filled_in, panels
from tests.deploy.picture import draw
from tests.deploy.prometheus import WINDOW, Prometheus, watching
from tests.deploy.test_observability import alerts
from tests.integration.scenario import OUTBOX, Connection, one, set_up, statuses, write_wal
from tests.services import Database, Kafka, Process, environment, eventually, eventually_none

REFUSED = 240
BACKLOG = 10_500
BUDGET_MB = 64


def say(connection: Connection, topic: str, rows: int, text: str, *, keys: int = 40, **instead: Any) -> None:
    """Enqueue messages of some conversations in turn; `instead` replaces parts of the payload, `biz_type`, `status`."""
    biz_type = instead.pop("biz_type", "chat_history_persist")
    status = instead.pop("status", "pending")
    payload = {"user_id": 1, "role": "user", "message_content": text} | instead
    connection.execute(
        f"insert into {OUTBOX} (biz_type, status, topic, message_key, payload)"
        " select %s, %s, %s, k, %s || jsonb_build_object('chat_id', k)"
        "   from (select %s || ' ' || n %% %s as k from generate_series(1, %s) as n) as keys",
        [biz_type, status, topic, Jsonb(payload), text, keys, rows],
    )


class Talk:
    """An application that enqueues a few messages all along."""

    def __init__(self, database: Database, topic: str) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._talk, args=(database, topic))
        self._thread.start()

    def _talk(self, database: Database, topic: str) -> None:
        with database.connect() as connection:
            while not self._stopping.wait(0.1):
                say(connection, topic, 5, "talk")

    def close(self) -> None:
        """Say no more."""
        self._stopping.set()
        self._thread.join()


@dataclass(frozen=True)
class Run:
    """A pipeline, Prometheus beside it, and what is done to them. Each fault is mended once its alerts have fired."""

    prometheus: Prometheus
    database: Database
    connection: Connection
    kafka: Kafka
    topic: str
    slot: str
    start_reader: Callable[[], Process]
    start_sink: Callable[[], Process]

    def nobody_leads(self) -> Process:
        """The slot is gone, and the one reader is kept from leading."""
        self.prometheus.await_firing("OutboxReaderNotScraped", "OutboxSinkNotScraped")
        self.connection.execute("select pg_drop_replication_slot(%s)", [self.slot])
        with self.database.connect() as leader:
            leader.execute("select pg_advisory_lock(hashtext('outbox_connector'), hashtext(%s))", [self.slot])
            reader = self.start_reader()
            self.prometheus.await_firing("OutboxNoLeader", "OutboxSlotLost")
        self.prometheus.await_over("OutboxReaderNotScraped", "OutboxNoLeader", "OutboxSlotLost")
        return reader

    def messages_fail(self) -> None:
        """Messages die, are refused and hold others back; some values in Kafka are no messages, or of no row."""
        self.connection.execute(
            "alter table chat_histories add constraint refused check (message_content <> 'refused')"
        )
        say(self.connection, self.topic, 1, "no number", user_id="one")
        say(self.connection, self.topic, 1, "nobody's", biz_type="nobody_knows")
        say(self.connection, self.topic, REFUSED, "refused", keys=REFUSED // 2)
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers})
        producer.produce(self.topic, b"no envelope")
        no_row = {"outbox_id": 10**12, "biz_type": "chat_history_persist", "payload": {"user_id": 1, "chat_id": "c"}}
        producer.produce(self.topic, json.dumps(no_row).encode())
        producer.flush(10)
        self.prometheus.await_firing(
            "OutboxDeadRows", "OutboxDeadLetters", "OutboxRowsMissing", "OutboxRetriesStorm", "OutboxHeldLong"
        )
        # Whoever changes many rows by hand may collide with the pipeline, and does it again.
        eventually(
            lambda: self.connection.execute(
                f"update {OUTBOX} set created_at = now() - interval '2 hours'"
                " where payload->>'message_content' = 'refused'"
            ),
            what="the update",
            ignoring=(psycopg.errors.DeadlockDetected,),
        )
        self.prometheus.await_firing("OutboxMessagesStuck")
        self.connection.execute("alter table chat_histories drop constraint refused")

    def nobody_stores(self, sink: Process) -> Process:
        """The sink is stopped while messages come."""
        assert sink.stop() == 0
        say(self.connection, self.topic, BACKLOG, "backlog")
        self.prometheus.await_firing("OutboxSinkNotScraped", "OutboxSinkStalled", "OutboxConsumerLag")
        sink = self.start_sink()
        # One that has not met Kafka before Kafka goes away would wait for it no longer than its start deadline.
        sink.wait_for_log("partitions_assigned", within=45)
        return sink

    def kafka_goes_away(self) -> None:
        """Kafka is stopped, and the database goes on writing."""
        self.kafka.stop()
        write_wal(self.connection, BUDGET_MB // 8)
        self.prometheus.await_firing("OutboxKafkaTakesNothing", "OutboxReplicationLag")
        self.kafka.start()
        self.prometheus.await_over("OutboxKafkaTakesNothing", "OutboxReplicationLag")

    def an_old_transaction_pins_wal(self) -> None:
        """A transaction stays open while the database writes more than the budget."""
        with self.database.connect() as forgotten:
            forgotten.execute("begin")
            say(forgotten, self.topic, 1, "never committed")
            for _ in range(BUDGET_MB // 4 + 2):
                write_wal(self.connection, 4)
                # Else it would be the reader's own lag, for which it gives the slot up.
                eventually(lambda: self._lag() < 4 << 20, within=20, what="the reader's keeping up")
            self.prometheus.await_firing("OutboxSlotNearBudget", "OutboxSlotOverBudget")
            forgotten.execute("rollback")
        # What a slot pins follows once the server has logged which transactions run.
        self.connection.execute("checkpoint")
        self.prometheus.await_over("OutboxSlotNearBudget", "OutboxSlotOverBudget")

    def _lag(self) -> int:
        return int(
            one(
                self.connection,
                "select pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)"
                "  from pg_replication_slots where slot_name = %s",
                [self.slot],
            )
        )

    def nobody_gets_into_the_database(self, reader: Process) -> None:
        """The database refuses everybody, so nothing can be proved, and the reader crashes."""
        reader.kill()
        with no_connections(self.database):
            self.prometheus.await_firing("OutboxReaderNotScraped", "OutboxDatabaseNotSeen", "OutboxProofOverdue")
        self.start_reader()

    def somebody_changes_what_is_settled(self) -> None:
        """A row says that it is consumed, and is in no history."""
        # A sink proves what comes after its start: so let it have begun.
        proved = "max(outbox_connector_last_proof_timestamp)"
        eventually(lambda: self.prometheus.value(proved) > 0, within=45, what="the first proof")
        say(self.connection, self.topic, 1, "never stored", status="consumed")
        self.prometheus.await_firing("OutboxUnproved")
        self.connection.execute(f"delete from {OUTBOX} where message_key like 'never stored%'")
        self.prometheus.await_over("OutboxUnproved")

    def all_is_well(self, sink: Process) -> None:
        """What is dead is seen to, everything else is stored, and a new sink need not prove what was before it."""
        with self.database.connect() as connection:
            eventually(
                lambda: statuses(connection).keys() == {"consumed", "dead"}, within=60, what="the storing of all"
            )
            assert statuses(connection)["dead"] == 2
            connection.execute(f"delete from {OUTBOX} where status = 'dead'")
        assert sink.stop() == 0
        self.start_sink()
        eventually_none(self.prometheus.firing, within=60, what="the end of every alert")
        led = "min_over_time(max(outbox_connector_leader)[3s:500ms])"
        eventually(lambda: self.prometheus.value(led) == 1, within=30, what="a reader's leading for three seconds")


@contextmanager
def no_connections(database: Database) -> Iterator[None]:
    """Let nobody into a database, and end who is in it."""
    with database.connect() as connection:
        name = one(connection, "select current_database()")
    with psycopg.connect(database.server.url, autocommit=True) as elsewhere:
        elsewhere.execute(f'alter database "{name}" allow_connections false')
        elsewhere.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
        try:
            yield
        finally:
            elsewhere.execute(f'alter database "{name}" allow_connections true')


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_alert_fires_at_its_fault_and_every_panel_has_something_to_show(
    database: Database, durable_own_kafka: Kafka, own_topic: str, tmp_path: Path
) -> None:
    """Alerts come with their faults and go with them; the variable `DASHBOARD_PICTURE` names an SVG to draw of it."""
    ports = {"outbox-reader": free_port(), "outbox-sink": free_port()}
    env = environment(database, durable_own_kafka, own_topic)
    set_up(env)

    def start(command: str, **variables: str) -> Process:
        return Process(command, env=env | {"CONNECTOR_HTTP_PORT": str(ports[f"outbox-{command}"])} | variables).start()

    with watching(tmp_path, ports) as prometheus, database.connect() as connection:
        run = Run(
            prometheus,
            database,
            connection,
            durable_own_kafka,
            own_topic,
            env["CONNECTOR_SLOT_NAME"],
            lambda: start("reader", CONNECTOR_WAL_BUDGET=f"{BUDGET_MB}MB"),
            lambda: start("sink", CONNECTOR_PROOF_SECONDS="1"),
        )
        began = time.time()
        reader = run.nobody_leads()
        with closing(Talk(database, own_topic)):
            sink = run.start_sink()
            run.somebody_changes_what_is_settled()
            run.messages_fail()
            sink = run.nobody_stores(sink)
            run.kafka_goes_away()
            run.an_old_transaction_pins_wal()
        run.nobody_gets_into_the_database(reader)
        run.all_is_well(sink)
        ended = time.time()

        fired = prometheus.over('ALERTS{alertstate="firing"}', began, ended)
        assert {(series.labels["alertname"], series.labels["severity"]) for series in fired} == {
            (alert["alert"], alert["labels"]["severity"]) for alert in alerts()
        }
        for alert in alerts():
            prometheus.now(alert["expr"])

        answers = []
        for panel in panels():
            answer: list[Any] = []
            for expression, legend in panel.queries:
                found = prometheus.over(filled_in(expression, f"{WINDOW}s"), began, ended)
                assert any(series.is_told for series in found), f"{panel.title}: {expression} gives nothing"
                answer += [(legend_of(legend, dict(series.labels)), series) for series in found]
            answers.append((panel, answer))
        if picture := os.environ.get("DASHBOARD_PICTURE"):
            Path(picture).write_text(draw(answers, began, ended))


def legend_of(pattern: str, labels: dict[str, str]) -> str:
    """Return a legend with the labels that it names, or the name of an alert."""
    for name, value in labels.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return (
        pattern
        or labels.get("alertname")
        or " ".join(f"{name} {labels[name]}" for name in ("job", "version") if name in labels)
    )
