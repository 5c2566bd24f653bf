"""How far the sink's consumer group is behind, partition by partition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from connector.kafka import Admin


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """A partition's offsets: committed (None if never), first that is kept, and one past the last."""

    topic: str
    partition: int
    committed: int | None
    first: int
    end: int

    @property
    def lag(self) -> int:
        """How many offsets are still to be read; a group that never committed starts at the first."""
        return max(0, self.end - max(self.first, self.committed or 0))

    @property
    def deleted_unread(self) -> int:
        """How many offsets Kafka removed before the group had read them."""
        return 0 if self.committed is None else max(0, self.first - self.committed)


def consumer_lag(
    admin: Admin, group_id: str, partitions: Iterable[tuple[str, int]], timeout: float = 5
) -> list[PartitionLag]:
    """Compare what the group has committed with the partitions' logs.

    Raises:
        KafkaException: the group or a partition cannot be asked.
    """
    committed = admin.group_offsets(group_id, timeout)
    return [
        PartitionLag(topic, partition, committed.get((topic, partition)), first, end)
        for (topic, partition), (first, end) in sorted(admin.log_ranges(partitions, timeout).items())
    ]
