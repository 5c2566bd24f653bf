"""What is wrong with a message, as far as the database can tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from connector.errors import PayloadError
from connector.outbox import Status
from connector.store.comparison import Message, Stored

Parsers = Mapping[str, Callable[[Any], Sequence[object]]]
"""For each `biz_type` that is stored in history, how its payload becomes the values of a history row."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_COLUMNS: Final = ("user_id", "chat_id", "message_content", "role", "created_at")


class Damage(StrEnum):
    """The kinds of damage, by the names of the counts in the report."""

    MISSING = "missing"
    STUCK = "stuck"
    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    DIFFERING = "differing"


class Flaw(NamedTuple):
    """One thing that is wrong with a message, in words."""

    damage: Damage
    text: str


def flaws(message: Message, parsers: Parsers, stuck_after: float) -> Iterator[Flaw]:
    """Yield what is wrong with a message; `stuck_after` is in seconds.

    What only Kafka or its neighbours can tell, whether it is there and in order, is not among it.
    """
    parse = parsers.get(message.biz_type)
    stored = message.stored
    if message.status == Status.CONSUMED and not stored and parse is not None:
        yield Flaw(Damage.MISSING, "consumed, and not in history")
    if message.waits is not None and message.waits > stuck_after:
        since = "ever" if message.waits == float("inf") else f"{message.waits:.0f} s"
        what = "published, and not consumed" if message.status == Status.PUBLISHED else "pending, and overdue"
        yield Flaw(Damage.STUCK, f"{what} for {since}")
    if len(stored) > 1:
        places = ", ".join(str(row.place) for row in stored)
        yield Flaw(Damage.DUPLICATED, f"{len(stored)} rows of history: {places}")
    if stored and message.status != Status.CONSUMED:
        yield Flaw(Damage.DIFFERING, f"in history, though {message.status}")
    elif stored and parse is not None:
        difference = _difference(message.payload, stored, parse)
        if difference:
            yield Flaw(Damage.DIFFERING, difference)


def _difference(payload: str | None, stored: Sequence[Stored], parse: Callable[[Any], Sequence[object]]) -> str | None:
    try:
        values = parse(json.loads(payload or ""))
    except (PayloadError, ValueError, RecursionError) as error:
        return f"in history, with a payload that its handler refuses: {error}"
    *expected, moment = values
    for row in stored:
        differing = [
            name for name, wanted, found in zip(_COLUMNS, expected, row.values, strict=False) if wanted != found
        ]
        if isinstance(moment, datetime) and (moment - _EPOCH) // _MICROSECOND != row.created:
            differing.append("created_at")
        if differing:
            return f"row {row.place} of history has another {', '.join(differing)} than the payload"
    return None
