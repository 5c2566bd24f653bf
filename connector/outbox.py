"""The outbox vocabulary: statuses, a row on its way, and the envelope that carries it through Kafka."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from connector.errors import EnvelopeError

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
    """The fences of rows that may be marked, by column: a sixth of the memory that as many tuples take.

    A row whose times are infinite is left out, and to the sink: there is no telling whether it has changed.
    """

    __slots__ = ("ids", "next_retry_ats", "retry_counts", "updated_ats")

    def __init__(self, fences: Sequence[Fence] = ()) -> None:
        """Take the columns of some fences."""
        columns = tuple(zip(*fences, strict=True)) or ((), (), (), ())
        if _INFINITY in columns[2] or columns[3].count(None) < len(columns[3]):
            finite = [f for f in fences if f.updated_at < _INFINITY and abs(f.next_retry_at or 0) < _INFINITY]
            columns = tuple(zip(*finite, strict=True)) or ((), (), (), ())
        ids, retry_counts, updated_ats, next_retry_ats = columns
        self.ids = array("q", ids)
        self.retry_counts = array("q", retry_counts)
        self.updated_ats = array("q", updated_ats)
        self.next_retry_ats: list[int | None] = list(next_retry_ats)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def extend(self, others: Fences) -> None:
        """Add the rows of others."""
        self.ids.extend(others.ids)
        self.retry_counts.extend(others.retry_counts)
        self.updated_ats.extend(others.updated_ats)
        self.next_retry_ats.extend(others.next_retry_ats)


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


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a payload that is nested too deep, or holds a number too long, to be read; `why` tells which."""

    why: str


_BEGINNING: Final = b'{"outbox_id":'
_LONGEST_BEGINNING: Final = 40
_read = json.JSONDecoder().raw_decode
# The beginning of a value as `encode_envelope` writes it.
_OPENING = re.compile(
    rb'\{"outbox_id":([1-9]\d{0,18}),"biz_type":("(?:[^"\\]|\\.)*"),"attempt":(\d{1,10}),"payload":[\[{]'
)


class Envelope(NamedTuple):
    """The value of a Kafka message, decoded. `attempt` is the row's `retry_count` when it was published."""

    outbox_id: int
    biz_type: str
    attempt: int
    payload: Any


@lru_cache(maxsize=1024)
def _opening(biz_type: str) -> bytes:
    return b',"biz_type":' + json.dumps(biz_type, ensure_ascii=False).encode() + b',"attempt":'


def encode_envelope(row: OutboxRow) -> bytes:
    """Return the Kafka value for a row; the payload's own bytes are carried over, never parsed and rebuilt."""
    outbox_id, retry_count, _, _ = row.fence
    return b'{"outbox_id":%d%b%d,"payload":%b}' % (
        outbox_id,
        _opening(row.biz_type),
        max(0, retry_count),  # whatever somebody has set it to by hand
        row.payload,
    )


def decode_envelope(value: bytes | None) -> Envelope:
    """Decode a Kafka value.

    Fields it does not know are ignored; a value without `attempt` is attempt 0.

    Raises:
        EnvelopeError: the value is no JSON object with a positive integer `outbox_id`, or its other
            fields are not of their types.
    """
    if value is None:
        raise EnvelopeError("the value is empty (a tombstone)")
    try:
        document = _document(value)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EnvelopeError(f"the value is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        return _unreadable(value, error)
    if not isinstance(document, dict):
        raise EnvelopeError(f"the value is a JSON {type(document).__name__}, not an object")
    outbox_id = document.get("outbox_id")
    if type(outbox_id) is not int or not 0 < outbox_id < 1 << 63:
        raise EnvelopeError("the value has no positive integer `outbox_id`")
    biz_type = document.get("biz_type")
    if not isinstance(biz_type, str):
        raise EnvelopeError("`biz_type` is not a string")
    attempt = document.get("attempt", 0)
    if type(attempt) is not int or not 0 <= attempt < 1 << 31:
        raise EnvelopeError("`attempt` is not a non-negative integer")
    return Envelope(outbox_id, biz_type, attempt, document.get("payload"))


def _document(value: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Do as `json.loads`, in half the time for a value of our own making, whose encoding and spaces are known."""
    if not value.startswith(_BEGINNING):
        return json.loads(value)
    try:
        text = value.decode()
        document, end = _read(text)
    except (ValueError, RecursionError):
        return json.loads(value)  # it says what is wrong, or knows what to do
    return document if end == len(text) else json.loads(value)


def _unreadable(value: bytes, error: Exception) -> Envelope:
    """Return what can be told of a value of our own making whose payload is beyond what Python can read."""
    opening = _OPENING.match(value)
    if opening is None or not value.endswith(b"}"):
        raise EnvelopeError(f"the value is not JSON: {error}") from None
    outbox_id, biz_type, attempt = opening.groups()
    return Envelope(int(outbox_id), json.loads(biz_type), int(attempt), Unreadable(str(error)))


def outbox_id_of(value: bytes | None) -> int | None:
    """Return the outbox id in a Kafka value without reading its payload, or None where it is no envelope."""
    if value is not None and value.startswith(_BEGINNING):
        digits = value[len(_BEGINNING) : value.find(b",", len(_BEGINNING), _LONGEST_BEGINNING)]
        if digits.isdigit():
            return int(digits)
    try:
        return decode_envelope(value).outbox_id
    except EnvelopeError:
        return None


def decode_headers(headers: bytes) -> list[tuple[str, str | bytes | None]]:
    """Turn the `headers` column (a JSON object of strings) into Kafka headers.

    A value that is no string is carried as its JSON text, and null as an empty value, so that odd headers never stop
    a message.
    """
    try:
        # Numbers stay the text they are: Python has limits to their size that JSON has not.
        document = json.loads(headers, parse_int=str, parse_float=str)
        if not isinstance(document, dict):
            return []
        return [(name, _header_value(value)) for name, value in document.items()]
    except (ValueError, RecursionError):
        return [("headers", headers)]


def _header_value(value: object) -> bytes:
    if value is None:
        return b""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode()


def trim_error(text: str) -> str:
    """Return an error's text as `last_error` can hold it: at most 2,000 characters, storable, nothing cut in half."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")[:LONGEST_ERROR]
