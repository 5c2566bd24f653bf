"""The outbox vocabulary: statuses, tables, failures, and a row on its way."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

DEFAULT_MAX_RETRY = 20
LONGEST_ERROR = 2_000

WAKE_PREFIX = "outbox_connector"
"""Prefix of the logical decoding messages by which the sink tells the reader that a retry falls due."""


class Status(StrEnum):
    """Where a row stands. `consumed` and `dead` are terminal: no late write changes them."""

    PENDING = "pending"
    PUBLISHED = "published"
    CONSUMED = "consumed"
    DEAD = "dead"


class Table(NamedTuple):
    """A table by its schema and name, neither of them quoted."""

    schema: str
    name: str

    def __str__(self) -> str:
        """Return the name as SQL takes it, both parts quoted."""
        return ".".join('"' + part.replace('"', '""') + '"' for part in self)


class Fence(NamedTuple):
    """What a copy of a row showed when it was read; a late mark writes only where all of it still stands.

    Times are microseconds since 2000-01-01 UTC, as PostgreSQL sends them.
    """

    outbox_id: int
    retry_count: int
    updated_at: int
    next_retry_at: int | None


_INFINITY: Final = (1 << 63) - 1


class Fences:
    """The fences of rows that may be marked, by column: a tenth of the memory that as many tuples take.

    A row whose times are infinite is left out, and to the sink: there is no telling whether it has changed.
    """

    __slots__ = ("_retried", "ids", "updated_ats")

    def __init__(self, fences: Sequence[Fence] = ()) -> None:
        """Take the columns of some fences."""
        columns = tuple(zip(*fences, strict=True)) or ((), (), (), ())
        if _INFINITY in columns[2] or columns[3].count(None) < len(columns[3]):
            finite = [f for f in fences if f.updated_at < _INFINITY and abs(f.next_retry_at or 0) < _INFINITY]
            columns = tuple(zip(*finite, strict=True)) or ((), (), (), ())
        ids, retry_counts, updated_ats, next_retry_ats = columns
        self.ids = array("q", ids)
        self.updated_ats = array("q", updated_ats)
        # Retry count and due time by place, of the few rows that have any.
        self._retried: dict[int, tuple[int, int | None]] = {}
        if retry_counts.count(0) < len(ids) or next_retry_ats.count(None) < len(ids):
            pairs = enumerate(zip(retry_counts, next_retry_ats, strict=True))
            self._retried = {place: pair for place, pair in pairs if pair != (0, None)}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def extend(self, others: Fences) -> None:
        """Add the rows of others."""
        for place, pair in others._retried.items():
            self._retried[len(self.ids) + place] = pair
        self.ids.extend(others.ids)
        self.updated_ats.extend(others.updated_ats)

    @property
    def retry_counts(self) -> list[int]:
        """Return the retry count of each row."""
        counts = [0] * len(self.ids)
        for place, (count, _) in self._retried.items():
            counts[place] = count
        return counts

    @property
    def next_retry_ats(self) -> list[int | None]:
        """Return the due time of each row, None where it has none."""
        moments: list[int | None] = [None] * len(self.ids)
        for place, (_, moment) in self._retried.items():
            moments[place] = moment
        return moments


class Failure(NamedTuple):
    """One failed attempt at a row; `reason` is a short word for metrics.

    A `final` one leaves the row dead at once. A `blameless` one was another message's fault: it costs no retry.
    """

    outbox_id: int
    attempt: int
    error: str
    reason: str
    final: bool = False
    blameless: bool = False
    named: Mapping[str, str] = {}
    """Fields by which a log tells more of the message than its id."""


class OutboxRow(NamedTuple):
    """One pending row, as the stream or the table gave it. `payload` is JSON text in UTF-8."""

    fence: Fence
    biz_type: str
    topic: str
    key: bytes
    payload: bytes
    headers: bytes | None


def trim_error(text: str) -> str:
    """Return an error's text as `last_error` can hold it: at most 2,000 characters, storable, nothing cut in half."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")[:LONGEST_ERROR]
