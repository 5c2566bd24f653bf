"""`redrive`: which rows it means, what it leaves of them, and that copies of before can do them no harm."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, NewTopic, ResourceType
from psycopg import sql
from psycopg.conninfo import make_conninfo

from connector.cli import main
from connector.errors import ConnectorError, SetupRequired
from connector.kafka import Kafka as Connections
from connector.kafka import LetterBox
from connector.ops.latest_letters import read_latest
from connector.ops.redrive import RedriveOptions, redrive
from connector.ops.redrive_letters import LetterOptions, redrive_letters
from connector.outbox import Failure, Fences, Status, Table
from connector.store.queries import Tables
from connector.store.redrives import Redrives, Run, Selection
from connector.store.schema import migrate
from tests.integration.letters import write_letter
from tests.integration.outbox_table import PAYLOAD, TABLES, OutboxTable, item
from tests.integration.scenario import Tap, forbidden, is_streaming, one, set_up
from tests.services import Database, Kafka, Postgres, Process, environment, eventually

TOO_LONG = "c" * 37
END_OF_TRANSACTION = b"\0\x1a\0\1"
"""How an EndTxn request begins behind its length (https://kafka.apache.org/protocol)."""


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def dead(outbox: OutboxTable, key: str = "key", error: str = "it failed", topic: str = "topic", **columns: Any) -> int:
    """Insert a row whose attempts are used up, the last of them an hour ago."""
    outbox_id = outbox.new(key, topic, **columns)
    outbox.connection.execute(
        "update agent_outbox_messages set status = 'dead', retry_count = max_retry, last_error = %s,"
        " updated_at = now() - interval '1 hour' where id = %s",
        [error, outbox_id],
    )
    return outbox_id


def stuck(outbox: OutboxTable, key: str = "key", minutes: int = 60) -> int:
    """Insert a row that was published so long ago, and never consumed."""
    outbox_id = outbox.new(key)
    outbox.change(outbox_id, f"status = 'published', published_at = now() - interval '{minutes} minutes'")
    return outbox_id


def run(
    outbox: OutboxTable, *, really: bool = True, reason: str | None = None, rate: float = 10_000, **selection: Any
) -> str:
    """Run `redrive` in this process and return what it prints."""
    out = io.StringIO()
    options = RedriveOptions(outbox.database.url, TABLES, 10.0, Selection(**selection), "test@here", reason, rate)
    redrive(options, out, really=really)
    return out.getvalue()


def with_status(outbox: OutboxTable, status: str) -> list[int]:
    """Return the ids of the rows with a status."""
    rows = outbox.connection.execute("select id from agent_outbox_messages where status = %s order by id", [status])
    return [outbox_id for (outbox_id,) in rows]


def pending(outbox: OutboxTable) -> list[int]:
    """Return the ids of the rows that are pending."""
    return with_status(outbox, "pending")


def everything(outbox: OutboxTable) -> list[Any]:
    """Return every row and every line of the record."""
    rows = outbox.connection.execute("select * from agent_outbox_messages order by id").fetchall()
    return [*rows, *outbox.connection.execute("select * from outbox_connector_redrives order by id")]


# --- which rows ------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows that differ in everything that a selection can name."""

    plain: int
    other_key: int
    other_type: int
    other_error: int
    young: int
    stuck: int
    fresh: int


@pytest.fixture
def rows(outbox: OutboxTable) -> Rows:
    """Five dead rows, one that is stuck, one that was published a moment ago, and one that is stored."""
    young = dead(outbox)
    outbox.change(young, "updated_at = now()")
    outbox.change(outbox.new(), "status = 'consumed', updated_at = now() - interval '1 hour'")
    return Rows(
        dead(outbox),
        dead(outbox, "other"),
        dead(outbox, biz_type="other"),
        dead(outbox, error='Value 100% too_long for "x\\y"'),
        young,
        stuck(outbox),
        stuck(outbox, minutes=0),
    )


SELECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all": ({}, {"plain", "other_key", "other_type", "other_error", "young"}),
    "key": ({"key": "other"}, {"other_key"}),
    "biz_type": ({"biz_type": "other"}, {"other_type"}),
    "age": ({"older_than": 600.0}, {"plain", "other_key", "other_type", "other_error"}),
    "error, in any case": ({"error_like": "VALUE 100"}, {"other_error"}),
    "error, with what LIKE knows": ({"error_like": "too_long"}, {"other_error"}),
    "error, an underscore is itself": ({"error_like": "it_failed"}, set()),
    "error, a backslash is itself": ({"error_like": "x\\y"}, {"other_error"}),
    "error, a per cent sign is anything": ({"error_like": "it%led"}, {"plain", "other_key", "other_type", "young"}),
    "conditions together": ({"key": "key", "older_than": 600.0, "error_like": "it failed"}, {"plain", "other_type"}),
    "stuck": ({"status": Status.PUBLISHED, "older_than": 600.0}, {"stuck"}),
    "stuck, of any age": ({"status": Status.PUBLISHED}, {"stuck", "fresh"}),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_means_just_the_rows_for_which_all_of_it_holds(outbox: OutboxTable, rows: Rows, name: str) -> None:
    """What the dry run counts is what is then moved, and nothing else is touched."""
    selection, expected = SELECTIONS[name]
    before = everything(outbox)
    shown = run(outbox, really=False, **selection)
    assert everything(outbox) == before
    assert shown.startswith(f"{len(expected)} ")
    run(outbox, **selection)
    assert pending(outbox) == sorted(getattr(rows, row) for row in expected)


def test_ids_may_be_repeated_and_those_that_cannot_be_moved_are_told_of(outbox: OutboxTable, rows: Rows) -> None:
    """Only the dead ones among the ids are put back; each of the others is named with what it is."""
    consumed = one(outbox.connection, "select id from agent_outbox_messages where status = 'consumed'")
    said = run(outbox, ids=(rows.plain, rows.other_key, rows.stuck, consumed, 999))
    assert pending(outbox) == [rows.plain, rows.other_key]
    assert f"#{consumed} is consumed" in said
    assert f"#{rows.stuck} is published: it is left alone, unless it is stuck: see --stuck" in said
    assert "#999: there is no such row" in said


def test_a_dry_run_shows_counts_by_reason_and_samples_that_cannot_steer_a_terminal(outbox: OutboxTable) -> None:
    """Errors that differ only in their values are one reason; control characters of keys and errors are not printed."""
    ids = [dead(outbox, error=f"no chat Key (chat_id)=(chat-{n}) in line {n} (SQLSTATE 23503)") for n in range(7)]
    dead(outbox, "\x1b[2Jkey", error="odd\x1b]0;title\x07 and\nlong")
    said = run(outbox, really=False)
    assert "8 dead messages selected" in said
    assert "         7  no chat Key (chat_id)=(…) in line N (SQLSTATE 23503)" in said
    assert f"\n{ids[0]}  " in said
    assert "… and 3 more" in said
    assert "Nothing was changed. With --yes they are put back." in said
    assert all(letter.isprintable() or letter == "\n" for letter in said)


# --- what becomes of a row -------------------------------------------------------------------------------------------


def test_a_redriven_row_is_due_at_once_with_fresh_attempts_and_no_copy_of_before_counts(outbox: OutboxTable) -> None:
    """`retry_count` goes on, `max_retry` goes on with it by as many attempts as at first, time after time."""
    outbox_id = dead(outbox, max_retry=3)
    for retry_count, max_retry in ((4, 7), (8, 11)):
        run(outbox, ids=(outbox_id,))
        (due,) = outbox.bookkeeping().due_rows(10)
        assert (due.fence.outbox_id, due.fence.retry_count) == (outbox_id, retry_count)
        assert one(outbox.connection, "select max_retry from agent_outbox_messages") == max_retry
        for attempt in range(retry_count, max_retry):
            assert outbox.status(outbox_id) == "pending"
            outbox.bookkeeping().settle_failures([Failure(outbox_id, attempt, "again", "reason")])
        assert outbox.status(outbox_id) == "dead"


@pytest.mark.parametrize(
    ("retry_count", "max_retry", "expected"),
    [(-5, 20, (1, 21)), (2_147_483_647, 20, (2_147_483_647, 2_147_483_647)), (3, -1, (4, 5))],
)
def test_odd_counters_of_a_row_do_not_stop_the_others(
    outbox: OutboxTable, retry_count: int, max_retry: int, expected: tuple[int, int]
) -> None:
    """Whatever somebody has set them to by hand, the row has an attempt, and its neighbour is moved too."""
    odd, neighbour = dead(outbox), dead(outbox)
    outbox.change(odd, f"retry_count = {retry_count}, max_retry = {max_retry}, updated_at = 'infinity'")
    run(outbox)
    assert pending(outbox) == [odd, neighbour]
    counters = "select (retry_count, max_retry)::text from agent_outbox_messages where id = %s"
    assert one(outbox.connection, counters, [odd]) == f"({expected[0]},{expected[1]})"
    assert len(outbox.bookkeeping().due_rows(10)) == 2


@pytest.mark.parametrize("final", [False, True], ids=["passing", "final"])
@pytest.mark.parametrize("status", [Status.DEAD, Status.PUBLISHED])
def test_a_late_failure_of_an_earlier_copy_changes_nothing(outbox: OutboxTable, status: Status, *, final: bool) -> None:
    """Of a copy published before the redrive, no failure counts, whether a retry could have helped or not.

    A row that died at once died with the attempt that its copy in Kafka still carries.
    """
    outbox_id = outbox.new()
    if status is Status.PUBLISHED:
        outbox.change(outbox_id, "status = 'published', published_at = now()")
    else:
        outbox.bookkeeping().settle_failures([Failure(outbox_id, 0, "hopeless", "reason", final=True)])
    run(outbox, status=status)
    before = outbox.row(outbox_id)
    failure = Failure(outbox_id, 0, "late", "reason", final)
    assert outbox.bookkeeping().settle_failures([failure]) == []
    outbox.settlement().settle([] if final else [item(outbox_id, 0, chat_id=TOO_LONG)], [failure] if final else [])
    assert outbox.row(outbox_id) == before
    assert before.status == "pending"


@pytest.mark.parametrize("status", [Status.DEAD, Status.PUBLISHED])
def test_a_late_mark_of_an_earlier_copy_changes_nothing(outbox: OutboxTable, status: Status) -> None:
    """The mark of a copy published before the redrive would leave the row published with nobody to publish it again."""
    outbox_id = outbox.new()
    fence = outbox.fence(outbox_id)
    outbox.change(outbox_id, f"status = '{status}'")
    run(outbox, status=status)
    assert outbox.bookkeeping().mark_published(Fences([fence])) == 0
    assert outbox.status(outbox_id) == "pending"
    # Not even one that shows the same moment of change.
    stale = outbox.fence(outbox_id)._replace(retry_count=0)
    assert outbox.bookkeeping().mark_published(Fences([stale])) == 0


def test_a_late_success_of_an_earlier_copy_is_stored_and_the_new_copy_is_skipped(outbox: OutboxTable) -> None:
    """Whichever copy comes first is stored; history has one row."""
    outbox_id = dead(outbox)
    run(outbox)
    settlement = outbox.settlement()
    assert [outcome.what for outcome in settlement.settle([item(outbox_id, 0)], []).outcomes] == ["stored"]
    assert [outcome.what for outcome in settlement.settle([item(outbox_id, 21)], []).outcomes] == ["consumed"]
    assert outbox.history() == [outbox_id]
    assert run(outbox).startswith("0 dead")


def test_a_sink_that_settles_a_stuck_row_at_that_moment_wins(outbox: OutboxTable) -> None:
    """The redrive waits for the row's lock, sees that it is consumed, and leaves it."""
    outbox_id, neighbour = stuck(outbox), stuck(outbox)
    moving, waiting = outbox.connect(), outbox.connect()
    redrives = Redrives(waiting, TABLES)
    this_run = Run(uuid4(), "test@here", None, redrives.clock())
    with ThreadPoolExecutor(1) as pool:
        with moving.transaction():
            outbox.settlement(moving).settle([item(outbox_id)], [])
            future = pool.submit(redrives.move, Selection(Status.PUBLISHED), this_run, None, 1)
            outbox.wait_until_blocked(waiting)
        assert future.result(20) == [neighbour]
    assert outbox.status(outbox_id) == "consumed"


# --- order -----------------------------------------------------------------------------------------------------------


def test_later_messages_of_the_key_that_are_not_stored_yet_wait_for_a_redriven_one(outbox: OutboxTable) -> None:
    """What is behind it in the outbox comes behind it in history; what was stored before stays where it is."""
    stored_before = outbox.new()
    first, second, behind = dead(outbox), dead(outbox), outbox.new()
    settlement = outbox.settlement()
    settlement.settle([item(stored_before)], [])
    run(outbox)
    assert [row.fence.outbox_id for row in outbox.bookkeeping().due_rows(10)] == [first, second]
    assert [outcome.what for outcome in settlement.settle([item(behind)], []).outcomes] == ["held"]
    assert [outcome.what for outcome in settlement.settle([item(second, 21)], []).outcomes] == ["held"]
    settlement.settle([item(first, 21)], [])
    settlement.settle([item(second, 21), item(behind)], [])
    assert outbox.history() == [stored_before, first, second, behind]


def test_rows_of_several_batches_come_due_in_outbox_order(outbox: OutboxTable) -> None:
    """One due time for the whole run: its batches may be far apart, or the clock set back between them."""
    ids = [dead(outbox) for _ in range(6)]
    redrives = Redrives(outbox.connect(), TABLES)
    this_run = Run(uuid4(), "test@here", None, redrives.clock())
    after = None
    for _ in range(3):
        after = redrives.move(Selection(), this_run, after, 2)[-1]
    assert [row.fence.outbox_id for row in outbox.bookkeeping().due_rows(10)] == ids
    assert one(outbox.connection, "select count(distinct next_retry_at) from agent_outbox_messages") == 1


# --- the record ------------------------------------------------------------------------------------------------------


def test_each_redrive_is_recorded_with_who_when_what_and_why(outbox: OutboxTable) -> None:
    """A line a message, in the transaction that moves it: role, user and machine, time, error and count of before."""
    outbox_id = dead(outbox, "a key", error="the reason of its death", max_retry=3)
    run(outbox, reason="handler mended")
    record = outbox.connection.execute(
        "select redriven_by, database_role, reason, outbox_table, outbox_id, was, error, retry_count, attempt, topic,"
        " message_key, clock_timestamp() - redriven_at < interval '1 minute' from outbox_connector_redrives"
    ).fetchall()
    role = outbox.connection.info.user
    ((redriven_by, *rest),) = record
    assert "@" in redriven_by
    table, error = '"public"."agent_outbox_messages"', "the reason of its death"
    assert rest == [role, "handler mended", table, outbox_id, "dead", error, 3, 4, "topic", "a key", True]


def test_a_second_run_moves_nothing_and_records_nothing(outbox: OutboxTable) -> None:
    """Run again at once, it finds nothing dead."""
    dead(outbox)
    run(outbox)
    before = everything(outbox)
    assert "0 dead messages selected" in run(outbox)
    assert everything(outbox) == before


def test_a_batch_that_cannot_be_recorded_is_not_moved(outbox: OutboxTable) -> None:
    """Row and record are one transaction: a refusal leaves both as they were, and tells what to do."""
    outbox_id = dead(outbox)
    outbox.connection.execute("drop table outbox_connector_redrives")
    with pytest.raises(SetupRequired, match="outbox-connector setup"):
        run(outbox)
    assert outbox.status(outbox_id) == "dead"


def test_a_row_that_dies_again_while_the_run_goes_on_is_not_moved_twice(outbox: OutboxTable) -> None:
    """A run goes through the ids once, so that a message that cannot succeed does not keep it going for ever."""
    ids = [dead(outbox) for _ in range(3)]
    redrives = Redrives(outbox.connect(), TABLES)
    this_run = Run(uuid4(), "test@here", None, redrives.clock())
    moved: list[int] = []
    while batch := redrives.move(Selection(), this_run, moved[-1] if moved else None, 1):
        moved += batch
        outbox.bookkeeping().settle_failures([Failure(moved[-1], 21, "hopeless", "reason", final=True)])
    assert moved == ids


def test_tables_of_any_name_are_redriven_each_with_its_own_record(database: Database) -> None:
    """Quotes, blanks and braces in names; two outboxes of one schema share the record and not their attempts."""
    one_outbox = Tables(Table('odd "schema"', "an outbox {x}"), Table("public", "one's history"))
    other = Tables(Table('odd "schema"', "Other"), Table("public", "other_history"))
    with database.connect() as connection:
        connection.execute('create schema "odd ""schema"""')
        for tables in (one_outbox, other):
            connection.execute('drop function if exists "odd ""schema""".outbox_enqueue')
            migrate(connection, tables)
            statement = "insert into {} (biz_type, topic, message_key, payload, status) values ('b','t','k','1','dead')"
            connection.execute(sql.SQL(statement).format(sql.Identifier(*tables.outbox)))
        for _ in range(2):
            options = RedriveOptions(database.url, one_outbox, 10.0, Selection(), "test@here", None, 1_000)
            assert redrive(options, io.StringIO(), really=True) == 1
            table = sql.Identifier(*one_outbox.outbox)
            connection.execute(sql.SQL("update {} set status = 'dead'").format(table))
        options = RedriveOptions(database.url, other, 10.0, Selection(), "test@here", None, 1_000)
        assert redrive(options, io.StringIO(), really=True) == 1
        limits = [
            connection.execute(sql.SQL("select max_retry from {}").format(sql.Identifier(*t.outbox))).fetchone()
            for t in (one_outbox, other)
        ]
    # The first has had one attempt less of its twenty when it was put back for the second time.
    assert limits == [(22,), (21,)]


# --- dead letters ----------------------------------------------------------------------------------------------------


class Letters:
    """A dead-letter topic with letters in it, as sinks write them."""

    def __init__(self, kafka: Kafka, topic: str, outbox: OutboxTable) -> None:
        self.topic, self.dead, self._outbox = topic, f"{topic}.dead", outbox
        self.kafka = Connections(kafka.bootstrap_servers, {})
        self._producer = Producer(
            {"bootstrap.servers": kafka.bootstrap_servers, "partitioner": "murmur2_random", "log_level": 0}
        )
        self._admin = kafka.admin()

    def make(self) -> None:
        """Make the dead-letter topic, of three partitions."""
        (made,) = self._admin.create_topics([NewTopic(self.dead, 3, 1)]).values()
        made.result(20)
        eventually(lambda: self._ready() == 3, what="the dead-letter topic")

    def remove(self) -> None:
        """Delete the dead-letter topic."""
        (deleted,) = self._admin.delete_topics([self.dead]).values()
        deleted.result(20)
        eventually(lambda: self._ready() == 0, what="the end of the dead-letter topic")

    def _ready(self) -> int:
        topic = self._admin.list_topics(timeout=5).topics.get(self.dead)
        return 0 if topic is None else sum(partition.leader >= 0 for partition in topic.partitions.values())

    def write(self, value: bytes, reason: str = "not JSON", topic: str | None = None, **headers: str) -> None:
        """Write a letter whose message came from the topic, or from another."""
        write_letter(self._producer, topic or self.topic, value, reason, self.dead, **headers)

    def send(self, value: bytes) -> None:
        """Send something else to where the letters go."""
        self._producer.produce(self.topic, value, b"key")
        assert self._producer.flush(20) == 0

    def redrive(self, *, really: bool = True, rate: float = 1_000.0, **given: Any) -> str:
        """Run `redrive --dead-letters` in this process and return what it prints."""
        out = io.StringIO()
        selection: dict[str, Any] = {"key": None, "error_like": None, "older_than": None, "topics": (self.topic,)}
        options = LetterOptions(
            database_url=self._outbox.database.url,
            kafka=self.kafka,
            tables=TABLES,
            dead_letter_topic=self.dead,
            redriven_by="test@here",
            reason="a new sink",
            start_deadline_seconds=10.0,
            rate=rate,
            **(selection | given),
        )
        redrive_letters(options, out, really=really)
        return out.getvalue()


@pytest.fixture
def letters(kafka: Kafka, topic: str, outbox: OutboxTable) -> Letters:
    """An empty dead-letter topic of three partitions beside `topic`."""
    letters = Letters(kafka, topic, outbox)
    letters.make()
    return letters


def test_letters_go_back_to_their_topic_once(letters: Letters, kafka: Kafka, outbox: OutboxTable) -> None:
    """With key, value and headers as they were, and a header that tells where they lay; a second run sends none."""
    letters.write(b"first")
    letters.write(b"second", reason="no positive integer `outbox_id` in line 7")
    assert "2 dead letters selected" in letters.redrive(really=False)
    with Tap(kafka, letters.topic) as tap:
        assert tap.read(0.5) == []
        assert "2 dead letters sent back" in letters.redrive()
        sent = tap.until(lambda sent: len(sent) >= 2)
        assert [message.value for message in sent] == [b"first", b"second"]
        assert {message.key for message in sent} == {"key"}
        (place,) = {place.rpartition(b"/")[0] for place in (dict(m.headers)["redriven_from"] for m in sent)}
        assert place.startswith(f"{letters.dead}/".encode())
        assert [name for name, _ in sent[0].headers] == ["traceparent", "redriven_from"]
        letters.write(b"third")
        said = letters.redrive()
        assert "1 dead letter sent back" in said
        assert "left: 2 that were sent back before" in said
        assert [message.value for message in tap.until(lambda sent: len(sent) >= 3)][2:] == [b"third"]
        assert len(tap.read(0.5)) == 3
    records = outbox.connection.execute(
        "select was, error, topic, message_key, reason, outbox_id, letter_topic, letter_offset"
        "  from outbox_connector_redrives order by id"
    ).fetchall()
    assert records == [
        ("dead letter", reason, letters.topic, "key", "a new sink", None, letters.dead, offset)
        for offset, reason in enumerate(["not JSON", "no positive integer `outbox_id` in line 7", "not JSON"])
    ]


def test_letters_are_selected_and_those_that_cannot_go_back_are_told_of(letters: Letters, kafka: Kafka) -> None:
    """By a part of the reason, by key and by age; letters of a foreign topic, or without their value, stay."""
    letters.write(b"a", reason="the value is not JSON")
    letters.write(b"b", reason="no `outbox_id`")
    letters.write(b"c", topic="somebody.elses")
    letters.write(b"", dead_letter_value_bytes="2000000")
    said = letters.redrive(really=False)
    assert "2 dead letters selected" in said
    assert "left: 1 of topic 'somebody.elses'" in said
    assert "left: 1 whose value was too large" in said
    assert "0 dead letters selected" in letters.redrive(older_than=3600.0)
    assert "0 dead letters selected" in letters.redrive(key="other")
    assert "1 dead letter sent back" in letters.redrive(error_like="NO%outbox_id", key="key", older_than=0.0)
    with Tap(kafka, letters.topic) as tap:
        assert [message.value for message in tap.until(lambda sent: sent)] == [b"b"]
    assert "1 dead letter sent back" in letters.redrive()


def test_the_latest_letters_are_read_without_all_the_others(letters: Letters) -> None:
    """No more than asked for, the latest first, however they lie in the partitions."""
    for number in range(7):
        letters.write(str(number).encode())
    box = LetterBox(letters.kafka, letters.dead)
    found, held, complete = read_latest(box, 3)
    assert ([letter.value for letter in found], held, complete) == ([b"6", b"5", b"4"], 7, True)
    assert len(read_latest(box, 100)[0]) == 7


def test_a_topic_that_was_made_anew_has_letters_of_its_own(letters: Letters) -> None:
    """Its offsets begin at 0 again; what was recorded of the former topic's does not hide them."""
    letters.write(b"old")
    letters.redrive()
    letters.remove()
    letters.make()
    letters.write(b"new")
    assert "1 dead letter sent back" in letters.redrive()


def test_two_at_once_send_each_letter_once(letters: Letters, kafka: Kafka) -> None:
    """Each batch looks at the record again before it is sent, with the other one kept out."""
    for number in range(50):
        letters.write(str(number).encode())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: letters.redrive(rate=20_000), range(2)))
    with Tap(kafka, letters.topic) as tap:
        tap.until(lambda sent: len(sent) >= 50)
        assert sorted(int(message.value) for message in tap.read(0.5)) == list(range(50))


@pytest.mark.usefixtures("complete_kafka")
def test_a_run_goes_on_after_another_has_claimed_the_letters(
    letters: Letters, kafka: Kafka, outbox: OutboxTable
) -> None:
    """It looks again at what is left, and claims it anew."""
    for number in range(3):
        letters.write(str(number).encode())
    with ThreadPoolExecutor(1) as pool, Tap(kafka, letters.topic) as tap:
        with outbox.connect() as blocking, blocking.transaction():
            blocking.execute("lock table outbox_connector_redrives in exclusive mode")
            run = pool.submit(letters.redrive, rate=1)
            tap.until(lambda sent: sent)
            LetterBox(letters.kafka, letters.dead).claim()
        assert "3 dead letters sent back" in run.result(20)
        tap.until(lambda sent: len(sent) >= 3)
        assert [message.value for message in tap.read(0.5)] == [b"0", b"1", b"2"]


@pytest.mark.usefixtures("complete_kafka")
def test_what_kafka_took_is_recorded_when_it_refuses_another(letters: Letters, kafka: Kafka) -> None:
    """The error names the topic; the letters around it go, and are not sent again."""
    with kafka.topic(1, {"max.message.bytes": "300"}) as narrow:
        letters.write(b"before", topic=narrow)
        letters.write(os.urandom(1_000), topic=narrow)
        letters.write(b"behind", topic=narrow)
        for _ in range(2):
            with pytest.raises(ConnectorError, match=f"topic {narrow}: .*MSG_SIZE_TOO_LARGE"):
                letters.redrive(topics=(narrow,))
        with Tap(kafka, narrow, partitions=1) as tap:
            tap.until(lambda sent: len(sent) == 2)
            assert [message.value for message in tap.read(0.5)] == [b"before", b"behind"]


@pytest.mark.usefixtures("complete_kafka")
def test_letters_of_a_topic_that_is_gone_keep_the_others_from_nothing(letters: Letters, kafka: Kafka) -> None:
    """The others go, and the topic that is not there, or may not be written to, is named."""
    gone = f"{letters.topic}.gone"
    for number in range(20):
        letters.write(b"no", topic=gone)
        letters.write(str(number).encode())
    with Tap(kafka, letters.topic) as tap:
        with pytest.raises(ConnectorError, match=f"topic {gone}: there is none"):
            letters.redrive(topics=(letters.topic, gone))
        tap.until(lambda sent: len(sent) == 20)
        letters.write(b"20")
        with kafka.topic(1) as closed, forbidden(kafka, closed, AclOperation.WRITE):
            letters.write(b"no", topic=closed)
            with pytest.raises(ConnectorError, match="TOPIC_AUTHORIZATION_FAILED"):
                letters.redrive(topics=(letters.topic, closed))
        tap.until(lambda sent: len(sent) >= 21)
        assert sorted(int(message.value) for message in tap.read(0.5)) == list(range(21))


@pytest.mark.usefixtures("complete_kafka")
def test_letters_that_a_killed_run_had_sent_are_not_sent_again(
    letters: Letters, kafka: Kafka, outbox: OutboxTable, connector: Callable[..., Process]
) -> None:
    """Killed between Kafka's answers and their record: the next run finds the copies, records them, sends the rest."""
    for number in range(40):
        letters.write(str(number).encode())
    with Tap(kafka, letters.topic) as tap:
        # The record is kept from being written, so that the kill comes just before it.
        with outbox.connect() as blocking, blocking.transaction():
            blocking.execute("lock table outbox_connector_redrives in exclusive mode")
            process = connector(
                "redrive", "--dead-letters", "--yes", "--rate", "30", CONNECTOR_DEAD_LETTER_TOPIC=letters.dead
            )
            tap.until(lambda sent: len(sent) == 30)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -9
        assert one(outbox.connection, "select count(*) from outbox_connector_redrives") == 0
        said = letters.redrive()
        assert "40 dead letters sent back" in said
        assert "30 dead letters of these had been sent by a run that was interrupted" in said
        tap.until(lambda sent: len(sent) >= 40)
        assert sorted(int(message.value) for message in tap.read(0.5)) == list(range(40))
    recorded = "select count(*), count(distinct (letter_partition, letter_offset)) from outbox_connector_redrives"
    assert outbox.connection.execute(recorded).fetchone() == (40, 40)
    assert one(outbox.connection, "select count(*) from outbox_connector_letters") == 0


@pytest.mark.usefixtures("complete_kafka")
@pytest.mark.parametrize("held", [b"second", END_OF_TRANSACTION], ids=["letters", "their commit"])
def test_letters_of_a_killed_run_that_the_network_holds_up_never_come(
    letters: Letters, kafka: Kafka, outbox: OutboxTable, connector: Callable[..., Process], held: bytes
) -> None:
    """The next run ends its transaction at once, and sends them; what reaches Kafka only then is refused there."""
    for value in (b"first", b"second"):
        letters.write(value)
    with kafka.proxy() as proxy, Tap(kafka, letters.topic) as tap:
        proxy.hold_back(held)
        process = connector(
            *("redrive", "--dead-letters", "--yes"),
            CONNECTOR_DEAD_LETTER_TOPIC=letters.dead,
            CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{proxy.port}",
            CONNECTOR_PRODUCER_COMPRESSION_TYPE="none",
        )
        assert proxy.holds.wait(30), process.stderr
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -9
        letters.send(b"behind")
        tap.read(1.0)
        # What came behind letters that wait for their commit waits too.
        assert [message.value for message in tap.read(0.5)] == ([b"behind"] if held == b"second" else [])
        assert "2 dead letters sent back" in letters.redrive()
        proxy.restore()
        eventually(lambda: proxy.connections == 0, what="the end of what the killed run had sent")
        letters.write(b"last")
        letters.redrive()
        tap.until(lambda sent: sent and sent[-1].value == b"last")
        assert [message.value for message in tap.read(0.5)] == [b"behind", b"first", b"second", b"last"]
    assert one(outbox.connection, "select count(*) from outbox_connector_letters") == 0


@pytest.mark.usefixtures("complete_kafka")
def test_letters_that_a_killed_run_had_only_announced_are_sent(
    letters: Letters, kafka: Kafka, outbox: OutboxTable
) -> None:
    """Copies are looked for behind where the topic ended then, or in all of it where it was made anew since."""
    letters.write(b"first")
    letters.write(b"second")
    letters.redrive()

    def as_if_killed(ends: str) -> None:
        outbox.connection.execute(
            "insert into outbox_connector_letters select letter_topic, letter_partition, letter_offset, letter_time,"
            " now() - interval '1 minute', %s from outbox_connector_redrives",
            [ends],
        )
        outbox.connection.execute("delete from outbox_connector_redrives")

    with Tap(kafka, letters.topic) as tap:
        (partition,) = {sent.partition for sent in tap.until(lambda sent: len(sent) == 2)}
        as_if_killed(f'{{"{partition}": 2}}')
        said = letters.redrive()
        assert ("2 dead letters sent back" in said, "interrupted" in said) == (True, False)
        assert len(tap.until(lambda sent: len(sent) == 4)) == 4
        as_if_killed(f'{{"{partition}": 999}}')
        assert "2 dead letters of these had been sent" in letters.redrive()
        assert len(tap.read(0.5)) == 4


def test_without_a_dead_letter_topic_it_says_what_to_do(topic: str, kafka: Kafka, outbox: OutboxTable) -> None:
    """`setup` makes the topic."""
    with pytest.raises(SetupRequired, match="outbox-connector setup"):
        Letters(kafka, topic, outbox).redrive()


@pytest.mark.usefixtures("complete_kafka")
def test_without_its_right_to_transactions_it_says_which(letters: Letters, kafka: Kafka, outbox: OutboxTable) -> None:
    """An account needs two rights on the transactional id; without them nothing is announced or sent."""
    letters.write(b"first")
    name = f"{letters.dead}.redrive"
    for denied in (AclOperation.WRITE, AclOperation.DESCRIBE):
        with (
            forbidden(kafka, name, denied, kind=ResourceType.TRANSACTIONAL_ID),
            pytest.raises(SetupRequired, match=f"allow Write and Describe on the transactional id {name}"),
        ):
            letters.redrive()
    assert one(outbox.connection, "select count(*) from outbox_connector_letters") == 0
    assert "1 dead letter sent back" in letters.redrive()


# --- the command, and the pipeline beside it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--yes"],
        ["--id", "five"],
        ["--id", "0"],
        ["--older-than", "10"],
        ["--all", "--rate", "0"],
        ["--dead-letters", "--id", "1"],
        ["--dead-letters", "--stuck"],
        ["--key", "\udcff"],
    ],
    ids=lambda arguments: " ".join(arguments).encode("ascii", "backslashreplace").decode() or "nothing",
)
def test_a_wrong_use_is_told_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing selected, or what cannot be understood: no setting is read and no service is asked."""
    with pytest.raises(SystemExit) as ended:
        main(["redrive", *arguments])
    assert ended.value.code == 2
    assert "usage: outbox-connector redrive" in capsys.readouterr().err


def test_without_setup_it_ends_with_78_and_without_a_server_with_69(
    connector_env: dict[str, str], connector: Callable[..., Process]
) -> None:
    """The exit codes that scripts and jobs go by."""
    absent = {"CONNECTOR_DATABASE_URL": "postgresql://u@127.0.0.1:1/none", "CONNECTOR_START_DEADLINE_SECONDS": "0"}
    for command in (["redrive", "--all"], ["prune"]):
        missing, away = connector(*command), connector(*command, **absent)
        assert missing.wait(30) == 78
        assert "outbox-connector setup" in missing.stderr
        assert away.wait(30) == 69
        assert "PostgreSQL stayed away" in away.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_is_finished_by_the_next(
    outbox: OutboxTable, connector: Callable[..., Process], number: signal.Signals
) -> None:
    """Between two batches or within one: each row is moved once and recorded once, and the rest is as it was."""
    ids = [
        outbox_id
        for (outbox_id,) in outbox.connection.execute(
            "insert into agent_outbox_messages (biz_type, topic, message_key, payload, status)"
            " select 'b', 't', 'k', '{}', 'dead' from generate_series(1, 2000) returning id"
        )
    ]
    process = connector("redrive", "--all", "--yes", "--rate", "50", CONNECTOR_KAFKA_BOOTSTRAP_SERVERS="")
    eventually(lambda: pending(outbox), what="the first batch")
    os.kill(process.pid, number)
    assert process.wait() == (-number if number is signal.SIGKILL else 1)
    moved = pending(outbox)
    assert moved == ids[: len(moved)]
    assert len(moved) < len(ids)
    if number is not signal.SIGKILL:
        # One that came between a commit and its answer leaves that batch out of what is told.
        (told,) = re.findall(r"(\d+) of 2,000 dead messages put back", process.stdout)
        assert len(moved) - int(told) in {0, 50}
    recorded = "select count(*), count(distinct outbox_id) from outbox_connector_redrives"
    assert outbox.connection.execute(recorded).fetchone() == (len(moved), len(moved))
    run(outbox)
    assert pending(outbox) == ids
    assert outbox.connection.execute(recorded).fetchone() == (len(ids), len(ids))


def test_a_run_that_loses_its_connection_ends_with_69_and_is_finished_by_the_next(
    outbox: OutboxTable, connector: Callable[..., Process]
) -> None:
    """What was moved before is moved and recorded; the error says to run it again."""
    for _ in range(200):
        dead(outbox)
    process = connector("redrive", "--all", "--yes", "--rate", "20")
    eventually(lambda: pending(outbox), what="the first batch")
    ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
    outbox.connection.execute(f"{ended} and application_name = 'outbox-connector redrive'")
    assert process.wait(30) == 69
    assert "run it again" in process.stderr
    assert 0 < len(pending(outbox)) < 200
    run(outbox)
    assert len(pending(outbox)) == one(outbox.connection, "select count(*) from outbox_connector_redrives") == 200


def test_it_keeps_to_its_rate(outbox: OutboxTable) -> None:
    """Forty rows at forty a second take a second at least."""
    for _ in range(40):
        dead(outbox)
    began = time.monotonic()
    run(outbox, rate=40)
    assert time.monotonic() - began >= 1.0


def test_the_reader_publishes_a_redriven_row_at_once(
    outbox: OutboxTable, connector_env: dict[str, str], kafka: Kafka, topic: str, connector: Callable[..., Process]
) -> None:
    """Woken by the redrive, not by the sweep, which comes half a minute later."""
    set_up(connector_env)
    reader = is_streaming(connector("reader"))
    with Tap(kafka, topic) as tap:
        tap.has([outbox.new("key", topic)])
        outbox_id = outbox.new("key", topic, status="dead", retry_count=20)
        run(outbox)
        (copy,) = [sent for sent in tap.has([outbox_id], within=25) if sent.outbox_id == outbox_id]
        assert copy.envelope["attempt"] == 21
        eventually(lambda: outbox.status(outbox_id) == "published", what="the mark")
    assert "overlooked_rows_found" not in {event["event"] for event in reader.events}
    assert reader.stop() == 0


@pytest.mark.slow
def test_a_row_that_is_seen_later_than_its_hint_is_published_as_soon_as_it_is_seen(
    own_postgres: Postgres, own_database: Database, kafka: Kafka, topic: str
) -> None:
    """With a synchronous standby a commit is in the stream before other sessions see it: until the standby has it."""
    env = environment(own_database, kafka, topic)
    set_up(env)
    with own_database.connect() as app:
        app.execute(f"alter database {own_database.name} set synchronous_commit = local")
    reader = is_streaming(Process("reader", env=env).start())
    with closing(OutboxTable(own_database)) as outbox, Tap(kafka, topic) as tap, ThreadPoolExecutor(1) as thread:
        ask = outbox.connection.execute
        tap.has([outbox.new("key", topic)])
        outbox_id = outbox.new("key", topic, status="dead", retry_count=20)
        ask("alter system set synchronous_standby_names = 'nobody'")
        ask("select pg_reload_conf()")
        url = make_conninfo(own_database.url, options="-c synchronous_commit=on")
        options = RedriveOptions(url, TABLES, 10.0, Selection(), "test@here", None, 10_000)
        redriven = thread.submit(redrive, options, io.StringIO(), really=True)
        look = (
            "select pid from pg_stat_activity where application_name = 'outbox-connector reader (bookkeeping)'"
            " and query_start > (select query_start from pg_stat_activity where wait_event = 'SyncRep')"
        )
        try:
            eventually(lambda: ask(look).fetchone(), what="a look at the table")
            assert outbox.status(outbox_id) == "dead"
        finally:
            ask("alter system reset synchronous_standby_names")
            ask("select pg_reload_conf()")
        redriven.result(20)
        tap.has([outbox_id], within=15)
    assert "overlooked_rows_found" not in {event["event"] for event in reader.events}
    assert reader.stop() == 0


def test_beside_a_running_pipeline_each_message_is_stored_once_and_each_key_in_order(
    outbox: OutboxTable,
    connector_env: dict[str, str],
    kafka: Kafka,
    topic: str,
    connector: Callable[..., Process],
) -> None:
    """Dead and stuck rows are put back while more of their keys come; what is stored later stands later."""
    set_up(connector_env)
    refuse = "add constraint refuse check (message_content <> 'bad')"
    outbox.connection.execute(f"alter table chat_histories {refuse}")
    reader, sink = connector("reader"), connector("sink")
    keys = [f"key-{n}" for n in range(5)]
    bad = [outbox.new(key, topic, {**PAYLOAD, "message_content": "bad"}, max_retry=1) for key in keys * 8]
    eventually(lambda: len(with_status(outbox, "dead")) == len(bad), what="their deaths", within=40)
    outbox.connection.execute("alter table chat_histories drop constraint refuse")
    # As Kafka leaves them that has lost a message: published, and in no topic.
    lost = [outbox.new(key, topic, status="published") for key in keys]
    for outbox_id in lost:
        outbox.change(outbox_id, "published_at = now() - interval '1 hour'")
    moving = connector("redrive", "--all", "--yes", "--rate", "40", "--reason", "constraint dropped")
    later: list[int] = []
    while moving.returncode is None:
        later += [outbox.new(key, topic) for key in keys]
        time.sleep(0.05)
    assert moving.wait() == 0
    assert f"{len(bad)} dead messages put back" in moving.stdout
    stuck = connector("redrive", "--stuck", "--yes")
    assert stuck.wait(30) == 0
    assert f"{len(lost)} stuck messages put back" in stuck.stdout
    later += [outbox.new(key, topic) for key in keys]
    every = [*bad, *lost, *later]
    eventually(lambda: len(with_status(outbox, "consumed")) == len(every), within=60, what="the storing of all")
    history = outbox.history()
    assert sorted(history) == sorted(every)
    for group in (bad, lost, later):
        for place in range(len(keys)):
            of_one_key = set(group[place :: len(keys)])
            stored = [outbox_id for outbox_id in history if outbox_id in of_one_key]
            assert stored == sorted(stored), keys[place]
    assert reader.stop() == 0
    assert sink.stop() == 0
