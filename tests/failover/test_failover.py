"""The primary is lost and its standby promoted: what the promoted server has is stored once and in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
from psycopg.types.json import Jsonb

from connector.demo.embedded import scratch_directory
from tests.failover.servers import Pair, Server
from tests.integration.scenario import is_streaming, metric, readiness, set_up
from tests.services import Database, Kafka, Postgres, Process, environment, eventually

CONVERSATIONS = 20

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the servers' account can reach."""
    with scratch_directory() as directory:
        yield directory


@contextmanager
def pair_of_servers(directory: Path, *, failover_slots: bool, synchronous: bool = False) -> Iterator[Pair]:
    """A primary with its standby."""
    pair = Pair(directory, failover_slots=failover_slots, synchronous=synchronous)
    try:
        yield pair
    finally:
        Process.end_all()
        pair.close()


def variables(pair: Pair, kafka: Kafka, topic: str) -> dict[str, str]:
    """The settings of a pipeline that finds whichever server takes writes; its objects are made."""
    env = environment(Database("app", pair.url, Postgres(pair.url)), kafka, topic)
    set_up(env)
    return env


def at(server: Server, env: Mapping[str, str]) -> dict[str, str]:
    """The same settings for a process that knows one of the servers only."""
    return {**env, "CONNECTOR_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{server.port}/app"}


def enqueue(connection: Connection, topic: str, first: int, messages: int) -> None:
    """Enqueue numbered messages, each on the conversation that is its turn, in one transaction."""
    with connection.transaction():
        for number in range(first, first + messages):
            chat = f"chat-{number % CONVERSATIONS}"
            payload = {"user_id": number, "chat_id": chat, "message_content": f"message {number}", "role": "user"}
            connection.execute(
                "select outbox_enqueue('chat_history_persist', %s, %s, %s)", [topic, chat, Jsonb(payload)]
            )


class Load:
    """An application that goes on enqueuing, to whichever server takes writes."""

    def __init__(self, url: str, topic: str) -> None:
        self._url, self._topic = url, topic
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.committed = 0

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            try:
                with psycopg.connect(self._url, autocommit=True, connect_timeout=2) as connection:
                    while not self._ended.wait(0.005):
                        number += 5
                        enqueue(connection, self._topic, number, 5)
                        self.committed += 5
            except psycopg.Error:
                self._ended.wait(0.1)

    def await_more(self, messages: int) -> None:
        """Wait until so many more are committed."""
        goal = self.committed + messages
        eventually(lambda: self.committed >= goal, within=60, what=f"{messages} more messages")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def statuses(server: Server) -> dict[str, int]:
    """Count the rows of the outbox by status."""
    with server.connect("app") as connection:
        return dict(connection.execute("select status, count(*) from agent_outbox_messages group by status").fetchall())


def stored(server: Server) -> int:
    """Count the rows of history."""
    with server.connect("app") as connection:
        return connection.execute("select count(*) from chat_histories").fetchall()[0][0]  # type: ignore[no-any-return]


def await_all_stored_once_and_in_order(server: Server) -> None:
    """Wait until every row that the server has is consumed, and hold history to it row by row."""
    eventually(lambda: statuses(server).keys() == {"consumed"}, within=60, what="the consumption of every row")
    with server.connect("app") as connection:
        differing = connection.execute(
            "select o.id, o.payload, h.* from agent_outbox_messages o full join chat_histories h on h.outbox_id = o.id"
            " where h.message_content is distinct from o.payload->>'message_content'"
            " or h.chat_id is distinct from o.message_key"
        ).fetchall()
        assert differing == []
        reordered = connection.execute(
            "select * from (select *, lag(outbox_id) over (partition by chat_id order by id) as before"
            " from chat_histories) as pairs where outbox_id < before"
        ).fetchall()
        assert reordered == []
        retried = connection.execute("select count(*) from agent_outbox_messages where retry_count > 0").fetchone()
        assert retried == (0,)


FAILOVER_SLOTS = pytest.mark.parametrize("failover_slots", [True, False], ids=["failover slots", "no failover slots"])


@FAILOVER_SLOTS
def test_one_reader_that_knows_both_servers_goes_on_with_the_promoted_one(
    directory: Path, kafka: Kafka, topic: str, failover_slots: bool
) -> None:
    """It is killed under load; the same two processes store every row of the promoted one once and in order."""
    with pair_of_servers(directory, failover_slots=failover_slots) as pair:
        env = variables(pair, kafka, topic)
        reader, sink = (Process(name, env=env).start() for name in ("reader", "sink"))
        is_streaming(reader)
        with Load(pair.url, topic) as load:
            load.await_more(500)
            if failover_slots:
                pair.await_synchronised(env["CONNECTOR_SLOT_NAME"])
            eventually(lambda: stored(pair.primary) > 200, within=30, what="messages stored")
            pair.primary.kill()
            pair.standby.promote()
            load.await_more(500)
        await_all_stored_once_and_in_order(pair.standby)
        made = [event for event in reader.events if event["event"] == "slot_made"]
        assert len(made) == (0 if failover_slots else 1)
        assert (reader.stop(), sink.stop()) == (0, 0)


@FAILOVER_SLOTS
def test_a_reader_beside_each_server_waits_ready_and_takes_over_on_promotion(
    directory: Path, kafka: Kafka, topic: str, failover_slots: bool
) -> None:
    """The one beside the standby is ready and does nothing, until its server is promoted under load."""
    with pair_of_servers(directory, failover_slots=failover_slots) as pair:
        env = variables(pair, kafka, topic)
        pair.await_copy()
        first = is_streaming(Process("reader", env=at(pair.primary, env)).start())
        second = Process("reader", env=at(pair.standby, env)).start()
        second.wait_for_log("standing_by")
        sink = Process("sink", env=env).start()
        with Load(pair.url, topic) as load:
            load.await_more(500)
            if failover_slots:
                pair.await_synchronised(env["CONNECTOR_SLOT_NAME"])
            eventually(lambda: stored(pair.primary) > 200, within=30, what="messages stored")
            eventually(lambda: readiness(second) == 200, what="the readiness of the reader beside the standby")
            assert (metric(second, "leader"), metric(second, "published_total")) == (0, 0)
            assert metric(second, 'outbox_rows{status="consumed"}') > 0
            pair.primary.kill()
            pair.standby.promote()
            is_streaming(second)
            load.await_more(500)
        await_all_stored_once_and_in_order(pair.standby)
        assert metric(second, "leader") == 1
        eventually(lambda: readiness(first) == 503, what="the reader beside the lost server not ready")
        assert first.returncode is None
        assert (second.stop(), sink.stop()) == (0, 0)


@pytest.mark.parametrize("restarted", [False, True], ids=["the same sink", "a new sink"])
def test_what_the_promoted_server_has_not_got_of_the_sinks_work_is_done_again(
    directory: Path, kafka: Kafka, topic: str, restarted: bool
) -> None:
    """The sink has stored messages and committed their offsets, and the standby has not heard of it."""
    with pair_of_servers(directory, failover_slots=False) as pair:
        env = variables(pair, kafka, topic)
        sink = Process("sink", env=env | {"CONNECTOR_POD_NAME": "sink-0"}).start()
        reader = is_streaming(Process("reader", env=env).start())
        with pair.primary.connect("app") as app:
            enqueue(app, topic, 0, 100)
            eventually(lambda: stored(pair.primary) == 100, within=30, what="the first messages stored")
            pair.await_copy()
            # The rows get through, what is done with them does not.
            assert sink.stop() == 0
            enqueue(app, topic, 100, 300)
            eventually(lambda: statuses(pair.primary).get("published") == 300, within=30, what="the publishing")
            pair.await_copy()
            pair.standby.cut_off()
            sink = Process("sink", env=env | {"CONNECTOR_POD_NAME": "sink-0"}).start()
            eventually(lambda: stored(pair.primary) == 400, within=30, what="all messages stored")
        if restarted:
            assert sink.stop() == 0
        assert stored(pair.standby) == 100
        pair.primary.kill()
        pair.standby.promote()
        with pair.standby.connect("app") as app:
            # These must not overtake what has to be stored again.
            enqueue(app, topic, 400, 100)
        if restarted:
            sink = Process("sink", env=env | {"CONNECTOR_POD_NAME": "sink-0"}).start()
        eventually(lambda: stored(pair.standby) == 500, within=60, what="all messages stored again")
        await_all_stored_once_and_in_order(pair.standby)
        sink.wait_for_log("failover_noticed", gone_back=True)
        assert (reader.stop(), sink.stop()) == (0, 0)


def test_a_message_of_a_row_that_was_lost_is_never_taken_for_the_row_that_got_its_id(
    directory: Path, kafka: Kafka, topic: str
) -> None:
    """The promoted server gives ids out again whose first rows it never had, but Kafka has."""
    with pair_of_servers(directory, failover_slots=False) as pair:
        env = variables(pair, kafka, topic)
        reader = is_streaming(Process("reader", env=env).start())
        with pair.primary.connect("app") as app:
            sink = Process("sink", env=env).start()
            enqueue(app, topic, 0, 40)
            eventually(lambda: stored(pair.primary) == 40, within=30, what="the first messages stored")
            assert sink.stop() == 0
            pair.await_copy()
            pair.standby.cut_off()
            enqueue(app, topic, 1_000, 200)
            eventually(lambda: statuses(pair.primary).get("published") == 200, within=30, what="the publishing")
        pair.primary.kill()
        pair.standby.promote()
        with pair.standby.connect("app") as app:
            enqueue(app, topic, 5_000, 200)
            again = app.execute("select count(*) from agent_outbox_messages where id between 41 and 240").fetchone()
            assert again is not None
            assert again[0] > 100
        sink = Process("sink", env=env).start()
        await_all_stored_once_and_in_order(pair.standby)
        assert metric(sink, 'skipped_total{reason="lost_row"}') > 100
        assert (reader.stop(), sink.stop()) == (0, 0)


def test_with_a_synchronous_standby_nothing_that_was_committed_is_lost(
    directory: Path, kafka: Kafka, topic: str
) -> None:
    """Every message whose commit the application was told of is on the promoted server, and is stored."""
    with pair_of_servers(directory, failover_slots=True, synchronous=True) as pair:
        env = variables(pair, kafka, topic)
        reader, sink = (Process(name, env=env).start() for name in ("reader", "sink"))
        is_streaming(reader)
        with Load(pair.url, topic) as load:
            load.await_more(500)
            eventually(lambda: stored(pair.primary) > 200, within=30, what="messages stored")
            pair.primary.kill()
            pair.standby.promote()
            load.await_more(100)
        await_all_stored_once_and_in_order(pair.standby)
        assert stored(pair.standby) >= load.committed
        assert (reader.stop(), sink.stop()) == (0, 0)


def test_a_sink_that_is_led_to_a_standby_waits_and_blames_no_message(directory: Path, kafka: Kafka, topic: str) -> None:
    """It says why it is not ready, as doctor and status do, and stores everything once the standby is promoted."""
    with pair_of_servers(directory, failover_slots=False) as pair:
        env = variables(pair, kafka, topic)
        reader = is_streaming(Process("reader", env=env).start())
        with pair.primary.connect("app") as app:
            enqueue(app, topic, 0, 50)
        eventually(lambda: statuses(pair.primary).get("published") == 50, within=30, what="the publishing")
        pair.await_copy()
        sink = Process("sink", env=at(pair.standby, env)).start()
        sink.wait_for_log("waiting_for_service")
        assert "standby" in sink.http("/readyz").body
        doctor, status = (Process(name, env=at(pair.standby, env)).start() for name in ("doctor", "status"))
        assert doctor.wait() == 1
        assert "leads to a standby" in doctor.stdout
        assert status.wait() in {0, 1}
        for command in (doctor, status):
            assert "Traceback" not in command.stderr + command.stdout
        pair.primary.kill()
        pair.standby.promote()
        eventually(lambda: stored(pair.standby) == 50, within=60, what="all messages stored")
        await_all_stored_once_and_in_order(pair.standby)
        assert (reader.stop(), sink.stop()) == (0, 0)
