"""How the clients of Kafka are configured, where the guarantees stand on it and no test could provoke more."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import pytest
from confluent_kafka import KafkaError, KafkaException

from connector.kafka import Publisher, admin, clients
from connector.kafka.clients import PRODUCER_DEFAULTS, Kafka
from connector.kafka.options import option_problems

KAFKA = Kafka("127.0.0.1:1", {})


def test_the_producer_neither_doubles_nor_reorders_nor_gives_up() -> None:
    """A request that is sent again keeps its place; only an answer from every replica counts; an outage has no end."""
    assert (
        KAFKA._configuration(PRODUCER_DEFAULTS).items()
        >= {"enable.idempotence": True, "acks": "all", "message.timeout.ms": 0}.items()
    )


def test_whatever_the_settings_say_a_transaction_has_its_own_times() -> None:
    """A user's longer times, by whichever name, keep no transactional producer from being made."""
    longer = ("message.timeout.ms", "delivery.timeout.ms", "socket.timeout.ms", "transaction.timeout.ms")
    options = {name: "0" if "delivery" in name or "message" in name else "60000" for name in longer}
    Kafka("127.0.0.1:1", options).producer(lambda _error: None, "redrive")
    Kafka("127.0.0.1:1", {}, producer_options=options).producer(lambda _error: None, "redrive")


def test_the_consumer_moves_no_offset_by_itself_and_keeps_little() -> None:
    """Offsets are stored by the sink alone; what is fetched in advance is a few megabytes."""
    configuration = KAFKA._configuration(clients.CONSUMER_DEFAULTS)
    assert configuration["enable.auto.offset.store"] is False
    assert configuration["enable.auto.commit"] is True
    assert configuration["auto.offset.reset"] == "earliest"
    assert configuration["partition.assignment.strategy"] == "cooperative-sticky"
    assert configuration["queued.max.messages.kbytes"] <= 16 * 1024
    assert configuration["fetch.max.bytes"] <= 4 * 1024 * 1024


def test_what_a_producer_may_send_keeps_no_consumer_from_being_made() -> None:
    """It is a limit of producers, which librdkafka compares with what a consumer fetches at once; ours fetch little."""
    for options, consumer_options in (({"message.max.bytes": "20000000"}, {}), ({}, {"message.max.bytes": "20000000"})):
        assert not list(option_problems(options, {}, consumer_options))
        kafka = Kafka("127.0.0.1:1", options, {}, consumer_options)
        kafka.consumer("group", None, lambda _: None, lambda *_: None).close()


def test_options_are_judged_together_with_what_holds_beneath_them() -> None:
    """Who allows answers of a megabyte cannot have what we fetch at once; it is said before anything is connected."""
    ((variable, problem),) = option_problems({"receive.message.max.bytes": "1000000"}, {}, {})
    assert variable == "CONNECTOR_KAFKA_*"
    assert "fetch.max.bytes" in problem
    assert not list(option_problems({"receive.message.max.bytes": "10000000"}, {}, {}))


def test_messages_wait_for_each_other_as_the_settings_say() -> None:
    """There is no other producer then, by whichever name they say it, and whether for producers or for all clients."""
    for options, producer_options in (({}, {"linger.ms": "7"}), ({"queue.buffering.max.ms": "7"}, {})):
        kafka = Kafka("127.0.0.1:1", options, producer_options)
        publisher = Publisher(kafka, kafka.admin(), [], lambda _error: None)
        assert not publisher.may_change(backlog=False)
        assert len(publisher._made) == 1


@pytest.mark.parametrize("code", [KafkaError.NOT_COORDINATOR, KafkaError.NOT_LEADER_FOR_PARTITION])
def test_who_is_about_to_answer_is_asked_again(code: int) -> None:
    """A broker that has just started, or just taken over, turns away what it will answer a moment later."""
    said = iter([code, code, None])
    assert admin._answers(lambda _: _answer(next(said)), timeout=10) == {"what": "said"}


def test_what_is_refused_is_told_at_once_and_what_is_never_answered_in_time() -> None:
    """Only an answer that is about to come is waited for, and no longer than the caller has."""
    asked = []

    def refused(code: int, seconds: float) -> Mapping[str, Future[str]]:
        asked.append(seconds)
        return _answer(code)

    with pytest.raises(KafkaException):
        admin._answers(lambda seconds: refused(KafkaError.TOPIC_AUTHORIZATION_FAILED, seconds), timeout=10)
    assert len(asked) == 1
    with pytest.raises(KafkaException):
        admin._answers(lambda seconds: refused(KafkaError.NOT_LEADER_FOR_PARTITION, seconds), timeout=0.2)
    assert len(asked) > 2


def _answer(code: int | None) -> Mapping[str, Future[str]]:
    future: Future[str] = Future()
    if code is None:
        future.set_result("said")
    else:
        future.set_exception(KafkaException(KafkaError(code)))
    return {"what": future}
