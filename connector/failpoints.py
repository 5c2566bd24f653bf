"""Named points between steps whose order matters, where a test makes the process crash, raise or wait.

They are off unless `CONNECTOR_FAILPOINTS` names some: `name=action` or `name=action@n`, comma-separated. An action is
`kill` (SIGKILL, at once), `raise` (an error that nobody expects) or `delay:seconds`; with `@n` it is taken the n-th
time only that the point is reached. Off, a point costs a look at an empty dictionary.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

_ENTRY: Final = re.compile(
    r"(?P<point>\w+)=(?P<action>kill|raise|delay:(?P<seconds>\d+(?:\.\d+)?))(?:@(?P<n>[1-9]\d*))?"
)


class Point(StrEnum):
    """Where the order of two steps matters: what has just happened, and not yet what follows from it."""

    LEADERSHIP_TAKEN = "leadership_taken"
    """The reader holds the lock."""
    ROW_READ = "row_read"
    """A row has come by the stream."""
    ROW_PRODUCED = "row_produced"
    """A message was handed to the producer."""
    ROWS_ACKNOWLEDGED = "rows_acknowledged"
    """Kafka has answered for every message of a lot; nobody has noted it."""
    FAILURES_WRITTEN = "failures_written"
    """What Kafka refused is written to its rows; the lot does not count as settled."""
    ROWS_MARKED = "rows_marked"
    """Rows are marked published."""
    LSN_RECORDED = "lsn_recorded"
    """A position is recorded in the database; the server was not told."""
    LSN_CONFIRMED = "lsn_confirmed"
    """The server was told."""
    CATCH_UP_OWED = "catch_up_owed"
    """A catch-up is written down as owed; the slot is as it was."""
    SLOT_MADE = "slot_made"
    """A slot is made; how far it reaches is not recorded."""
    SLOT_RECORDED = "slot_recorded"
    """How far a new slot reaches is recorded."""
    CATCH_UP_HALF_WAY = "catch_up_half_way"
    """A catch-up has published some rows of the table."""
    CATCH_UP_ACKNOWLEDGED = "catch_up_acknowledged"
    """Kafka has all of a catch-up; it is still written down as owed."""
    CATCH_UP_DONE = "catch_up_done"
    """A catch-up is written off; the stream was not started."""
    SLOT_OWED = "slot_owed"
    """What a slot pins is too much: a catch-up is written down as owed, the slot is still there."""
    SLOT_DROPPED = "slot_dropped"
    """A slot was given up; there is none."""
    RETRY_PICKED = "retry_picked"
    """Due rows were taken from the table."""
    RETRY_PRODUCED = "retry_produced"
    """Due rows were handed to the producer."""
    RETRY_MARKED = "retry_marked"
    """Due rows are marked published."""
    BATCH_CONSUMED = "batch_consumed"
    """The sink has taken messages from Kafka."""
    DEAD_LETTER_SENT = "dead_letter_sent"
    """Kafka has a dead letter; the batch's transaction has not begun."""
    STATEMENT_RUN = "statement_run"
    """A batch is stored and marked; its transaction is not committed."""
    BATCH_COMMITTED = "batch_committed"
    """A batch's transaction is committed; its offsets are where they were."""
    OFFSET_STORED = "offset_stored"
    """librdkafka may commit the offsets; it has not yet."""
    OFFSET_COMMITTED = "offset_committed"
    """Kafka has the offsets."""


class Failpoint(NamedTuple):
    """What to do at a point: `kill`, `raise` or `delay`; the `nth` time alone, or each time if that is None."""

    action: str
    seconds: float = 0.0
    nth: int | None = None


class FailpointError(Exception):
    """Raised on purpose at a failpoint; nothing in the connector expects it."""


class _Trap:
    """A failpoint that is armed, with how often its point was reached."""

    def __init__(self, point: Point, failpoint: Failpoint, tell: Callable[[Point, str], None]) -> None:
        self._point = point
        self._failpoint = failpoint
        self._tell = tell
        self._lock = threading.Lock()
        self._times = 0

    def spring(self) -> None:
        with self._lock:
            self._times += 1
            if self._failpoint.nth not in {None, self._times}:
                return
        self._tell(self._point, self._failpoint.action)
        if self._failpoint.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._failpoint.action == "raise":
            raise FailpointError(f"failpoint {self._point}")
        else:
            time.sleep(self._failpoint.seconds)


armed: Final[dict[Point, _Trap]] = {}
"""Where something is to happen. Empty outside of tests, and then a point is no more than a look at it."""


def parse(text: str) -> dict[Point, Failpoint]:
    """Read failpoints as the environment names them; raises ValueError for what is none."""
    found: dict[Point, Failpoint] = {}
    entries = [part for part in map(str.strip, text.split(",")) if part]
    for number, entry in enumerate(entries, 1):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"entry {number} is not name=action")
        try:
            point = Point(match["point"])
        except ValueError:
            raise ValueError(f"entry {number} names no failpoint") from None
        nth = int(match["n"]) if match["n"] else None
        found[point] = Failpoint(match["action"].partition(":")[0], float(match["seconds"] or 0), nth)
    return found


def arm(failpoints: Mapping[Point, Failpoint], tell: Callable[[Point, str], None]) -> None:
    """Let things happen from now on; `tell` gets point and action before each, in the thread that it happens to."""
    armed.update({point: _Trap(point, failpoint, tell) for point, failpoint in failpoints.items()})


def reach(point: Point) -> None:
    """Do what is to be done at a point: as a rule, nothing.

    Raises:
        FailpointError: that is what is to be done.
    """
    if armed and (trap := armed.get(point)) is not None:
        trap.spring()
