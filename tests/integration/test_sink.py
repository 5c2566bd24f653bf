"""The sink beside what may happen to it: outages, kills, rebalances, least privilege; and what it shows of itself."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import NewTopic
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from tests.integration.outbox_table import PAYLOAD, TABLES, OutboxTable
from tests.integration.scenario import Tap, metric, one, readiness, set_up
from tests.services import Database, Kafka, Process, environment, eventually
from tests.services.console import TOKEN, Console

TOO_LONG = "c" * 37
PASSWORD = "least-privilege"  # noqa: S105 - of roles that live as long as the test


@pytest.fixture
def outbox(database: Database, connector_env: dict[str, str]) -> Iterator[OutboxTable]:
    """The tables of a fresh database, with everything else that `setup` makes."""
    set_up(connector_env)
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


class Reader:
    """Publishes as the reader does, when the test says so."""

    def __init__(self, kafka: Kafka, topic: str, outbox: OutboxTable) -> None:
        options = {"bootstrap.servers": kafka.bootstrap_servers, "partitioner": "murmur2_random", "log_level": 0}
        self._producer = Producer(options)
        self._topic = topic
        self._outbox = outbox

    def send(self, outbox_id: int, key: str = "key", *, attempt: int = 0, **payload: Any) -> None:
        """Send the message of a row, or of none."""
        document = {
            "outbox_id": outbox_id,
            "biz_type": "chat_history_persist",
            "attempt": attempt,
            "payload": {**PAYLOAD, **payload},
        }
        self.send_value(json.dumps(document).encode(), key)

    def send_value(self, value: bytes, key: str = "key") -> None:
        """Send any value, and wait until Kafka has it."""
        self._producer.produce(self._topic, value, key)
        assert self._producer.flush(20) == 0

    def enqueue(self, rows: int = 1, keys: Sequence[str] = ("key",)) -> list[int]:
        """Insert rows, their keys in turn, and send their messages; return the ids."""
        ids = []
        for n in range(rows):
            key = keys[n % len(keys)]
            ids.append(self._outbox.new(key, self._topic))
            self.send(ids[-1], key)
        return ids

    def backlog(self, rows: int, keys: Sequence[str]) -> list[int]:
        """Do as `enqueue`, for many rows at a time."""
        inserted = self._outbox.connection.execute(
            "insert into agent_outbox_messages (biz_type, topic, message_key, payload)"
            " select 'chat_history_persist', %s, (%s::text[])[1 + n %% %s], %s from generate_series(0, %s) as n"
            " returning id, message_key",
            [self._topic, list(keys), len(keys), Jsonb(PAYLOAD), rows - 1],
        ).fetchall()
        for outbox_id, key in inserted:
            value = {"outbox_id": outbox_id, "biz_type": "chat_history_persist", "attempt": 0, "payload": PAYLOAD}
            self._producer.produce(self._topic, json.dumps(value).encode(), key)
        assert self._producer.flush(20) == 0
        return [outbox_id for outbox_id, _ in inserted]


@pytest.fixture
def reader(kafka: Kafka, topic: str, outbox: OutboxTable) -> Reader:
    """What stands in for the reader."""
    return Reader(kafka, topic, outbox)


def wait_for(outbox: OutboxTable, outbox_id: int, status: str = "consumed", within: float = 30.0) -> None:
    """Wait until a row has that status."""
    eventually(lambda: outbox.status(outbox_id) == status, within=within, what=f"row {outbox_id} becoming {status}")


def committed(kafka: Kafka, env: dict[str, str]) -> int:
    """Return the sum of the offsets that the sink's group has committed."""
    from connector.kafka import Kafka as Client  # noqa: PLC0415 - the name is that of the test's own

    return sum(Client(kafka.bootstrap_servers, {}).admin().group_offsets(env["CONNECTOR_GROUP_ID"]).values())


def members(kafka: Kafka, env: dict[str, str]) -> dict[str, set[int]]:
    """Return the partitions of each member of the sink's group, by the id that the group gave it."""
    admin = kafka.admin()
    (described,) = admin.describe_consumer_groups([env["CONNECTOR_GROUP_ID"]]).values()
    return {
        member.member_id: {partition.partition for partition in member.assignment.topic_partitions}
        for member in described.result(20).members
    }


def assigned(sink: Process, within: float = 30.0) -> None:
    """Wait until the group has given the sink its part."""
    sink.wait_for_log("partitions_assigned", within=within)


def events(process: Process, name: str) -> list[dict[str, Any]]:
    """Return the log lines of one event."""
    return [event for event in process.events if event.get("event") == name]


def sink_sessions(outbox: OutboxTable, condition: str = "true") -> int:
    """Count the sink's sessions in the database that satisfy a condition on pg_stat_activity."""
    query = (
        "select count(*) from pg_stat_activity where datname = current_database()"
        f" and application_name = 'outbox-connector sink' and {condition}"
    )
    return int(one(outbox.connection, query))


class Absence:
    """Takes the database away from everybody but the test, and gives it back."""

    def __init__(self, outbox: OutboxTable) -> None:
        self._outbox = outbox

    def begin(self) -> None:
        """Refuse new sessions and end those of the connector."""
        self._allow("false")
        self._outbox.connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like 'outbox-connector%'"
        )

    def end(self) -> None:
        """Let everybody in again."""
        self._allow("true")

    def _allow(self, allowed: str) -> None:
        database = self._outbox.database
        with psycopg.connect(database.server.url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("alter database {} allow_connections {}").format(
                    sql.Identifier(database.name), sql.SQL(allowed)
                )
            )


# --- the database is away --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("complete_kafka")
def test_an_outage_of_the_database_costs_no_retry_no_membership_and_no_message(
    outbox: OutboxTable,
    reader: Reader,
    kafka: Kafka,
    connector: Callable[..., Process],
    connector_env: dict[str, str],
) -> None:
    """For longer than the group's session timeout: the sink stays the member it was, and then stores everything."""
    # Whoever does not poll for so long has left the group.
    sink = connector("sink", CONNECTOR_CONSUMER_MAX_POLL_INTERVAL_MS="6000")
    (first,) = reader.enqueue()
    wait_for(outbox, first)
    before = members(kafka, connector_env)
    assert [len(partitions) for partitions in before.values()] == [6]

    absence = Absence(outbox)
    absence.begin()
    try:
        rows = reader.enqueue(30, ["a", "b", "c"])
        # 0.1 s, doubled each time: the seventh comes after the session timeout of six seconds.
        eventually(lambda: len(events(sink, "batch_postponed")) >= 7, within=40, what="the seventh attempt")
        assert readiness(sink) == 503
        assert sink.http("/livez").status == 200
        assert committed(kafka, connector_env) <= 1
        rows += reader.enqueue(10, ["a", "b", "c"])
    finally:
        absence.end()

    wait_for(outbox, rows[-1])
    eventually(lambda: len(outbox.history()) == 41, what="the storing of every message")
    assert members(kafka, connector_env) == before
    assert events(sink, "partitions_revoked") == []
    assert one(outbox.connection, "select max(retry_count) from agent_outbox_messages") == 0
    assert metric(sink, "retries_scheduled_total") == 0
    eventually(lambda: readiness(sink) == 200, what="readiness")


@pytest.mark.slow
@pytest.mark.usefixtures("complete_kafka")
def test_a_sink_that_the_database_keeps_waiting_takes_little_from_kafka(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """Whether a statement waits or the database is away: of 150 MB in Kafka it holds a few at a time."""
    sink = connector("sink")
    (first,) = reader.enqueue()
    wait_for(outbox, first)
    second = outbox.new(topic=connector_env["CONNECTOR_TOPICS"])
    blocker = outbox.connect()
    with blocker.transaction():
        blocker.execute("select from agent_outbox_messages where id = %s for update", [second])
        reader.send(second)
        eventually(lambda: sink_sessions(outbox, "wait_event_type = 'Lock'"), what="the sink's wait for the lock")
        for number in range(1, 301):
            # Of no row of ours, which is a no-op once it comes to that.
            reader.send(1_000_000 + number, f"key-{number}", message_content=os.urandom(256 * 1024).hex())
        long = "wait_event_type = 'Lock' and clock_timestamp() - xact_start > interval '3 seconds'"
        eventually(lambda: sink_sessions(outbox, long), what="a transaction that has waited for long")
    absence = Absence(outbox)
    absence.begin()
    try:
        eventually(lambda: len(events(sink, "batch_postponed")) >= 6, within=40, what="the sixth attempt")
    finally:
        absence.end()
    (last,) = reader.enqueue()
    wait_for(outbox, last, within=60)
    assert sink.peak_rss_mb < 150


@pytest.mark.slow
def test_a_crash_of_the_database_costs_no_retry_and_stores_nothing_twice(
    own_database: Database, kafka: Kafka, topic: str
) -> None:
    """PostgreSQL ends without a word and comes back; the same sink goes on."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    outbox = OutboxTable(own_database)
    reader = Reader(kafka, topic, outbox)
    sink = Process("sink", env=env).start()
    rows = reader.enqueue(5)
    wait_for(outbox, rows[-1])
    rows += [outbox.new(topic=topic) for _ in range(5)]
    outbox.close()
    own_database.server.stop("immediate")
    for outbox_id in rows[5:]:
        reader.send(outbox_id)
    sink.wait_for_log("batch_postponed")
    own_database.server.start()
    outbox = OutboxTable(own_database)
    wait_for(outbox, rows[-1])
    assert outbox.history() == rows
    assert one(outbox.connection, "select max(retry_count) from agent_outbox_messages") == 0
    outbox.close()


def test_a_dead_letter_is_sent_once_however_long_the_database_is_away(
    outbox: OutboxTable, reader: Reader, kafka: Kafka, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """A batch that waits for the database does not copy its bad values again at every attempt."""
    sink = connector("sink")
    assigned(sink)
    absence = Absence(outbox)
    absence.begin()
    try:
        reader.send_value(b"no envelope")
        (last,) = reader.enqueue()
        eventually(lambda: len(events(sink, "batch_postponed")) >= 4, what="the fourth attempt")
    finally:
        absence.end()
    wait_for(outbox, last)
    eventually(lambda: metric(sink, "dead_letters_total") == 1, what="the count of the letter")
    with Tap(kafka, connector_env["CONNECTOR_DEAD_LETTER_TOPIC"]) as tap:
        tap.until(lambda sent: sent)
        assert len(tap.read(0.5)) == 1


def test_a_conflict_with_another_transaction_is_tried_again_at_once(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process]
) -> None:
    """A deadlock or a serialization failure costs no retry."""
    outbox.connection.execute(
        "create table conflicts (n serial); create function conflict() returns trigger language plpgsql as $$ begin"
        "    if nextval('conflicts_n_seq') < 4 then raise 'again' using errcode = '40P01'; end if; return new; end $$;"
        "create trigger conflict before insert on chat_histories for each row execute function conflict()"
    )
    connector("sink")
    (row,) = reader.enqueue()
    wait_for(outbox, row)
    assert outbox.row(row).retry_count == 0


# --- offsets come after the transaction ------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_offset_is_committed_before_the_transaction_that_settles_its_message(
    outbox: OutboxTable,
    reader: Reader,
    kafka: Kafka,
    connector: Callable[..., Process],
    connector_env: dict[str, str],
) -> None:
    """A sink that is killed in the midst of its transaction leaves the offset where it was; the next one stores it."""
    # By either name: the environment can neither end the committing of what was stored, nor let it come earlier.
    sink = connector(
        "sink", CONNECTOR_CONSUMER_ENABLE_AUTO_COMMIT="false", CONNECTOR_CONSUMER_AUTO_COMMIT_ENABLE="false"
    )
    (first,) = reader.enqueue()
    wait_for(outbox, first)
    eventually(lambda: committed(kafka, connector_env) == 1, what="the first offset")
    second = outbox.new(topic=connector_env["CONNECTOR_TOPICS"])
    blocker = outbox.connect()
    with blocker.transaction():
        blocker.execute("select from agent_outbox_messages where id = %s for update", [second])
        reader.send(second)
        # Offsets are committed once a second.
        long = "wait_event_type = 'Lock' and clock_timestamp() - xact_start > interval '2.5 seconds'"
        eventually(lambda: sink_sessions(outbox, long), what="a transaction that has waited for long")
        sink.kill()
        assert committed(kafka, connector_env) == 1
    eventually(lambda: sink_sessions(outbox) == 0, what="the end of the killed sink's session")
    assert outbox.history() == [first]
    connector("sink")
    wait_for(outbox, second)
    assert outbox.history() == [first, second]
    eventually(lambda: committed(kafka, connector_env) == 2, what="the second offset")


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_batch_finish_commits_its_offset_and_exits_with_0(
    outbox: OutboxTable,
    kafka: Kafka,
    connector: Callable[..., Process],
    connector_env: dict[str, str],
    signal_name: str,
) -> None:
    """What is being stored is stored, the offset is committed, the group is left, and the exit code is 0."""
    sink = connector("sink")
    assigned(sink)
    topic = connector_env["CONNECTOR_TOPICS"]
    row = outbox.new(topic=topic)
    blocker = outbox.connect()
    with blocker.transaction():
        blocker.execute("select from agent_outbox_messages where id = %s for update", [row])
        Reader(kafka, topic, outbox).send(row)
        eventually(lambda: sink_sessions(outbox, "wait_event_type = 'Lock'"), what="the sink's wait for the lock")
        os.kill(sink.pid, signal.Signals[signal_name])
    assert sink.wait(20) == 0
    assert outbox.status(row) == "consumed"
    assert committed(kafka, connector_env) == 1
    assert members(kafka, connector_env) == {}


def test_a_sink_stops_while_the_database_is_away(
    outbox: OutboxTable, reader: Reader, kafka: Kafka, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """SIGTERM in an outage ends the sink with 0 and leaves the offset, so that the next one stores the message."""
    sink = connector("sink")
    assigned(sink)
    absence = Absence(outbox)
    absence.begin()
    try:
        (row,) = reader.enqueue()
        sink.wait_for_log("batch_postponed")
        assert sink.stop(15) == 0
        assert committed(kafka, connector_env) == 0
    finally:
        absence.end()
    connector("sink")
    wait_for(outbox, row)
    assert outbox.history() == [row]


def test_a_sink_stops_in_time_while_kafka_is_away(
    database: Database, kafka: Kafka, topic: str, outbox: OutboxTable, connector_env: dict[str, str]
) -> None:
    """SIGTERM while Kafka is out of reach ends the sink with 0 within its time, though it cannot commit or leave."""
    with kafka.proxy() as proxy:
        env = connector_env | {
            "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{proxy.port}",
            "CONNECTOR_SHUTDOWN_SECONDS": "6",
        }
        sink = Process("sink", env=env).start()
        assigned(sink)
        reader = Reader(kafka, topic, outbox)
        (row,) = reader.enqueue()
        wait_for(outbox, row)
        proxy.unplug()
        assert sink.stop(8) == 0


# --- the group -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("complete_kafka")
def test_sinks_that_join_and_leave_store_each_message_once_and_in_order(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process]
) -> None:
    """Three sinks come, one goes by SIGTERM, one by SIGKILL: nothing is lost, doubled, or out of its key's order."""
    keys = [f"key-{n}" for n in range(12)]
    first = connector("sink")
    rows = reader.enqueue(100, keys)
    assigned(first)
    second = connector("sink")
    rows += reader.enqueue(100, keys)
    assigned(second)
    third = connector("sink")
    rows += reader.enqueue(100, keys)
    assigned(third)
    assert first.stop() == 0
    rows += reader.enqueue(100, keys)
    second.kill()
    rows += reader.enqueue(100, keys)
    eventually(lambda: len(outbox.history()) == len(rows), within=60, what="the storing of every message")
    assert sorted(outbox.history()) == rows
    by_key = defaultdict(list)
    for outbox_id in outbox.history():
        by_key[rows.index(outbox_id) % 100 % len(keys)].append(outbox_id)
    assert all(stored == sorted(stored) for stored in by_key.values())
    # Cooperative: whoever gives partitions away keeps the others meanwhile.
    revoked = events(first, "partitions_revoked")
    assert revoked
    assert revoked[0]["all"] > 0
    assert one(outbox.connection, "select max(retry_count) from agent_outbox_messages") == 0


@pytest.mark.slow
def test_a_sink_that_joins_in_the_midst_of_a_backlog_takes_over_what_another_had_taken_ahead(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """A batch that was decoded ahead is stored in its turn, and once, also where its partitions go away meanwhile."""
    keys = [f"key-{n}" for n in range(12)]
    rows = reader.backlog(5_000, keys)
    blocker = outbox.connect()
    with blocker.transaction():
        blocker.execute("select from agent_outbox_messages where id = %s for update", [rows[2_500]])
        first = connector("sink")
        eventually(lambda: sink_sessions(outbox, "wait_event_type = 'Lock'"), what="the sink's wait for the lock")
        connector("sink").wait_for_log("subscribed", within=30)
    eventually(lambda: len(outbox.history()) == len(rows), within=60, what="the storing of every message")
    by_key = defaultdict(list)
    for outbox_id in outbox.history():
        by_key[rows.index(outbox_id) % len(keys)].append(outbox_id)
    assert {place: rows[place :: len(keys)] for place in range(len(keys))} == by_key
    first.wait_for_log("partitions_revoked", within=30)
    eventually(lambda: not sink_sessions(outbox, "state <> 'idle'"), what="the end of all transactions")
    assert len(outbox.history()) == len(rows)


@pytest.mark.usefixtures("complete_kafka")
def test_a_named_sink_that_restarts_moves_no_partitions(
    outbox: OutboxTable, reader: Reader, kafka: Kafka, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """With CONNECTOR_POD_NAME the group keeps a member's place over its restart; the others notice nothing."""
    names = ("sink-0", "sink-1")
    first, second = (connector("sink", CONNECTOR_POD_NAME=name) for name in names)
    assigned(first)
    assigned(second)
    eventually(lambda: sorted(map(len, members(kafka, connector_env).values())) == [3, 3], what="an even split")
    parts = sorted(map(sorted, members(kafka, connector_env).values()))
    seen = len(events(second, "partitions_assigned")) + len(events(second, "partitions_revoked"))
    assert first.stop() == 0
    first = connector("sink", CONNECTOR_POD_NAME="sink-0")
    assigned(first)
    rows = reader.enqueue(24, [f"key-{n}" for n in range(12)])
    eventually(lambda: sorted(outbox.history()) == rows, within=20, what="the storing of every message")
    assert sorted(map(sorted, members(kafka, connector_env).values())) == parts
    assert len(events(second, "partitions_assigned")) + len(events(second, "partitions_revoked")) == seen


@pytest.mark.usefixtures("complete_kafka")
def test_a_sink_whose_name_another_one_takes_ends_and_says_so(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process]
) -> None:
    """A consumer that is fenced is of no use any more: its sink ends, so that it is started again."""
    first = connector("sink", CONNECTOR_POD_NAME="sink-0")
    assigned(first)
    second = connector("sink", CONNECTOR_CONSUMER_GROUP_INSTANCE_ID="sink-0")  # its name among librdkafka's options
    assigned(second)
    assert first.wait() == 69
    assert "CONNECTOR_POD_NAME" in first.stderr
    (row,) = reader.enqueue()
    wait_for(outbox, row)


# --- readiness -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("complete_kafka")
def test_a_sink_is_not_ready_before_the_group_has_given_it_its_part(
    outbox: OutboxTable, reader: Reader, kafka: Kafka, connector: Callable[..., Process], connector_env: dict[str, str]
) -> None:
    """While a consumer of the other rebalance protocol keeps it out of the group, the sink says so, and waits."""
    options = {"bootstrap.servers": kafka.bootstrap_servers, "group.id": connector_env["CONNECTOR_GROUP_ID"]}
    eager = Consumer({**options, **kafka.consumer_options, "partition.assignment.strategy": "range", "log_level": 0})
    try:
        eager.subscribe([connector_env["CONNECTOR_TOPICS"]])
        eventually(lambda: (eager.poll(0.1), eager.assignment())[1], within=20, what="the other consumer's assignment")
        sink = connector("sink")
        sink.wait_for_log("subscribed")
        answer = eventually(lambda: _not_ready(sink, "JoinGroup"), what="word of what keeps it out")
        assert answer.status == 503
        assert events(sink, "partitions_assigned") == []
    finally:
        eager.close()
    eventually(lambda: readiness(sink) == 200, within=30, what="readiness")
    assert events(sink, "partitions_assigned")
    (row,) = reader.enqueue()
    wait_for(outbox, row)


def test_an_idle_sink_tells_that_the_database_is_gone_and_that_it_is_back(
    outbox: OutboxTable, reader: Reader, connector: Callable[..., Process]
) -> None:
    """Readiness does not wait for a message to find out."""
    sink = connector("sink")
    eventually(lambda: readiness(sink) == 200, within=30, what="readiness")
    absence = Absence(outbox)
    absence.begin()
    try:
        eventually(lambda: readiness(sink) == 503, within=15, what="word of the outage")
    finally:
        absence.end()
    eventually(lambda: readiness(sink) == 200, within=15, what="readiness after the outage")
    (row,) = reader.enqueue()
    wait_for(outbox, row)


def _not_ready(sink: Process, reason: str) -> Any:
    answer = sink.http("/readyz")
    return answer if answer.status == 503 and reason in answer.body else None


@pytest.mark.usefixtures("complete_kafka")
def test_a_sink_waits_for_a_topic_that_is_not_there_yet(
    outbox: OutboxTable, kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """A sink that starts before its topic is made says so, and reads it once it is there."""
    late = f"{topic}.late"
    sink = connector("sink", CONNECTOR_TOPICS=late)
    sink.wait_for_log("subscribed")
    eventually(lambda: _not_ready(sink, late), within=20, what="word of the missing topic")
    admin = kafka.admin()
    for created in admin.create_topics([NewTopic(late, 1, 1)]).values():
        created.result(20)
    row = outbox.new(topic=late)
    Reader(kafka, late, outbox).send(row)
    wait_for(outbox, row)
    assert readiness(sink) == 200


@pytest.mark.parametrize(
    ("variable", "address", "told"),
    [
        ("CONNECTOR_DATABASE_URL", "postgresql://127.0.0.1:1/none", "PostgreSQL"),
        ("CONNECTOR_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1", "Kafka"),
    ],
)
def test_a_service_that_stays_away_past_the_start_deadline_ends_the_sink_with_69(
    connector: Callable[..., Process], variable: str, address: str, told: str
) -> None:
    """The sink waits for what it needs as long as it is told to, then says which it was."""
    sink = connector("sink", **{variable: address, "CONNECTOR_START_DEADLINE_SECONDS": "1"})
    assert sink.wait(30) == 69
    assert told in sink.stderr.splitlines()[-1]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_a_sink_without_its_tables_gives_up_at_its_deadline(
    connector: Callable[..., Process], topic: str, kafka: Kafka
) -> None:
    """What `setup` makes is missing: not ready, then exit 78, and the words name the remedy."""
    sink = connector("sink", CONNECTOR_START_DEADLINE_SECONDS="3")
    sink.wait_for_log("waiting_for_service")
    assert readiness(sink) == 503
    assert sink.wait(20) == 78
    assert "outbox-connector setup" in sink.stderr


def test_a_batch_that_takes_too_long_is_stored_in_halves_and_costs_no_retry(
    outbox: OutboxTable, connector: Callable[..., Process], reader: Reader
) -> None:
    """A statement that the server has cancelled was too much: its messages are tried in smaller parts."""
    ids = reader.backlog(8, ["key"])  # sent together, so that they come together
    with outbox.database.connect() as other, other.transaction():
        other.execute("select from agent_outbox_messages where id = %s for update", [ids[-1]])
        sink = connector("sink")
        waiting = (
            "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            " and application_name = 'outbox-connector sink'"
        )
        pid = eventually(lambda: one(outbox.connection, waiting), within=30, what="a statement to cancel")
        outbox.connection.execute("select pg_cancel_backend(%s)", [pid])
        # The first half goes ahead of the row that is locked.
        for outbox_id in ids[:4]:
            wait_for(outbox, outbox_id)
        assert outbox.status(ids[-1]) == "pending"
    for outbox_id in ids:
        wait_for(outbox, outbox_id)
    assert outbox.history() == ids
    assert one(outbox.connection, "select sum(retry_count) from agent_outbox_messages") == 0
    assert events(sink, "batch_halved")


def test_a_signal_gives_a_statement_up_that_would_overrun_the_shutdown(
    outbox: OutboxTable, connector: Callable[..., Process], reader: Reader
) -> None:
    """A row that somebody holds locked keeps the sink neither from ending in time nor from ending with 0."""
    (outbox_id,) = reader.enqueue()
    with outbox.database.connect() as other, other.transaction():
        other.execute("select from agent_outbox_messages for update")
        sink = connector("sink", CONNECTOR_SHUTDOWN_SECONDS="3")
        eventually(lambda: sink_sessions(outbox, "wait_event_type = 'Lock'") == 1, within=30, what="a wait for a lock")
        assert sink.stop() == 0
    assert outbox.status(outbox_id) == "pending"


def test_the_metrics_are_true_after_a_run(
    outbox: OutboxTable, reader: Reader, topic: str, connector: Callable[..., Process]
) -> None:
    """Each metric of the sink that the contract names shows what has happened, and nothing else."""
    good = reader.enqueue(5, ["a"])
    outbox.change(good[0], "created_at = now() - interval '1000 seconds'")
    reader.send(good[0], "a")  # with its first copy, or after it
    reader.send(999_999, "a")
    dead = outbox.new("a", topic, status="dead")
    reader.send(dead, "a")
    refused = outbox.new("a", topic)
    outbox.change(refused, "created_at = now() - interval '500 seconds'")
    reader.send(refused, "a", chat_id=TOO_LONG)
    held = outbox.new("a", topic)
    reader.send(held, "a")
    hopeless = outbox.new("a", topic)
    reader.send(hopeless, "a", user_id="seven")
    reader.send_value(b"no envelope", "a")
    sink = connector("sink")
    wait_for(outbox, hopeless, "dead")
    eventually(lambda: metric(sink, "dead_letters_total") == 1, what="the count of the batch")

    assert metric(sink, "consumed_total") == 5
    redelivered = metric(sink, 'skipped_total{reason="duplicate"}') + metric(sink, 'skipped_total{reason="consumed"}')
    assert redelivered == 1
    assert metric(sink, 'skipped_total{reason="missing"}') == 1
    assert metric(sink, 'skipped_total{reason="dead"}') == 1
    assert metric(sink, "retries_scheduled_total") == 1
    assert metric(sink, 'dead_total{reason="payload"}') == 1
    assert metric(sink, "end_to_end_seconds_count") == 5
    assert 1000 <= metric(sink, "end_to_end_seconds_sum") < 1300
    assert metric(sink, 'end_to_end_seconds_bucket{le="900.0"}') == 4
    assert metric(sink, "sink_batch_rows_count") >= 1
    assert 10 <= metric(sink, "sink_batch_rows_sum") <= 11
    assert metric(sink, "held_messages") == 1
    assert metric(sink, 'outbox_rows{status="consumed"}') == 5
    assert metric(sink, 'outbox_rows{status="pending"}') == 2
    assert metric(sink, 'outbox_rows{status="published"}') == 0
    assert metric(sink, 'outbox_rows{status="dead"}') == 2
    assert 500 <= metric(sink, "oldest_unconsumed_age_seconds") < 600

    reader.send(refused, "a", chat_id=TOO_LONG)
    eventually(lambda: metric(sink, 'skipped_total{reason="stale"}') == 1, what="the count of a stale copy")
    assert metric(sink, "retries_scheduled_total") == 1
    reader.send(refused, "a", attempt=1)
    reader.send(held, "a")
    wait_for(outbox, held)
    eventually(lambda: metric(sink, "consumed_total") == 7, what="the count of the last two")
    assert metric(sink, "held_messages") == 0
    assert metric(sink, "oldest_unconsumed_age_seconds") == 0


def test_two_hopeless_copies_of_one_message_are_one_dead_message(
    outbox: OutboxTable, reader: Reader, topic: str, connector: Callable[..., Process]
) -> None:
    """A message that is delivered twice dies once, and is counted once."""
    row, after = outbox.new(topic=topic), outbox.new(topic=topic)
    reader.send(row, user_id="seven")
    reader.send(row, user_id="seven")
    reader.send(after)
    sink = connector("sink")
    wait_for(outbox, after)
    assert outbox.status(row) == "dead"
    eventually(lambda: metric(sink, "consumed_total") == 1, what="the count of the batch")
    assert metric(sink, 'dead_total{reason="payload"}') == 1


# --- least privilege -------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(outbox: OutboxTable) -> Iterator[Callable[[str], str]]:
    """Grant what `sql/roles.sql` grants; gives the database's URL as one of the roles."""
    names = ("outbox_reader", "outbox_sink", "outbox_operator", "outbox_auditor")
    existing = {
        name
        for (name,) in outbox.connection.execute("select rolname from pg_roles where rolname = any(%s)", [[*names]])
    }
    for _ in range(2):
        outbox.connection.execute(TABLES.script("roles.sql"))
    for name in names:
        outbox.connection.execute(
            sql.SQL("alter role {} password {}").format(sql.Identifier(name), sql.Literal(PASSWORD))
        )

    def url(role: str) -> str:
        parts = urlsplit(outbox.database.url)
        return urlunsplit(parts._replace(netloc=f"{role}:{PASSWORD}@{parts.netloc.rpartition('@')[2]}"))

    yield url
    for name in set(names) - existing:
        role = sql.Identifier(name)
        outbox.connection.execute(sql.SQL("drop owned by {}").format(role))
        # It may own something in a database of another test run.
        with suppress(errors.DependentObjectsStillExist):
            outbox.connection.execute(sql.SQL("drop role {}").format(role))


def test_reader_and_sink_work_with_the_least_privilege(
    outbox: OutboxTable, roles: Callable[[str], str], topic: str, connector: Callable[..., Process]
) -> None:
    """As outbox_reader and outbox_sink they publish, store, retry, hold back and give up, and show their metrics."""
    good = outbox.new("a", topic)
    bad, behind = outbox.new("b", topic, {**PAYLOAD, "chat_id": TOO_LONG}, max_retry=2), outbox.new("b", topic)
    hopeless = outbox.new("c", topic, {})
    known = outbox.new("d", topic)
    outbox.connection.execute("insert into chat_histories (user_id, chat_id, outbox_id) values (1, 'old', %s)", [known])
    reader = connector("reader", CONNECTOR_DATABASE_URL=roles("outbox_reader"))
    sink = connector("sink", CONNECTOR_DATABASE_URL=roles("outbox_sink"))
    wait_for(outbox, bad, "dead")
    wait_for(outbox, hopeless, "dead")
    for outbox_id in (good, behind, known):
        wait_for(outbox, outbox_id)
    assert sorted(outbox.history()) == [good, behind, known]
    for process in (reader, sink):
        assert metric(process, 'outbox_rows{status="consumed"}') == 3
        assert events(process, "metrics_left_out") == []
    assert metric(reader, "leader") == 1
    assert reader.stop() == 0
    assert sink.stop() == 0


def test_the_operator_redrives_and_prunes_with_the_least_privilege(
    outbox: OutboxTable, roles: Callable[[str], str], connector: Callable[..., Process]
) -> None:
    """As outbox_operator both commands do all of their work, and the record names the role; other roles are told."""
    for role in ("outbox_reader", "outbox_sink"):
        outbox.new(status="dead")
        refused = connector("redrive", "--all", "--yes", CONNECTOR_DATABASE_URL=roles(role))
        assert refused.wait(30) == 78
        assert "outbox_operator" in refused.stderr
    outbox.new(status="published")
    outbox.new(status="consumed")
    outbox.new(status="dead")
    url = roles("outbox_operator")
    for command in (
        ["redrive", "--id", "1", "--yes"],
        ["redrive", "--stuck", "--all", "--yes"],
        ["redrive", "--dead-letters", "--yes"],
        ["prune", "--older-than", "0s", "--dead", "--dry-run"],
        ["prune", "--older-than", "0s", "--dead"],
    ):
        process = connector(*command, CONNECTOR_DATABASE_URL=url)
        assert process.wait(30) == 0, process.stderr
    assert one(outbox.connection, "select string_agg(status, ' ') from agent_outbox_messages") == "pending pending"
    assert one(outbox.connection, "select min(database_role) from outbox_connector_redrives") == "outbox_operator"


def test_the_auditor_can_compare_everything(
    outbox: OutboxTable, roles: Callable[[str], str], connector: Callable[..., Process]
) -> None:
    """As outbox_auditor `reconcile` does all of its work; a role that reads no history is told which one does."""
    outbox.new(status="consumed")
    refused = connector("reconcile", CONNECTOR_DATABASE_URL=roles("outbox_sink"))
    assert refused.wait(30) == 78
    assert "outbox_auditor" in refused.stderr
    process = connector("reconcile", CONNECTOR_DATABASE_URL=roles("outbox_auditor"))
    assert process.wait(30) == 1, process.stderr
    assert "consumed, and not in history" in process.stdout


def test_whoever_is_on_call_needs_one_login_for_all_commands(
    outbox: OutboxTable, roles: Callable[[str], str], topic: str, connector: Callable[..., Process]
) -> None:
    """A member of outbox_operator and outbox_auditor sees, mends and proves; the record names the login."""
    login = f"oncall_{topic.replace('-', '_')}"
    name = sql.Identifier(login)
    outbox.connection.execute(
        sql.SQL("create role {} login password {} in role outbox_operator, outbox_auditor").format(
            name, sql.Literal(PASSWORD)
        )
    )
    try:
        url = roles(login)
        outbox.new(status="dead", topic=topic)
        for command in (
            ["status"],
            ["redrive", "--all", "--yes"],
            ["redrive", "--dead-letters", "--yes"],
            ["reconcile"],
            ["prune", "--dry-run"],
        ):
            process = connector(*command, CONNECTOR_DATABASE_URL=url)
            assert process.wait(30) == 0, process.stderr
            assert "note:" not in process.stdout
            assert "permission denied" not in process.stdout
        assert one(outbox.connection, "select min(database_role) from outbox_connector_redrives") == login
        assert one(outbox.connection, "select min(database_role) from outbox_connector_proofs") == login
    finally:
        outbox.connection.execute(sql.SQL("drop role {}").format(name))


def test_the_auditor_may_look_by_the_console_and_change_nothing(
    outbox: OutboxTable, roles: Callable[[str], str], connector: Callable[..., Process]
) -> None:
    """As outbox_auditor the web page shows all it has; a redrive is refused, with the role that it takes."""
    outbox_id = outbox.new(status="dead")
    token = {"CONNECTOR_CONSOLE_TOKEN": TOKEN}
    console = Console(connector("console", CONNECTOR_DATABASE_URL=roles("outbox_auditor"), **token))
    assert console.now()["problems"] == []
    life = console.ask(f"/api/messages/{outbox_id}").json()
    assert (life["message"]["status"], life["untold"]) == ("dead", [])
    assert console.post("/api/proof", {}).status == 200
    refused = console.post("/api/redrive", {"ids": [str(outbox_id)]})
    assert (refused.status, "outbox_operator" in refused.text) == (403, True)
    assert outbox.status(outbox_id) == "dead"


FORBIDDEN = {
    "outbox_auditor": [
        "insert into chat_histories (user_id, chat_id) values (1, 'c')",
        "update chat_histories set role = 'x'",
        "update agent_outbox_messages set status = 'dead'",
        "delete from agent_outbox_messages",
        "delete from outbox_connector_redrives",
        "delete from outbox_connector_proofs",
        "select from outbox_connector_letters",
        "update outbox_connector_slots set catch_up_owed = false",
    ],
    "outbox_operator": [
        "select from chat_histories",
        "select from outbox_connector_proofs",
        "update outbox_connector_letters set since = now()",
        "delete from chat_histories",
        "insert into chat_histories (user_id, chat_id) values (1, 'c')",
        "insert into agent_outbox_messages (biz_type, topic, message_key, payload) values ('b', 't', 'k', '1')",
        "update agent_outbox_messages set payload = '1'",
        "truncate agent_outbox_messages",
        "select from outbox_connector_slots",
        "update outbox_connector_redrives set reason = 'none'",
        "delete from outbox_connector_redrives",
    ],
    "outbox_sink": [
        "select from chat_histories",
        "update chat_histories set role = 'x'",
        "delete from chat_histories",
        "truncate chat_histories",
        "insert into agent_outbox_messages (biz_type, topic, message_key, payload) values ('b', 't', 'k', '1')",
        "delete from agent_outbox_messages",
        "truncate agent_outbox_messages",
        "select from outbox_connector_slots",
        "create table public.mine ()",
        "alter table agent_outbox_messages add column mine int",
        "delete from outbox_connector_offsets",
        "select pg_create_logical_replication_slot('mine', 'pgoutput')",
        "select from outbox_connector_redrives",
        "create publication mine",
        "copy (select 1) to program 'true'",
        "alter system set wal_level = minimal",
    ],
    "outbox_reader": [
        "select from chat_histories",
        "insert into chat_histories (user_id, chat_id) values (1, 'c')",
        "update chat_histories set role = 'x'",
        "delete from chat_histories",
        "insert into agent_outbox_messages (biz_type, topic, message_key, payload) values ('b', 't', 'k', '1')",
        "delete from agent_outbox_messages",
        "truncate agent_outbox_messages",
        "delete from outbox_connector_slots",
        "create table public.mine ()",
        "create publication mine for all tables",
        "select from outbox_connector_offsets",
        "select from outbox_connector_redrives",
        "select from outbox_connector_proofs",
        "copy chat_histories to program 'true'",
    ],
}


@pytest.mark.parametrize(
    ("role", "statement"), [(role, statement) for role, statements in FORBIDDEN.items() for statement in statements]
)
def test_the_roles_may_do_nothing_else(
    outbox: OutboxTable, roles: Callable[[str], str], role: str, statement: str
) -> None:
    """The sink reads and changes no history, others do not touch it; the operator alone deletes, nobody enqueues."""
    with psycopg.connect(roles(role), autocommit=True) as connection, pytest.raises(errors.InsufficientPrivilege):
        connection.execute(statement)
