"""The whole pipeline: separate processes, real services, failing messages, and SIGKILLs at any moment."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from connector import Outbox
from tests.faults.pipeline import Pipeline
from tests.services import Database, Kafka, Process, eventually

CONVERSATIONS = 1_000
LATE = 10  # of the conversations, so one message in a hundred fails at first
PER_TRANSACTION = 25
KILLS = 10
MEMORY_LIMIT_MB = 120

Start = Callable[..., Process]


def prepare(database: Database, connector: Start) -> None:
    """Set the pipeline up, with a foreign key from history to conversations, all but the late ones of which exist."""
    assert connector("setup").wait() == 0
    with database.connect() as connection:
        connection.execute("create table agent_chats (chat_id varchar(36) primary key)")
        connection.execute("alter table chat_histories add foreign key (chat_id) references agent_chats")
        connection.execute(
            "insert into agent_chats select 'chat-' || n from generate_series(%s::int, %s) n", [LATE, CONVERSATIONS - 1]
        )


def enqueue(database: Database, topic: str, messages: int, pace: Pace) -> None:
    """Enqueue messages round-robin over the conversations, some to a transaction, on one connection."""
    with psycopg.connect(database.url) as connection:
        outbox = Outbox(connection)
        for first in range(0, messages, PER_TRANSACTION):
            pace.await_leave(first)
            for number in range(first, min(first + PER_TRANSACTION, messages)):
                chat = f"chat-{number % CONVERSATIONS}"
                payload = {"user_id": number, "chat_id": chat, "message_content": f"message {number}", "role": "user"}
                outbox.create_chat_history_message(topic, chat, payload)
            connection.commit()


class Pace:
    """How far the enqueuing may go: however fast the pipeline is, work is left for every kill to interrupt."""

    def __init__(self, messages: int) -> None:
        self._changed = threading.Condition()
        self._leave = messages

    def allow(self, messages: int) -> None:
        """Let it go as far as this many messages."""
        with self._changed:
            self._leave = messages
            self._changed.notify_all()

    def close(self) -> None:
        """Let it go to its end."""
        self.allow(sys.maxsize)

    def await_leave(self, number: int) -> None:
        """Wait until the message of this number may be enqueued."""
        with self._changed:
            self._changed.wait_for(lambda: number < self._leave)


def counts(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Return the number of outbox rows of each status."""
    return dict(connection.execute("select status, count(*) from agent_outbox_messages group by status").fetchall())


def assert_each_once_and_in_order(connection: psycopg.Connection[Any], messages: int) -> None:
    """Hold history to the outbox, row by row."""
    assert counts(connection) == {"consumed": messages}
    stored = connection.execute("select count(*), count(distinct outbox_id) from chat_histories").fetchone()
    assert stored == (messages, messages)
    differing = connection.execute(
        "select count(*) from agent_outbox_messages o left join chat_histories h on h.outbox_id = o.id"
        " where h.message_content is distinct from o.payload->>'message_content'"
        " or h.chat_id is distinct from o.message_key"
    ).fetchone()
    assert differing == (0,)
    reordered = connection.execute(
        "select chat_id, before, outbox_id from (select *, lag(outbox_id) over (partition by chat_id order by id)"
        " as before from chat_histories) as pairs where outbox_id < before"
    ).fetchall()
    assert reordered == []


class Supervised:
    """A process that somebody starts again whenever it has ended, as an orchestrator would."""

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start = start
        self.process = start()
        self.largest_mb = 0.0

    def measure(self) -> None:
        """Take note of the most resident memory that it ever had."""
        self.largest_mb = max(self.largest_mb, self.process.peak_rss_mb)

    def kill(self) -> None:
        """End it with SIGKILL, and start it again."""
        self.measure()
        self.process.kill()
        self.process = self._start()


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[threading.Thread]:
    """Run work in a thread and raise what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed over to the test
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
    if raised:
        raise raised[0]


def let_late_conversations_begin(connection: psycopg.Connection[Any]) -> None:
    """Create the conversations whose messages have failed, once they have."""
    eventually(
        lambda: (
            connection.execute("select count(*) from agent_outbox_messages where retry_count > 0").fetchone() == (LATE,)
        ),
        within=60,
        what="messages of late conversations failing",
    )
    connection.execute("insert into agent_chats select 'chat-' || n from generate_series(0, %s) n", [LATE - 1])


def await_progress(connection: psycopg.Connection[Any], before: int) -> None:
    """Wait until more messages are consumed than before."""
    eventually(lambda: counts(connection).get("consumed", 0) > before, within=60, what="progress")


def all_consumed(connection: psycopg.Connection[Any], messages: int) -> None:
    """Wait until every message is consumed, as long as it goes on."""
    while (consumed := counts(connection).get("consumed", 0)) < messages:
        await_progress(connection, consumed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [0, KILLS], ids=["undisturbed", "killed"])
def test_every_message_is_stored_once_and_in_order(
    database: Database, durable_kafka: Kafka, topic: str, connector: Start, kills: int
) -> None:
    """50,000 messages arrive each once and in order, though some fail at first and both processes are killed."""
    messages = 50_000
    prepare(database, connector)
    reader = Supervised(lambda: connector("reader"))
    # A pod's name makes its membership static: started again it has its partitions back at once.
    sink = Supervised(lambda: connector("sink", CONNECTOR_POD_NAME="sink-0"))
    rng = random.Random(20_261_124)
    pace = Pace(0 if kills else messages)
    with (
        database.connect() as connection,
        in_background(lambda: enqueue(database, topic, messages, pace)),
        closing(pace),
    ):
        for round_ in range(kills):
            # Each kill waits for progress, so that every one of them interrupts work.
            before = counts(connection).get("consumed", 0)
            pace.allow(messages * (round_ + 1) // kills)
            await_progress(connection, before)
            time.sleep(rng.uniform(0, 0.4))  # the moment of a kill is no condition to wait for
            reader.kill()
            time.sleep(rng.uniform(0, 0.8))
            sink.kill()
            if round_ == kills // 2:
                let_late_conversations_begin(connection)
        if not kills:
            let_late_conversations_begin(connection)
        all_consumed(connection, messages)
        reader.measure()
        sink.measure()
        assert_each_once_and_in_order(connection, messages)
        recovered = connection.execute("select count(*) from agent_outbox_messages where retry_count > 0").fetchone()
        assert recovered is not None
        assert recovered[0] >= LATE
    assert reader.largest_mb < MEMORY_LIMIT_MB
    assert sink.largest_mb < MEMORY_LIMIT_MB
    assert reader.process.stop() == 0
    assert sink.process.stop() == 0


@pytest.mark.parametrize("due_in", [-60.0, 1.0], ids=["in the past", "in a second"])
def test_a_message_with_a_due_time_of_its_own_keeps_its_place_in_its_key(
    database: Database, kafka: Kafka, topic: str, due_in: float
) -> None:
    """Stored at its time, behind a backlog that was enqueued before it and before what was enqueued after it."""
    with closing(Pipeline(database, kafka, topic)) as pipeline:
        pipeline.enqueue(500)
        pipeline.enqueue(1, due_in=due_in)
        pipeline.enqueue(20)
        pipeline.start("sink")
        pipeline.start("reader")
        pipeline.prove()
        early = "select count(*) from agent_outbox_messages where consumed_at < created_at + %s * interval '1 second'"
        assert pipeline.app.execute(f"{early} and id between 1501 and 1503", [due_in]).fetchone() == (0,)
