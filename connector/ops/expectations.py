"""What must be there, as the settings say: what `doctor` holds the facts against."""

from __future__ import annotations

from dataclasses import dataclass

from connector.store.queries import Tables


@dataclass(frozen=True, slots=True)
class Expectations:
    """Names and numbers from the settings; `wal_budget` in bytes."""

    tables: Tables
    publication_name: str
    slot_name: str
    wal_budget: int
    topics: tuple[str, ...]
    dead_letter_topic: str
    topic_partitions: int
    topic_replication: int
    group_id: str
