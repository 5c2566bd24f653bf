"""What a broker may refuse or slow down: messages wait or are tried again, and none is lost."""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import closing

import pytest
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import AclOperation, AlterConfigOpType, ConfigEntry, ConfigResource

from connector.kafka import Fate, fate_of
from tests.faults.pipeline import KEYS, PipelineFactory
from tests.integration.scenario import OUTBOX, forbidden, metric, one, readiness
from tests.services import Database, Kafka, eventually


def test_a_topic_that_is_forbidden_for_a_while_costs_retries_and_no_message(
    database: Database, durable_own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> None:
    """What Kafka forbids is a failure of the row, with its reason; once it is allowed again everything arrives."""
    pipeline = new_pipeline(database, durable_own_kafka, own_topic, {})
    reader, sink = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    with forbidden(durable_own_kafka, own_topic):
        pipeline.spent.update(pipeline.enqueue(1))
        reason = f"select last_error from {OUTBOX} where status = 'pending' and retry_count > 0"
        error = eventually(lambda: one(pipeline.app, reason), within=30, what="the refusal")
        assert own_topic in error
        assert "AUTHORIZATION" in error
        eventually(lambda: readiness(sink) == 503, within=30, what="word of it from the sink")
        assert own_topic in sink.http("/readyz").body
    pipeline.prove(within=60)
    eventually(lambda: readiness(sink) == 200, within=30, what="readiness of the sink")
    assert metric(reader, "retries_scheduled_total") >= 3


def test_what_follows_a_refused_message_is_not_published_before_the_refusal_is_on_its_row(
    database: Database, durable_own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> None:
    """Until then nothing in the table would hold it back; Kafka may take it by then, and it would be stored first."""
    pipeline = new_pipeline(database, durable_own_kafka, own_topic, {})
    reader, _ = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    pipeline.app.execute(
        "create function wait() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock_shared(1); return new; end $$;"
        f"create trigger wait before update on {OUTBOX} for each row"
        " when (old.last_error is null and new.last_error is not null) execute function wait()"
    )
    with database.connect() as other, other.transaction():
        other.execute("select pg_advisory_xact_lock(1)")
        with forbidden(durable_own_kafka, own_topic, AclOperation.WRITE):
            pipeline.spent.add(pipeline.insert("key"))
            eventually(lambda: metric(reader, "publish_failures_total") >= 1, within=30, what="the refusal")
        later = pipeline.insert("key")
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert pipeline.statuses()[later] == "pending"
    pipeline.prove(within=60)


@pytest.mark.slow
def test_a_producer_that_is_throttled_waits(
    database: Database, own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> None:
    """A quota makes Kafka slow for us: messages stay in flight for longer, and nothing else happens."""
    pipeline = new_pipeline(database, own_kafka, own_topic, {})
    reader, _ = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue(10)
    pipeline.prove()

    def waited() -> tuple[float, float]:
        return metric(reader, "commit_to_ack_seconds_sum"), metric(reader, "commit_to_ack_seconds_count")

    before = waited()

    def is_throttled() -> bool:
        # One after the other, so that no more waits for the quota in the end than one large message.
        if pipeline.is_settled():
            pipeline.insert(KEYS[0], message_content=secrets.token_urlsafe(15_000))
        seconds, rows = (now - then for now, then in zip(waited(), before, strict=True))
        return rows > 0 and seconds / rows > 0.2

    own_kafka.limit_producers(5_000)
    try:
        eventually(is_throttled, within=40, what="messages that are in flight for longer")
        pipeline.prove(within=60)
    finally:
        own_kafka.limit_producers(None)
    assert metric(reader, "publish_failures_total") == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_too_few_replicas_in_sync_are_waited_for(
    database: Database, durable_own_kafka: Kafka, new_pipeline: PipelineFactory
) -> None:
    """While a topic wants two replicas and has one, messages stay in flight; then all arrive, once and in order."""
    with closing(durable_own_kafka.second_broker()) as second, durable_own_kafka.topic(replication=2) as topic:
        pipeline = new_pipeline(database, durable_own_kafka, topic, {})
        reader, sink = pipeline.start("reader"), pipeline.start("sink")
        pipeline.enqueue()
        pipeline.prove()
        _want_replicas(durable_own_kafka, topic, 2)
        pipeline.enqueue()
        pipeline.prove()
        before = pipeline.lsn()
        second.kill()
        pipeline.enqueue()
        eventually(lambda: _in_sync(durable_own_kafka, topic) == {1}, within=30, what="the loss of a replica")
        _refused(durable_own_kafka, topic, "Not enough in-sync replicas")
        pipeline.enqueue(2)
        eventually(lambda: metric(reader, "in_flight_messages") == 21, what="all that is in flight")
        for process in (reader, sink):
            eventually(lambda: readiness(process) == 200, within=30, what=f"readiness of {process.name}")  # noqa: B023
        assert not pipeline.confirmed_beyond(before)
        _want_replicas(durable_own_kafka, topic, 1)
        pipeline.prove(within=60)
        for process in (reader, sink):
            eventually(lambda: readiness(process) == 200, within=30, what=f"readiness of {process.name}")  # noqa: B023
            assert process.returncode is None
        assert metric(reader, "retries_scheduled_total") == 0


def _want_replicas(kafka: Kafka, topic: str, replicas: int) -> None:
    wanted = ConfigEntry("min.insync.replicas", str(replicas), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[wanted])
    admin = kafka.admin()  # kept: a client that is thrown away takes its answers with it
    for altered in admin.incremental_alter_configs([resource]).values():
        altered.result(20)


def _in_sync(kafka: Kafka, topic: str) -> set[int]:
    partitions = kafka.admin().list_topics(topic, timeout=5).topics[topic].partitions
    return {broker for partition in partitions.values() for broker in partition.isrs}


def _refused(kafka: Kafka, topic: str, why: str) -> None:
    """Wait until Kafka refuses a message for that reason; librdkafka tells it to its log alone, and tries again."""
    said: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    log = logging.getLogger(f"librdkafka of {topic}")
    log.setLevel(logging.DEBUG)
    log.addFilter(hear)
    producer = Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "acks": "all", "debug": "msg", "log_level": 7, "logger": log}
    )
    producer.produce(topic, b"{}")
    eventually(lambda: producer.poll(0.1) or any(why in line for line in said), within=20, what=why)
    producer.purge()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_that_takes_no_more_is_an_outage(
    database: Database, durable_own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> None:
    """A broker whose only disk fails ends itself; once it is back everything arrives, each once and in order."""
    pipeline = new_pipeline(database, durable_own_kafka, own_topic, {})
    reader, sink = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    before = pipeline.lsn()
    durable_own_kafka.refuse_to_grow()
    pipeline.enqueue()
    for process in (reader, sink):
        eventually(lambda: readiness(process) == 503, within=40, what=f"word of it from {process.name}")  # noqa: B023
        assert process.http("/livez").status == 200
    pipeline.enqueue()
    assert not pipeline.confirmed_beyond(before)
    durable_own_kafka.start()
    pipeline.prove(within=60)
    # What the broker last knew of the group may be lost with its disk: a sink that is fenced by that is started again.
    for command in ("reader", "sink"):
        eventually(lambda: readiness(pipeline.processes[command]) == 200, within=30, what=f"readiness of the {command}")  # noqa: B023
    assert reader.returncode is None
    assert metric(reader, "retries_scheduled_total") == 0


@pytest.mark.parametrize(
    "code",
    [
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        KafkaError.UNKNOWN,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._STATE,
    ],
)
def test_a_brokers_own_trouble_is_no_fault_of_a_message(code: int) -> None:
    """A full disk, too few replicas, a leader that moves, a missing permission on the cluster: no retry is spent."""
    assert fate_of(KafkaError(code)) is Fate.NOT_ITS_FAULT
