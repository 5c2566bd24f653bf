"""`reconcile` names every message that is not as it should be, and none that is."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from connector.ops.reconcile.retention import partition_of
from tests.integration.scenario import OUTBOX, is_streaming, metric, one, set_up
from tests.services import Database, Kafka, Process, eventually

Connection = psycopg.Connection[tuple[Any, ...]]
Start = Callable[..., Process]

HISTORY = "public.chat_histories"
KINDS = ["missing", "stuck", "duplicated", "reordered", "differing"]


@pytest.fixture
def connection(connector_env: dict[str, str], database: Database) -> Iterator[Connection]:
    """A pipeline that is set up, by its database."""
    set_up(connector_env)
    with database.connect() as connection:
        yield connection


def enqueue(connection: Connection, topic: str, chat: str, messages: int = 1, **payload: Any) -> list[int]:
    """Enqueue messages of one conversation, each in a transaction of its own; return their ids."""
    return [
        one(
            connection,
            "select outbox_enqueue('chat_history_persist', %s, %s, %s::jsonb)",
            [topic, chat, json.dumps({"user_id": 7, "chat_id": chat, "message_content": str(number), **payload})],
        )
        for number in range(messages)
    ]


def statuses(connection: Connection) -> dict[str, int]:
    """Count the rows by status."""
    return dict(connection.execute(f"select status, count(*) from {OUTBOX} group by status").fetchall())


def all_consumed(connection: Connection, within: float = 60) -> None:
    """Wait until every message is."""
    eventually(lambda: statuses(connection).keys() == {"consumed"}, within=within, what="the storing of everything")


def reconciled(connector: Start, *arguments: str, code: int | None = None, **variables: str) -> Any:
    """Run `reconcile --json`, hold its exit code against its verdict, and return its document."""
    process = connector("reconcile", "--json", *arguments, **variables)
    ended = process.wait(90)
    assert process.stdout, process.stderr
    document = json.loads(process.stdout)
    assert ended == (0 if document["ok"] else 1)
    assert document["ok"] is not any(document[kind] for kind in KINDS)
    assert code is None or code == ended, document
    return document


def named(document: Any) -> dict[str, list[int]]:
    """Return the ids of the samples by kind of damage, those without any left out."""
    samples = {kind: [sample["outbox_id"] for sample in document["samples"][kind]] for kind in KINDS}
    assert {kind: len(ids) for kind, ids in samples.items()} == {kind: document[kind] for kind in KINDS}
    return {kind: ids for kind, ids in samples.items() if ids}


def test_an_empty_outbox_is_proved(connection: Connection, connector: Start) -> None:
    """Nothing is no damage; the document has the fields of the contract, and no more."""
    document = reconciled(connector)
    assert document == {"ok": True, "checked": 0, **dict.fromkeys(KINDS, 0), "samples": {kind: [] for kind in KINDS}}


def statements(guide: str) -> list[str]:
    """Return the blocks of SQL of a guide."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / guide).read_text("utf-8")
    return re.findall(r"^```(?:sql|psql)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def remedies() -> dict[str, str]:
    """Return the SQL of the guide by the first line of each block."""
    return {block.partition("\n")[0].removeprefix("-- "): block for block in statements("prove.md")}


def mend(connection: Connection, what: str, *ids: int) -> None:
    """Do what the guide says."""
    connection.execute(remedies()[what].replace("4711", ", ".join(map(str, ids))))


def read_copies(connection: Connection, copies: Path) -> None:
    """Do what `psql` does with the guide's script."""
    before, copy, after = re.split(r"^\\(copy .*)$", remedies()["Kafka's copies"], flags=re.MULTILINE)
    connection.execute(before)
    with connection.cursor().copy(copy.replace("'copies.jsonl'", "stdin")) as lines:
        lines.write(copies.read_bytes())
    connection.execute(after)


def add_to_history(connection: Connection, doubled: int, copied: int, unnamed: int, *made_up: int) -> None:
    """Add rows of messages that never were, a copy, another one without `outbox_id`, and two rows that are no damage.

    Of these one is from before the connector, and one is the same said once more. A row loses its `outbox_id`.
    """
    connection.execute(f"update {HISTORY} set outbox_id = null where outbox_id = %s", [unnamed])
    connection.execute("drop index chat_histories_outbox_id_key")
    connection.execute(
        f"insert into {HISTORY} (user_id, chat_id, message_content, role, created_at, outbox_id)"
        f" select user_id, chat_id, message_content, role, created_at, outbox_id from {HISTORY} where outbox_id = %s",
        [doubled],
    )
    for outbox_id, created in ((None, "2001-01-01"), (None, "now"), *((outbox_id, "now") for outbox_id in made_up)):
        connection.execute(
            f"insert into {HISTORY} (user_id, chat_id, message_content, role, created_at, outbox_id)"
            " values (7, 'a', '0', 'user', %s, %s)",
            [created, outbox_id],
        )
    connection.execute(
        f"insert into {HISTORY} (user_id, chat_id, message_content, role, created_at)"
        f" select user_id, chat_id, message_content, role, created_at from {HISTORY} where outbox_id = %s",
        [copied],
    )


def of_people(connector: Start, ids: list[int], alike: int) -> None:
    """See that the table for people names these, and what is no damage in notes; also where nothing can be recorded."""
    people = connector("reconcile")
    assert people.wait() == 1
    assert "recorded" not in people.stdout
    assert "1 messages are dead" in people.stdout
    assert "4 rows of history have no outbox_id" in people.stdout
    assert re.search(rf"content of a message, at another time: row \d+ that of #{alike}\n", people.stdout)
    for outbox_id in ids:
        assert f"#{outbox_id} " in people.stdout
    # As a standby is.
    only_read = connector("reconcile", PGOPTIONS="-c default_transaction_read_only=on")
    assert (only_read.wait(), "it could not be recorded" in only_read.stdout) == (1, True)


@pytest.mark.slow
def test_each_kind_of_damage_is_named_and_once_it_is_mended_all_is_proved(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start, tmp_path: Path
) -> None:
    """Damage of every kind, planted by hand, is named by its ids and nothing else is; the guide mends all of it."""
    reader, sink = is_streaming(connector("reader")), connector("sink")
    moment = {"created_at": "2026-01-02T03:04:05.678+02:00", "role": "user"}
    rows = {chat: enqueue(connection, topic, chat, 8, **moment) for chat in ("a", "b", "c")}
    all_consumed(connection)
    assert reconciled(connector)["checked"] == 24
    (untimely,) = enqueue(connection, topic, "i")
    all_consumed(connection)
    sink.stop()
    (stuck,) = enqueue(connection, topic, "d")
    (erased,) = enqueue(connection, topic, "h")
    eventually(lambda: statuses(connection).get("published") == 2, what="the publishing of the stuck messages")
    reader.stop()
    rowless, unmarked, rewritten, made_up = rows["a"][6], rows["c"][6], rows["b"][3], 1 << 40
    connection.execute(f"delete from {OUTBOX} where id = any(%s)", [[erased, rowless]])
    connection.execute(
        f"update {HISTORY} set created_at = created_at + interval '1 hour' where outbox_id = %s", [untimely]
    )
    connection.execute(f"update {OUTBOX} set status = 'published' where id = %s", [unmarked])
    connection.execute(f'update {OUTBOX} set payload = payload || \'{{"role": "nobody"}}\' where id = %s', [rewritten])

    place: dict[int, int] = dict(connection.execute(f"select outbox_id, id from {HISTORY}").fetchall())
    lost, doubled, altered, early, unread = rows["a"][2], rows["a"][4], rows["b"][1], rows["b"][5], rows["c"][0]
    connection.execute(f"delete from {HISTORY} where outbox_id = %s", [lost])
    add_to_history(connection, doubled, rows["c"][5], rows["b"][7], made_up, -3)
    connection.execute(f"update {HISTORY} set message_content = 'not this' where outbox_id = %s", [altered])
    connection.execute(
        f"update {HISTORY} set created_at = created_at + interval '1 microsecond' where outbox_id = %s", [unread]
    )
    late = rows["b"][6]
    for outbox_id, new in ((early, -1), (late, place[early]), (early, place[late])):
        connection.execute(f"update {HISTORY} set id = %s where outbox_id = %s", [new, outbox_id])
    # Moved by hand, before all the others of its key.
    connection.execute(f"update {HISTORY} set id = -1 where outbox_id = %s", [rows["c"][3]])
    connection.execute(f"update {OUTBOX} set published_at = now() - interval '11 minutes' where id = %s", [stuck])
    (overdue,) = enqueue(connection, topic, "e")
    connection.execute(f"update {OUTBOX} set updated_at = now() - interval '2 hours' where id = %s", [overdue])
    (never,) = enqueue(connection, topic, "j")
    connection.execute(f"update {OUTBOX} set next_retry_at = 'infinity' where id = %s", [never])
    (unsent,) = enqueue(connection, topic, "f")
    connection.execute(f"update {OUTBOX} set status = 'consumed' where id = %s", [unsent])
    (dead,) = enqueue(connection, topic, "g")
    connection.execute(f"update {OUTBOX} set status = 'dead' where id = %s", [dead])
    connection.execute(
        f"insert into {HISTORY} (user_id, chat_id, message_content, outbox_id)"
        " values (7, 'f', '0', %s), (7, 'g', '0', %s)",
        [unsent, dead],
    )

    document = reconciled(connector, "--copies", str(copies := tmp_path / "copies.jsonl"))
    signs = {sample["outbox_id"]: sample["signs"] for sample in document["samples"]["missing"]}
    assert signs == {
        lost: ["not_in_history"],
        rows["b"][7]: ["not_in_history"],
        unsent: ["not_in_kafka"],
        erased: ["only_in_kafka"],
        rowless: ["not_in_outbox"],
        made_up: ["only_in_history"],
        -3: ["only_in_history"],
    }
    assert named(document) == {
        "missing": [lost, rows["b"][7], unsent, -3, rowless, made_up, erased],
        "stuck": [stuck, overdue, never],
        "duplicated": [doubled, rows["c"][5]],
        "reordered": [early, rows["c"][2]],
        "differing": [altered, rewritten, unread, unmarked, untimely, dead],
    }
    of_people(connector, [outbox_id for ids in named(document).values() for outbox_id in ids], alike=rows["a"][0])
    assert named(reconciled(connector, "--stuck-after", "1h"))["stuck"] == [overdue, never]

    read_copies(connection, copies)
    for what, ids in (
        ("without its outbox_id", [lost, rows["b"][7]]),
        ("missing from history", [lost]),
        ("missing from Kafka", [unsent]),
        ("missing from the outbox", [erased, rowless]),
        ("made up", [made_up, -3]),
        ("far off", [never]),
        ("duplicated", [doubled]),
        ("the index", []),
        ("duplicated without outbox_id", [rows["c"][5]]),
        ("reordered", [early, rows["c"][2]]),
        ("payload from Kafka", [rewritten]),
        ("differing", [altered, unread, untimely]),
        ("not marked", [unmarked]),
    ):
        mend(connection, what, *ids)
    for command in (["--stuck", "--older-than", "10m"], ["--id", str(dead)]):
        assert connector("redrive", *command, "--reason", "a test", "--yes").wait() == 0
    connector("reader")
    connector("sink")
    all_consumed(connection)
    assert named(reconciled(connector)) == {}


def enqueue_unsent(connection: Connection, topic: str, chat: str) -> int:
    """Make a message as if it had been stored, which Kafka never had."""
    payload = json.dumps({"user_id": 7, "chat_id": chat})
    outbox_id: int = one(
        connection,
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status, consumed_at)"
        " values ('chat_history_persist', %s, %s, %s, 'consumed', clock_timestamp()) returning id",
        [topic, chat, payload],
    )
    connection.execute(
        f"insert into {HISTORY} (user_id, chat_id, outbox_id) values (7, %s, %s)",
        [chat, outbox_id],
    )
    return outbox_id


def test_what_kafka_no_longer_holds_is_not_called_missing(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start
) -> None:
    """Once the log is cut, a note counts what cannot be proved; what came after the cut still has to be there."""
    admin = AdminClient({"bootstrap.servers": durable_kafka.bootstrap_servers, "log_level": 0})
    is_streaming(connector("reader"))
    connector("sink")
    # One partition is cut, another was never written to, and the last one was written to before.
    keys = {partition_of(key.encode(), 6): key for key in map(str, range(100))}
    old = enqueue(connection, topic, keys[0]) + enqueue(connection, topic, keys[5])
    all_consumed(connection)
    for cut in admin.delete_records([TopicPartition(topic, 0, -1)]).values():
        cut.result(20)
    unsent = enqueue_unsent(connection, topic, keys[2])
    assert named(reconciled(connector)) == {"missing": [unsent]}
    for table, column in ((OUTBOX, "id"), (HISTORY, "outbox_id")):
        connection.execute(f"delete from {table} where {column} = %s", [unsent])
    old += enqueue(connection, topic, "a", 3)
    all_consumed(connection)
    connection.execute(f"update {OUTBOX} set created_at = now() - interval '1 hour'")
    for cut in admin.delete_records([TopicPartition(topic, partition, -1) for partition in range(6)]).values():
        cut.result(20)
    process = connector("reconcile")
    assert process.wait() == 0, process.stdout
    assert f"{len(old)} messages are older than what Kafka keeps" in process.stdout
    # The next message is at the beginning of its log, long enough before the one that nobody sent.
    enqueue(connection, topic, "a")
    all_consumed(connection)
    unsent = enqueue(connection, topic, "a")[0]
    eventually(
        lambda: statuses(connection) == {"consumed": len(old) + 2}, within=30, what="the storing of the last one"
    )
    for cut in admin.delete_records([TopicPartition(topic, partition, -1) for partition in range(6)]).values():
        cut.result(20)
    assert named(reconciled(connector)) == {}
    connection.execute(f"update {OUTBOX} set created_at = now() + interval '2 minutes' where id = %s", [unsent])
    enqueue(connection, topic, "a")
    all_consumed(connection)
    assert named(reconciled(connector)) == {"missing": [unsent]}


@pytest.mark.slow
def test_much_that_history_has_lost_is_put_back_and_sorted_at_once(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start
) -> None:
    """Every third message is gone: one statement stores them anew, another sorts all keys that `reconcile` names."""
    is_streaming(connector("reader"))
    connector("sink")
    for chat in "abcde":
        enqueue(connection, topic, chat, 20)
    all_consumed(connection)
    lost = connection.execute(f"delete from {HISTORY} where outbox_id %% 3 = 1 returning outbox_id", []).fetchall()
    assert reconciled(connector)["missing"] == len(lost)
    (put_back,) = [block for block in statements("replay.md") if "insert into" in block]
    connection.execute(put_back)
    document = reconciled(connector, "--samples", "100000")
    assert set(named(document)) == {"reordered"}
    mend(connection, "reordered", *named(document)["reordered"])
    assert named(reconciled(connector)) == {}

    admin = AdminClient({"bootstrap.servers": durable_kafka.bootstrap_servers, "log_level": 0})
    admin.delete_topics([topic])[topic].result(20)
    eventually(lambda: topic not in admin.list_topics(timeout=10).topics, within=20, what="the end of the topic")
    admin.create_topics([NewTopic(topic, 6)])[topic].result(20)
    document = reconciled(connector, "--samples", "100000")
    assert len(named(document)["missing"]) == 100
    mend(connection, "missing from Kafka", *named(document)["missing"])
    all_consumed(connection)
    assert named(reconciled(connector)) == {}


def test_what_prune_has_removed_is_nobodys_damage(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start
) -> None:
    """Not a dead message that went, nor history that was deleted afterwards; a row that somebody else removes is."""
    is_streaming(connector("reader"))
    connector("sink")
    (stored,) = enqueue(connection, topic, "a")
    enqueue(connection, topic, "a", user_id="nobody")
    eventually(lambda: statuses(connection) == {"consumed": 1, "dead": 1}, within=30, what="a death")
    assert connector("prune", "--older-than", "0s", "--dead").wait(30) == 0
    connection.execute(f"delete from {HISTORY} where outbox_id = %s", [stored])
    process = connector("reconcile")
    assert process.wait() == 0, process.stdout
    assert f"2 messages of Kafka (#{stored}, #{stored + 1}) are in neither table" in process.stdout
    (later,) = enqueue(connection, topic, "a", user_id="nobody")
    eventually(lambda: statuses(connection) == {"dead": 1}, within=30, what="another death")
    connection.execute(f"delete from {OUTBOX} where id = %s", [later])
    assert named(reconciled(connector)) == {"missing": [later]}
    enqueue(connection, topic, "a")
    all_consumed(connection)
    assert named(reconciled(connector)) == {"missing": [later]}
    assert named(reconciled(connector, "--since", "0s")) == {}


def swap(connection: Connection, *ids: int) -> None:
    """Let two messages change places in history."""
    place: dict[int, int] = dict(
        connection.execute(f"select outbox_id, id from {HISTORY} where outbox_id = any(%s)", [list(ids)]).fetchall()
    )
    one_id, other = ids
    for outbox_id, new in ((one_id, -1), (other, place[one_id]), (one_id, place[other])):
        connection.execute(f"update {HISTORY} set id = %s where outbox_id = %s", [new, outbox_id])


def test_a_redriven_message_may_stand_behind_those_that_were_stored_meanwhile(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start
) -> None:
    """The record of its redrive explains its place; without it, it is out of order."""
    # As tables may be that were there before.
    connection.execute(f"alter table {HISTORY} alter created_at type timestamp, alter created_at set default now()")
    for column in ("created_at", "published_at", "consumed_at"):
        connection.execute(f"alter table {OUTBOX} alter {column} type timestamp")
    connection.execute(f"alter database {connection.info.dbname} set timezone = 'Asia/Kolkata'")
    is_streaming(connector("reader"))
    connector("sink")
    (dead,) = enqueue(connection, topic, "a", user_id="nobody")
    enqueue(connection, topic, "a", 2)
    eventually(lambda: statuses(connection) == {"dead": 1, "consumed": 2}, within=30, what="a death, and what follows")
    assert named(reconciled(connector)) == {}
    payload = '{"user_id": 7, "chat_id": "a"}'
    connection.execute(f"update {OUTBOX} set payload = %s where id = %s", [payload, dead])
    assert connector("redrive", "--id", str(dead), "--yes").wait() == 0
    all_consumed(connection)
    assert named(reconciled(connector)) == {}
    # What came after its redrive is to stand behind it.
    (after,) = enqueue(connection, topic, "a", created_at="2026-01-02T03:04:05Z")
    all_consumed(connection)
    assert named(reconciled(connector)) == {}
    swap(connection, dead, after)
    assert named(reconciled(connector)) == {"reordered": [dead]}
    swap(connection, dead, after)
    connection.execute("delete from outbox_connector_redrives")
    assert named(reconciled(connector)) == {"reordered": [dead]}
    # Nobody promises an order of what was retried, where it is not asked for.
    connection.execute(f"update {OUTBOX} set retry_count = 1 where id = %s", [dead])
    assert named(reconciled(connector, CONNECTOR_KEY_ORDERING="relaxed")) == {}


@contextmanager
def busy(database: Database, topic: str) -> Iterator[threading.Event]:
    """Enqueue from several transactions at a time, often into the same conversations, until the event is set."""
    over = threading.Event()
    problems: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with database.connect(autocommit=False) as connection:
                turn = 0
                while not over.wait(0.05):
                    turn += 1
                    for chat in (f"chat-{turn % 7}", f"chat-{(turn * number) % 7}"):
                        enqueue(connection, topic, chat, 2)
                    connection.commit()
        except psycopg.Error as error:
            problems.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 4)]
    for writer in writers:
        writer.start()
    try:
        yield over
    finally:
        over.set()
        for writer in writers:
            writer.join()
    assert problems == []


def test_nothing_is_named_while_the_pipeline_is_busy(
    connection: Connection, database: Database, durable_kafka: Kafka, topic: str, connector: Start
) -> None:
    """With messages in flight, in retry, held and pruned, and writers of one key that overlap, nothing is damage."""
    connection.execute("create table agent_chats (chat_id varchar(36) primary key)")
    connection.execute(f"alter table {HISTORY} add foreign key (chat_id) references agent_chats")
    connection.execute("insert into agent_chats select 'chat-' || n from generate_series(1, 6) as n")
    is_streaming(connector("reader"))
    connector("sink")
    with busy(database, topic) as over:
        eventually(
            lambda: one(connection, f"select count(*) > 2 from {OUTBOX} where next_retry_at is not null"),
            within=30,
            what="messages in retry and held",
        )
        for _ in range(2):
            pruning = connector("prune", "--older-than", "1s")
            assert named(reconciled(connector)) == {}
            assert pruning.wait(30) == 0
        assert named(reconciled(connector, "--since", "2s")) == {}
        connection.execute("insert into agent_chats values ('chat-0')")
        assert named(reconciled(connector)) == {}
        over.set()
    all_consumed(connection)
    document = reconciled(connector)
    assert document["ok"], document
    assert document["checked"] == one(connection, f"select count(*) from {OUTBOX}")


def stored_and_sent(connection: Connection, kafka: Kafka, topic: str, rows: int) -> None:
    """Fill outbox, history and topic as if the pipeline had carried so many messages of 60,000 conversations."""
    payload = "jsonb_build_object('user_id', 7, 'chat_id', 'chat-' || n %% 60000, 'message_content', n::text)"
    connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status, published_at, consumed_at)"
        f" select 'chat_history_persist', %s, 'chat-' || n %% 60000, {payload}, 'consumed', now(), now()"
        "   from generate_series(1, %s) as n",
        [topic, rows],
    )
    connection.execute(
        f"insert into {HISTORY} (user_id, chat_id, message_content, outbox_id)"
        f" select 7, 'chat-' || n %% 60000, n::text, n from generate_series(1, %s) as n",
        [rows],
    )
    connection.execute(f"analyze {OUTBOX}, {HISTORY}")
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "linger.ms": 20, "log_level": 0})
    for number in range(1, rows + 1):
        value = b'{"outbox_id":%d,"biz_type":"chat_history_persist","attempt":0,"payload":{}}' % number
        while True:
            try:
                producer.produce(topic, value, f"chat-{number % 60000}")
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


MEMORY_LIMIT_MB = 130


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_messages_are_compared_in_little_memory_and_an_interrupted_run_goes_on(
    connection: Connection, durable_kafka: Kafka, topic: str, connector: Start, tmp_path: Path
) -> None:
    """300,000 messages take little memory; stopped on its way, it goes on from there and finds what is wrong."""
    rows = 300_000
    stored_and_sent(connection, durable_kafka, topic, rows)
    connection.execute(f"delete from {HISTORY} where outbox_id in (7, %s)", [rows - 7])
    state = tmp_path / "state"
    first = connector("reconcile", "--state", str(state), "--rate", "30000")
    eventually(state.exists, within=30, what="its first ranges")
    assert first.stop() == 1
    kept = json.loads(state.read_text("utf-8"))
    assert 0 < kept["after"] < rows
    # What lies behind it is not looked at again; what is ahead is.
    connection.execute(f"delete from {HISTORY} where outbox_id in (8, %s)", [rows - 8])

    other = connector("reconcile", "--state", str(state), "--since", "2h", "--stuck-after", "1h")
    assert other.wait(30) == 78
    assert "begun with --stuck-after 600s, and this run has --since 7200s --stuck-after 3600s" in other.stderr

    largest = 0.0
    second = connector("reconcile", "--json", "--state", str(state))
    pause = threading.Event()
    while second.returncode is None:
        with suppress(psutil.NoSuchProcess):
            largest = max(largest, second.rss_mb)
        pause.wait(0.05)
    assert second.wait() == 1
    document = json.loads(second.stdout)
    assert document["checked"] == rows
    assert named(document) == {"missing": [7, rows - 8, rows - 7]}
    assert largest < MEMORY_LIMIT_MB
    assert not state.exists()


def test_the_sink_proves_what_it_has_settled_and_shows_what_is_damaged_until_it_is_mended(
    connection: Connection, topic: str, connector: Start
) -> None:
    """`unproved` and `last_proof_timestamp` follow the database; what is on its way is proved once it is settled."""
    is_streaming(connector("reader"))
    sink = connector("sink", CONNECTOR_PROOF_SECONDS="0.2")
    rows = enqueue(connection, topic, "a", 3)
    all_consumed(connection)
    proved = eventually(lambda: metric(sink, "last_proof_timestamp"), within=20, what="the first proof")
    eventually(lambda: metric(sink, "last_proof_timestamp") > proved, within=20, what="the next one")
    assert metric(sink, "unproved") == 0
    rows += enqueue(connection, topic, "a", 3)
    all_consumed(connection)
    connection.execute(f"update {HISTORY} set role = 'nobody' where outbox_id = %s", [rows[-1]])
    (lost,) = enqueue(connection, topic, "b")
    connection.execute(f"update {OUTBOX} set status = 'consumed' where id = %s", [lost])
    connection.execute(f"delete from {HISTORY} where outbox_id = %s", [lost])
    eventually(lambda: metric(sink, "unproved") == 2, within=20, what="word of the damage")
    said = {
        key: why
        for line in sink.events
        if line["event"] == "messages_unproved"
        for key, why in line["outbox_ids"].items()
    }
    assert said == {str(rows[-1]): "differing", str(lost): "missing"}
    connection.execute(f"update {HISTORY} set role = null where outbox_id = %s", [rows[-1]])
    mend(connection, "missing from history", lost)
    eventually(lambda: metric(sink, "unproved") == 0, within=20, what="the proof of what was mended")
    assert sink.stop() == 0


def test_the_sink_goes_round_what_it_has_proved_before(connection: Connection, topic: str, connector: Start) -> None:
    """Damage that is done long after a message was settled, or before the sink began, shows until it is mended."""
    is_streaming(connector("reader"))
    sink = connector("sink", CONNECTOR_PROOF_SECONDS="0.2")
    rows = enqueue(connection, topic, "a", 3) + enqueue(
        connection, topic, "a", created_at="2026-01-02T03:04:05.6+02:00"
    )
    all_consumed(connection)
    assert sink.stop() == 0
    sink = connector("sink", CONNECTOR_PROOF_SECONDS="0.2")
    proved = eventually(lambda: metric(sink, "last_proof_timestamp"), within=20, what="the first proof")
    eventually(lambda: metric(sink, "last_proof_timestamp") > proved, within=20, what="the next one")
    assert metric(sink, "unproved") == 0
    connection.execute(f"delete from {HISTORY} where outbox_id = %s", [rows[1]])
    for outbox_id, by in ((rows[2], "1 hour"), (rows[3], "1 microsecond")):
        connection.execute(
            f"update {HISTORY} set created_at = created_at - %s::interval where outbox_id = %s", [by, outbox_id]
        )
    eventually(lambda: metric(sink, "unproved") == 3, within=20, what="word of the damage")
    mend(connection, "missing from history", rows[1])
    mend(connection, "differing", rows[2], rows[3])
    eventually(lambda: metric(sink, "unproved") == 0, within=20, what="the proof of what was mended")
    assert sink.stop() == 0


def test_while_nothing_is_settled_the_sink_proves_a_tenth_as_often(
    connection: Connection, topic: str, connector: Start
) -> None:
    """An idle database is asked next to nothing; what is settled then is proved as soon as ever."""
    is_streaming(connector("reader"))
    sink = connector("sink", CONNECTOR_PROOF_SECONDS="0.2")

    def proved_after(moment: float) -> float:
        proved = eventually(
            lambda: metric(sink, "last_proof_timestamp") > moment and metric(sink, "last_proof_timestamp"),
            within=20,
            what="the next proof",
        )
        assert isinstance(proved, float)
        return proved

    enqueue(connection, topic, "a", 3)
    all_consumed(connection)
    last = proved_after(time.time())
    while (proved := proved_after(last)) < last + 10 * 0.2:
        last = proved
    assert proved_after(proved) >= proved + 10 * 0.2
    (lost,) = enqueue(connection, topic, "b")
    all_consumed(connection)
    settled = time.time()
    assert proved_after(settled) < settled + 10 * 0.2
    connection.execute(f"delete from {HISTORY} where outbox_id = %s", [lost])
    eventually(lambda: metric(sink, "unproved") == 1, within=20, what="word of the damage")
    assert sink.stop() == 0
