"""Who takes part: each as something to start on an arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

from connector.envelope import encode_envelope
from connector.outbox import OutboxRow
from tests.bench import ours
from tests.bench.arena import Arena, Running
from tests.bench.peers import debezium, jdbc_sink, poller

Start = Callable[[Arena], Running]


def _nothing(_: Arena) -> None:
    """Wait for nothing."""


def _fine() -> str | None:
    return None


class Reader(NamedTuple):
    """From outbox to Kafka. `settle` waits until it has written down what it did; `most_rows` is what it can manage."""

    name: str
    start: Start
    start_for_latency: Start
    settle: Callable[[Arena], None] = _nothing
    why_not: Callable[[], str | None] = _fine
    most_rows: int | None = None
    most_a_second: float | None = None


class Sink(NamedTuple):
    """From Kafka to history. `encode` makes its message of a row."""

    name: str
    start: Start
    encode: Callable[[OutboxRow], bytes] = encode_envelope
    why_not: Callable[[], str | None] = _fine
    most_rows: int | None = None


OUR_READER: Final = Reader(
    ours.NAME, partial(ours.start, command="reader"), partial(ours.start, command="reader"), ours.settle
)
OUR_SINK: Final = Sink(ours.NAME, partial(ours.start, command="sink"))

READERS: Final = (
    OUR_READER,
    Reader(
        debezium.NAME,
        partial(debezium.start, tuned=debezium.THROUGHPUT),
        partial(debezium.start, tuned=debezium.LATENCY),
        why_not=debezium.why_not,
    ),
    Reader(
        poller.NAME,
        partial(poller.start, command="publish"),
        partial(poller.start, command="publish"),
        most_rows=poller.MOST_ROWS,
        most_a_second=poller.MOST_A_SECOND,
    ),
)
SINKS: Final = (
    OUR_SINK,
    Sink(jdbc_sink.NAME, jdbc_sink.start, jdbc_sink.encode, jdbc_sink.why_not),
    Sink(poller.NAME, partial(poller.start, command="store"), most_rows=poller.MOST_ROWS),
)


def left_out() -> Mapping[str, str]:
    """Return which peers cannot be had, and why."""
    return {one.name: problem for one in (*READERS, *SINKS) if (problem := one.why_not()) is not None}
