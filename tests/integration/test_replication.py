"""The stream from PostgreSQL, as it was measured: each pitfall of COPY BOTH and of confirming is a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from connector.lsn import format_lsn, parse_lsn
from connector.outbox import WAKE_PREFIX, Table
from connector.replication import FEEDBACK_SECONDS, ReplicationConnection, StreamEnded
from connector.row import RowDecoder
from connector.store.queries import Tables
from connector.store.schema import PUBLISHED_COLUMNS, migrate, publish
from connector.wire.frames import PrimaryKeepalive, XLogData, decode_frame
from connector.wire.pgoutput import Begin, Commit, Insert, LogicalMessage, Relation, decode
from tests.integration.scenario import OUTBOX, Connection, enqueue, one, write_wal
from tests.services import Database, eventually

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))
PUBLICATION = 'Publication "of" my outbox\'s'
FAR = parse_lsn("7FFFFFFF/0")


class Stream:
    """A replication connection on a slot of the test's own, and the messages that came over it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.slot = f"s_{database.name}"
        self.replication = ReplicationConnection.open(database.url)
        self.messages: list[Any] = []
        self.frames: list[XLogData | PrimaryKeepalive] = []

    def start(self, lsn: int = 0) -> None:
        """Start streaming from where the slot is confirmed, or from `lsn` if that is further."""
        self.replication.start(self.slot, PUBLICATION, lsn)

    def reopen(self) -> None:
        """Connect again, as after a restart of the reader."""
        self.replication.close()
        eventually(self._is_free, what="the end of the last session")
        self.replication = ReplicationConnection.open(self.database.url)
        self.messages.clear()
        self.frames.clear()

    def _is_free(self) -> bool:
        with self.database.connect() as connection:
            return one(connection, "select active from pg_replication_slots where slot_name = %s", [self.slot]) is False

    def take(self) -> list[Any]:
        """Read what has arrived."""
        while (data := self.replication.receive()) is not None:
            frame = decode_frame(data)
            self.frames.append(frame)
            if isinstance(frame, XLogData):
                self.messages.append(decode(frame.payload))
        return self.messages

    def until(self, condition: Callable[[], object], within: float = 10.0) -> None:
        """Read, waiting on the socket, until a condition holds."""

        def taken() -> object:
            self.replication.wait([], 0.02)
            self.take()
            return condition()

        eventually(taken, within=within, what="what the stream should bring")

    def of(self, kind: type) -> list[Any]:
        """Return the messages of one kind."""
        return [message for message in self.messages if isinstance(message, kind)]


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    """A connection to a database with outbox and publication, for the writes of the application."""
    with database.connect() as connection:
        migrate(connection, TABLES)
        publish(connection, TABLES, PUBLICATION)
        yield connection


@pytest.fixture
def stream(database: Database, writer: Connection) -> Iterator[Stream]:
    """A stream on a new slot, not started."""
    stream = Stream(database)
    stream.replication.create_slot(stream.slot)
    yield stream
    stream.replication.close()


def _confirmed(stream: Stream) -> int:
    with stream.database.connect() as connection:
        text = one(
            connection, "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = %s", [stream.slot]
        )
    return parse_lsn(text)


def test_a_publication_of_any_name_can_be_streamed(stream: Stream, writer: Connection) -> None:
    """The command is composed, not parameterised, and quotes a name with quotes, spaces and capitals in it."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Commit))
    assert len(stream.of(Insert)) == 1


def test_a_start_that_the_server_refuses_says_why(stream: Stream) -> None:
    """A slot that does not exist ends with the server's code, and the session can be used again."""
    stream.slot = "no_such_slot"
    with pytest.raises(StreamEnded, match="no_such_slot") as refused:
        stream.start()
    assert refused.value.sqlstate == "42704"
    stream.replication.ping()


def test_a_row_arrives_with_just_the_published_columns_in_binary(stream: Stream, writer: Connection) -> None:
    """The column list holds on the wire, integers come as big-endian bytes and jsonb as 0x01 and its text."""
    stream.start()
    (outbox_id,) = enqueue(writer, "topic", "key", 7)
    stream.until(lambda: stream.of(Commit))
    (relation,), (insert,) = stream.of(Relation), stream.of(Insert)
    assert {column.name for column in relation.columns} == set(PUBLISHED_COLUMNS)
    values = dict(zip((column.name for column in relation.columns), insert.values, strict=True))
    assert values["id"] == outbox_id.to_bytes(8, "big")
    assert values["payload"] == b'\x01{"number": 7}'
    assert values["headers"] is None
    row = RowDecoder(relation)(insert.values)
    assert (row.payload, row.fence.outbox_id) == (b'{"number": 7}', outbox_id)


def test_the_fence_on_the_stream_is_the_tables_own(stream: Stream, writer: Connection) -> None:
    """`updated_at` as it is streamed is, to the microsecond, what the table holds."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Commit))
    row = RowDecoder(stream.of(Relation)[0])(stream.of(Insert)[0].values)
    since_2000 = "extract(epoch from updated_at - timestamptz '2000-01-01 00:00+00')"
    stored = one(writer, f"select ({since_2000} * 1000000)::bigint from {OUTBOX}")
    assert row.fence.updated_at == stored


def test_rows_and_messages_arrive_in_the_order_of_the_transaction(stream: Stream, writer: Connection) -> None:
    """A transactional message comes between the rows it was emitted between."""
    stream.start()
    with writer.transaction():
        enqueue(writer, "topic", "key", 1)
        writer.execute("select pg_logical_emit_message(true, %s, '2000')", [WAKE_PREFIX])
        enqueue(writer, "topic", "key", 2)
    stream.until(lambda: stream.of(Commit))
    kinds = [type(message) for message in stream.messages if not isinstance(message, Relation)]
    assert kinds == [Begin, Insert, LogicalMessage, Insert, Commit]
    (message,) = stream.of(LogicalMessage)
    assert (message.prefix, message.content, message.transactional) == (WAKE_PREFIX, b"2000", True)


def test_nothing_but_inserts_of_pending_rows_is_sent(stream: Stream, writer: Connection) -> None:
    """Rows that are inserted with another status, updates and deletes never reach the reader."""
    stream.start()
    (kept, gone) = enqueue(writer, "topic", "key", 1, 2)
    writer.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status) values ('b', 't', 'k', '1', 'dead')"
    )
    writer.execute(f"update {OUTBOX} set retry_count = 3 where id = %s", [kept])
    writer.execute(f"delete from {OUTBOX} where id = %s", [gone])
    writer.execute(f"truncate {OUTBOX}")
    (last,) = enqueue(writer, "topic", "key", 3)
    stream.until(lambda: len(stream.of(Insert)) == 3)
    decoder = RowDecoder(stream.of(Relation)[0])
    assert [decoder(insert.values).fence.outbox_id for insert in stream.of(Insert)] == [kept, gone, last]
    assert {type(message) for message in stream.messages} <= {Begin, Relation, Insert, Commit}


def test_a_confirmed_end_is_not_sent_again(stream: Stream, writer: Connection) -> None:
    """After `end_lsn` of a transaction was confirmed, a new session begins with the next one."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Commit))
    end_lsn = stream.of(Commit)[0].end_lsn
    stream.replication.confirm(end_lsn, end_lsn)
    stream.replication.stop(5)
    stream.reopen()
    stream.start()
    enqueue(writer, "topic", "key", 2)
    stream.until(lambda: stream.of(Commit))
    assert [insert.values[4] for insert in stream.of(Insert)] == [b'\x01{"number": 2}']


def test_a_confirmed_commit_record_is_sent_again(stream: Stream, writer: Connection) -> None:
    """`commit_lsn` is where the commit begins: confirming it is not enough, so we confirm `end_lsn`."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Commit))
    commit_lsn = stream.of(Commit)[0].commit_lsn
    stream.replication.confirm(commit_lsn, commit_lsn)
    stream.replication.stop(5)
    stream.reopen()
    stream.start()
    stream.until(lambda: stream.of(Commit))
    assert len(stream.of(Insert)) == 1


def test_what_was_not_confirmed_is_sent_again(stream: Stream, writer: Connection) -> None:
    """Having received a transaction is not having confirmed it."""
    stream.start()
    enqueue(writer, "topic", "key", 1, 2)
    stream.until(lambda: stream.of(Commit))
    stream.replication.confirm(stream.of(Commit)[0].end_lsn, 0)
    stream.replication.stop(5)
    stream.reopen()
    stream.start()
    stream.until(lambda: stream.of(Commit))
    assert len(stream.of(Insert)) == 2


def test_status_updates_get_through_while_nobody_reads(stream: Stream, writer: Connection) -> None:
    """With the socket full of unread rows, thousands of status updates are written without blocking for good."""
    stream.start()
    writer.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload)"
        " select 'b', 't', 'k', to_jsonb(repeat('x', 10000)) from generate_series(1, 2000)"
    )
    started = time.monotonic()
    for _ in range(5_000):
        stream.replication.confirm(0, 0)
    assert time.monotonic() - started < 10
    stream.until(lambda: stream.of(Commit))
    assert len(stream.of(Insert)) == 2000


def test_reading_with_nothing_there_returns_at_once(stream: Stream) -> None:
    """The connection is non-blocking: an idle stream gives None."""
    stream.start()
    stream.until(lambda: stream.replication.receive() is None)
    started = time.monotonic()
    for _ in range(100):
        stream.take()
    assert time.monotonic() - started < 1


def test_an_idle_stream_sees_how_far_the_rest_of_the_server_is(stream: Stream, writer: Connection) -> None:
    """Keepalives tell the server's position though nothing is sent; confirming it lets the slot go forward."""
    stream.start()
    write_wal(writer, 4)
    target = parse_lsn(one(writer, "select pg_current_wal_lsn()::text"))

    def told() -> bool:
        ends = [frame.wal_end for frame in stream.frames if isinstance(frame, PrimaryKeepalive)]
        return bool(ends) and max(ends) >= target

    stream.until(told)
    assert stream.of(Insert) == []
    stream.replication.confirm(target, target)
    eventually(lambda: _confirmed(stream) >= target, what="the confirmation")


def test_keepalives_make_no_storm(stream: Stream, writer: Connection) -> None:
    """Answering only when asked, with a position that does not move, gets a handful of keepalives, not thousands."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    write_wal(writer, 2)
    answers = 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        stream.replication.wait([], 0.05)
        before = len(stream.frames)
        stream.take()
        for frame in stream.frames[before:]:
            if isinstance(frame, PrimaryKeepalive) and frame.reply_requested:
                stream.replication.confirm(0, 0)
                answers += 1
    assert answers < 100
    assert sum(isinstance(frame, PrimaryKeepalive) for frame in stream.frames) < 2_000


def test_a_terminated_walsender_is_told_by_its_code(stream: Stream, writer: Connection) -> None:
    """`pg_terminate_backend` ends the stream with 57P01, which only the result reveals."""
    stream.start()
    writer.execute("select pg_terminate_backend(%s)", [stream.replication.backend_pid])
    with pytest.raises(StreamEnded) as ended:
        stream.until(lambda: False)
    assert ended.value.sqlstate == "57P01"


def test_a_clean_end_leaves_the_session_usable(stream: Stream, writer: Connection) -> None:
    """After the stream was stopped, the same connection takes commands, and the slot is free."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Insert))
    stream.replication.stop(5)
    stream.replication.ping()
    assert stream.replication.identify().wal_position > 0
    assert one(writer, "select active from pg_replication_slots where slot_name = %s", [stream.slot]) is False


def test_a_second_stream_on_a_session_ends_at_once_and_leaves_it_usable(stream: Stream, writer: Connection) -> None:
    """PostgreSQL streams a slot once per session; a second start is seen to end, and is no trap for the session."""
    stream.start()
    stream.replication.stop(5)
    stream.start()
    enqueue(writer, "topic", "key", 1)
    with pytest.raises(StreamEnded):
        stream.until(lambda: stream.of(Commit))
    stream.replication.stop(5)
    stream.replication.ping()


def test_a_stream_stops_cleanly_while_the_server_still_sends(stream: Stream, writer: Connection) -> None:
    """Rows that nobody has read yet are thrown away, and the session is usable afterwards."""
    stream.start()
    writer.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload)"
        " select 'b', 't', 'k', to_jsonb(repeat('x', 10000)) from generate_series(1, 3000)"
    )
    stream.until(lambda: stream.of(Insert))
    stream.replication.stop(10)
    stream.replication.ping()


def test_the_session_is_usable_after_the_server_ended_the_stream_with_an_error(
    stream: Stream, writer: Connection
) -> None:
    """An error that ends only the stream leaves a session that still takes commands."""
    version = stream.database.server.version
    if version >= 18:
        pytest.skip("from PostgreSQL 18 on a publication that is missing is no error")
    writer.execute(psycopg.sql.SQL("drop publication {}").format(psycopg.sql.Identifier(PUBLICATION)))
    stream.start()
    enqueue(writer, "topic", "key", 1)
    with pytest.raises(StreamEnded) as ended:
        stream.until(lambda: False)
    assert ended.value.sqlstate == "42704"
    stream.replication.ping()


def test_a_position_ahead_of_the_slot_skips_what_lies_between(stream: Stream, writer: Connection) -> None:
    """A session that starts from where the last one had read is not sent those rows again."""
    stream.start()
    enqueue(writer, "topic", "key", 1)
    stream.until(lambda: stream.of(Commit))
    received = stream.of(Commit)[0].end_lsn
    stream.reopen()
    stream.start(received)
    enqueue(writer, "topic", "key", 2)
    stream.until(lambda: stream.of(Commit))
    assert [insert.values[4] for insert in stream.of(Insert)] == [b'\x01{"number": 2}']
    assert _confirmed(stream) < received


def test_the_exported_snapshot_shows_just_what_the_slot_does_not_bring(database: Database, writer: Connection) -> None:
    """A row from before the slot is in its snapshot, one from after it only on its stream."""
    enqueue(writer, "topic", "key", 1)
    stream = Stream(database)
    try:
        _, snapshot = stream.replication.create_slot(stream.slot)
        enqueue(writer, "topic", "key", 2)
        with database.connect(autocommit=False) as reader:
            reader.execute("set transaction isolation level repeatable read")
            reader.execute(f"set transaction snapshot '{snapshot}'")
            assert one(reader, f"select array_agg(payload->>'number') from {OUTBOX}") == ["1"]
        stream.start()
        stream.until(lambda: stream.of(Commit))
        assert [insert.values[4] for insert in stream.of(Insert)] == [b'\x01{"number": 2}']
    finally:
        stream.replication.close()


def test_the_slot_survives_a_failover_where_the_server_can_do_that(stream: Stream, writer: Connection) -> None:
    """From PostgreSQL 17 on the slot is a failover slot; it is never temporary and never two-phase."""
    query = "select to_jsonb(s) from pg_replication_slots as s where slot_name = %s"
    slot = one(writer, query, [stream.slot])
    assert slot["plugin"] == "pgoutput"
    assert slot["temporary"] is False
    assert slot["two_phase"] is False
    if stream.database.server.version >= 17:
        assert slot["failover"] is True


def test_only_one_session_leads_a_slot(stream: Stream) -> None:
    """The lock is had by one session, and by the next as soon as that one ends."""
    other = ReplicationConnection.open(stream.database.url)
    try:
        assert stream.replication.try_lock(stream.slot)
        assert not other.try_lock(stream.slot)
        assert other.try_lock(f"{stream.slot}_2")
        stream.replication.close()
        eventually(lambda: other.try_lock(stream.slot), what="the lock")
    finally:
        other.close()


@pytest.mark.slow
def test_the_server_gives_up_a_silent_reader_soon(stream: Stream) -> None:
    """A session that sends nothing is ended within its 12 seconds and a check, and its lock with it."""
    assert stream.replication.try_lock(stream.slot)
    stream.start()
    pid = stream.replication.backend_pid
    with stream.database.connect() as connection:
        started = time.monotonic()
        eventually(
            lambda: one(connection, "select count(*) from pg_stat_activity where pid = %s", [pid]) == 0,
            within=20,
            what="the end of the silent session",
        )
    assert time.monotonic() - started > FEEDBACK_SECONDS * 2


def test_a_session_that_says_nothing_between_streams_is_given_up_too(stream: Stream) -> None:
    """A leader that hangs while it does not stream keeps the lock for a minute at the most."""
    assert stream.replication._connection.execute("show idle_session_timeout").fetchone() == ("1min",)


def test_positions_are_written_as_the_server_writes_them(writer: Connection) -> None:
    """Parsing and formatting a position is lossless beside the server's own arithmetic."""
    for text in ("0/0", "0/1", "16/B374D848", "FFFFFFFF/FFFFFFFF"):
        difference = one(writer, "select pg_wal_lsn_diff(%s, '0/0')::numeric", [text])
        assert parse_lsn(text) == int(difference)
        assert format_lsn(int(difference)) == text
