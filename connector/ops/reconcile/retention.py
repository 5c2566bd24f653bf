"""How far back Kafka's logs reach, which is how far back it can be proved that a message is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from connector.kafka import Admin, LogScan, Partition
from connector.ops.reconcile.damage import CLOCK_SKEW_SECONDS

_FIRST_FEW: Final = 100
_MURMUR2_SEED: Final = 0x9747B28C
_MURMUR2_FACTOR: Final = 0x5BD1E995
_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class TopicReach:
    """How far back each partition of a topic reaches; times are in seconds since 1970."""

    since: tuple[float, ...]
    """From when on each has everything: `-inf` if nothing was ever deleted of it."""
    oldest: tuple[float, ...] = ()
    """When the oldest message of each was written, `inf` if there is none; empty if nothing was ever deleted at all."""
    why_not: str = ""
    """Why nothing can be proved of the topic at all."""

    def covers(self, key: str, created: float, skew: float = CLOCK_SKEW_SECONDS) -> bool:
        """Tell whether a message of a key, if Kafka ever had it, must be there still.

        A topic may have been given more partitions since, and then it lies in the one that its key had before. What has
        an older message was there already.
        """
        if not self.oldest or not self.since:
            return bool(self.since)
        if created >= max(self.since) + skew:
            return True
        fewest = max((number for number, at in enumerate(self.oldest) if at <= created), default=0) + 1
        return all(
            created >= self.since[partition_of(key.encode(), partitions)] + skew
            for partitions in range(fewest, len(self.since) + 1)
        )


class Retention:
    """Learns of topics as they turn up."""

    def __init__(self, admin: Admin, scan: LogScan, *, java_partitioner: bool) -> None:
        """Use both clients; without the Java client's partitioner a key may be in any partition."""
        self._admin = admin
        self._scan = scan
        self._java_partitioner = java_partitioner
        self._reach: dict[str, TopicReach] = {}
        self.ranges: dict[Partition, tuple[int, int]] = {}
        """The first offset and the one past the last of each partition, when its topic was looked at last."""

    @property
    def topics(self) -> set[str]:
        """The topics that were asked for and are there."""
        return {topic for topic, reach in self._reach.items() if reach.since}

    def unprovable(self) -> Iterable[str]:
        """Yield why nothing can be proved of some topics."""
        return (f"topic {topic} {reach.why_not}" for topic, reach in sorted(self._reach.items()) if reach.why_not)

    def of(self, topic: str) -> TopicReach:
        """Return how far back a topic reaches.

        Raises:
            KafkaException, ServiceUnavailable: Kafka does not answer.
        """
        reach = self._reach.get(topic)
        if reach is None:
            reach = self._reach[topic] = self._look(topic)
        return reach

    def look_again(self) -> None:
        """Learn anew what was known: logs lose their oldest messages all the time. Errors as of `of`."""
        for topic in self._reach:
            self._reach[topic] = self._look(topic)

    def _look(self, topic: str) -> TopicReach:
        state = self._admin.topics().get(topic)
        if state is None:
            return TopicReach((), why_not="does not exist, or may not be read")
        if "compact" in self._admin.topic_settings([topic]).get(topic, {}).get("cleanup.policy", ""):
            return TopicReach((), why_not="is compacted, so that Kafka keeps only the last message of each key")
        partitions = [(topic, number) for number in range(state.partitions)]
        ranges = self._admin.log_ranges(partitions)
        self.ranges.update(ranges)
        if not any(first for first, _ in ranges.values()):
            return TopicReach((-math.inf,) * len(partitions))
        oldest = dict.fromkeys(partitions, math.inf)
        few = {place: (first, min(end, first + _FIRST_FEW)) for place, (first, end) in ranges.items()}
        for records in self._scan.read(few):
            for record in records:
                if record.at is not None:
                    oldest[record.partition] = min(oldest[record.partition], record.at)
        since = tuple(oldest[place] if ranges[place][0] else -math.inf for place in partitions)
        if not self._java_partitioner:
            since = (max(since),) * len(partitions)
        return TopicReach(since, tuple(oldest.values()))


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that the Java client, and our producer, give a key."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    length = len(data)
    mixed = _MURMUR2_SEED ^ length
    whole = length & ~3
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * _MURMUR2_FACTOR & _WORD
        word = (word ^ word >> 24) * _MURMUR2_FACTOR & _WORD
        mixed = mixed * _MURMUR2_FACTOR & _WORD ^ word
    if length & 3:
        mixed = (mixed ^ int.from_bytes(data[whole:], "little")) * _MURMUR2_FACTOR & _WORD
    mixed = (mixed ^ mixed >> 13) * _MURMUR2_FACTOR & _WORD
    return mixed ^ mixed >> 15
