"""The sink's own proof: what has been settled is in history, once, and as its payload says.

A thread of its own with a connection of its own, slow on purpose. The comparison is the database's, so that none of it
takes the interpreter from the sink. A round looks at what has been settled since the last one, and once more at a part
of what was settled before: in time it goes round all of that. While nothing is settled, and nothing is left to compare,
only each tenth round takes place, for the sake of an idle database. `reconcile` proves everything, and at once.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg import errors

from connector.observability.logs import get_logger
from connector.store.bookkeeping import Connection
from connector.store.comparison import Comparison
from connector.store.connections import describe
from connector.store.proofs import MOST_SAMPLES, Unproved, Verdict

if TYPE_CHECKING:
    from connector.observability.metrics import SinkMetrics

_ROWS: Final = 1_000
_MOST_OPEN: Final = 10_000
_OLDER_AT_LEAST: Final = 5_000
ROUNDS_FOR_ALL: Final = 1_440
"""In so many rounds at the most everything older is looked at again: a day, at a round a minute."""

_ROUNDS_AT_REST: Final = 10
"""While nothing happens, one in so many rounds takes place."""

_SHARE_OF_TIME: Final = 0.2
_NAMED: Final = 10

_log = get_logger("proof")


class Proof(threading.Thread):
    """Compares every so many seconds, and tells by the metrics `unproved` and `last_proof_timestamp`."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        compare: Callable[[Connection], Comparison],
        biz_types: Sequence[str],
        seconds: float,
        metrics: SinkMetrics,
        *,
        record: Callable[[Connection, Verdict], None],
        batches: Callable[[], int],
    ) -> None:
        """Prepare the thread.

        `biz_types` are those that are stored in history, `record` keeps what was found, `batches` tells how many the
        sink has settled.
        """
        super().__init__(name="proof", daemon=True)
        self._connect = connect
        self._compare = compare
        self._record = record
        self._records = True
        self._batches = batches
        self._biz_types = list(biz_types)
        self._seconds = seconds
        self._metrics = metrics
        self._closed = threading.Event()
        self._said = ""
        self._connection: Connection | None = None
        self._comparison: Comparison
        self._after: int | None = None
        self._first = 0
        self._through = 0
        self._lowest: int | None = None
        self._again_after: int | None = None
        self._open: set[int] = set()
        self._damaged: dict[int, str] = {}

    def close(self) -> None:
        """End the thread; a statement that runs is not waited for."""
        self._closed.set()

    def run(self) -> None:
        """Prove, until closed."""
        while not self._closed.is_set():
            batches, rests = self._batches(), False
            try:
                rests = self._round()
                self._said = ""
            except errors.InsufficientPrivilege as error:
                self._say("proof_not_permitted", error)
            except psycopg.Error as error:
                self._say("proof_interrupted", error)
                if self._connection is not None:
                    self._connection.close()
            for _ in range(_ROUNDS_AT_REST if rests else 1):
                if self._closed.wait(self._seconds) or self._batches() != batches:
                    break
        if self._connection is not None:
            self._connection.close()

    def _say(self, event: str, error: psycopg.Error) -> None:
        text = describe(error)
        if text != self._said:
            self._said = text
            _log.info(event, error=text)

    def _round(self) -> bool:
        """Look again at what was open or damaged, then at what had been enqueued by the last round; tell if it was all.

        A round is behind by one, so that a transaction which commits its lower ids late is not passed by.
        """
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
            self._comparison = self._compare(self._connection)
        if self._after is None:
            self._after, unsettled = self._comparison.unsettled(_MOST_OPEN)
            self._first = min(unsettled, default=self._after + 1)
            self._through = self._after
            self._open.update(unsettled)
        last, began = self._comparison.last_id(), time.monotonic()
        opened, damaged = self._open, self._damaged
        self._open, self._damaged = set(), {}
        try:
            whole = self._look_at_all(sorted(opened | damaged.keys()), last)
        except psycopg.Error:
            self._open |= opened
            self._damaged = damaged | self._damaged
            raise
        self._metrics.unproved.set(len(self._damaged))
        if fresh := sorted(self._damaged.keys() - damaged.keys()):
            named = {outbox_id: self._damaged[outbox_id] for outbox_id in fresh[:_NAMED]}
            _log.error("messages_unproved", messages=len(fresh), outbox_ids=named)
        if whole:
            self._keep(time.monotonic() - began)
        return whole and self._after == last and not self._open and not self._damaged

    def _keep(self, seconds: float) -> None:
        """Let others see the verdict, where this role may write it."""
        assert self._connection is not None
        verdict = Verdict(
            seconds,
            f"messages #{self._first} to #{self._after}, but for {len(self._open)} that are on their way",
            len(self._damaged),
            Counter(self._damaged.values()),
            [Unproved(outbox_id, why) for outbox_id, why in sorted(self._damaged.items())[:MOST_SAMPLES]],
        )
        try:
            self._record(self._connection, verdict)
            self._records = True
        except (errors.InsufficientPrivilege, errors.UndefinedTable) as error:
            if self._records:
                _log.info("proof_not_recorded", error=describe(error))
            self._records = False

    def _look_at_all(self, again: Sequence[int], last: int) -> bool:
        """Look at all that is to be looked at in this round; tell whether that was done."""
        assert self._after is not None
        for some in _batches(again):
            self._look(some, self._after, self._after)
        while self._after < self._through and not self._closed.is_set():
            if len(self._open) + len(self._damaged) > _MOST_OPEN:
                # What is open is remembered within bounds: go on once it is settled. The time of the proof stays.
                return False
            end = self._look([], self._after, self._through)
            self._after = self._through if end is None else end
        self._look_at_older()
        self._metrics.last_proof_timestamp.set_to_current_time()
        self._through = last
        return not self._closed.is_set()

    def _look_at_older(self) -> None:
        """Look again at the next part of what was settled before, and after the last part at the first."""
        assert self._after is not None
        lowest = self._comparison.first_stored()
        if lowest is not None:
            self._lowest = min(lowest, self._lowest) if self._lowest is not None else lowest
        if self._lowest is None or self._lowest > self._after:
            return
        if self._again_after is None:
            # Anywhere, so that sinks which begin often, or together, do not all look at the same.
            self._again_after = self._lowest - 1 + secrets.randbelow(self._after - self._lowest + 1)
        left = max(_OLDER_AT_LEAST, (self._after - self._lowest) // ROUNDS_FOR_ALL + 1)
        left = min(left, self._after - self._lowest + 1)
        while left > 0 and len(self._open) + len(self._damaged) <= _MOST_OPEN and not self._closed.is_set():
            if not self._lowest <= self._again_after + 1 <= self._after:
                self._again_after = self._lowest - 1
            through = min(self._again_after + left, self._after)
            end = self._look([], self._again_after, through)
            end = through if end is None else end
            left -= end - self._again_after
            self._again_after = end

    def _look(self, again: Sequence[int], after: int, through: int) -> int | None:
        began = time.monotonic()
        end, found = self._comparison.unproved(again, after, through, _ROWS, self._biz_types)
        for outbox_id, why in found.items():
            if why == "unsettled":
                self._open.add(outbox_id)
            else:
                self._damaged[outbox_id] = why
        self._closed.wait((time.monotonic() - began) / _SHARE_OF_TIME)
        return end


def _batches(ids: Sequence[int]) -> Iterator[list[int]]:
    left = iter(ids)
    while some := list(islice(left, _ROWS)):
        yield some
