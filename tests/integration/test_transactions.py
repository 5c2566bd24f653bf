"""What transactions leave in a topic, their ends and what they took back, is no message to anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition

from connector.kafka import Kafka as Connections
from connector.kafka import LogScan, Subscription, log_scan
from connector.ops.consumer_lag import consumer_lag
from tests.integration.scenario import is_streaming, set_up, statuses
from tests.services import Database, Kafka, Process, eventually

Connection = psycopg.Connection[tuple[Any, ...]]
Start = Callable[..., Process]

PARTITION = 0

pytestmark = pytest.mark.usefixtures("complete_kafka")


@pytest.fixture
def connection(connector_env: dict[str, str], database: Database) -> Iterator[Connection]:
    """A pipeline that is set up, by its database."""
    set_up(connector_env)
    with database.connect() as connection:
        yield connection


@pytest.fixture
def producer(kafka: Kafka, topic: str) -> Producer:
    """Somebody else who writes to the topic, in transactions."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": topic, "log_level": 0})
    producer.init_transactions(30)
    return producer


def begin(producer: Producer, topic: str, *values: bytes) -> None:
    """Send something in a transaction that stays open."""
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value, b"key", partition=PARTITION)
    assert producer.flush(20) == 0


def enqueue(connection: Connection, topic: str, messages: int) -> None:
    """Enqueue messages of several conversations."""
    connection.execute(
        "select outbox_enqueue('chat_history_persist', %s, 'key-' || n,"
        " jsonb_build_object('user_id', n, 'chat_id', 'a chat', 'message_content', 'hello', 'role', 'user'))"
        " from generate_series(1, %s) as n",
        [topic, messages],
    )


def behind(env: Mapping[str, str]) -> int:
    """Return how many offsets the group has still to read."""
    admin = Connections(env["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"], {}).admin()
    partitions = [(env["CONNECTOR_TOPICS"], partition) for partition in range(6)]
    return sum(partition.lag for partition in consumer_lag(admin, env["CONNECTOR_GROUP_ID"], partitions))


def test_what_ends_a_topic_without_a_message_is_read_stored_and_proved(
    connection: Connection, connector_env: dict[str, str], topic: str, producer: Producer, connector: Start
) -> None:
    """The group has nothing left to read, be a sink there meanwhile or not, and `reconcile` finds all well."""
    reader, sink = is_streaming(connector("reader")), connector("sink")
    enqueue(connection, topic, 20)
    eventually(lambda: statuses(connection) == {"consumed": 20}, within=30, what="the storing of everything")
    begin(producer, topic, b"no envelope")
    producer.commit_transaction(20)
    eventually(lambda: behind(connector_env) == 0, within=20, what="the reading of a transaction's end")
    begin(producer, topic, b"taken back", b"too")
    producer.abort_transaction(20)
    eventually(lambda: behind(connector_env) == 0, within=20, what="the reading of what was taken back")
    assert sink.stop() == 0
    begin(producer, topic, b"taken back again")
    producer.abort_transaction(20)
    assert behind(connector_env) == 2
    connector("sink")
    eventually(lambda: behind(connector_env) == 0, within=20, what="the reading of what a sink finds at its start")
    enqueue(connection, topic, 20)
    eventually(lambda: statuses(connection) == {"consumed": 40}, within=30, what="the storing of what came behind it")
    begin(producer, topic, b"taken back at last")
    producer.abort_transaction(20)
    process = connector("reconcile")
    assert process.wait(60) == 0, process.stdout
    assert reader.stop() == 0


def test_a_stretch_that_lies_behind_an_open_transaction_is_read_once_that_has_ended(
    kafka: Kafka, topic: str, producer: Producer
) -> None:
    """What a transaction holds back is neither passed over nor taken for the log's end."""
    connections = Connections(kafka.bootstrap_servers, {})
    begin(producer, topic, b"open")
    plain = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    plain.produce(topic, b"behind it", partition=PARTITION)
    assert plain.flush(20) == 0
    stretch = connections.admin().log_ranges([(topic, PARTITION)])
    assert stretch == {(topic, PARTITION): (0, 2)}

    subscription = Subscription(connections, [topic], topic, None, lambda _error: None)
    assert subscription.end_of((topic, PARTITION)) == 2
    eventually(lambda: (subscription.take(1, 0.1), subscription.assigned)[1], within=20, what="the group's answer")
    subscription.close(5)

    def scanned() -> list[bytes | None]:
        scan = LogScan(connections, topic)
        try:
            return [message.value() for messages in scan.messages(stretch) for message in messages]
        finally:
            scan.close()

    with ThreadPoolExecutor(1) as pool:
        scanning = pool.submit(scanned)
        with pytest.raises(TimeoutError):
            scanning.result(1.5)
        producer.abort_transaction(20)
        assert scanning.result(20) == [b"behind it"]
    assert connections.admin().log_ranges([(topic, PARTITION)]) == {(topic, PARTITION): (0, 3)}
    stretch = {(topic, PARTITION): (0, 3)}
    assert scanned() == [b"behind it"]
    stretch = {(topic, PARTITION): (2, 3)}
    assert scanned() == []


def test_a_scan_whose_consumer_stands_still_begins_again_where_it_was(
    kafka: Kafka, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message is read, and each once."""
    monkeypatch.setattr(log_scan, "_BEGIN_AGAIN_SECONDS", 0.3)
    plain = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    for number in range(2_000):
        plain.produce(topic, str(number).encode(), partition=PARTITION)
    assert plain.flush(20) == 0
    scan = LogScan(Connections(kafka.bootstrap_servers, {}), topic)
    found: list[int] = []
    for messages in scan.messages({(topic, PARTITION): (0, 2_000)}):
        found += [int(message.value() or b"") for message in messages]
        if len(found) < 1_500:
            assert scan._consumer is not None
            scan._consumer.pause([TopicPartition(topic, PARTITION)])
    scan.close()
    assert found == list(range(2_000))
