"""The ledger of what has no fate yet: a position is confirmed only when everything before it is settled."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from connector.ledger import Ledger, Lot
from connector.outbox import Failure, Fence, Fences

FAILURE = Failure(1, 0, "no", "test")


@dataclass(slots=True)
class Row:
    """A row that was read; it is settled when Kafka has it and its mark is written, or when its failure is."""

    lot: Lot
    end_lsn: int | None = None
    answered: bool = False
    refused: bool = False
    settled: bool = False


def test_a_lot_that_is_answered_keeps_nothing_but_what_its_marks_need() -> None:
    """Of a long backlog many rows wait for their marks, each perhaps in a transaction of its own."""
    lot = Lot(0.0)
    lot.fences.append(Fence(1, 0, 0, None))
    lot.waits.append((0.5, 0))
    lot.close()
    lot.pack()
    assert not lot.fences
    assert not lot.waits
    assert len(lot.acknowledged) == 1


@settings(max_examples=500)
@given(st.data())
def test_no_position_is_confirmed_that_lies_behind_a_row_without_a_fate(  # noqa: C901, PLR0912 - one case for each step
    data: st.DataObject,
) -> None:
    """Whatever the order of reads, commits, keepalives, acknowledgements, refusals and writes; at last all is."""
    ledger, rows, lsn = Ledger(), list[Row](), 0
    lot: Lot | None = None
    in_transaction = False
    for step in data.draw(st.lists(st.sampled_from("rrrcxkaafwm"), min_size=10, max_size=60)):
        lsn += 10
        waiting = [row for row in rows if not row.answered]
        refused = [row for row in rows if row.refused and not row.settled]
        if step == "r":  # a row is read
            in_transaction = True
            if lot is None:
                lot = Lot(0.0)
                ledger.append(lot)
            lot.fences.append(Fence(len(rows) + 1, 0, 0, None))
            rows.append(Row(lot))
        elif step == "x" and lot is not None:  # the lot is full
            lot.close()
            lot = None
        elif step == "c" and in_transaction:  # the transaction ends
            in_transaction = False
            ledger.committed(lsn)
            for row in rows:
                row.end_lsn = row.end_lsn or lsn
        elif step == "k" and not in_transaction:  # a keepalive
            ledger.nothing_until(lsn)
        elif step in "af" and waiting:  # Kafka takes, or refuses, a row
            row = data.draw(st.sampled_from(waiting))
            row.lot.awaited -= 1
            row.answered = True
            if step == "f":
                row.refused = True
                row.lot.failed(FAILURE)
        elif step == "w" and refused:  # the failures of a lot are written down
            written = data.draw(st.sampled_from(refused)).lot
            written.written = True
            for row in refused:
                row.settled = row.settled or row.lot is written
        elif step == "m":  # the marks of a lot are written
            answered = [row for row in rows if row.lot.answered]
            for row in answered:
                row.lot.marked = row.lot.marked or row.lot is answered[0].lot
                row.settled = row.settled or (row.lot.marked and row.answered and not row.refused)
        confirmable = ledger.settle()
        assert all(confirmable < (row.end_lsn or lsn + 1) for row in rows if not row.settled)
    for row in rows:
        row.lot.closed, row.lot.awaited, row.lot.written, row.lot.marked = True, 0, True, True
    ledger.committed(lsn + 1)
    assert ledger.settle() == lsn + 1
    assert ledger.empty


_MOMENTS = st.integers(-(1 << 62), 1 << 62) | st.sampled_from([-(1 << 63), (1 << 63) - 1])
_FENCES = st.builds(
    Fence, st.integers(1, (1 << 63) - 1), st.just(0) | st.integers(0, 20), _MOMENTS, st.none() | _MOMENTS
)


@given(st.lists(st.lists(_FENCES, max_size=5), max_size=5))
def test_fences_give_back_what_they_were_given_but_for_what_is_infinite(batches: list[list[Fence]]) -> None:
    """One by one and together, in order, each column of each row."""
    fences = Fences()
    for batch in batches:
        fences.extend(Fences(batch))
    infinity = (1 << 63) - 1
    finite = [f for batch in batches for f in batch if f.updated_at < infinity and abs(f.next_retry_at or 0) < infinity]
    found = zip(fences.ids, fences.retry_counts, fences.updated_ats, fences.next_retry_ats, strict=True)
    assert [Fence._make(columns) for columns in found] == finite
    assert len(fences) == len(finite)
