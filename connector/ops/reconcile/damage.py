"""What is wrong with a message, as far as the database can tell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from connector.errors import PayloadError
from connector.outbox import Status
from connector.store.comparison import Message

Parsers = Mapping[str, Callable[[Any], Sequence[object]]]
"""For each `biz_type` that is stored in history, how its payload becomes the values of a history row."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
CLOCK_SKEW_SECONDS: Final = 60.0
"""How far one clock may be from another: a producer's from the database's, or that of a former primary."""

_DAY: Final = 86_400.0
_LONGEST_HOLD: Final = 2 * _DAY
_MOST_DAYS_AHEAD: Final = 366
_COLUMNS: Final = ("user_id", "chat_id", "message_content", "role", "created_at")


class Damage(StrEnum):
    """The kinds of damage, by the names of the counts in the report."""

    MISSING = "missing"
    STUCK = "stuck"
    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    DIFFERING = "differing"


class Sign(StrEnum):
    """What was seen of a damage, in one word for programs: each has its own mend."""

    NOT_IN_HISTORY = "not_in_history"
    NOT_IN_KAFKA = "not_in_kafka"
    ONLY_IN_KAFKA = "only_in_kafka"
    NOT_IN_OUTBOX = "not_in_outbox"
    ONLY_IN_HISTORY = "only_in_history"
    OVERDUE = "overdue"
    FAR_OFF = "far_off"
    NOT_CONSUMED = "not_consumed"
    SAME_ID = "same_id"
    WITHOUT_ID = "without_id"
    CONTENT = "content"
    STATUS = "status"
    ORDER = "order"


class Flaw(NamedTuple):
    """One thing that is wrong with a message, for programs and in words."""

    damage: Damage
    sign: Sign
    text: str


def flaws(message: Message, parsers: Parsers, stuck_after: float) -> Iterator[Flaw]:
    """Yield what is wrong with a message; `stuck_after` is in seconds.

    What only Kafka or its neighbours can tell, whether it is there and in order, is not among it.
    """
    parse = parsers.get(message.biz_type)
    stored = message.stored
    if message.status == Status.CONSUMED and not stored and parse is not None:
        yield Flaw(Damage.MISSING, Sign.NOT_IN_HISTORY, "consumed, and not in history")
    if message.waits is not None and message.waits > stuck_after:
        since = "ever" if message.waits == math.inf else f"{message.waits:.0f} s"
        if message.status == Status.PUBLISHED:
            yield Flaw(Damage.STUCK, Sign.NOT_CONSUMED, f"published, and not consumed for {since}")
        else:
            yield Flaw(Damage.STUCK, Sign.OVERDUE, f"pending, and overdue for {since}")
    ahead = days_ahead(message)
    if ahead and (message.retry_count or ahead > _MOST_DAYS_AHEAD):
        until = "never due" if ahead == math.inf else f"not due for {ahead:,.0f} days"
        yield Flaw(Damage.STUCK, Sign.FAR_OFF, f"pending, and {until}")
    if len(stored) > 1:
        places = ", ".join(str(row.place) for row in stored)
        yield Flaw(Damage.DUPLICATED, Sign.SAME_ID, f"{len(stored)} rows of history: {places}")
    if stored and message.status != Status.CONSUMED:
        yield Flaw(Damage.DIFFERING, Sign.STATUS, f"in history, though {message.status}")
    elif stored and parse is not None:
        difference = _difference(message, parse)
        if difference:
            yield Flaw(Damage.DIFFERING, Sign.CONTENT, difference)


def days_ahead(message: Message) -> float:
    """Return in how many days a message is due, if that is later than a retry or a hold makes it, and 0 if not.

    Its application may have enqueued it like that.
    """
    if message.status != Status.PENDING or message.waits is None or message.waits > -_LONGEST_HOLD:
        return 0.0
    return -message.waits / _DAY


def _difference(message: Message, parse: Callable[[Any], Sequence[object]]) -> str | None:
    try:
        values = parse(json.loads(message.payload or ""))
    except (PayloadError, ValueError, RecursionError) as error:
        return f"in history, with a payload that its handler refuses: {error}"
    *expected, moment = values
    for row in message.stored:
        differing = [
            name for name, wanted, found in zip(_COLUMNS, expected, row.values, strict=False) if wanted != found
        ]
        if isinstance(moment, datetime):
            if (moment - _EPOCH) // _MICROSECOND != row.created:
                differing.append("created_at")
        elif not _may_be_when_it_was_stored(row.created, message):
            differing.append("created_at")
        if differing:
            return f"row {row.place} of history has another {', '.join(differing)} than the payload"
    return None


def _may_be_when_it_was_stored(moment: int | None, message: Message) -> bool:
    """Tell whether a row may be of that time: where the payload has none it is that of the sink's transaction."""
    if message.consumed is None:
        return True
    earliest = min(message.created, message.consumed) - CLOCK_SKEW_SECONDS
    return moment is not None and earliest <= moment / 1_000_000 <= message.consumed + CLOCK_SKEW_SECONDS
