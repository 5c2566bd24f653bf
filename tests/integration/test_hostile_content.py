"""Whatever an outbox row can hold arrives byte for byte in Kafka and in history, or is settled with a clear reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from connector import Outbox
from tests.integration.outbox_table import OutboxTable
from tests.integration.scenario import OUTBOX, Tap, one, set_up
from tests.services import Database, Kafka, Process, environment, eventually

MB = 1_000_000

EVERY_PLANE = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0x20, 0xFDD0, 0xFFFD, 0xFFFE, 0xFFFF))
EVERY_CHARACTER = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]))
QUOTES = "'\"\\ ''; drop table chat_histories; -- $$ {} %s %(x)s \\u0041 \\\\u0000 \x7f\x1b[31m\r\n\t\x01"

# What is added to a chat message, as JSON text that jsonb accepts.
ODD: dict[str, str] = {
    "every plane": json.dumps(EVERY_PLANE),
    "every character of the first plane": json.dumps(EVERY_CHARACTER, ensure_ascii=False),
    "quotes": json.dumps(QUOTES),
    "numbers beyond 2^53": f"[{2**53 + 1}, -{2**64}, 1e400, 0.1000000000000000000000001, {'9' * 4_000}, 1.10, -0]",
    "deep nesting": "[" * 400 + "]" * 400,
    "many keys": json.dumps({str(n): n for n in range(20_000)}),
    "odd keys": json.dumps({"": 1, QUOTES: 2, EVERY_PLANE: 3, "outbox_id": 4, "payload": 5}),
    "a megabyte": json.dumps("\u4f60" * (MB // 3 - 2_000)),
}


@pytest.fixture
def outbox(database: Database, connector_env: dict[str, str]) -> Iterator[OutboxTable]:
    """The tables of a fresh database, with everything else that `setup` makes."""
    set_up(connector_env)
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def insert(outbox: OutboxTable, topic: str, payload: str, key: str = "key", headers: str | None = None) -> int:
    """Insert a row from JSON text, untouched by any encoder of this side."""
    query = (
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, headers)"
        " values ('chat_history_persist', %s, %s, %s, %s) returning id"
    )
    return int(one(outbox.connection, query, [topic, key, payload, headers]))


def chat(extra: str = "null", content: str = "hello", chat_id: str = "chat-1", user_id: int = 7) -> str:
    """Return a chat message as JSON text with something else in it."""
    known = json.dumps({"user_id": user_id, "chat_id": chat_id, "message_content": content}, ensure_ascii=False)
    return f'{known[:-1]}, "extra": {extra}}}'


def settled(outbox: OutboxTable, ids: list[int], within: float = 60.0) -> None:
    """Wait until each of these rows is consumed or dead."""
    query = f"select count(*) from {OUTBOX} where id = any(%s) and status in ('consumed', 'dead')"
    eventually(lambda: one(outbox.connection, query, [ids]) == len(ids), within=within, what="the settling of all rows")


def assert_in_kafka_as_in_the_table(outbox: OutboxTable, tap: Tap, ids: list[int]) -> None:
    """Hold key and value of each message to the row's own text, byte for byte."""
    seen = {sent.outbox_id: sent for sent in _unparsed(tap, ids)}
    query = f"select convert_to(payload::text, 'UTF8'), message_key from {OUTBOX} where id = %s"
    for outbox_id in ids:
        record = outbox.connection.execute(query, [outbox_id]).fetchone()
        assert record is not None
        payload, key = record
        head = b'{"outbox_id":%d,"biz_type":"chat_history_persist","attempt":0,"payload":' % outbox_id
        assert seen[outbox_id].value == head + payload + b"}"
        assert seen[outbox_id].key == key


class Seen:
    """A message whose value is not parsed: what is beyond Python is not beyond Kafka."""

    def __init__(self, key: str, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        self.key, self.value, self.headers = key, value, headers
        self.outbox_id = int(value.split(b",", 1)[0].removeprefix(b'{"outbox_id":'))


def _unparsed(tap: Tap, ids: list[int]) -> list[Seen]:
    sent = tap.until(lambda sent: len(sent) >= len(ids), within=60)
    return [Seen(message.key, message.value, message.headers) for message in sent]


@pytest.mark.slow
def test_odd_payloads_arrive_byte_for_byte_in_kafka_and_do_not_harm_their_message(
    outbox: OutboxTable, kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Kafka has the row's own text; history has the message, in order, whatever else its payload holds."""
    connector("reader")
    connector("sink")
    with Tap(kafka, topic) as tap:
        ids = [insert(outbox, topic, chat(extra)) for extra in ODD.values()]
        settled(outbox, ids)
        assert_in_kafka_as_in_the_table(outbox, tap, ids)
    assert outbox.connection.execute(f"select id, last_error from {OUTBOX} where status = 'dead'").fetchall() == []
    assert outbox.history() == ids


CONTENTS = {
    "every plane": EVERY_PLANE,
    "every character of the first plane": EVERY_CHARACTER,
    "quotes": QUOTES,
    "nothing": "",
    "a megabyte": "x" * (MB - 2_000),
}


def test_odd_texts_are_in_history_as_they_were_enqueued(
    outbox: OutboxTable, topic: str, connector: Callable[..., Process]
) -> None:
    """Content, chat and user are the row's own, to the last bit of a bigint, also with an empty key."""
    connector("reader")
    connector("sink")
    largest = 2**63 - 1
    ids = {
        insert(outbox, topic, chat(content=content, chat_id=name[:36], user_id=largest), key=""): (name[:36], content)
        for name, content in CONTENTS.items()
    }
    settled(outbox, list(ids))
    stored = outbox.connection.execute("select outbox_id, user_id, chat_id, message_content from chat_histories")
    assert {n: (user_id, chat_id, text) for n, user_id, chat_id, text in stored} == {
        n: (largest, chat_id, text) for n, (chat_id, text) in ids.items()
    }
    assert outbox.history() == list(ids)


def test_what_python_cannot_read_arrives_in_kafka_and_is_dead_with_its_reason(
    outbox: OutboxTable, kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Valid JSON beyond the limits of the handler's language is given up at once, and its neighbours are stored."""
    connector("reader")
    connector("sink")
    beyond = {
        "deep": "[" * (5 * sys.getrecursionlimit()) + "]" * (5 * sys.getrecursionlimit()),
        "long number": "9" * 5_000,
        "long number, written short": "1e10000",
    }
    with Tap(kafka, topic) as tap:
        before = insert(outbox, topic, chat())
        ids = [insert(outbox, topic, chat(extra)) for extra in beyond.values()]
        after = insert(outbox, topic, chat())
        settled(outbox, [before, *ids, after])
        assert_in_kafka_as_in_the_table(outbox, tap, [before, *ids, after])
    for outbox_id in ids:
        row = outbox.row(outbox_id)
        assert (row.status, row.retry_count) == ("dead", 0)
        assert "cannot be read" in (row.last_error or "")
    assert outbox.history() == [before, after]


def test_odd_headers_arrive_byte_for_byte(
    outbox: OutboxTable, kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Hundreds of kilobytes of them, odd names, empty values and every plane among them."""
    connector("reader")
    connector("sink")
    headers = {f"name-{n}": "x" * 4_000 for n in range(100)} | {"": "", QUOTES: QUOTES, EVERY_PLANE: EVERY_PLANE}
    with Tap(kafka, topic) as tap:
        outbox_id = insert(outbox, topic, chat(), headers=json.dumps(headers))
        settled(outbox, [outbox_id])
        (sent,) = _unparsed(tap, [outbox_id])
    assert {name: value.decode() for name, value in sent.headers} == headers
    assert outbox.history() == [outbox_id]


@pytest.mark.slow
@pytest.mark.usefixtures("complete_kafka")
def test_a_payload_of_twenty_megabytes_arrives_where_its_topic_takes_it_and_is_dead_elsewhere(
    database: Database, kafka: Kafka, topic: str
) -> None:
    """Where the topic allows it, it is in Kafka and in history byte for byte; elsewhere the reason is clear."""
    with kafka.topic(partitions=1, config={"max.message.bytes": str(32 * MB)}) as wide, Tap(kafka, wide, 1) as tap:
        env = environment(database, kafka, wide)
        set_up(env)
        outbox = OutboxTable(database)
        reader, sink = Process("reader", env=env).start(), Process("sink", env=env).start()
        content = "".join(str(n) for n in range(3_000_000))[: 20 * MB]
        before = insert(outbox, wide, chat())
        large = insert(outbox, wide, chat(content=content))
        after = insert(outbox, wide, chat())
        refused = insert(outbox, topic, chat(content=content))
        settled(outbox, [before, large, after, refused])
        assert_in_kafka_as_in_the_table(outbox, tap, [before, large, after])
        assert outbox.history() == [before, large, after]
        same = "select message_content = %s from chat_histories where outbox_id = %s"
        assert one(outbox.connection, same, [content, large])
        row = outbox.row(refused)
        assert (row.status, row.retry_count) == ("dead", 0)
        assert "max.message.bytes 1048588" in (row.last_error or "")
        assert {reader.returncode, sink.returncode} == {None}
        outbox.close()


@pytest.mark.parametrize("where", ["payload", "headers", "key"])
def test_a_nul_character_is_refused_when_it_is_enqueued(outbox: OutboxTable, topic: str, where: str) -> None:
    """Neither jsonb nor text holds one: the application hears of it in its own transaction, and nothing is written."""
    odd: dict[str, Any] = {"payload": {"user_id": 1}, "headers": {"a": "b"}, "key": "key"}
    odd[where] = "a\0b" if where == "key" else {"a": "b\0c"}
    with pytest.raises(psycopg.DataError):
        Outbox(outbox.connection).enqueue(
            "chat_history_persist", topic, odd["key"], odd["payload"], headers=odd["headers"]
        )
    assert one(outbox.connection, f"select count(*) from {OUTBOX}") == 0
