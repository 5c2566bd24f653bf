"""A loop that no longer moves is told by liveness, whichever it is, and so is that it moves again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from connector import failpoints
from connector.cli.composition import reader_options, sink_options
from connector.failpoints import Point
from connector.handlers import load_handlers
from connector.observability.health import Health
from connector.observability.metrics import ReaderMetrics, SinkMetrics
from connector.reader import Reader
from connector.settings import Settings, load_settings
from connector.sink import Sink
from tests.integration.outbox_table import OutboxTable
from tests.integration.scenario import set_up
from tests.services import Database, eventually, eventually_none

AN_HOUR = 3600.0


class Clock:
    """A clock that a test puts forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() + self.ahead


class Held:
    """Keeps whoever reaches a failpoint until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def spring(self) -> None:
        """Stay here."""
        self.reached.set()
        self.go.wait(60)


def stuck(*healths: Health) -> set[str]:
    """Return the parts that do not move, by what `/livez` is made of."""
    answers = [health.liveness() for health in healths]
    return {part for alive, parts in answers for part, state in parts.items() if not alive and state != "alive"}


@contextmanager
def running(loop: Reader | Sink) -> Iterator[None]:
    """Run a loop beside the test."""
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield
    finally:
        loop.stop()
        thread.join(30)
    assert not thread.is_alive()


def reader_of(settings: Settings, health: Health) -> Reader:
    """Return a reader for this process."""
    options = replace(reader_options(settings), shutdown_seconds=5)
    return Reader(options, ReaderMetrics(), health)


def sink_of(settings: Settings, health: Health) -> Sink:
    """Return a sink for this process."""
    options = replace(sink_options(settings), shutdown_seconds=5)
    return Sink(options, load_handlers(), SinkMetrics(), health)


@pytest.mark.parametrize(
    ("point", "part"),
    [(Point.ROW_READ, "reader"), (Point.ROWS_MARKED, "bookkeeper"), (Point.STATEMENT_RUN, "sink")],
)
def test_a_loop_that_is_stuck_is_not_alive_until_it_moves_again(
    database: Database, connector_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, point: Point, part: str
) -> None:
    """Held in the midst of its work for an hour, it is named, and none of those that are only idle."""
    set_up(connector_env)
    settings = load_settings(connector_env, needs=frozenset({"database", "kafka"}))
    clock, held = Clock(), Held()
    of_reader, of_sink = Health(clock), Health(clock)
    outbox = OutboxTable(database)
    monkeypatch.setitem(failpoints.armed, point, held)
    with running(reader_of(settings, of_reader)), running(sink_of(settings, of_sink)):
        row = outbox.new(topic=settings.topics[0])
        try:
            assert held.reached.wait(30)
            clock.ahead += AN_HOUR
            eventually(lambda: stuck(of_reader, of_sink) == {part}, within=20, what="word of the stuck part alone")
        finally:
            held.go.set()
        eventually_none(lambda: stuck(of_reader, of_sink), within=20, what="life")
        eventually(lambda: outbox.status(row) == "consumed", within=20, what="the message")
    outbox.close()
