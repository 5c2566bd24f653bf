"""What the database says at the end: that every message is stored exactly once, and in order; or what is not so."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg

from connector.store.queries import Tables


class DeadMessage(NamedTuple):
    """A message that was given up: its outbox id, how often it was tried, and why it failed."""

    outbox_id: int
    attempts: int
    reason: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"#{self.outbox_id} after {self.attempts} attempts: {self.reason}"


@dataclass(frozen=True, slots=True)
class Proof:
    """Counts over all messages; `p50` and `p99` are seconds, of messages that neither failed nor waited for one."""

    enqueued: int
    stored: int
    retried: int
    dead: frozenset[int]
    missing: int
    duplicates: int
    reordered: int
    altered: int
    unsettled: int
    p50: float | None
    p99: float | None

    def gaps(self, enqueued: int, doomed: Collection[int]) -> Iterator[str]:
        """Yield everything that keeps it from being a proof, given what the application knows of its messages.

        `enqueued` is how many it committed, `doomed` the ids of those that are to die.
        """
        if self.enqueued != enqueued:
            yield f"the application enqueued {enqueued:,}, the outbox holds {self.enqueued:,}"
        if self.missing:
            yield f"{self.missing:,} not stored"
        if self.duplicates:
            yield f"{self.duplicates:,} rows of history too many"
        if self.reordered:
            yield f"{self.reordered:,} stored after a later one of their conversation"
        if self.altered:
            yield f"{self.altered:,} stored otherwise than enqueued"
        if self.unsettled:
            yield f"{self.unsettled:,} neither consumed nor dead"
        if unplanned := self.dead - set(doomed):
            yield f"{len(unplanned):,} dead that should not be: {_few(unplanned)}"
        if alive := set(doomed) - self.dead:
            yield f"{len(alive):,} not dead that should be: {_few(alive)}"


def prove(connection: psycopg.Connection[Any], tables: Tables) -> Proof:
    """Ask the database about everything that was enqueued; nothing may be writing any more.

    Raises:
        psycopg.Error: the database cannot answer.
    """
    ((enqueued, stored, retried, dead, *counts),) = connection.execute(tables.query("demo", "proof"))
    return Proof(enqueued, stored, retried, frozenset(dead), *counts)


def dead_messages(connection: psycopg.Connection[Any], tables: Tables) -> list[DeadMessage]:
    """Return the messages that were given up, in outbox order."""
    return [DeadMessage(*record) for record in connection.execute(tables.query("demo", "dead"))]


def _few(ids: Collection[int], most: int = 5) -> str:
    shown = ", ".join(f"#{outbox_id}" for outbox_id in sorted(ids)[:most])
    return shown if len(ids) <= most else f"{shown}, …"
