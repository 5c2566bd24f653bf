"""Which rows are on their way to Kafka, and up to where the stream may be confirmed.

Rows are counted in lots: a few rows that were read together. A lot is settled when each of its rows was acknowledged
by Kafka and marked, or had its failure written to the outbox. The position that may be confirmed never passes a lot
that is not settled, whatever order the lots settle in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from connector.outbox import Failure, Fence, Fences


class Lot:
    """Rows read together, with how many of them have no fate yet."""

    __slots__ = (
        "acknowledged",
        "awaited",
        "bytes",
        "closed",
        "end_lsn",
        "failures",
        "fences",
        "marked",
        "opened_at",
        "rows",
        "waits",
        "written",
    )

    def __init__(self, opened_at: float) -> None:
        """Open a lot; `opened_at` is on the caller's monotonic clock, in seconds."""
        self.fences: list[Fence] = []
        """Of the rows on their way; `acknowledged` takes their place once all are answered for."""
        self.acknowledged = Fences()
        self.rows = 0
        """How many rows it has; known once it is closed."""
        self.awaited = 0
        """How many answers are awaited; while the lot is open, how many have come already, negative."""
        self.closed = False
        """Whether no more rows will be added."""
        self.failures: list[Failure] = []
        self.written = True
        """Whether `failures` are in the database; set by the one who writes them."""
        self.marked = False
        """Whether the marks of what is acknowledged are in the database; set by the one who writes them."""
        self.bytes = 0
        self.end_lsn: int | None = None
        self.opened_at = opened_at
        self.waits: list[tuple[float, int]] = []
        """Per transaction: (seconds from its commit until it was read, place of its first row); none once packed."""

    def close(self) -> None:
        """Add no more rows."""
        self.closed = True
        self.rows = len(self.fences)
        self.awaited += self.rows

    def failed(self, failure: Failure) -> None:
        """Note that Kafka refused a row; the lot is not settled before that is written to the row."""
        self.failures.append(failure)
        self.written = False

    def pack(self) -> None:
        """Keep of the rows what their marks need; every one of them is answered for."""
        failed = {failure.outbox_id for failure in self.failures}
        self.acknowledged = Fences([f for f in self.fences if f.outbox_id not in failed] if failed else self.fences)
        self.fences = []
        self.waits = []

    @property
    def answered(self) -> bool:
        """Whether Kafka has answered for every row, one way or the other."""
        return self.closed and self.awaited == 0

    @property
    def settled(self) -> bool:
        """Whether every row is acknowledged and marked, or its failure is written down."""
        return self.closed and self.awaited == 0 and self.written and self.marked


class Ledger:
    """The lots of one stream, in the order in which they were read."""

    def __init__(self) -> None:
        """Start with nothing read and nothing to confirm."""
        self._lots: deque[Lot] = deque()
        self._flushable = 0

    @property
    def flushable_lsn(self) -> int:
        """The position up to which every row is settled; 0 while none is known."""
        return self._flushable

    @property
    def empty(self) -> bool:
        """Whether no lot is unsettled."""
        return not self._lots

    def __len__(self) -> int:
        """Return the number of lots that are not settled yet, or not yet found to be."""
        return len(self._lots)

    def __iter__(self) -> Iterator[Lot]:
        """Iterate over the lots, oldest first."""
        return iter(self._lots)

    def append(self, lot: Lot) -> None:
        """Put a lot behind all that were read before it."""
        self._lots.append(lot)

    def committed(self, end_lsn: int) -> None:
        """Note the end of a transaction, all of whose rows are in lots appended before."""
        if self._lots:
            self._lots[-1].end_lsn = end_lsn
        else:
            self._flushable = max(self._flushable, end_lsn)

    def nothing_until(self, wal_end: int) -> None:
        """Note that the server has nothing for us before `wal_end`; counts only while no lot is unsettled.

        The caller must be between transactions.
        """
        if not self._lots:
            self._flushable = max(self._flushable, wal_end)

    def settle(self) -> int:
        """Drop settled lots from the front and return the position that may be confirmed now."""
        lots = self._lots
        while lots and lots[0].settled:
            end_lsn = lots.popleft().end_lsn
            if end_lsn is not None and end_lsn > self._flushable:
                self._flushable = end_lsn
        return self._flushable
