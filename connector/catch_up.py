"""Whether a slot can be trusted to bring every row, and what to do where it cannot.

The outbox table is the durable backlog. Whatever happened to the slot, pending rows are still there: the reader writes
down that it owes a catch-up before it touches the slot, publishes them from the table, then streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from connector.errors import SetupRequired
from connector.failpoints import Point, reach
from connector.lsn import format_lsn
from connector.store.bookkeeping import Bookkeeping, Progress, SlotState

if TYPE_CHECKING:
    from connector.replication import ReplicationConnection


class Remedy(Enum):
    """What to do with the slot itself."""

    KEEP = auto()
    MAKE = auto()
    REPLACE = auto()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be done with a slot, and why a catch-up is owed; None if the slot has everything."""

    remedy: Remedy
    owed: str | None


def judge(slot: SlotState | None, progress: Progress | None, system_identifier: str) -> Judgement:
    """Compare a slot with what was recorded of it.

    The record is written before the server is told, so a slot that is further than its record was moved, or made anew,
    by somebody else, and rows may lie in between.
    """
    if slot is None:
        owed = progress.catch_up_reason if progress is not None and progress.catch_up_owed else None
        return Judgement(Remedy.MAKE, owed or "there was no slot")
    if slot.wal_status == "lost" or slot.confirmed_lsn is None:
        return Judgement(Remedy.REPLACE, "the server invalidated the slot")
    if progress is None:
        return Judgement(Remedy.KEEP, "nothing is recorded of the slot")
    if progress.system_identifier != system_identifier:
        return Judgement(Remedy.KEEP, "the slot's record is of another database cluster")
    if slot.confirmed_lsn > progress.confirmed_lsn:
        return Judgement(
            Remedy.KEEP,
            f"the slot is confirmed up to {format_lsn(slot.confirmed_lsn)}, further than the reader ever confirmed"
            f" ({format_lsn(progress.confirmed_lsn)})",
        )
    return Judgement(Remedy.KEEP, progress.catch_up_reason or "unfinished" if progress.catch_up_owed else None)


def prepare_slot(replication: ReplicationConnection, books: Bookkeeping, slot_name: str) -> Judgement:
    """Make sure that there is a slot, and that a catch-up is written down where one is owed.

    A crash at any point leaves a state that the next call judges to owe a catch-up.

    Raises:
        SetupRequired: the slot's name is taken by a slot of another kind or database.
        psycopg.Error: the database refused or went away.
    """
    system = replication.identify()
    slot = books.slot_state()
    if slot is not None:
        require_ours(slot, books, slot_name)
    progress = books.read_progress()
    owing = progress if progress is not None and progress.catch_up_owed else None
    judgement = judge(slot, progress, system.identifier)
    if judgement.remedy is Remedy.KEEP:
        assert slot is not None
        assert slot.confirmed_lsn is not None
        already = owing is not None and slot.confirmed_lsn <= owing.confirmed_lsn
        if judgement.owed is not None and not already:
            books.owe_catch_up(system.identifier, slot.confirmed_lsn, books.highest_pending_id(), judgement.owed)
            reach(Point.CATCH_UP_OWED)
        return judgement
    assert judgement.owed is not None
    books.owe_catch_up(system.identifier, 0, None, judgement.owed)
    reach(Point.CATCH_UP_OWED)
    if judgement.remedy is Remedy.REPLACE:
        books.drop_slot()
    lsn, snapshot = replication.create_slot(slot_name)
    reach(Point.SLOT_MADE)
    through = books.highest_pending_id(snapshot)
    books.owe_catch_up(system.identifier, lsn, through, judgement.owed)
    reach(Point.SLOT_RECORDED)
    if through is None and owing is None:
        books.catch_up_done()
        return Judgement(judgement.remedy, None)
    return judgement


def require_ours(slot: SlotState, books: Bookkeeping, slot_name: str) -> None:
    """Make sure that a slot is of the kind and the database that the reader reads.

    Raises:
        SetupRequired: it is not.
    """
    if slot.plugin != "pgoutput" or slot.database != books.connection.info.dbname:
        raise SetupRequired(
            f"replication slot {slot_name!r} is of plugin {slot.plugin!r} in database {slot.database!r}, not of"
            f" pgoutput in {books.connection.info.dbname!r}: set another CONNECTOR_SLOT_NAME, or drop it"
        )
