"""What a broker may refuse or slow down: messages wait or are tried again, and none is lost."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from connector.kafka import Fate, fate_of
from tests.faults.pipeline import PipelineFactory
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


def test_a_producer_that_is_throttled_waits(
    database: Database, own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> None:
    """A quota makes Kafka slow for us: messages stay in flight for longer, and nothing else happens."""
    pipeline = new_pipeline(database, own_kafka, own_topic, {})
    own_kafka.limit_producers(10_000)
    try:
        reader, _ = pipeline.start("reader"), pipeline.start("sink")
        for _ in range(6):
            pipeline.enqueue(100)
        eventually(lambda: metric(reader, "in_flight_messages") > 0, what="messages in flight")
        pipeline.prove(within=60)
    finally:
        own_kafka.limit_producers(None)
    assert metric(reader, "publish_failures_total") == 0
    waits = metric(reader, "commit_to_ack_seconds_sum") / metric(reader, "commit_to_ack_seconds_count")
    assert waits > 0.2


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
