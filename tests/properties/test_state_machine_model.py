"""Random interleavings of reader, sinks and crashes on the real statements, held to a model after each step.

The log is a Kafka partition: it is consumed in order, any part of it may be delivered again at any time, and the
reader may add copies to it from the stream and from the table. Time passes by moving due times into the past; each new
one is first put an hour off, so that how fast the test runs decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Literal, NamedTuple
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from connector.backoff import backoff
from connector.outbox import Failure, Fence, Fences, OutboxRow, Status
from connector.store.bookkeeping import Bookkeeping
from connector.store.connections import is_conflict
from connector.store.redrives import Redrives, Run, Selection
from connector.store.settlement import Item, Result, Settlement
from tests.integration.outbox_table import TABLES, OutboxTable, item
from tests.properties import model
from tests.properties.model import Copy, Delivery, Row, Verdict
from tests.services import Database

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "40"))
STEPS = 40
MOST_ROWS = 12
SECONDS = 120 + 2 * EXAMPLES
TOO_LONG = "c" * 37
SLACK = timedelta(seconds=30)
SOON = timedelta(minutes=1)

VERDICTS = st.lists(st.sampled_from([*[Verdict.FINE] * 4, *Verdict]), min_size=8, max_size=8)
ENDINGS = st.sampled_from(["commits", "commits", "commits", "commits", "crashes", "waits"])
PUT_BACK = (Status.DEAD, Status.PUBLISHED)
COUNTS = st.integers(1, 8)


Sinks = dict[bool, tuple[Settlement, Settlement]]


class Record(NamedTuple):
    """A row as it really is."""

    status: str
    retry_count: int
    last_error: str | None
    due: datetime | None
    published_at: datetime | None
    consumed_at: datetime | None
    updated_at: datetime


class Machine(RuleBasedStateMachine):
    """The connector's two sides on connections of their own, and what the model knows of their rows."""

    def __init__(self, outbox: OutboxTable, books: Bookkeeping, sinks: Sinks) -> None:
        super().__init__()
        self.outbox = outbox
        self.redrives = Redrives(outbox.connection, TABLES)
        self.books = books
        self.sinks = sinks
        self.strict = True
        self.rows: dict[int, Row] = {}
        self.inserted: dict[int, Fence] = {}
        self.seen: dict[int, tuple[int, Record]] = {}
        self.history: list[int] = []
        self.streamed = 0
        self.log: list[Copy] = []
        self.consumed = 0
        self.unmarked: list[Copy] = []
        self.open: ExitStack | None = None
        self.locked: set[int] = set()
        self.outcome = model.Settled({}, [], {})
        self.position = 0

    @property
    def sink(self) -> Settlement:
        """The sink whose transactions may stay open."""
        return self.sinks[self.strict][0]

    @initialize(strict=st.sampled_from([True, True, False]), keys=st.lists(st.sampled_from("aab"), max_size=6))
    def begin(self, strict: bool, keys: list[str]) -> None:
        """Start with some messages in Kafka, under either ordering."""
        self.strict = strict
        self.outbox.connection.execute(
            "delete from agent_outbox_messages; delete from chat_histories; delete from outbox_connector_redrives;"
            "select setval(pg_get_serial_sequence('agent_outbox_messages', 'id'), 1, false)"
        )
        for key in keys:
            self.enqueue(key=key, count=1, max_retry=20)
        self.publish_from_the_stream(count=len(keys))

    def teardown(self) -> None:
        """Leave no transaction behind."""
        if self.open is not None:
            self.the_sink_crashes()

    # --- the application -----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(key=st.sampled_from("aab"), count=st.integers(1, 3), max_retry=st.sampled_from([20, 20, 3, 2, 1]))
    def enqueue(self, key: str, count: int, max_retry: int) -> None:
        """The application commits messages of a key."""
        for _ in range(count):
            outbox_id = self.outbox.new(key, max_retry=max_retry)
            self.rows[outbox_id] = Row(key, max_retry)
            self.inserted[outbox_id] = self.outbox.fence(outbox_id)

    @precondition(lambda self: self.open is None and any(row.due for row in self.rows.values()))
    @rule(seconds=st.sampled_from([1_700, 3_700, 3_700]))
    def time_passes(self, seconds: int) -> None:
        """Everything falls due sooner, also in the copies that were read before."""
        self.outbox.connection.execute(
            "update agent_outbox_messages set next_retry_at = next_retry_at - %s * interval '1 second'"
            " where next_retry_at is not null",
            [seconds],
        )
        passed = timedelta(seconds=seconds)
        self.rows = {n: replace(row, due=row.due and row.due - passed) for n, row in self.rows.items()}
        self.log = [_earlier(copy, seconds) for copy in self.log]
        self.unmarked = [_earlier(copy, seconds) for copy in self.unmarked]
        self.seen = {
            n: (version, record._replace(due=record.due and record.due - passed))
            for n, (version, record) in self.seen.items()
        }

    # --- the reader ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.streamed < len(self.rows))
    @rule(count=COUNTS)
    def publish_from_the_stream(self, count: int) -> None:
        """A copy by the stream shows its row as it was inserted, whatever has become of it."""
        for outbox_id in sorted(self.rows)[self.streamed : self.streamed + count]:
            self._publish(Copy(outbox_id, 0, self.inserted[outbox_id], 0))
            self.streamed += 1

    @precondition(lambda self: self.open is None and self.streamed < len(self.rows))
    @rule(final=st.booleans())
    def publishing_fails(self, final: bool) -> None:
        """Kafka refuses the next row of the stream."""
        outbox_id = sorted(self.rows)[self.streamed]
        self.streamed += 1
        self._fails(outbox_id, 0, final=final)

    @precondition(lambda self: self.unmarked)
    @rule(back=st.integers(0, 10), slot_is_lost=st.booleans())
    def the_reader_crashes(self, back: int, slot_is_lost: bool) -> None:
        """Marks that were not written are lost; the stream begins before them, or the table has to serve instead."""
        self.unmarked = []
        self.streamed = max(0, self.streamed - back)
        if slot_is_lost:
            (rows,) = list(self.books.catch_up_rows(None, 1_000)) or [[]]
            assert [row.fence.outbox_id for row in rows] == self._untried()
            self.streamed = len(self.rows)
            for row in rows:
                self._publish_from_table(row)

    @precondition(lambda self: self.streamed == len(self.rows) and self._untried())
    @rule(limit=COUNTS)
    def the_sweep_finds_what_was_overlooked(self, limit: int) -> None:
        """With the stream read to its end, what is still pending comes from the table."""
        rows = self.books.overlooked_rows(-3_600, limit)
        assert [row.fence.outbox_id for row in rows] == self._untried()[:limit]
        for row in rows:
            self._publish_from_table(row)

    @precondition(lambda self: self._waiting())
    @rule()
    def what_waits_comes_round(self) -> None:
        """Enough time passes, and the reader publishes all that waited."""
        if self.open is None:
            self.time_passes(seconds=3_700)
        self.publish_what_is_due(limit=100)

    @precondition(lambda self: self._waiting())
    @rule(limit=COUNTS)
    def publish_what_is_due(self, limit: int) -> None:
        """Rows whose time has come come from the table."""
        for row in self._due_rows(limit):
            self._publish_from_table(row)

    @precondition(lambda self: self.open is None and self._waiting())
    @rule(final=st.booleans())
    def publishing_what_is_due_fails(self, final: bool) -> None:
        """Kafka refuses a retry."""
        for row in self._due_rows(1):
            self._fails(row.fence.outbox_id, row.fence.retry_count, final=final)

    @precondition(lambda self: self.unmarked)
    @rule(picks=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def mark(self, picks: list[int]) -> None:
        """Marks land in any order; what a sink has locked, or has changed since the copy was read, is left alone."""
        self._mark([self.unmarked[pick % len(self.unmarked)] for pick in picks])

    @precondition(lambda self: self.unmarked)
    @rule()
    def mark_all(self) -> None:
        """The reader has caught up with its marks."""
        self._mark(self.unmarked)

    def _mark(self, copies: list[Copy]) -> None:
        self.unmarked = [copy for copy in self.unmarked if copy not in copies]
        standing = {
            copy.outbox_id
            for copy in copies
            if self.rows[copy.outbox_id].status == "pending"
            and copy.version == self.rows[copy.outbox_id].version
            and copy.outbox_id not in self.locked
        }
        assert self.books.mark_published(Fences([copy.fence for copy in copies])) == len(standing)
        for outbox_id in standing:
            self.rows[outbox_id] = model.marked(self.rows[outbox_id])

    # --- the sinks -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.open is None and self.consumed < len(self.log))
    @rule(count=COUNTS, verdicts=VERDICTS, ending=ENDINGS)
    def deliver(self, count: int, verdicts: list[Verdict], ending: str) -> None:
        """Deliver what comes next."""
        self._deliver(0, count, verdicts, ending)

    @precondition(lambda self: self.open is None and self.consumed < len(self.log))
    @rule(ending=ENDINGS)
    def deliver_all_without_a_failure(self, ending: str) -> None:
        """Nothing is in the way of anything, but what waits."""
        self._deliver(0, len(self.log), [Verdict.FINE], ending)

    @precondition(lambda self: self.open is None and self.log)
    @rule(again=st.sampled_from([1, 2, 5, 100]), count=COUNTS, verdicts=VERDICTS, ending=ENDINGS)
    def deliver_again(self, again: int, count: int, verdicts: list[Verdict], ending: str) -> None:
        """Deliver what was delivered before, and perhaps something that comes next."""
        self._deliver(again, count, verdicts, ending)

    def _deliver(self, again: int, count: int, verdicts: list[Verdict], ending: str) -> None:
        batch = self._take(again, count, verdicts)
        if not batch:
            return
        self.outcome = model.settle(self.rows, batch, self._now(), strict=self.strict)
        self.open = ExitStack()
        self.open.enter_context(self.sink.connection.transaction())
        # What the batch leaves as it is, such as a stale copy's failure, it does not keep locked.
        self.locked = {n for n, row in self.outcome.rows.items() if row != self.rows[n]}
        result = _settle(self.sink, batch)
        assert {outcome.outbox_id: outcome.what for outcome in result.outcomes} == self.outcome.outcomes
        dead = {settled.outbox_id: settled.dead for settled in result.settled}
        assert dead == {n: row.status == "dead" for n, row in self._changed() if row.failed}
        if ending == "commits":
            self.the_sink_commits()
        elif ending == "crashes":
            self.the_sink_crashes()

    @precondition(lambda self: self.open is not None)
    @rule()
    def the_sink_commits(self) -> None:
        """The batch is settled, and its offsets are committed."""
        assert self.open is not None
        self.open.close()
        self.rows |= dict(self._changed())
        self.history += self.outcome.history
        self.consumed = self.position
        self.open, self.locked = None, set()

    @precondition(lambda self: self.open is not None)
    @rule()
    def the_sink_crashes(self) -> None:
        """Nothing of the batch is settled; it will be delivered again."""
        assert self.open is not None
        self.open.__exit__(psycopg.Rollback, psycopg.Rollback(), None)
        self.open, self.locked = None, set()

    @precondition(lambda self: self.open is None and self.log)
    @rule(again=st.integers(0, 3), count=COUNTS, verdicts=VERDICTS)
    def two_sinks_settle_the_same_messages_at_once(self, again: int, count: int, verdicts: list[Verdict]) -> None:
        """A sink that its group has given up, and the one that follows it, are both at work on one batch."""
        batch = self._take(again, count, verdicts)
        now = self._now()
        once = model.settle(self.rows, batch, now, strict=self.strict)
        twice = model.settle(once.rows, batch, now, strict=self.strict)
        if any(_shape(row) != _shape(twice.rows[n]) for n, row in once.rows.items()):
            return  # what the second one finds depends on which statement of the first it has seen
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda sink: _settle(sink, batch), self.sinks[self.strict]))
        self.consumed = self.position
        self.history += once.history
        records = self._records()
        for outbox_id in {delivery.outbox_id for delivery in batch}:
            changed = records[outbox_id].updated_at != self.seen[outbox_id][1].updated_at
            assert changed == (once.rows[outbox_id] != self.rows[outbox_id])
            self.rows[outbox_id] = once.rows[outbox_id]

    # --- the operator ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.open is None and any(row.status in PUT_BACK for row in self.rows.values()))
    @rule(status=st.sampled_from(PUT_BACK), key=st.sampled_from([None, "a"]), limit=COUNTS)
    def redrive(self, status: Literal[Status.DEAD, Status.PUBLISHED], key: str | None, limit: int) -> None:
        """Dead or stuck rows go back to pending, lowest ids first."""
        expected = [n for n, row in sorted(self.rows.items()) if row.status == status and key in {None, row.key}]
        now = self.redrives.clock()
        run = Run(uuid4(), "somebody@somewhere", None, now)
        assert self.redrives.move(Selection(status=status, key=key), run, None, limit) == expected[:limit]
        for outbox_id in expected[:limit]:
            self.rows[outbox_id] = model.redriven(self.rows[outbox_id], now)

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        """A row changes when the model says so, forward in `updated_at`, and stays to the microsecond where not."""
        records = self._records()
        assert records.keys() == self.rows.keys()
        for outbox_id, row in self.rows.items():
            record = records[outbox_id]
            assert _looks_like(row, record), (outbox_id, row, record)
            version, before = self.seen.get(outbox_id, (0, record))
            if row.version == version:
                assert record == before
            else:
                assert record.updated_at > before.updated_at
                assert (record.consumed_at is not None) == (record.status == "consumed")
                assert (record.published_at is not None) >= (record.status in {"published", "consumed"})
                if row.failed:
                    assert record.last_error
                if row.failed and record.due is not None:
                    wait = (record.due - record.updated_at).total_seconds()
                    assert wait == pytest.approx(backoff(record.retry_count), abs=0.5)
            fresh = row.version != version and record.status == "pending"
            if fresh and record.due is not None and record.due - record.updated_at < SOON:
                self.outbox.change(outbox_id, "next_retry_at = next_retry_at + interval '1 hour'")
                record = record._replace(due=record.due + timedelta(hours=1))
            # From here on the model knows the due time to the microsecond.
            self.rows[outbox_id] = replace(row, due=record.due)
            self.seen[outbox_id] = row.version, record

    @invariant()
    def history_holds_each_consumed_row_once(self) -> None:
        """History has what the model stored, in that order, and each consumed row once."""
        assert self.outbox.history() == self.history
        assert sorted(self.history) == sorted(n for n, row in self.rows.items() if row.status == "consumed")

    @invariant()
    def each_key_is_in_order(self) -> None:
        """Under strict ordering the history of a key is in outbox order."""
        if self.strict:
            assert model.out_of_order(self.history, self.rows) == []

    # --- parts ---------------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        record = self.outbox.connection.execute("select clock_timestamp()").fetchone()
        assert record is not None
        return record[0]  # type: ignore[no-any-return]

    def _records(self) -> dict[int, Record]:
        query = (
            "select id, status, retry_count, last_error, next_retry_at, published_at, consumed_at, updated_at"
            " from agent_outbox_messages"
        )
        return {outbox_id: Record(*record) for outbox_id, *record in self.outbox.connection.execute(query)}

    def _untried(self) -> list[int]:
        """Return the rows that neither a retry nor a hold will bring."""
        return [n for n, row in sorted(self.rows.items()) if row.status == "pending" and row.due is None]

    def _waiting(self) -> list[tuple[datetime, int]]:
        """Return when each row that waits is due, in the order in which they must be published."""
        return sorted((row.due, n) for n, row in self.rows.items() if row.status == "pending" and row.due)

    def _publish(self, copy: Copy) -> None:
        self.log.append(copy)
        self.unmarked.append(copy)

    def _publish_from_table(self, row: OutboxRow) -> None:
        known = self.rows[row.fence.outbox_id]
        assert row.fence.retry_count == known.retry_count
        self._publish(Copy(row.fence.outbox_id, row.fence.retry_count, row.fence, known.version))

    def _due_rows(self, limit: int) -> list[OutboxRow]:
        """Return what is due, held to the model; what falls due at this very moment may be in it or not."""
        waiting = self._waiting()
        earliest = self._now()
        rows = self.books.due_rows(limit)
        latest = self._now()
        ids = [row.fence.outbox_id for row in rows]
        assert ids == [n for _, n in waiting][: len(ids)]
        assert min(limit, sum(due <= earliest for due, _ in waiting)) <= len(ids)
        assert len(ids) <= min(limit, sum(due <= latest for due, _ in waiting))
        return rows

    def _fails(self, outbox_id: int, attempt: int, *, final: bool) -> None:
        before, now = self.rows[outbox_id], self._now()
        self.books.settle_failures([Failure(outbox_id, attempt, "the topic is unknown", "reason", final)])
        self.rows[outbox_id] = model.failed(before, attempt, now, final=final)

    def _take(self, again: int, count: int, verdicts: Sequence[Verdict]) -> list[Delivery]:
        """Take a batch as the sink does: of two copies of a row the newest counts, at the place of the first."""
        first = max(0, self.consumed - again)
        copies = self.log[first : first + count]
        self.position = max(self.consumed, first + len(copies))
        batch: dict[int, Delivery] = {}
        for copy in copies:
            verdict = verdicts[copy.outbox_id % len(verdicts)]
            attempt = max(copy.attempt, batch[copy.outbox_id].attempt if copy.outbox_id in batch else 0)
            batch[copy.outbox_id] = Delivery(copy.outbox_id, attempt, verdict)
        return list(batch.values())

    def _changed(self) -> list[tuple[int, Row]]:
        return [(n, row) for n, row in self.outcome.rows.items() if n in self.locked and row != self.rows[n]]


def _settle(sink: Settlement, batch: Sequence[Delivery]) -> Result:
    items: list[Item] = []
    unparsed: list[Failure] = []
    for outbox_id, attempt, verdict in batch:
        if verdict in {Verdict.FINE, Verdict.REFUSED}:
            chat_id = TOO_LONG if verdict is Verdict.REFUSED else "chat-1"
            items.append(item(outbox_id, attempt, chat_id=chat_id))
        else:
            unparsed.append(Failure(outbox_id, attempt, str(verdict), "reason", verdict is Verdict.HOPELESS))
    while True:
        try:
            return sink.settle(items, unparsed)
        except psycopg.Error as error:
            if not is_conflict(error):
                raise


def _shape(row: Row | Record) -> tuple[str, int, bool]:
    return row.status, row.retry_count, row.due is None


def _looks_like(row: Row, record: Record) -> bool:
    if _shape(row) != _shape(record):
        return False
    return row.due is None or record.due is None or row.due <= record.due <= row.due + SLACK


def _earlier(copy: Copy, seconds: int) -> Copy:
    due = copy.fence.next_retry_at
    return copy if due is None else copy._replace(fence=copy.fence._replace(next_retry_at=due - seconds * 1_000_000))


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_whatever_the_interleaving_the_rows_are_as_the_state_machine_says(outbox: OutboxTable) -> None:
    """Publishing, marks, failures, holds, retries, redeliveries and crashes leave what the model leaves."""
    books = outbox.bookkeeping()
    sinks: Sinks = {
        strict: (outbox.settlement(strict=strict), outbox.settlement(strict=strict)) for strict in (True, False)
    }
    for connection in (
        outbox.connection,
        books.connection,
        *(sink.connection for pair in sinks.values() for sink in pair),
    ):
        # No server crashes here, so nothing has to wait for its disk; and who loses a deadlock is told at once.
        connection.execute("set synchronous_commit = off")
        connection.execute("set deadlock_timeout = '20ms'")

    class OnTheseTables(Machine):
        def __init__(self) -> None:
            super().__init__(outbox, books, sinks)

    run_state_machine_as_test(
        OnTheseTables,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
