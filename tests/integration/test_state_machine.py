"""The contract's state machine, row by row, on the statements that reader and sink share."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from connector.backoff import backoff
from connector.handlers import load_handlers
from connector.outbox import Failure, Fence, Fences
from connector.store.settlement import Result, Settlement
from tests.integration.outbox_table import TABLES, OutboxTable, item
from tests.services import Database

TOO_LONG = "c" * 37


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """Threads for what has to wait while the test goes on."""
    with ThreadPoolExecutor() as threads:
        yield threads


def outcomes(result: Result) -> dict[int, str]:
    """Return what became of each message of a batch."""
    return {outcome.outbox_id: outcome.what for outcome in result.outcomes}


def failure(outbox_id: int, attempt: int = 0, error: str = "it failed", *, final: bool = False) -> Failure:
    """Return a failed attempt."""
    return Failure(outbox_id, attempt, error, "reason", final)


# --- mark published --------------------------------------------------------------------------------------------------


def test_a_pending_row_is_marked_published(outbox: OutboxTable) -> None:
    """A row that nothing has changed since its copy was read becomes `published`, at the database's time."""
    outbox_id = outbox.new()
    assert outbox.bookkeeping().mark_published(Fences([outbox.fence(outbox_id)])) == 1
    row = outbox.row(outbox_id)
    assert row.status == "published"
    assert row.published_at is not None
    assert abs(row.published_at - _database_clock(outbox)) < timedelta(seconds=5)


def test_consumed_is_never_overwritten_by_a_late_published(outbox: OutboxTable) -> None:
    """The sink is done before the reader's mark lands; the mark changes nothing."""
    outbox_id = outbox.new()
    fence = outbox.fence(outbox_id)
    assert outcomes(outbox.settlement().settle([item(outbox_id)], [])) == {outbox_id: "stored"}
    before = outbox.row(outbox_id)
    assert outbox.bookkeeping().mark_published(Fences([fence])) == 0
    assert outbox.row(outbox_id) == before
    assert before.status == "consumed"


def test_a_late_published_mark_never_swallows_a_scheduled_retry(outbox: OutboxTable) -> None:
    """The sink schedules a retry before the reader's mark lands; the retry still falls due."""
    outbox_id = outbox.new()
    fence = outbox.fence(outbox_id)
    outbox.settlement().settle([item(outbox_id, chat_id=TOO_LONG)], [])
    before = outbox.row(outbox_id)
    assert outbox.bookkeeping().mark_published(Fences([fence])) == 0
    assert outbox.row(outbox_id) == before
    assert (before.status, before.retry_count) == ("pending", 1)
    assert before.next_retry_at is not None


def test_a_late_published_mark_never_swallows_a_hold(outbox: OutboxTable) -> None:
    """The sink holds a message back before the reader's mark lands; the message still falls due."""
    outbox.in_retry()
    outbox_id = outbox.new()
    fence = outbox.fence(outbox_id)
    assert outcomes(outbox.settlement().settle([item(outbox_id)], [])) == {outbox_id: "held"}
    before = outbox.row(outbox_id)
    assert outbox.bookkeeping().mark_published(Fences([fence])) == 0
    assert outbox.row(outbox_id) == before
    assert (before.status, before.retry_count) == ("pending", 0)


def test_a_late_mark_of_an_earlier_hold_never_swallows_the_next_one(outbox: OutboxTable) -> None:
    """A message held twice for the same moment differs in nothing but `updated_at`, and that stops the late mark."""
    outbox.in_retry()
    outbox_id = outbox.new()
    outbox.settlement().settle([item(outbox_id)], [])
    fence = outbox.fence(outbox_id)
    outbox.settlement().settle([item(outbox_id)], [])
    again = outbox.fence(outbox_id)
    assert again._replace(updated_at=0) == fence._replace(updated_at=0)
    assert outbox.bookkeeping().mark_published(Fences([fence])) == 0


@pytest.mark.parametrize("change", ["a retry", "a hold"])
def test_the_fence_holds_when_the_clock_stood_still_or_went_back(outbox: OutboxTable, change: str) -> None:
    """Whatever the clock says, a change moves `updated_at` forward, so that a copy from before it is found out."""
    outbox.in_retry()
    outbox_id = outbox.new()
    outbox.change(outbox_id, "updated_at = clock_timestamp() + interval '1 hour'")
    before = outbox.row(outbox_id).updated_at
    bad = TOO_LONG if change == "a retry" else "chat-1"
    outbox.settlement(strict=change == "a hold").settle([item(outbox_id, chat_id=bad)], [])
    assert outbox.row(outbox_id).next_retry_at is not None
    assert outbox.row(outbox_id).updated_at > before


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda fence: fence._replace(retry_count=fence.retry_count + 1), id="retry_count"),
        pytest.param(lambda fence: fence._replace(updated_at=fence.updated_at - 1), id="updated_at"),
        pytest.param(lambda fence: fence._replace(next_retry_at=None), id="next_retry_at"),
    ],
)
def test_each_part_of_the_fence_stops_a_mark(outbox: OutboxTable, changed: Callable[[Fence], Fence]) -> None:
    """A mark writes only where retry_count, updated_at and next_retry_at are all as its copy showed them."""
    outbox_id = outbox.in_retry()
    fence = outbox.fence(outbox_id)
    books = outbox.bookkeeping()
    assert books.mark_published(Fences([changed(fence)])) == 0
    assert outbox.status(outbox_id) == "pending"
    assert books.mark_published(Fences([fence])) == 1


def test_a_retried_row_keeps_its_due_time_when_it_is_published_again(outbox: OutboxTable) -> None:
    """The due time stays until the row is consumed or dead: it is what holds later messages of the key back."""
    outbox_id = outbox.in_retry()
    due = outbox.row(outbox_id).next_retry_at
    assert outbox.bookkeeping().mark_published(Fences([outbox.fence(outbox_id)])) == 1
    row = outbox.row(outbox_id)
    assert (row.status, row.next_retry_at) == ("published", due)


def test_a_mark_never_waits_for_the_sink(outbox: OutboxTable) -> None:
    """A row that the sink's transaction has locked is skipped, and is consumed when that commits."""
    locked, free = outbox.new(), outbox.new("other")
    fences = [outbox.fence(locked), outbox.fence(free)]
    settlement = outbox.settlement()
    marks = outbox.connect()
    marks.execute("set lock_timeout = '500ms'")
    with settlement.connection.transaction():
        settlement.settle([item(locked)], [])
        assert outbox.bookkeeping(marks).mark_published(Fences(fences)) == 1
    assert [outbox.status(locked), outbox.status(free)] == ["consumed", "published"]


def test_the_sink_waits_for_a_mark_and_consumes_what_it_left(outbox: OutboxTable, beside: ThreadPoolExecutor) -> None:
    """A mark that commits while the sink waits for the row's lock is kept, and the row is consumed on top of it."""
    outbox_id = outbox.new()
    books, settlement = outbox.bookkeeping(), outbox.settlement()
    with books.transaction():
        assert books.mark_published(Fences([outbox.fence(outbox_id)])) == 1
        settling = beside.submit(settlement.settle, [item(outbox_id)], [])
        outbox.wait_until_blocked(settlement.connection)
    assert outcomes(settling.result(20)) == {outbox_id: "stored"}
    row = outbox.row(outbox_id)
    assert row.status == "consumed"
    assert row.published_at is not None
    assert row.consumed_at is not None
    assert row.published_at < row.consumed_at


def test_marks_and_settlements_that_cross_do_not_deadlock(outbox: OutboxTable, beside: ThreadPoolExecutor) -> None:
    """The sink holds one row and wants another that a mark holds, while the mark wants the first: both finish."""
    first, second = outbox.new("a"), outbox.new("b")
    fences = [outbox.fence(first), outbox.fence(second)]
    books, settlement = outbox.bookkeeping(), outbox.settlement()
    books.connection.execute("set lock_timeout = '2s'")
    with settlement.connection.transaction(), ThreadPoolExecutor() as other:
        settlement.settle([item(second)], [])
        with books.transaction():
            assert books.mark_published(Fences(fences)) == 1
            settling = other.submit(settlement.settle, [item(first)], [])
            outbox.wait_until_blocked(settlement.connection)
        assert outcomes(settling.result(20)) == {first: "stored"}
    assert [outbox.status(first), outbox.status(second)] == ["consumed", "consumed"]


@pytest.mark.parametrize("write", ["settle", "settle beside a failure", "retries", "dead"])
def test_writes_lock_their_rows_in_id_order(outbox: OutboxTable, beside: ThreadPoolExecutor, write: str) -> None:
    """While the row of the lowest id is locked elsewhere, none of the others is held, whatever the batch's order."""
    rows = [outbox.new(f"key-{n}") for n in range(4)]
    backwards = rows[::-1]
    books, settlement = outbox.bookkeeping(), outbox.settlement()
    blocker = outbox.connect()
    lock = "select id from agent_outbox_messages where id = %s for update nowait"
    with blocker.transaction():
        blocker.execute(lock, [rows[0]])
        if write.startswith("settle"):
            connection, batch = settlement.connection, [item(n, key=str(n)) for n in backwards]
            failed = [] if write == "settle" else [failure(outbox.new("bad"), final=True)]
            writing: Future[object] = beside.submit(settlement.settle, batch, failed)
        else:
            connection, failures = books.connection, [failure(n, final=write == "dead") for n in backwards]
            writing = beside.submit(books.settle_failures, failures)
        outbox.wait_until_blocked(connection)
        with outbox.connection.transaction(force_rollback=True):
            for outbox_id in rows[1:]:
                outbox.connection.execute(lock, [outbox_id])
    writing.result(20)
    assert {outbox.status(n) for n in rows} == {{"retries": "pending", "dead": "dead"}.get(write, "consumed")}


# --- retries ---------------------------------------------------------------------------------------------------------


def test_the_backoff_doubles_from_one_second_to_thirty_two_by_the_databases_clock(outbox: OutboxTable) -> None:
    """After the nth failure a row is due in 1, 2, 4, 8, 16, 32, 32, 32 seconds, counted by the database's clock."""
    outbox_id = outbox.new()
    books = outbox.bookkeeping()
    waits = []
    for attempt in range(8):
        before = _database_clock(outbox)
        (settled,) = books.settle_failures([failure(outbox_id, attempt)])
        row = outbox.row(outbox_id)
        assert (row.status, row.retry_count) == ("pending", attempt + 1)
        assert before <= row.updated_at <= _database_clock(outbox)
        assert row.due_in is not None
        assert settled.due_in == pytest.approx(row.due_in, abs=0.5)
        waits.append(row.due_in)
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 32, 32], abs=0.05)
    assert waits == pytest.approx([backoff(n) for n in range(1, 9)], abs=0.05)


def test_a_retry_from_an_odd_retry_count_waits_one_second(outbox: OutboxTable) -> None:
    """backoff(n) is one second for n of zero or less, should somebody have written such a count."""
    outbox_id = outbox.new(retry_count=-5)
    outbox.bookkeeping().settle_failures([failure(outbox_id)])
    assert outbox.row(outbox_id).due_in == pytest.approx(1, abs=0.05)


def test_a_published_row_goes_back_to_pending_for_its_retry(outbox: OutboxTable) -> None:
    """A failure of a row that is published leaves it pending, with its error and its due time."""
    outbox_id = outbox.new(status="published")
    outbox.bookkeeping().settle_failures([failure(outbox_id, error="the reason")])
    row = outbox.row(outbox_id)
    assert (row.status, row.retry_count, row.last_error) == ("pending", 1, "the reason")


@pytest.mark.parametrize(("retry_count", "max_retry", "status"), [(1, 3, "pending"), (2, 3, "dead"), (0, 1, "dead")])
def test_a_row_is_dead_when_its_attempts_are_used_up(
    outbox: OutboxTable, retry_count: int, max_retry: int, status: str
) -> None:
    """`retry_count + 1 >= max_retry` is dead, with the last error and no due time; one attempt less is a retry."""
    outbox_id = outbox.new(status="published", retry_count=retry_count, max_retry=max_retry)
    (settled,) = outbox.bookkeeping().settle_failures([failure(outbox_id, retry_count, "the last straw")])
    row = outbox.row(outbox_id)
    assert (row.status, row.retry_count, row.last_error) == (status, retry_count + 1, "the last straw")
    assert settled.dead == (status == "dead")
    assert (row.next_retry_at is None) == (status == "dead")


def test_a_stale_copys_failure_schedules_nothing(outbox: OutboxTable) -> None:
    """A failure whose attempt is older than `retry_count` changes nothing, however often it comes."""
    outbox_id = outbox.new()
    books, settlement = outbox.bookkeeping(), outbox.settlement()
    books.settle_failures([failure(outbox_id, 0)])
    before = outbox.row(outbox_id)
    assert books.settle_failures([failure(outbox_id, 0)]) == []
    result = settlement.settle([item(outbox_id, 0, chat_id=TOO_LONG)], [])
    assert result.settled == []
    assert [stale.outbox_id for stale in result.failures] == [outbox_id]
    assert outbox.row(outbox_id) == before
    assert before.retry_count == 1


def test_a_stale_copys_final_failure_leaves_its_row_alive(outbox: OutboxTable) -> None:
    """What no retry could help is no verdict on a row that has moved on since that copy was made."""
    outbox_id = outbox.in_retry()
    before = outbox.row(outbox_id)
    assert outbox.bookkeeping().settle_failures([failure(outbox_id, 0, final=True)]) == []
    assert outbox.row(outbox_id) == before
    (settled,) = outbox.bookkeeping().settle_failures([failure(outbox_id, 1, final=True)])
    assert settled.dead
    assert outbox.status(outbox_id) == "dead"


def test_a_failure_by_another_messages_fault_costs_no_retry(outbox: OutboxTable) -> None:
    """The row is tried again as the same attempt, holding back what follows it meanwhile; it never dies of that."""
    outbox_id = outbox.new(max_retry=1)
    behind = outbox.new()
    failure = Failure(outbox_id, 0, "another record of the batch", "neighbour_refused", blameless=True)
    (settled,) = outbox.bookkeeping().settle_failures([failure])
    row = outbox.row(outbox_id)
    assert (row.status, row.retry_count, settled.dead) == ("pending", 0, False)
    assert settled.due_in == pytest.approx(1.0, abs=0.5)
    (outcome,) = outbox.settlement().settle([item(behind)], []).outcomes
    assert outcome.what == "held"


def test_two_copies_that_fail_in_one_batch_cost_one_retry(outbox: OutboxTable) -> None:
    """The same attempt, delivered twice and failed twice at once, counts once."""
    outbox_id = outbox.new()
    assert len(outbox.bookkeeping().settle_failures([failure(outbox_id), failure(outbox_id)])) == 1
    assert outbox.row(outbox_id).retry_count == 1


@pytest.mark.parametrize("final", [False, True])
def test_last_error_holds_two_thousand_characters_and_never_half_of_one(outbox: OutboxTable, final: bool) -> None:
    """An error longer than 2,000 characters is cut between characters; what text cannot hold is replaced."""
    outbox_id = outbox.new()
    outbox.bookkeeping().settle_failures([failure(outbox_id, error="a\x00\ud800" + "😀" * 3_000, final=final)])
    assert outbox.row(outbox_id).last_error == "a\N{REPLACEMENT CHARACTER}?" + "😀" * 1_997


# --- terminal rows, missing rows -------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[OutboxTable, int], object]] = {
    "mark published": lambda outbox, n: outbox.bookkeeping().mark_published(Fences([outbox.fence(n)])),
    "schedule a retry": lambda outbox, n: outbox.bookkeeping().settle_failures([failure(n, 99)]),
    "mark dead": lambda outbox, n: outbox.bookkeeping().settle_failures([failure(n, 99, final=True)]),
    "store": lambda outbox, n: outbox.settlement().settle([item(n, 99)], []),
    "refuse": lambda outbox, n: outbox.settlement().settle([item(n, 99, chat_id=TOO_LONG)], []),
    "give up": lambda outbox, n: outbox.settlement().settle([], [failure(n, 99, final=True)]),
    "hold": lambda outbox, n: _held_behind(outbox, n - 1).settle([item(n)], []),
    "store with neighbours one by one": lambda outbox, n: outbox.settlement().settle(
        [item(n, key="a"), item(outbox.new("bad"), chat_id=TOO_LONG, key="bad")], []
    ),
    "mark already stored": lambda outbox, n: outbox.connection.execute(
        TABLES.query("sink", "mark_already_stored"), {"id": n}
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("status", ["consumed", "dead"])
def test_no_write_changes_a_terminal_row(outbox: OutboxTable, status: str, write: str) -> None:
    """`consumed` and `dead` rows keep every column, and get no history, whatever comes late."""
    outbox.new()
    outbox_id = outbox.new(status=status, last_error="as it was")
    before = _everything(outbox, outbox_id)
    WRITES[write](outbox, outbox_id)
    assert _everything(outbox, outbox_id) == before
    assert outbox.history() == []


@pytest.mark.parametrize("status", ["consumed", "dead"])
def test_a_message_of_a_terminal_row_is_a_counted_no_op(outbox: OutboxTable, status: str) -> None:
    """The batch answers with the status that it found, for the metric to count."""
    outbox_id = outbox.new(status=status)
    assert outcomes(outbox.settlement().settle([item(outbox_id)], [])) == {outbox_id: status}


def test_a_message_without_a_row_is_a_counted_no_op(outbox: OutboxTable) -> None:
    """A row that was deleted, or never was, stores nothing and does not disturb its neighbours."""
    outbox_id = outbox.new()
    result = outbox.settlement().settle([item(999_999, key="gone"), item(outbox_id)], [])
    assert outcomes(result) == {999_999: "missing", outbox_id: "stored"}
    assert outbox.bookkeeping().settle_failures([failure(999_999), failure(999_998, final=True)]) == []
    assert outbox.history() == [outbox_id]


# --- persist ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "published"])
def test_a_message_is_stored_and_its_row_consumed(outbox: OutboxTable, status: str) -> None:
    """From pending, where no mark is in yet, and from published: history holds the payload, the row is consumed."""
    outbox_id = outbox.new(status=status)
    result = outbox.settlement().settle([item(outbox_id)], [])
    (outcome,) = result.outcomes
    assert (outcome.what, outcome.due_in) == ("stored", None)
    assert outcome.age is not None
    assert 0 <= outcome.age < 60
    row = outbox.row(outbox_id)
    assert (row.status, row.next_retry_at) == ("consumed", None)
    assert row.published_at is not None
    assert row.consumed_at is not None
    stored = outbox.connection.execute(
        "select user_id, chat_id, message_content, role, outbox_id from chat_histories"
    ).fetchall()
    assert stored == [(7, "chat-1", "hello", "user", outbox_id)]


def test_history_and_consumed_are_one_transaction_when_the_mark_fails(outbox: OutboxTable) -> None:
    """Where the row cannot be marked consumed, its history row is not there either."""
    outbox.connection.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise 'no mark today'; end $$;"
        "create trigger refuse before update on agent_outbox_messages for each row"
        " when (new.status = 'consumed') execute function refuse()"
    )
    outbox_id = outbox.new()
    outbox.settlement().settle([item(outbox_id)], [])
    row = outbox.row(outbox_id)
    assert (row.status, row.retry_count) == ("pending", 1)
    assert "no mark today" in (row.last_error or "")
    assert outbox.history() == []


def test_history_and_consumed_are_one_transaction_when_the_session_is_killed(
    outbox: OutboxTable, beside: ThreadPoolExecutor
) -> None:
    """A session that ends after its insert and before its commit leaves neither, and costs the message nothing."""
    outbox.connection.execute(
        "create function wait() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock(1); return null; end $$;"
        "create trigger wait after insert on chat_histories for each row execute function wait();"
        "select pg_advisory_lock(1)"
    )
    outbox_id = outbox.new()
    before = outbox.row(outbox_id)
    settlement = outbox.settlement()
    settling = beside.submit(settlement.settle, [item(outbox_id)], [])
    outbox.wait_until_blocked(settlement.connection)
    outbox.connection.execute("select pg_terminate_backend(%s)", [settlement.connection.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        settling.result(20)
    assert outbox.row(outbox_id) == before
    assert outbox.history() == []


def test_a_redelivery_stores_nothing_twice(outbox: OutboxTable) -> None:
    """The same message again, alone or in a batch, finds its row consumed."""
    outbox_id = outbox.new()
    settlement = outbox.settlement()
    settlement.settle([item(outbox_id)], [])
    assert outcomes(settlement.settle([item(outbox_id)], [])) == {outbox_id: "consumed"}
    assert outbox.history() == [outbox_id]


def test_two_sinks_with_the_same_message_store_it_once(outbox: OutboxTable, beside: ThreadPoolExecutor) -> None:
    """After a rebalance two sinks may hold one message: the second waits for the first and finds it consumed."""
    outbox_id = outbox.new()
    first, second = outbox.settlement(), outbox.settlement()
    with first.connection.transaction():
        assert outcomes(first.settle([item(outbox_id)], [])) == {outbox_id: "stored"}
        settling = beside.submit(second.settle, [item(outbox_id)], [])
        outbox.wait_until_blocked(second.connection)
    assert outcomes(settling.result(20)) == {outbox_id: "consumed"}
    assert outbox.history() == [outbox_id]


def test_a_message_that_history_holds_already_is_only_marked(outbox: OutboxTable) -> None:
    """A history row that somebody stored before is no failure: the row is consumed, and its neighbours are stored."""
    known, fresh = outbox.new("a"), outbox.new("b")
    outbox.connection.execute("insert into chat_histories (user_id, chat_id, outbox_id) values (1, 'old', %s)", [known])
    result = outbox.settlement().settle([item(known, key="a"), item(fresh, key="b")], [])
    assert outcomes(result) == {known: "already_stored", fresh: "stored"}
    assert result.failures == []
    assert [outbox.status(known), outbox.status(fresh)] == ["consumed", "consumed"]
    assert outbox.history() == [known, fresh]


def test_a_row_that_the_database_refuses_does_not_take_its_neighbours_along(outbox: OutboxTable) -> None:
    """Of a batch with one bad row in any place, all the others are stored in their order."""
    rows = [outbox.new(f"key-{n}") for n in range(7)]
    bad = {rows[0], rows[3], rows[6]}
    batch = [item(n, key=str(n), chat_id=TOO_LONG if n in bad else "chat-1") for n in rows]
    result = outbox.settlement().settle(batch, [])
    assert {settled.outbox_id for settled in result.settled} == bad
    assert outbox.history() == [n for n in rows if n not in bad]
    for outbox_id in bad:
        row = outbox.row(outbox_id)
        assert (row.status, row.retry_count) == ("pending", 1)
        assert "too long" in (row.last_error or "")


@pytest.mark.parametrize(
    "sqlstate",
    "08006 25006 25P03 40001 53100 53200 53300 55P03 57014 57P01 57P03 58030 XX000 XX001".split(),  # noqa: SIM905 - a table
)
def test_what_is_wrong_with_the_database_is_no_fault_of_a_message(outbox: OutboxTable, sqlstate: str) -> None:
    """A full disk, no memory, a standby, a shutdown: nothing changes."""
    outbox.connection.execute(
        "create function refuse() returns trigger language plpgsql as"
        f" $$ begin raise 'no' using errcode = '{sqlstate}'; end $$;"
        "create trigger refuse before insert on chat_histories for each row execute function refuse()"
    )
    rows = [outbox.new(), outbox.new("key-2")]
    before = [outbox.row(row) for row in rows]
    with pytest.raises(psycopg.Error) as refused:
        outbox.settlement().settle([item(row) for row in rows], [])
    assert refused.value.sqlstate == sqlstate
    assert [outbox.row(row) for row in rows] == before


@pytest.fixture
def sink_role(outbox: OutboxTable) -> Iterator[str]:
    """A role that may do what the sink does, and no more."""
    role = f"sink_{secrets.token_hex(4)}"
    outbox.connection.execute(
        f"create role {role}; grant select, update on agent_outbox_messages to {role};"
        f"grant insert on chat_histories to {role}"
    )
    yield role
    outbox.connection.execute(f"drop owned by {role}; drop role {role}")


@pytest.mark.parametrize(
    ("damage", "sqlstate"),
    [
        ("revoke insert on chat_histories from {role}", "42501"),
        ("alter table chat_histories enable row level security", "42501"),
        ("alter table chat_histories rename column role to part", "42703"),
        ("alter table chat_histories rename to histories", "42P01"),
    ],
    ids=["privilege", "row level security", "column", "table"],
)
def test_what_was_taken_from_the_sink_is_no_fault_of_a_message(
    outbox: OutboxTable, sink_role: str, damage: str, sqlstate: str
) -> None:
    """A missing privilege, table or column, and row level security that lets no row in: nothing changes."""
    rows = [outbox.new(), outbox.new("key-2")]
    before = [outbox.row(row) for row in rows]
    settlement = outbox.settlement()
    settlement.connection.execute(f"set role {sink_role}")
    outbox.connection.execute(damage.format(role=sink_role))
    with pytest.raises(psycopg.Error) as refused:
        settlement.settle([item(row) for row in rows], [])
    assert refused.value.sqlstate == sqlstate
    assert [outbox.row(row) for row in rows] == before


@pytest.mark.parametrize(
    "refusing",
    [
        """
        alter table chat_histories enable row level security;
        create policy somebody on chat_histories for insert with check (role <> 'nobody')
        """,
        """
        create function refuse() returns trigger language plpgsql as
            $$ begin raise 'not this one' using errcode = '42501'; end $$;
        create trigger refuse before insert on chat_histories for each row
            when (new.role = 'nobody') execute function refuse()
        """,
    ],
    ids=["a policy", "a trigger"],
)
@pytest.mark.parametrize("neighbours", [0, 2])
def test_a_row_that_a_policy_or_a_trigger_denies_is_refused_alone(
    outbox: OutboxTable, sink_role: str, refusing: str, neighbours: int
) -> None:
    """It goes by the code of a missing privilege, and is one row's fault: it is retried, and the others are stored."""
    outbox.connection.execute(refusing)
    bad, *good = [outbox.new(f"key-{n}") for n in range(1 + neighbours)]
    settlement = outbox.settlement()
    settlement.connection.execute(f"set role {sink_role}")
    settlement.settle([item(bad, role="nobody"), *(item(row, key=str(row)) for row in good)], [])
    row = outbox.row(bad)
    assert (row.status, row.retry_count) == ("pending", 1)
    assert "SQLSTATE 42501" in (row.last_error or "")
    assert outbox.history() == good


# --- strict ordering -------------------------------------------------------------------------------------------------


def test_a_message_behind_one_in_retry_is_held_and_pays_nothing_for_it(outbox: OutboxTable) -> None:
    """A held message stays pending, is due no earlier than the one it waits for, and keeps its retry_count."""
    earlier = outbox.in_retry()
    outbox_id = outbox.new(status="published", retry_count=3)
    (outcome,) = outbox.settlement().settle([item(outbox_id, 3)], []).outcomes
    row = outbox.row(outbox_id)
    assert (outcome.what, row.status, row.retry_count, row.last_error) == ("held", "pending", 3, None)
    assert row.next_retry_at == outbox.row(earlier).next_retry_at
    assert row.due_in is not None
    assert outcome.due_in == pytest.approx(row.due_in, abs=1)
    assert outbox.history() == []


def test_a_held_message_waits_a_second_at_least(outbox: OutboxTable) -> None:
    """Behind a retry that is overdue or in flight, a held message does not come straight back."""
    earlier = outbox.in_retry()
    outbox.change(earlier, "next_retry_at = clock_timestamp() - interval '1 minute'")
    outbox_id = outbox.new()
    outbox.settlement().settle([item(outbox_id)], [])
    assert outbox.row(outbox_id).due_in == pytest.approx(1, abs=0.05)


def test_a_retry_in_flight_holds_back_as_well(outbox: OutboxTable) -> None:
    """An earlier message that was published again, and is not settled yet, still holds later ones back."""
    earlier = outbox.in_retry()
    outbox.bookkeeping().mark_published(Fences([outbox.fence(earlier)]))
    assert outbox.status(earlier) == "published"
    outbox_id = outbox.new()
    assert outcomes(outbox.settlement().settle([item(outbox_id)], [])) == {outbox_id: "held"}


def test_a_failure_holds_back_what_follows_it_in_the_same_batch(outbox: OutboxTable) -> None:
    """The first message of a key fails; the others of the key are held, and other keys go on."""
    bad, behind, other, last = outbox.new(), outbox.new(), outbox.new("other"), outbox.new()
    batch = [item(bad, chat_id=TOO_LONG), item(behind), item(other, key="other"), item(last)]
    result = outbox.settlement().settle(batch, [])
    assert outcomes(result) == {behind: "held", other: "stored", last: "held"}
    assert [outbox.row(n).retry_count for n in (bad, behind, last)] == [1, 0, 0]
    assert outbox.history() == [other]


def test_a_failure_in_the_middle_holds_back_only_what_follows_it(outbox: OutboxTable) -> None:
    """What was before it in the batch is stored."""
    rows = [outbox.new() for _ in range(6)]
    batch = [item(n, chat_id=TOO_LONG if n == rows[2] else "chat-1") for n in rows]
    result = outbox.settlement().settle(batch, [])
    assert [failed.outbox_id for failed in result.failures] == [rows[2]]
    assert outbox.history() == rows[:2]
    assert {outcomes(result)[n] for n in rows[3:]} == {"held"}


def test_several_held_messages_follow_in_outbox_order_once_the_retry_succeeds(outbox: OutboxTable) -> None:
    """A failed message and those behind it come back in one look at the table, in order, and are stored in order."""
    rows = [outbox.new() for _ in range(4)]
    settlement, books = outbox.settlement(), outbox.bookkeeping()
    settlement.settle([item(rows[0], chat_id=TOO_LONG)], [])
    for outbox_id in rows[1:]:
        assert outcomes(settlement.settle([item(outbox_id)], [])) == {outbox_id: "held"}
    outbox.connection.execute(
        "update agent_outbox_messages set next_retry_at = next_retry_at - interval '1 hour'"
        " where next_retry_at is not null"
    )
    due = [row.fence for row in books.due_rows(10)]
    assert [fence.outbox_id for fence in due] == rows
    assert [fence.retry_count for fence in due] == [1, 0, 0, 0]
    books.mark_published(Fences(due))
    assert books.due_rows(10) == []
    settlement.settle([item(fence.outbox_id, fence.retry_count) for fence in due], [])
    assert outbox.history() == rows


def test_a_message_does_not_overtake_one_that_is_itself_held(outbox: OutboxTable) -> None:
    """The failed message is consumed, the first held one is not yet back: the second one waits for it."""
    failed, held = outbox.in_retry(), outbox.new()
    settlement = outbox.settlement()
    settlement.settle([item(held)], [])
    settlement.settle([item(failed, 1)], [])
    late = outbox.new()
    assert outcomes(settlement.settle([item(late)], [])) == {late: "held"}
    assert outcomes(settlement.settle([item(held), item(late)], [])) == {held: "stored", late: "stored"}
    assert outbox.history() == [failed, held, late]


def test_a_retry_that_comes_after_its_successor_in_one_batch_holds_it_back(outbox: OutboxTable) -> None:
    """The earlier message is in the batch too, but behind: it is stored, and the later one is held."""
    earlier, later = outbox.in_retry(), outbox.new()
    result = outbox.settlement().settle([item(later), item(earlier, 1)], [])
    assert outcomes(result) == {later: "held", earlier: "stored"}
    assert outbox.history() == [earlier]


def test_a_message_held_in_its_batch_holds_back_what_follows_it_there(outbox: OutboxTable) -> None:
    """The second message waits for the first, which comes behind it; the third must not slip in between."""
    first, second, third = outbox.in_retry(), outbox.in_retry(), outbox.new()
    result = outbox.settlement().settle([item(second, 1), item(first, 1), item(third)], [])
    assert outcomes(result) == {second: "held", first: "stored", third: "held"}
    assert outbox.history() == [first]


def test_a_retry_ahead_of_its_successor_in_one_batch_holds_nothing_back(outbox: OutboxTable) -> None:
    """Both are stored, in their order."""
    earlier, later = outbox.in_retry(), outbox.new()
    result = outbox.settlement().settle([item(earlier, 1), item(later)], [])
    assert outcomes(result) == {earlier: "stored", later: "stored"}
    assert outbox.history() == [earlier, later]


def test_a_retry_that_fails_again_ahead_of_its_successor_holds_it_back(outbox: OutboxTable) -> None:
    """What looked fine ahead in the batch is not taken for stored before it is."""
    earlier, later = outbox.in_retry(), outbox.new()
    result = outbox.settlement().settle([item(earlier, 1, chat_id=TOO_LONG), item(later)], [])
    assert outcomes(result) == {later: "held"}
    assert (outbox.row(earlier).retry_count, outbox.row(later).retry_count) == (2, 0)


@pytest.mark.parametrize("ending", ["consumed", "dead"])
def test_a_settled_message_holds_nothing_back(outbox: OutboxTable, ending: str) -> None:
    """Once the earlier message is consumed or dead, the next one goes through."""
    earlier, later = outbox.in_retry(), outbox.new()
    settlement = outbox.settlement()
    if ending == "consumed":
        settlement.settle([item(earlier, 1)], [])
    else:
        settlement.settle([], [failure(earlier, 1, final=True)])
    assert (outbox.status(earlier), outbox.row(earlier).next_retry_at) == (ending, None)
    assert outcomes(settlement.settle([item(later)], [])) == {later: "stored"}


def test_a_message_that_dies_in_the_batch_holds_nothing_back(outbox: OutboxTable) -> None:
    """A row whose last attempt fails is dead, and the next of its key is stored in the same transaction."""
    bad, later = outbox.new(max_retry=1), outbox.new()
    result = outbox.settlement().settle([item(bad, chat_id=TOO_LONG), item(later)], [])
    assert outcomes(result) == {later: "stored"}
    assert outbox.status(bad) == "dead"


def test_a_message_that_was_never_tried_holds_nothing_back(outbox: OutboxTable) -> None:
    """An earlier row that waits for nothing is ahead in the partition anyway, and must not stall the key."""
    outbox.new()
    later = outbox.new()
    assert outcomes(outbox.settlement().settle([item(later)], [])) == {later: "stored"}


def test_a_later_retry_holds_no_earlier_message_back(outbox: OutboxTable) -> None:
    """Only what comes first in the outbox holds back."""
    earlier = outbox.new()
    outbox.in_retry()
    assert outcomes(outbox.settlement().settle([item(earlier)], [])) == {earlier: "stored"}


@pytest.mark.parametrize("other", [{"key": "another key"}, {"topic": "another topic"}])
def test_messages_of_other_keys_and_topics_hold_nothing_back(outbox: OutboxTable, other: dict[str, str]) -> None:
    """The order is that of a key within a topic."""
    outbox.in_retry(**other)
    outbox_id = outbox.new()
    assert outcomes(outbox.settlement().settle([item(outbox_id)], [])) == {outbox_id: "stored"}


def test_relaxed_ordering_holds_nothing_back(outbox: OutboxTable) -> None:
    """With `relaxed` a message is stored although an earlier one of its key waits for a retry."""
    outbox.in_retry()
    outbox_id = outbox.new()
    assert outcomes(outbox.settlement(strict=False).settle([item(outbox_id)], [])) == {outbox_id: "stored"}


def test_a_batch_that_holds_or_fails_tells_the_reader_when_to_look(outbox: OutboxTable) -> None:
    """The due time goes to the reader through the WAL, with the commit; a batch without any sends nothing."""
    outbox.connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput', true)", ["hints"])
    changes = (
        "select count(*) from pg_logical_slot_get_binary_changes('hints', null, null, 'proto_version', '1',"
        " 'publication_names', 'none', 'messages', 'true') where get_byte(data, 0) = ascii('M')"
    )
    outbox.connection.execute("create publication none")
    settlement = outbox.settlement()
    hints = []
    for batch in ([item(outbox.new("fine"), key="fine")], [item(outbox.new(), chat_id=TOO_LONG)], [item(outbox.new())]):
        settlement.settle(batch, [])
        hints.append(outbox.connection.execute(changes).fetchone())
    assert hints == [(0,), (1,), (1,)]


def _database_clock(outbox: OutboxTable) -> datetime:
    record = outbox.connection.execute("select clock_timestamp()").fetchone()
    assert record is not None
    assert isinstance(record[0], datetime)
    return record[0]


def _held_behind(outbox: OutboxTable, earlier: int) -> Settlement:
    outbox.change(earlier, "next_retry_at = now()")
    return outbox.settlement()


def _everything(outbox: OutboxTable, outbox_id: int) -> object:
    return outbox.connection.execute("select * from agent_outbox_messages where id = %s", [outbox_id]).fetchone()


def test_a_connection_that_breaks_before_a_batch_is_undone_is_an_outage(outbox: OutboxTable) -> None:
    """No other error comes of it, and nothing has changed: the sink can try again."""
    ids = [outbox.new(), outbox.new()]
    outbox.settlement().settle([item(ids[1])], [])

    class BreaksOff(Settlement):
        def _store_plain(self, group: Any, meanwhile: Any) -> Any:
            answer = super()._store_plain(group, meanwhile)
            pid = self.connection.info.backend_pid
            outbox.connection.execute("select pg_terminate_backend(%s, 10000)", [pid])
            return answer

    with pytest.raises(psycopg.OperationalError):
        BreaksOff(outbox.connect(), TABLES, load_handlers(), strict=True).settle([item(one) for one in ids], [])
    assert (outbox.row(ids[0]).status, outbox.history()) == ("pending", [ids[1]])
