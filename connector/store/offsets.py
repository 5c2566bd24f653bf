"""Kafka's offsets as the database knows them: written in the transaction that settles what lies before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import psycopg

from connector.outbox import Table
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables
from connector.store.timelines import timeline_of

Partition = tuple[str, int]
"""A topic and the number of one of its partitions."""


class Offset(NamedTuple):
    """Everything before `next_offset` is settled, on that timeline of that cluster or on one that it grew from."""

    next_offset: int
    timeline: str


class TimelineChanged(Exception):
    """The database is not the one that it was, or not on the timeline that it was: a standby was promoted."""


class KeptOffsets:
    """The offsets of one consumer group, over one connection."""

    def __init__(self, connection: Connection, tables: Tables, group_id: str) -> None:
        """Ask where the connection leads.

        Raises:
            psycopg.errors.ReadOnlySqlTransaction: to a standby.
            psycopg.Error: the database could not say.
        """
        self._connection = connection
        self._tables = tables
        self._group_id = group_id
        offsets = Table(tables.outbox.schema, "outbox_connector_offsets")
        query = tables.query("sink", "may_keep_offsets")
        ((standby, may_keep),) = connection.execute(query, {"offsets": str(offsets)}).fetchall()
        if standby:
            raise psycopg.errors.ReadOnlySqlTransaction("the server is a standby, which takes no writes")
        self.timeline = timeline_of(connection, tables) if may_keep else None
        """The cluster and its timeline; None where the role may not keep offsets, or the server does not tell."""

    def read(self) -> dict[Partition, Offset]:
        """Return what was kept, by partition."""
        rows = self._connection.execute(self._tables.query("sink", "read_offsets"), {"group": self._group_id})
        return {(topic, partition): Offset(next_offset, timeline) for topic, partition, next_offset, timeline in rows}

    def keep(self, offsets: Mapping[Partition, Offset]) -> None:
        """Write offsets, in the caller's transaction.

        Raises:
            TimelineChanged: the server was another when `timeline` was asked for.
            psycopg.Error: the database could not do it.
        """
        if self.timeline is None or not offsets:
            return
        written = self._connection.execute(
            self._tables.query("sink", "keep_offsets"),
            {
                "group": self._group_id,
                "topics": [topic for topic, _ in offsets],
                "partitions": [partition for _, partition in offsets],
                "next_offsets": [offset.next_offset for offset in offsets.values()],
                "timelines": [offset.timeline for offset in offsets.values()],
                "believed": self.timeline,
            },
        ).rowcount
        if not written:
            raise TimelineChanged("the database has moved to another timeline")
