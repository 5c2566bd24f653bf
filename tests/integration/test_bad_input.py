"""The contract's table of bad input, line by line, through the real processes."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, NewTopic
from psycopg.types.json import Jsonb

from tests.integration.outbox_table import PAYLOAD, OutboxTable
from tests.integration.scenario import Sent, Tap, forbidden, metric, set_up
from tests.services import Database, Kafka, Process, environment, eventually

TOO_LONG = "c" * 37


@pytest.fixture
def outbox(database: Database, connector_env: dict[str, str]) -> Iterator[OutboxTable]:
    """The tables of a fresh database, with everything else that `setup` makes."""
    set_up(connector_env)
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


class Forger:
    """Puts values into Kafka that no reader would."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
        self._topic = topic

    def __call__(self, *values: bytes | None, key: bytes = b"key") -> None:
        """Send values to partition 0, in this order."""
        for value in values:
            headers: list[tuple[str, str | bytes | None]] = [("traceparent", b"00-1")]
            self._producer.produce(self._topic, value, key, partition=0, headers=headers)
        assert self._producer.flush(20) == 0


@pytest.fixture
def forge(kafka: Kafka, topic: str) -> Forger:
    """Send any value to the topic."""
    return Forger(kafka, topic)


def envelope(
    outbox_id: int, payload: Any = PAYLOAD, *, biz_type: str = "chat_history_persist", attempt: int = 0
) -> bytes:
    """Return the value that the reader would send."""
    document = {"outbox_id": outbox_id, "biz_type": biz_type, "attempt": attempt, "payload": payload}
    return json.dumps(document).encode()


def wait_for(outbox: OutboxTable, outbox_id: int, status: str, within: float = 30.0) -> None:
    """Wait until a row has that status."""
    eventually(lambda: outbox.status(outbox_id) == status, within=within, what=f"row {outbox_id} becoming {status}")


def committed(kafka: Kafka, env: dict[str, str], partition: int = 0) -> int:
    """Return the offset that the sink's group has committed."""
    from connector.kafka import Kafka as Client  # noqa: PLC0415 - the name is that of the test's own

    admin = Client(kafka.bootstrap_servers, {}).admin()
    return admin.group_offsets(env["CONNECTOR_GROUP_ID"]).get((env["CONNECTOR_TOPICS"], partition), 0)


def noise(size: int) -> str:
    """Return text that does not compress."""
    return "".join(random.Random(7).choices(string.ascii_letters + string.digits + "!#$%&()*+,-./:;<=>?@", k=size))


# --- the value is no envelope ----------------------------------------------------------------------------------------

NO_ENVELOPES: dict[str, tuple[bytes | None, str]] = {
    "tombstone": (None, "tombstone"),
    "empty": (b"", "not JSON"),
    "text": (b"hello", "not JSON"),
    "half a document": (b'{"outbox_id": 1', "not JSON"),
    "not UTF-8": (b'{"outbox_id": 1, "biz_type": "\xff"}', "not JSON"),
    "nested too deep": (b"[" * 100_000, "not JSON"),
    "a number too long": (b'{"outbox_id": ' + b"9" * 5_000 + b"}", "not JSON"),
    "null": (b"null", "not an object"),
    "list": (b'[{"outbox_id": 1}]', "not an object"),
    "string": (b'"outbox_id"', "not an object"),
    "number": (b"1", "not an object"),
    "no outbox_id": (b'{"biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id zero": (b'{"outbox_id": 0, "biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id negative": (b'{"outbox_id": -1, "biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id text": (b'{"outbox_id": "1", "biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id broken": (b'{"outbox_id": 1.0, "biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id true": (b'{"outbox_id": true, "biz_type": "chat_history_persist"}', "outbox_id"),
    "outbox_id no bigint": (b'{"outbox_id": 9223372036854775808, "biz_type": "chat_history_persist"}', "outbox_id"),
    "no biz_type": (b'{"outbox_id": 1}', "biz_type"),
    "biz_type null": (b'{"outbox_id": 1, "biz_type": null}', "biz_type"),
    "attempt negative": (b'{"outbox_id": 1, "biz_type": "chat_history_persist", "attempt": -1}', "attempt"),
    "attempt text": (b'{"outbox_id": 1, "biz_type": "chat_history_persist", "attempt": "0"}', "attempt"),
}


def test_values_that_are_no_envelope_go_to_the_dead_letter_topic_and_their_neighbours_are_stored(
    outbox: OutboxTable,
    forge: Forger,
    kafka: Kafka,
    connector: Callable[..., Process],
    connector_env: dict[str, str],
) -> None:
    """Each such value is copied with its reason, topic, partition and offset, and skipped; the good ones are stored."""
    before, after = outbox.new(), outbox.new()
    values = [value for value, _ in NO_ENVELOPES.values()]
    forge(envelope(before), *values, envelope(after))
    sink = connector("sink")
    with Tap(kafka, connector_env["CONNECTOR_DEAD_LETTER_TOPIC"]) as tap:
        letters = tap.until(lambda sent: len(sent) >= len(values), what="the dead letters")
        wait_for(outbox, after, "consumed")
        by_offset = {dict(letter.headers)["dead_letter_offset"]: letter for letter in letters}
        assert len(tap.read(0.2)) == len(values)
    assert outbox.history() == [before, after]
    for offset, (name, (value, reason)) in enumerate(NO_ENVELOPES.items(), start=1):
        letter = by_offset[str(offset).encode()]
        headers = dict(letter.headers)
        assert (letter.key, letter.value) == ("key", value or b""), name
        assert headers["dead_letter_topic"].decode() == connector_env["CONNECTOR_TOPICS"], name
        assert headers["dead_letter_partition"] == b"0", name
        assert reason in headers["dead_letter_reason"].decode(), name
        assert headers["traceparent"] == b"00-1", name
    assert metric(sink, "dead_letters_total") == len(values)
    eventually(lambda: committed(kafka, connector_env) == len(values) + 2, what="the offset past them")


def test_a_value_too_large_for_the_dead_letter_topic_leaves_word_of_where_it_lies(
    outbox: OutboxTable, forge: Forger, complete_kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """A letter that the topic cannot hold goes without its value, and does not stop what follows."""
    small = f"{topic}.small"
    _create(complete_kafka, small, {"max.message.bytes": "2000"})
    after = outbox.new()
    forge(noise(20_000).encode(), envelope(after))
    connector("sink", CONNECTOR_DEAD_LETTER_TOPIC=small)
    with Tap(complete_kafka, small, partitions=1) as tap:
        (letter,) = tap.until(lambda sent: sent, what="the dead letter")
    headers = dict(letter.headers)
    assert letter.value == b""
    assert headers["dead_letter_value_bytes"] == b"20000"
    assert headers["dead_letter_offset"] == b"0"
    wait_for(outbox, after, "consumed")


@pytest.mark.slow
def test_nothing_is_skipped_while_the_dead_letter_topic_is_missing(
    outbox: OutboxTable,
    forge: Forger,
    complete_kafka: Kafka,
    connector: Callable[..., Process],
    connector_env: dict[str, str],
) -> None:
    """The offset stays before a value that could not be copied; once the topic is there, everything goes on."""
    missing = f"{connector_env['CONNECTOR_TOPICS']}.missing"
    after = outbox.new()
    forge(b"no envelope", envelope(after))
    sink = connector("sink", CONNECTOR_DEAD_LETTER_TOPIC=missing)
    sink.wait_for_log("batch_postponed", within=40)
    assert committed(complete_kafka, connector_env) == 0
    assert outbox.history() == []
    _create(complete_kafka, missing, {})
    wait_for(outbox, after, "consumed", within=60)
    with Tap(complete_kafka, missing, partitions=1) as tap:
        letters: list[Sent] = tap.until(lambda sent: sent)
    assert {letter.value for letter in letters} == {b"no envelope"}


# --- unknown biz_type, wrong payload ---------------------------------------------------------------------------------

WRONG_PAYLOADS: dict[str, tuple[Any, str]] = {
    "null": (None, "payload"),
    "list": ([1], "payload"),
    "text": ("text", "payload"),
    "empty": ({}, "user_id"),
    "no user_id": ({"chat_id": "c"}, "user_id"),
    "user_id text": ({"user_id": "7", "chat_id": "c"}, "user_id"),
    "user_id broken": ({"user_id": 7.5, "chat_id": "c"}, "user_id"),
    "user_id true": ({"user_id": True, "chat_id": "c"}, "user_id"),
    "user_id no bigint": ({"user_id": 2**63, "chat_id": "c"}, "user_id"),
    "no chat_id": ({"user_id": 7}, "chat_id"),
    "chat_id number": ({"user_id": 7, "chat_id": 7}, "chat_id"),
    "content object": ({"user_id": 7, "chat_id": "c", "message_content": {}}, "message_content"),
    "role list": ({"user_id": 7, "chat_id": "c", "role": []}, "role"),
    "created_at text": ({"user_id": 7, "chat_id": "c", "created_at": "yesterday"}, "created_at"),
    "created_at number": ({"user_id": 7, "chat_id": "c", "created_at": 1}, "created_at"),
}


def test_payloads_of_the_wrong_shape_or_types_are_dead_at_once_and_their_neighbours_are_stored(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """No retry could help them: they are dead with the field in `last_error`, and hold nothing of their key back."""
    rows: dict[str, int] = {}
    good = [outbox.new(topic=topic)]
    for name, (payload, _) in WRONG_PAYLOADS.items():
        rows[name] = outbox.new(topic=topic, payload=payload)
        good.append(outbox.new(topic=topic))
    connector("reader")
    sink = connector("sink")
    wait_for(outbox, good[-1], "consumed")
    assert outbox.history() == good
    for name, outbox_id in rows.items():
        row = outbox.row(outbox_id)
        assert (row.status, row.retry_count, row.next_retry_at) == ("dead", 0, None), name
        assert WRONG_PAYLOADS[name][1] in (row.last_error or ""), name
    assert metric(sink, 'dead_total{reason="payload"}') == len(rows)


@pytest.mark.parametrize(
    ("biz_type", "shown"),
    [("nobody_knows_this", "'nobody_knows_this'"), ("\ud800", "'\\ud800'"), ("a\x00b", "'a\\x00b'")],
)
def test_an_unknown_biz_type_is_dead_at_once(
    outbox: OutboxTable, forge: Forger, connector: Callable[..., Process], biz_type: str, shown: str
) -> None:
    """The row is dead with the biz_type in `last_error`, even one that text cannot hold; its neighbours are stored."""
    unknown, after = outbox.new(), outbox.new()
    forge(envelope(unknown, biz_type=biz_type), envelope(after))
    sink = connector("sink")
    wait_for(outbox, after, "consumed")
    row = outbox.row(unknown)
    assert (row.status, row.retry_count) == ("dead", 0)
    assert f"no handler for biz_type {shown}" in (row.last_error or "")
    sink.wait_for_log("message_dead", outbox_id=unknown)
    assert metric(sink, 'dead_total{reason="unknown_biz_type"}') == 1


# --- the database refuses a row --------------------------------------------------------------------------------------

CONVERSATIONS = (
    "create table agent_chats (chat_id varchar(36) primary key); insert into agent_chats values ('chat-1');"
    "alter table chat_histories add foreign key (chat_id) references agent_chats"
)
REFUSING = """
    create function refuse() returns trigger language plpgsql as $$ begin raise 'not this role'{}; end $$;
    create trigger refuse before insert on chat_histories for each row when (new.role = 'nobody')
        execute function refuse()
"""

REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "foreign key": (CONVERSATIONS, {"chat_id": "nobody"}, "SQLSTATE 23503"),
    "deferred foreign key": (
        f"{CONVERSATIONS} deferrable initially deferred",
        {"chat_id": "nobody"},
        "SQLSTATE 23503",
    ),
    "too long": ("", {"chat_id": TOO_LONG}, "SQLSTATE 22001"),
    "check constraint": ("alter table chat_histories add check (user_id > 0)", {"user_id": -1}, "SQLSTATE 23514"),
    "too large for an index": (
        "create index on chat_histories (message_content)",
        {"message_content": noise(9_000)},
        "SQLSTATE 54000",
    ),
    "out of a time's range": ("", {"created_at": "2020-01-01T00:00:00+23:59"}, "SQLSTATE 22"),
    "a trigger that raises": (REFUSING.format(""), {"role": "nobody"}, "not this role (SQLSTATE P0001)"),
    "a trigger with an error code of its own": (
        REFUSING.format(" using errcode = 'MY001'"),
        {"role": "nobody"},
        "not this role (SQLSTATE MY001)",
    ),
    "a trigger with the code of unnamed conditions": (
        REFUSING.format(" using errcode = '45000'"),
        {"role": "nobody"},
        "not this role (SQLSTATE 45000)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_row_that_the_database_refuses_is_retried_then_dead_and_its_neighbours_are_stored(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process], name: str
) -> None:
    """It is tried again after a second, and dead after its second attempt of two; other keys are stored meanwhile."""
    preparation, odd, reason = REFUSALS[name]
    if preparation:
        outbox.connection.execute(preparation)
    before = outbox.new("a", topic)
    bad = outbox.new("b", topic, {**PAYLOAD, **odd}, max_retry=2)
    behind, other = outbox.new("b", topic), outbox.new("c", topic)
    connector("reader")
    sink = connector("sink")
    retry = sink.wait_for_log("retry_scheduled", outbox_id=bad, within=30)
    assert retry["due_in_seconds"] == pytest.approx(1, abs=0.3)
    wait_for(outbox, bad, "dead")
    row = outbox.row(bad)
    assert row.retry_count == 2
    assert reason in (row.last_error or "")
    assert str(PAYLOAD["message_content"]) not in (row.last_error or "") + sink.stderr
    wait_for(outbox, behind, "consumed")
    assert sorted(outbox.history()) == [before, behind, other]
    assert outbox.row(behind).retry_count == 0
    assert metric(sink, "retries_scheduled_total") == 1
    assert metric(sink, 'dead_total{reason="refused_by_database"}') == 1


def test_a_message_that_arrives_before_its_conversation_is_stored_once_that_is_there(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """A missing conversation is an ordinary retryable failure, and later messages of the key wait for it in order."""
    outbox.connection.execute(CONVERSATIONS)
    rows = [outbox.new(topic=topic, payload={**PAYLOAD, "chat_id": "chat-2"}) for _ in range(3)]
    connector("reader")
    sink = connector("sink")
    sink.wait_for_log("retry_scheduled", outbox_id=rows[0], within=30)
    outbox.connection.execute("insert into agent_chats values ('chat-2')")
    wait_for(outbox, rows[-1], "consumed")
    assert outbox.history() == rows
    assert [outbox.row(n).retry_count for n in rows[1:]] == [0, 0]


@pytest.mark.parametrize("field", ["chat_id", "message_content", "role"])
def test_text_with_a_nul_is_retried_then_dead_and_its_neighbours_are_stored(
    outbox: OutboxTable, forge: Forger, connector: Callable[..., Process], field: str
) -> None:
    """PostgreSQL's text has no NUL; a message that has one is refused like any other row."""
    before, bad, after = outbox.new("a"), outbox.new("b", max_retry=2), outbox.new("c")
    odd = {**PAYLOAD, field: "a\x00b"}
    forge(envelope(before), key=b"a")
    forge(envelope(bad, odd), key=b"b")
    forge(envelope(after), key=b"c")
    sink = connector("sink")
    sink.wait_for_log("retry_scheduled", outbox_id=bad, within=30)
    row = outbox.row(bad)
    assert (row.status, row.retry_count) == ("pending", 1)
    assert row.due_in == pytest.approx(1, abs=0.05)
    assert "NUL" in (row.last_error or "")
    forge(envelope(bad, odd, attempt=1), key=b"b")
    wait_for(outbox, bad, "dead")
    assert outbox.history() == [before, after]


# --- too large, unknown topic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "told"),
    [(True, True), (False, True), (True, False)],
    ids=["its topic is configured", "its topic is not configured", "its topic does not tell its limit"],
)
def test_a_message_too_large_for_its_topic_is_dead_at_once_and_its_small_neighbours_arrive(
    database: Database, complete_kafka: Kafka, topic: str, known: bool, told: bool
) -> None:
    """The reason names size and limit; messages of the same topic that fit arrive, though together they would not."""
    with ExitStack() as stack:
        small = stack.enter_context(complete_kafka.topic(config={"max.message.bytes": "10000"}))
        env = environment(database, complete_kafka, small if known else topic)
        set_up(env)
        if not told:
            stack.enter_context(forbidden(complete_kafka, small, AclOperation.DESCRIBE_CONFIGS))
        outbox = OutboxTable(database)
        stack.callback(outbox.close)
        content = noise(1_500)
        rows = []
        with outbox.connection.transaction():
            for n in range(40):
                payload = {**PAYLOAD, "message_content": noise(20_000) if n == 20 else content}
                rows.append(outbox.new("key", small, payload))
        large = rows.pop(20)
        reader = Process("reader", env=env).start()
        sink = Process("sink", env=env | {"CONNECTOR_TOPICS": small, "CONNECTOR_GROUP_ID": f"{small}-group"}).start()
        wait_for(outbox, large, "dead")
        row = outbox.row(large)
        assert row.retry_count == 0
        assert _named_size(row.last_error) == pytest.approx(20_000, rel=0.05)
        assert f"max.message.bytes {10_000 if told else 'unknown'}" in (row.last_error or "")
        for outbox_id in rows:
            wait_for(outbox, outbox_id, "consumed")
        # A broker may refuse a new producer's first batch and take the second; who knows its limit sends no such.
        stored = outbox.history()
        assert (stored if told else sorted(stored)) == rows
        assert metric(reader, 'dead_total{reason="message_too_large"}') == 1
        assert metric(sink, "consumed_total") == len(rows)


@pytest.mark.usefixtures("complete_kafka")
@pytest.mark.parametrize("what", ["content", "headers"])
def test_a_message_beyond_a_megabyte_is_dead_at_once_on_an_ordinary_topic(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process], what: str
) -> None:
    """The default limit of a broker is named like any other, and the neighbours arrive."""
    before = outbox.new(topic=topic)
    if what == "content":
        large = outbox.new(topic=topic, payload={**PAYLOAD, "message_content": noise(1_500_000)})
    else:
        large = outbox.new(topic=topic, headers=Jsonb({"large": noise(1_500_000)}))
    after = outbox.new(topic=topic)
    connector("reader")
    connector("sink")
    wait_for(outbox, after, "consumed")
    row = outbox.row(large)
    assert (row.status, row.retry_count) == ("dead", 0)
    assert _named_size(row.last_error) == pytest.approx(1_500_000, rel=0.01)
    assert "max.message.bytes 1048588" in (row.last_error or "")
    assert outbox.history() == [before, after]


@pytest.mark.slow
@pytest.mark.usefixtures("complete_kafka")
def test_a_topic_that_nobody_made_is_retried_then_dead_and_other_topics_go_on(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """Its messages are retried with backoff and dead after their attempts; the reason names the topic."""
    lost = outbox.new(topic=f"{topic}.lost", max_retry=2)
    impossible = outbox.new(topic="no topic may be called this", max_retry=2)
    good = outbox.new(topic=topic)
    reader = connector("reader")
    connector("sink")
    wait_for(outbox, good, "consumed")
    for outbox_id in (lost, impossible):
        wait_for(outbox, outbox_id, "dead", within=60)
        retry = reader.wait_for_log("retry_scheduled", outbox_id=outbox_id)
        assert retry["due_in_seconds"] == pytest.approx(1, abs=0.3)
        assert outbox.row(outbox_id).retry_count == 2
    assert f"{topic}.lost" in (outbox.row(lost).last_error or "")
    assert metric(reader, 'dead_total{reason="topic_refused"}') == 2


def test_a_topic_that_is_forbidden_is_retried_then_dead_and_other_topics_go_on(
    outbox: OutboxTable, durable_kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Its messages are retried with backoff and dead after their attempts; the reason is Kafka's."""
    closed = f"{topic}.closed"
    _create(durable_kafka, closed, {})
    with forbidden(durable_kafka, closed):
        refused = outbox.new(topic=closed, max_retry=2)
        good = outbox.new(topic=topic)
        reader = connector("reader")
        connector("sink")
        wait_for(outbox, good, "consumed")
        wait_for(outbox, refused, "dead")
    retry = reader.wait_for_log("retry_scheduled", outbox_id=refused)
    assert retry["due_in_seconds"] == pytest.approx(1, abs=0.3)
    row = outbox.row(refused)
    assert row.retry_count == 2
    assert closed in (row.last_error or "")
    assert "AUTHORIZATION" in (row.last_error or "")
    assert metric(reader, 'dead_total{reason="topic_refused"}') == 1


@pytest.mark.slow
def test_messages_for_a_topic_that_is_made_meanwhile_arrive(
    outbox: OutboxTable, complete_kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Once somebody makes the topic, what waits for it is published in order, without a restart."""
    late = f"{topic}.late"
    rows = [outbox.new(topic=late) for _ in range(3)]
    reader = connector("reader")
    reader.wait_for_log("retry_scheduled", outbox_id=rows[0], within=40)
    _create(complete_kafka, late, {})
    for outbox_id in rows:
        wait_for(outbox, outbox_id, "published", within=40)
    with Tap(complete_kafka, late, partitions=1) as tap:
        assert [sent.outbox_id for sent in tap.has(rows)] == rows


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["setup", "reader", "sink"])
def test_every_problem_of_the_configuration_is_told_at_once_without_secrets(command: str) -> None:
    """Wrong and missing variables are listed by name, one a line; no secret shows, and the exit code is 78."""
    process = Process(
        command,
        env={
            "CONNECTOR_DATABASE_URL": "postgresql://user:hunter2@[broken/db",
            "CONNECTOR_KAFKA_SASL_PASSWORD": "hunter2",
            "CONNECTOR_KAFKA_SSL_KEY_PASSWORD_FILE": "/nowhere/hunter2",
            "CONNECTOR_SLOT_NAME": "Not A Slot",
            "CONNECTOR_WAL_BUDGET": "hunter2",
            "CONNECTOR_HTTP_PORT": "99999",
            "CONNECTOR_KEY_ORDERING": "hunter2",
            "CONNECTOR_TOPIC": "one",
            "CONNECTOR_KAFKA_NO_SUCH_OPTION": "hunter2",
            "CONNECTOR_PRODUCER_LINGER_MS": "hunter2",
            "CONNECTOR_CONSUMER_AUTO_OFFSET_RESET": "hunter2",
            "CONNECTOR_CONSUMER_ENABLE_AUTO_OFFSET_STORE": "true",
        },
    ).start()
    assert process.wait(20) == 78
    told = {line.partition("CONNECTOR_")[2].partition(":")[0] for line in process.stderr.splitlines()}
    assert told == {
        "DATABASE_URL",
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_SSL_KEY_PASSWORD_FILE",
        "SLOT_NAME",
        "WAL_BUDGET",
        "HTTP_PORT",
        "KEY_ORDERING",
        "TOPIC",
        "KAFKA_NO_SUCH_OPTION",
        "PRODUCER_LINGER_MS",
        "CONSUMER_AUTO_OFFSET_RESET",
        "CONSUMER_ENABLE_AUTO_OFFSET_STORE",
    }
    assert "hunter2" not in process.stderr + process.stdout
    assert "did you mean CONNECTOR_TOPICS?" in process.stderr


def test_a_port_that_is_taken_is_a_problem_of_the_configuration(
    outbox: OutboxTable, connector: Callable[..., Process]
) -> None:
    """The second process on one port names CONNECTOR_HTTP_PORT and exits with 78."""
    sink = connector("sink")
    port = sink.wait_for_log("http_listening")["port"]
    second = connector("sink", CONNECTOR_HTTP_PORT=str(port))
    assert second.wait(20) == 78
    assert "CONNECTOR_HTTP_PORT" in second.stderr


def _named_size(error: str | None) -> int:
    found = re.search(r"(\d+) bytes", error or "")
    assert found, error
    return int(found[1])


def _create(kafka: Kafka, topic: str, config: dict[str, str]) -> None:
    admin = kafka.admin()
    for created in admin.create_topics([NewTopic(topic, 1, 1, config=config)]).values():
        created.result(20)
