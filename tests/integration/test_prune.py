"""`prune`: what it removes, what it leaves, and that nobody waits for it or stores anything twice because of it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from psycopg import sql

from connector.errors import ConnectorError
from connector.ops.prune import Pruned, PruneOptions, prune
from connector.outbox import Status, Table
from connector.store.queries import Tables
from connector.store.redrives import Redrives, Run, Selection
from connector.store.retention import Retention
from connector.store.schema import migrate
from tests.integration.outbox_table import TABLES, OutboxTable, item
from tests.integration.scenario import one
from tests.services import Database
from tests.simulated_month import live_a_day, prune_as_of, size_of

DAY = 86_400.0


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def settled(outbox: OutboxTable, days: float, status: str = "consumed", rows: int = 1) -> list[int]:
    """Insert rows that were enqueued, and settled, so many days ago; return their ids."""
    records = outbox.connection.execute(
        "insert into agent_outbox_messages (biz_type, topic, message_key, payload, status, created_at, updated_at,"
        " consumed_at) select 'b', 't', 'k', '{}', %s, at, at, case when %s = 'consumed' then at end"
        "   from (select now() - %s * interval '1 day' as at) as t, generate_series(1, %s) returning id",
        [status, status, days, rows],
    )
    return [outbox_id for (outbox_id,) in records]


def run(
    outbox: OutboxTable, days: float = 7, *, dead: bool = False, dry_run: bool = False, rate: float = 1e6
) -> tuple[Pruned, str]:
    """Run `prune` in this process; return what it removed and what it prints."""
    out = io.StringIO()
    options = PruneOptions(outbox.database.url, TABLES, 10.0, days * DAY, dead, rate)
    return prune(options, out, dry_run=dry_run), out.getvalue()


def ids(outbox: OutboxTable) -> list[int]:
    """Return the ids of all rows."""
    return [n for (n,) in outbox.connection.execute("select id from agent_outbox_messages order by id")]


def test_only_what_was_consumed_for_longer_is_removed(outbox: OutboxTable) -> None:
    """Rows of every other status stay, however old, and so does what was enqueued long ago and consumed lately."""
    gone = settled(outbox, 8, rows=3)
    left = [n for status in ("pending", "published", "dead") for n in settled(outbox, 30, status)]
    left += settled(outbox, 6)
    (late,) = settled(outbox, 30)
    outbox.change(late, "consumed_at = now() - interval '1 day'")
    gone += settled(outbox, 7.01)
    assert run(outbox, dry_run=True) == (Pruned(4, 0), "4 consumed rows older than 7d would be removed\n")
    assert ids(outbox) == sorted([*gone, *left, late])
    pruned, said = run(outbox)
    assert pruned == Pruned(4, 0)
    assert said.startswith("4 consumed rows older than 7d removed in ")
    assert ids(outbox) == sorted([*left, late])
    assert run(outbox)[0] == Pruned(0, 0)


def test_dead_rows_go_only_when_that_is_asked_for(outbox: OutboxTable) -> None:
    """Their age counts from their death, not from their enqueueing."""
    consumed, old = settled(outbox, 8), settled(outbox, 8, "dead")
    (young,) = settled(outbox, 8, "dead")
    outbox.change(young, "updated_at = now()")
    assert run(outbox, dead=True, dry_run=True)[0] == Pruned(1, 1)
    assert run(outbox)[0] == Pruned(1, 0)
    assert ids(outbox) == [*old, young]
    assert run(outbox, dead=True)[0] == Pruned(0, 1)
    assert ids(outbox) == [young]
    assert consumed[0] not in ids(outbox)


def test_it_goes_on_behind_rows_that_stay_and_stops_at_young_ones(outbox: OutboxTable) -> None:
    """Windows full of dead rows do not end it; a window of young rows does, and no row behind it is looked at."""
    settled(outbox, 30, "dead", rows=2_500)
    settled(outbox, 8, rows=2_500)
    settled(outbox, 1, rows=5_000)
    looked_at = 0
    retention = Retention(outbox.connection, TABLES, 7 * DAY, dead=False)
    after = None
    while True:
        window = retention.count(after, 1_000)
        looked_at, after = looked_at + window.looked_at, window.last_id
        if window.young and not window.chosen:
            break
    assert looked_at == 6_000
    assert run(outbox)[0] == Pruned(2_500, 0)


def test_rows_that_claim_to_be_younger_than_their_storing_are_removed_too(outbox: OutboxTable) -> None:
    """An application may write `created_at` itself; a window that has something to remove does not end the run."""
    settled(outbox, 8, rows=2_500)
    outbox.connection.execute("update agent_outbox_messages set created_at = now()")
    assert run(outbox)[0] == Pruned(2_500, 0)


def test_a_copy_that_comes_again_after_its_row_is_gone_is_a_counted_no_op(outbox: OutboxTable) -> None:
    """History keeps the one row it has, and takes no second."""
    outbox_id = outbox.new()
    settlement = outbox.settlement()
    settlement.settle([item(outbox_id)], [])
    outbox.change(outbox_id, "consumed_at = now() - interval '8 days', created_at = now() - interval '8 days'")
    assert run(outbox)[0] == Pruned(1, 0)
    assert [outcome.what for outcome in settlement.settle([item(outbox_id)], []).outcomes] == ["missing"]
    assert outbox.history() == [outbox_id]
    assert ids(outbox) == []


def test_it_waits_for_nobody(outbox: OutboxTable) -> None:
    """A row that a sink has locked, since a copy of it came again, is left to the next run."""
    locked, free = settled(outbox, 8, rows=2)
    with outbox.connect() as sink, sink.transaction():
        sink.execute("select from agent_outbox_messages where id = %s for update", [locked])
        assert run(outbox)[0] == Pruned(1, 0)
        assert ids(outbox) == [locked]
    assert run(outbox)[0] == Pruned(1, 0)
    assert free not in ids(outbox)


def test_a_dead_row_that_is_redriven_at_that_moment_stays(outbox: OutboxTable) -> None:
    """Whichever of the two has the row first, the other leaves it alone; here the redrive has it."""
    (outbox_id,) = settled(outbox, 8, "dead")
    with outbox.connect() as moving:
        redrives = Redrives(moving, TABLES)
        with moving.transaction():
            this_run = Run(uuid4(), "test@here", None, redrives.clock())
            assert redrives.move(Selection(Status.DEAD), this_run, None, 10) == [outbox_id]
            assert run(outbox, dead=True)[0] == Pruned(0, 0)
    assert outbox.status(outbox_id) == "pending"
    assert run(outbox, dead=True)[0] == Pruned(0, 0)


def test_two_at_once_remove_each_row_once(outbox: OutboxTable) -> None:
    """A job that overlaps the last one does no harm."""
    rows = len(settled(outbox, 8, rows=8_000))
    with ThreadPoolExecutor(2) as pool:
        pruned = list(pool.map(lambda _: run(outbox)[0].consumed, range(2)))
    assert sum(pruned) + len(ids(outbox)) == rows
    run(outbox)
    assert ids(outbox) == []


def test_what_a_batch_has_removed_stays_removed_when_a_later_one_is_refused(outbox: OutboxTable) -> None:
    """Each batch is a transaction; what refuses the next one is named."""
    settled(outbox, 8, rows=1_000)
    (held,) = settled(outbox, 8)
    outbox.connection.execute("create table mine (outbox_id bigint references agent_outbox_messages)")
    outbox.connection.execute("insert into mine values (%s)", [held])
    with pytest.raises(ConnectorError, match="mine"):
        run(outbox)
    assert ids(outbox) == [held]


def test_it_keeps_to_its_rate(outbox: OutboxTable) -> None:
    """Five hundred rows at 500 a second take a second at least."""
    settled(outbox, 8, rows=500)
    began = time.monotonic()
    assert run(outbox, rate=500)[0] == Pruned(500, 0)
    assert time.monotonic() - began >= 1.0


def test_tables_of_any_name_are_pruned(database: Database) -> None:
    """Quotes, blanks and braces in names."""
    tables = Tables(Table('odd "schema"', "an outbox {x}"), Table("public", "one's history"))
    with database.connect() as connection:
        connection.execute('create schema "odd ""schema"""')
        migrate(connection, tables)
        outbox = sql.Identifier(*tables.outbox)
        statement = "insert into {} (biz_type, topic, message_key, payload, status) values ('b','t','k','1','consumed')"
        connection.execute(sql.SQL(statement).format(outbox))
        options = PruneOptions(database.url, tables, 10.0, older_than=0.0, dead=False, rate=1e6)
        assert prune(options, io.StringIO(), dry_run=False) == Pruned(1, 0)
        assert one(connection, sql.SQL("select count(*) from {}").format(outbox).as_string(connection)) == 0


def test_a_pruned_outbox_stops_growing(database: Database) -> None:
    """Once it holds as many days as are kept, each day's rows take the place of those that went; the indexes too.

    Vacuumed once a day here; `tests/simulated_month.py` leaves that to autovacuum.
    """
    sizes = []
    with database.connect() as connection:
        migrate(connection, TABLES)
        for days_ago in reversed(range(12)):
            live_a_day(connection, 2_000, days_ago)
            prune_as_of(database.url, days_ago, 3)
            connection.execute("vacuum public.agent_outbox_messages")
            sizes.append(size_of(connection))
    assert [size.rows for size in sizes] == [2_000, 4_000] + [6_000] * 10
    assert sizes[-1].table <= 1.25 * sizes[5].table
    assert sizes[-1].indexes <= 1.25 * sizes[5].indexes
