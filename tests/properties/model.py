"""The contract's state machine as a few lines of Python, for the real statements to be held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from connector.backoff import backoff
from connector.outbox import Fence

TERMINAL = frozenset({"consumed", "dead"})


class Verdict(StrEnum):
    """What a delivery of a message meets: as in life, the same message may fail today and pass tomorrow."""

    FINE = "fine"
    REFUSED = "refused by the database"
    FAILED = "failed in its handler"
    HOPELESS = "of the wrong shape"


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of the outbox must be; `due` is the earliest that its next attempt may be due.

    `version` counts the changes that the row has seen, and `failed` tells that the last of them was a failure.
    `redriven` is the attempt that the last redrive gave it, `was_dead` that it was put back from its end.
    """

    key: str
    max_retry: int
    status: str = "pending"
    retry_count: int = 0
    due: datetime | None = None
    version: int = 0
    failed: bool = False
    redriven: int = 0
    was_dead: bool = False

    @property
    def live(self) -> bool:
        """Whether anything may still happen to it."""
        return self.status not in TERMINAL

    @property
    def holds_back(self) -> bool:
        """Whether later messages of its key have to wait for it."""
        return self.live and self.due is not None


class Copy(NamedTuple):
    """A message in Kafka, with what its row showed when it was read, and the row's version then."""

    outbox_id: int
    attempt: int
    fence: Fence
    version: int


class Delivery(NamedTuple):
    """One message of a batch: its row, its attempt, and what it meets."""

    outbox_id: int
    attempt: int
    verdict: Verdict


def failed(row: Row, attempt: int, now: datetime, *, final: bool) -> Row:
    """Return a row after a failed attempt."""
    if not row.live or attempt < row.retry_count:
        return row
    count = row.retry_count if final else row.retry_count + 1
    dead = final or count >= row.max_retry
    return replace(
        row,
        status="dead" if dead else "pending",
        retry_count=count,
        due=None if dead else now + timedelta(seconds=backoff(count)),
        version=row.version + 1,
        failed=True,
    )


def held(row: Row, behind: datetime, now: datetime) -> Row:
    """Return a row that has to wait for another of its key."""
    due = max(behind, now + timedelta(seconds=1))
    return replace(row, status="pending", due=due, version=row.version + 1, failed=False)


def stored(row: Row) -> Row:
    """Return a row whose message is in history."""
    return replace(row, status="consumed", due=None, version=row.version + 1, failed=False)


def marked(row: Row) -> Row:
    """Return a row whose copy Kafka has acknowledged; its due time stays until it is settled."""
    return replace(row, status="published", version=row.version + 1, failed=False)


def redriven(row: Row, now: datetime) -> Row:
    """Return a row that an operator has put back: every earlier copy is stale, and it has all its attempts again."""
    attempt = row.retry_count + 1
    return replace(
        row,
        status="pending",
        retry_count=attempt,
        max_retry=attempt + max(1, row.max_retry - row.redriven),
        due=now,
        version=row.version + 1,
        failed=False,
        redriven=attempt,
        was_dead=row.was_dead or not row.live,
    )


class Settled(NamedTuple):
    """What one transaction of the sink must leave: the rows, what is new in history, and the outcomes it tells."""

    rows: dict[int, Row]
    history: list[int]
    outcomes: dict[int, str]


def settle(rows: Mapping[int, Row], batch: Sequence[Delivery], now: datetime, *, strict: bool) -> Settled:
    """Return what becomes of the rows when the sink settles a batch at that time, one message after the other."""
    after = dict(rows)
    history: list[int] = []
    outcomes: dict[int, str] = {}
    for outbox_id, attempt, verdict in batch:
        if verdict in {Verdict.FAILED, Verdict.HOPELESS}:
            after[outbox_id] = failed(after[outbox_id], attempt, now, final=verdict is Verdict.HOPELESS)
    for outbox_id, attempt, verdict in batch:
        if verdict not in {Verdict.FINE, Verdict.REFUSED}:
            continue
        row = after[outbox_id]
        behind = [
            earlier.due
            for number, earlier in after.items()
            if number < outbox_id and earlier.key == row.key and earlier.holds_back and earlier.due is not None
        ]
        if not row.live:
            outcomes[outbox_id] = row.status
        elif strict and behind:
            after[outbox_id] = held(row, max(behind), now)
            outcomes[outbox_id] = "held"
        elif verdict is Verdict.REFUSED:
            after[outbox_id] = failed(row, attempt, now, final=False)
        else:
            after[outbox_id] = stored(row)
            history.append(outbox_id)
            outcomes[outbox_id] = "stored"
    return Settled(after, history, outcomes)


def out_of_order(history: Sequence[int], rows: Mapping[int, Row]) -> list[tuple[int, int]]:
    """Return pairs of one key that history has in another order than the outbox; those that were dead may come late."""
    last: dict[str, int] = {}
    wrong = []
    for outbox_id in history:
        row = rows[outbox_id]
        if row.was_dead:
            continue
        if last.get(row.key, 0) > outbox_id:
            wrong.append((last[row.key], outbox_id))
        last[row.key] = outbox_id
    return wrong
