"""Two paces of the reader: of a backlog in large pieces, and later each message at once."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from connector.kafka import Kafka as Clients
from connector.observability.metrics import ReaderMetrics
from connector.outbox import Fence, OutboxRow
from connector.publishing import Publishing, Shipment
from tests.integration.scenario import Tap, all_published, enqueue, enqueue_many, is_streaming, one, set_up
from tests.services import Database, Kafka, Process, eventually

Start = Callable[..., Process]


def test_a_producer_goes_on_only_when_all_of_the_other_ones_messages_have_arrived(
    kafka: Kafka, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a message of the one would overtake those of the other: until then there is no room for more."""
    monkeypatch.setattr("connector.kafka.publisher._LINGER_IN_A_BACKLOG", "5000")
    answered: list[Shipment] = []
    clients = Clients(kafka.bootstrap_servers, {})
    publishing = Publishing(
        clients, clients.admin(), [topic], ReaderMetrics(), on_error=lambda _: None, on_answered=answered.append
    )

    def publish(number: int) -> None:
        fence = Fence(number, 0, 0, None)
        publishing.publish([OutboxRow(fence, "chat", topic, b"key", b"{}", None)])

    def turn() -> bool:
        publishing.turn(0.01)
        publishing.pace(backlog=False)
        return publishing.has_room

    with Tap(kafka, topic) as tap:
        publish(1)
        eventually(lambda: not turn(), what="a pipe that waits for what is on its way")
        # Not for ever: who knows when Kafka takes it.
        eventually(turn, what="a pipe that is open again")
        publish(2)
        assert not publishing._publisher.may_change(backlog=True)
        eventually(lambda: turn() and not publishing.in_flight, within=30, what="the arrival of them both")
        eventually(lambda: turn() and publishing._publisher.may_change(backlog=True), within=30, what="the change")
        publish(3)
        eventually(lambda: turn() and not publishing.in_flight, what="the last message's arrival")
        assert [sent.outbox_id for sent in tap.has([3])] == [1, 2, 3]
    assert len(answered) == 3


def test_a_reader_that_was_behind_rests_when_it_has_read_everything(
    database: Database, topic: str, connector_env: dict[str, str], connector: Start
) -> None:
    """It looks for more of a backlog at short intervals, and waits to be woken where nothing more comes."""
    set_up(connector_env)
    with database.connect() as app:

        def seconds_later(seconds: float) -> None:
            began = one(app, "select clock_timestamp()")
            passed = f"select clock_timestamp() > '{began}'::timestamptz + interval '{seconds} s'"
            eventually(lambda: one(app, passed), what="the passing of time")

        enqueue_many(app, topic, 5_000)
        seconds_later(1.5)
        reader = is_streaming(connector("reader"))
        all_published(app)
        process = psutil.Process(reader.pid)

        def woken_in_two_seconds() -> int:
            before = process.num_ctx_switches().voluntary
            seconds_later(2)
            return int(process.num_ctx_switches().voluntary - before)

        eventually(lambda: woken_in_two_seconds() < 100, within=30, what="a reader that rests")
        # Nothing has told it that the backlog is over: what comes next does.
        enqueue(app, topic, "key", 1)
        all_published(app)
