"""The sweep for rows that nothing brings: what it takes, and what it leaves alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from connector import bookkeeper, retries
from connector.bookkeeper import Bookkeeper
from connector.ledger import Lot
from connector.store.connections import connect
from tests.integration.outbox_table import TABLES, OutboxTable
from tests.services import Database, eventually


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def test_the_sweep_takes_no_row_that_only_waits_for_its_mark(
    outbox: OutboxTable, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage rows may be old when Kafka acknowledges them; the sweep that follows marks them first."""
    monkeypatch.setattr(retries, "SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(bookkeeper, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(bookkeeper, "MARK_DELAY_SECONDS", 3600.0)
    books = Bookkeeper(
        lambda _prepare: connect(database.url, name="test"),
        TABLES,
        "slot",
        on_settled=lambda _rows, _lot: None,
        wake=lambda: None,
        beat=lambda: None,
    )
    acknowledged, overlooked = outbox.new(), outbox.new()
    lot = Lot(time.monotonic())
    lot.fences.append(outbox.fence(acknowledged))
    lot.close()
    lot.awaited = 0
    books.answered(lot, due=False)
    books.set_idle(True)
    books.serve(0, 1)
    books.start()
    try:
        eventually(lambda: books.due, what="the sweep")
        assert [row.fence.outbox_id for row in books.due] == [overlooked]
        assert outbox.status(acknowledged) == "published"
    finally:
        books.close()
