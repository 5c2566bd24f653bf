"""Puts together, a few times a second, what the view shows: from the database, the metrics and the logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from connector.demo.chat import Chat
from connector.demo.children import Child, Event
from connector.demo.proof import DeadMessage, dead_messages
from connector.store.queries import Tables

_KEPT_EVENTS: Final = 3
_TOLD: Final = frozenset({"retry_scheduled", "message_dead"})


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth a line: when, in seconds since the start, and what."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pipeline at one moment. Times are in seconds; None is "not known yet"."""

    elapsed: float
    total: int
    enqueued: int
    published: int
    consumed: int
    pending: int
    waiting: int
    in_kafka: int
    dead: tuple[DeadMessage, ...]
    lag_bytes: int
    oldest_age: float
    p50: float | None
    p99: float | None
    retries: int
    held: int  # how often a message was held back, in all
    held_now: int
    happenings: tuple[Happening, ...]

    @property
    def unsettled(self) -> int:
        """Messages that are neither consumed nor dead."""
        return self.pending + self.waiting + self.in_kafka


class Watch:
    """Looks at a running pipeline."""

    def __init__(
        self, connection: psycopg.Connection[Any], tables: Tables, chat: Chat, reader: Child, sink: Child
    ) -> None:
        """Use a connection in autocommit mode."""
        self._connection = connection
        self._tables = tables
        self._chat = chat
        self._reader = reader
        self._sink = sink
        self._started = time.monotonic()
        self._metrics: dict[Child, dict[str, float]] = {reader: {}, sink: {}}
        self._happenings: deque[Happening] = deque(maxlen=_KEPT_EVENTS)
        self._dead: tuple[DeadMessage, ...] = ()
        self._held = 0

    def look(self) -> Snapshot:
        """Take a snapshot.

        Raises:
            psycopg.Error: the database cannot answer.
        """
        elapsed = time.monotonic() - self._started
        # Against the stream, so that no number is ahead of the one that it follows from.
        for child in (self._sink, self._reader):
            self._note(child.new_events(), elapsed)
            # A process that is too busy to answer shows its last numbers.
            self._metrics[child] = child.metrics() or self._metrics[child]
        read, stored = self._metrics[self._reader], self._metrics[self._sink]
        counts = self._connection.execute(self._tables.query("demo", "watch"))
        ((pending, waiting, in_kafka, dead, p50, p99),) = counts
        if dead != len(self._dead):
            self._dead = tuple(dead_messages(self._connection, self._tables))
        return Snapshot(
            elapsed=elapsed,
            total=self._chat.total,
            enqueued=self._chat.enqueued,
            published=int(read.get("published_total", 0)),
            consumed=int(stored.get("consumed_total", 0)),
            pending=pending,
            waiting=waiting,
            in_kafka=in_kafka,
            dead=self._dead,
            lag_bytes=int(read.get("replication_lag_bytes", 0)),
            oldest_age=stored.get("oldest_unconsumed_age_seconds", 0.0),
            p50=p50,
            p99=p99,
            retries=int(read.get("retries_scheduled_total", 0) + stored.get("retries_scheduled_total", 0)),
            held=self._held,
            held_now=int(stored.get("held_messages", 0)),
            happenings=tuple(self._happenings),
        )

    def _note(self, events: Sequence[Event], elapsed: float) -> None:
        held = sum(int(event.get("messages", 0)) for event in events if event.get("event") == "messages_held")
        self._held += held
        self._happenings.extend(Happening(elapsed, _told(event)) for event in events if event.get("event") in _TOLD)
        if held:
            self._happenings.append(Happening(elapsed, f"{held} held back behind an earlier one of their conversation"))


def _told(event: Event) -> str:
    what = f"#{event.get('outbox_id')} failed, attempt {int(event.get('attempt', 0)) + 1}"
    due = event.get("due_in_seconds")
    return f"{what}: dead" if due is None else f"{what}: next one in {due:.0f} s"
