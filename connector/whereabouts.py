"""Keeps the subscription where the database is: after a failover it goes back to what the promoted server has settled.

Kafka's committed offsets outlive what an asynchronous standby has not received. The database's own record of them was
written with each batch, so it is exactly as old as the rest of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from connector.envelope import Envelope, Unreadable, decode_envelope
from connector.errors import EnvelopeError
from connector.kafka import Message, Subscription
from connector.observability.logs import get_logger
from connector.store.offsets import KeptOffsets, Offset, Partition
from connector.store.settlement import Settlement

_log = get_logger("sink")


class _Standing(NamedTuple):
    """What to write of a partition, and which of its messages may be copies of rows that the database has lost."""

    timeline: str
    doubtful_before: int


class Whereabouts:
    """What is known of each assigned partition, on the timeline that the database is on."""

    def __init__(self, subscription: Subscription) -> None:
        """Know nothing yet."""
        self._subscription = subscription
        self._timeline: str | None = None
        self._standings: dict[Partition, _Standing] = {}

    def agree(self, kept: KeptOffsets) -> set[Partition]:
        """Go back in each partition where the database does not have what Kafka says is settled; return those.

        Messages of theirs that were taken already must be thrown away: they come again, in their order.

        Raises:
            KafkaException: Kafka cannot do it now.
            psycopg.Error: the database cannot.
            TimelineChanged: it has become another meanwhile.
        """
        if kept.timeline is None:
            return set()
        if kept.timeline != self._timeline:
            self._timeline, self._standings = kept.timeline, {}
        assigned = self._subscription.assigned or set()
        self._standings = {partition: known for partition, known in self._standings.items() if partition in assigned}
        unknown = sorted(assigned - self._standings.keys())
        if not unknown:
            return set()
        recorded = kept.read()
        new = [partition for partition in unknown if partition not in recorded]
        # From here on it is known where the partition was begun, also if its first batch is lost in a failover.
        begun = self._subscription.committed(new)
        kept.keep({partition: Offset(begun[partition], kept.timeline) for partition in new})
        rewound = set()
        for partition in unknown:
            offset = recorded.get(partition)
            if offset is None or offset.timeline == kept.timeline:
                self._standings[partition] = _Standing(kept.timeline, 0)
                continue
            end = self._subscription.end_of(partition)
            if self._subscription.go_back(partition, offset.next_offset):
                rewound.add(partition)
            _log.warning(
                "failover_noticed",
                topic=partition[0],
                partition=partition[1],
                settled_before=offset.next_offset,
                gone_back=partition in rewound,
                timeline=kept.timeline,
            )
            self._standings[partition] = _Standing(offset.timeline, end)
        return rewound

    def genuine(self, messages: Sequence[Message], settlement: Settlement) -> list[Message]:
        """Leave out copies of rows that were lost in a failover, and whose ids were given out again.

        Raises:
            psycopg.Error: the database could not be asked.
            NotVisibleYet: a row's transaction is still at its commit.
        """
        if not any(standing.doubtful_before for standing in self._standings.values()):
            return list(messages)
        doubtful = {
            id(message): envelope.outbox_id
            for message in messages
            if self._is_doubtful(message) and (envelope := _envelope(message)) is not None
        }
        if not doubtful:
            return list(messages)
        rows = settlement.enqueued(sorted(set(doubtful.values())))
        left = [
            message
            for message in messages
            if id(message) not in doubtful or _is_copy_of(message, rows.get(doubtful[id(message)]))
        ]
        if len(left) < len(messages):
            _log.warning("copies_of_lost_rows_skipped", messages=len(messages) - len(left))
        return left

    def _is_doubtful(self, message: Message) -> bool:
        standing = self._standings.get(_partition(message))
        return standing is not None and (message.offset() or 0) < standing.doubtful_before

    def behind(self, ends: Mapping[Partition, int]) -> dict[Partition, Offset]:
        """Return what is to be kept once everything before these offsets is settled."""
        if self._timeline is None:
            return {}
        return {partition: self._offset(partition, end, self._timeline) for partition, end in ends.items()}

    def _offset(self, partition: Partition, end: int, timeline: str) -> Offset:
        standing = self._standings.get(partition)
        # A sink that starts in the midst of what is doubtful must find it so.
        return Offset(end, standing.timeline if standing is not None and end < standing.doubtful_before else timeline)


def _partition(message: Message) -> Partition:
    return message.topic() or "", message.partition() or 0


def _envelope(message: Message) -> Envelope | None:
    try:
        return decode_envelope(message.value())
    except EnvelopeError:
        return None


def _is_copy_of(message: Message, row: tuple[str, str] | None) -> bool:
    envelope = decode_envelope(message.value())
    if row is None:
        return False
    biz_type, payload = row
    if biz_type != envelope.biz_type:
        return False
    return isinstance(envelope.payload, Unreadable) or json.loads(payload) == envelope.payload
