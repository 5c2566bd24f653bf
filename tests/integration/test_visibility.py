"""Messages that are faster than the end of the transaction that enqueued them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from connector.outbox import Failure
from connector.store.settlement import NotVisibleYet
from tests.integration.outbox_table import OutboxTable, item
from tests.services import Database, eventually


@pytest.fixture
def outbox(database: Database) -> Iterator[OutboxTable]:
    """The tables of a fresh database."""
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


def enqueue_without_end(outbox: OutboxTable) -> int:
    """Begin a transaction on the table's own connection, insert a row in it, and return the row's id."""
    outbox.connection.execute("begin")
    return outbox.new()


def test_a_message_whose_transaction_others_do_not_see_yet_is_not_settled(outbox: OutboxTable) -> None:
    """Neither it nor its neighbours are touched; once the transaction has ended all are stored, in order."""
    settlement = outbox.settlement()
    early = enqueue_without_end(outbox)
    with outbox.connect() as other:
        (later,) = other.execute("select outbox_enqueue('chat_history_persist', 'topic', 'key', '{}')").fetchone() or ()
    with pytest.raises(NotVisibleYet, match=f"#{early} "):
        settlement.settle([item(early), item(later)], [])
    outbox.connection.execute("commit")
    assert outbox.history() == []
    outcomes = settlement.settle([item(early), item(later)], []).outcomes
    assert sorted((outcome.outbox_id, outcome.what) for outcome in outcomes) == [(early, "stored"), (later, "stored")]
    assert outbox.history() == [early, later]


def test_a_message_that_is_ahead_by_a_moment_is_stored_at_once(outbox: OutboxTable) -> None:
    """Where the transaction ends within the first look or two, its message is not put off."""
    settlement = outbox.settlement()
    early = enqueue_without_end(outbox)
    looked = threading.Event()
    look = settlement._not_seen

    def first_look_is_over(ids: list[int]) -> list[int]:
        absent = look(ids)
        looked.set()
        return absent

    settlement._not_seen = first_look_is_over  # type: ignore[method-assign, assignment]
    committer = threading.Thread(target=lambda: looked.wait(10) and outbox.connection.execute("commit"))
    committer.start()
    (outcome,) = settlement.settle([item(early)], []).outcomes
    committer.join()
    assert outcome.what == "stored"


def test_a_hopeless_message_waits_for_its_row_too(outbox: OutboxTable) -> None:
    """A failure that cannot be written to its row yet is not taken for a stale one."""
    settlement = outbox.settlement()
    early = enqueue_without_end(outbox)
    failure = Failure(early, 0, "no such handler", "unknown_biz_type", final=True)
    with pytest.raises(NotVisibleYet):
        settlement.settle([], [failure])
    outbox.connection.execute("commit")
    settlement.settle([], [failure])
    assert outbox.status(early) == "dead"


def test_a_message_of_a_row_that_is_gone_is_passed_over_beside_other_writers(outbox: OutboxTable) -> None:
    """Only transactions that wrote before the look can hide a row: once they have ended, a missing row is missing."""
    settlement = outbox.settlement()
    enqueue_without_end(outbox)
    with pytest.raises(NotVisibleYet):
        settlement.settle([item(4711)], [])
    outbox.connection.execute("rollback")
    (outcome,) = eventually(
        lambda: settlement.settle([item(4711)], []).outcomes, ignoring=(NotVisibleYet,), what="the verdict"
    )
    assert outcome.what == "missing"


def test_a_missing_row_stalls_no_batch_though_others_never_stop_writing(outbox: OutboxTable) -> None:
    """Transactions that began after the first look do not count, however often the batch is looked at again."""
    settlement = outbox.settlement()
    with outbox.connect() as other:
        enqueue_without_end(outbox)
        with pytest.raises(NotVisibleYet):
            settlement.settle([item(4711)], [])
        other.execute("begin")
        other.execute("select outbox_enqueue('chat_history_persist', 'topic', 'key', '{}')")
        outbox.connection.execute("rollback")
        (outcome,) = settlement.settle([item(4711)], []).outcomes
        other.execute("rollback")
    assert outcome.what == "missing"
