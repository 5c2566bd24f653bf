"""Rows that somebody has made or changed by hand in ways no application would: they stop nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration.outbox_table import OutboxTable
from tests.integration.scenario import Tap, one, set_up
from tests.services import Database, Kafka, Process, eventually


@pytest.fixture
def outbox(database: Database, connector_env: dict[str, str]) -> Iterator[OutboxTable]:
    """The tables of a fresh database, with everything else that `setup` makes."""
    set_up(connector_env)
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def wait_for(outbox: OutboxTable, outbox_id: int, status: str) -> None:
    """Wait until a row has that status."""
    eventually(lambda: outbox.status(outbox_id) == status, within=30, what=f"row {outbox_id} becoming {status}")


def test_rows_whose_ids_no_message_could_carry_are_dead_at_once(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """An id must be positive; what follows such a row in its transaction is stored."""
    with outbox.connection.transaction():
        odd = [outbox.new(topic=topic, id=0), outbox.new(topic=topic, id=-7)]
        good = outbox.new(topic=topic)
    connector("reader")
    connector("sink")
    wait_for(outbox, good, "consumed")
    for outbox_id in odd:
        wait_for(outbox, outbox_id, "dead")
        assert "must be positive" in (outbox.row(outbox_id).last_error or "")


@pytest.mark.parametrize("running", [True, False], ids=["streamed", "caught up"])
def test_infinite_times_stop_neither_their_row_nor_the_others(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process], *, running: bool
) -> None:
    """Minus infinity is due now, infinity never; a row that was changed at the end of time is a row like any other."""
    if running:
        connector("reader").wait_for_log("streaming")
    else:
        outbox.connection.execute("update outbox_connector_slots set catch_up_owed = true")
    early = outbox.new("early", topic, next_retry_at="-infinity")
    never = outbox.new("never", topic, next_retry_at="infinity")
    changed = outbox.new("changed", topic, updated_at="infinity")
    both = outbox.new("both", topic, updated_at="-infinity", next_retry_at="-infinity")
    good = outbox.new("good", topic)
    if not running:
        connector("reader")
    connector("sink")
    for outbox_id in (early, changed, both, good):
        wait_for(outbox, outbox_id, "consumed")
    assert outbox.status(never) == "pending"
    outbox.change(never, "next_retry_at = now(), updated_at = now()")
    outbox.connection.execute("select pg_logical_emit_message(true, 'outbox_connector', '0')")
    wait_for(outbox, never, "consumed")


def test_a_row_that_was_changed_at_the_end_of_time_is_retried(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """Its conversation arrives later, as anybody's may."""
    outbox.connection.execute("create table agent_chats (chat_id varchar(36) primary key)")
    outbox.connection.execute("alter table chat_histories add foreign key (chat_id) references agent_chats")
    outbox_id = outbox.new(topic=topic, updated_at="infinity")
    connector("reader")
    connector("sink")
    failed = "select retry_count > 0 from agent_outbox_messages"
    eventually(lambda: one(outbox.connection, failed), within=30, what="its failure")
    outbox.connection.execute("insert into agent_chats values ('chat-1')")
    wait_for(outbox, outbox_id, "consumed")


@pytest.mark.usefixtures("complete_kafka")
def test_nothing_is_published_before_a_refusal_is_written_to_its_row(
    outbox: OutboxTable, kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """A later message of its key would otherwise find nothing to wait for, once the topic is there again."""
    connector("reader").wait_for_log("streaming")
    with outbox.database.connect() as other:
        with other.transaction():
            refused = outbox.new("key", f"{topic}.missing")
            other.execute("select from agent_outbox_messages where id = %s for update", [refused])
            waiting = (
                "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            )
            eventually(lambda: other.execute(waiting).fetchone() == (1,), within=30, what="the refusal to be written")
            later = outbox.new("key", topic)
            with Tap(kafka, topic) as tap:
                assert later not in {sent.outbox_id for sent in tap.read(1.0)}
        with Tap(kafka, topic) as tap:
            tap.has([later])
    assert outbox.row(refused).retry_count == 1
