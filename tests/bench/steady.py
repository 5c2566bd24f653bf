"""Steady one-row transactions, and when each of them was seen: three processes of their own beside who is measured.

Times are of the wall clock in nanoseconds, which all processes of a machine share.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import psycopg
from confluent_kafka import Consumer, TopicPartition

from tests.bench.arena import HISTORY, KEYS, Arena, ends_of
from tests.bench.measure import GIVE_UP_SECONDS, consumer_options, number_of

_WRITERS: Final = 4
_CONTENT: Final = "and then the customer said: ok " * 12
_LOOK_SECONDS: Final = 0.001
_ENQUEUE: Final = (
    "select outbox_enqueue('chat_history_persist', %s, %s, jsonb_build_object("
    "'user_id', %s::bigint, 'chat_id', %s::text, 'role', 'user', 'message_content', %s::text))"
)

_processes = multiprocessing.get_context("spawn")


class Latencies(NamedTuple):
    """Milliseconds from a transaction's commit, as its writer learnt of it, until its row was seen."""

    p50: float
    p99: float
    worst: float
    kept_pace: float
    """The rate that was written, as a part of the rate that was asked for."""


def latencies(place: Arena, rate: int, *, warm_up: float, seconds: float, in_history: bool) -> Latencies:
    """Write at a rate, and look on in Kafka or in history; neither what is there already nor the warm-up counts.

    Raises:
        RuntimeError: not every row was seen.
    """
    count, before = round(rate * (warm_up + seconds)), round(rate * warm_up)
    here, there = _processes.Pipe()
    look = _look_into_history if in_history else _look_into_kafka
    last = f"select coalesce(max(id), 0) from {HISTORY}"
    where: tuple[object, ...] = (place.database.url, place.ask(last))
    if not in_history:
        where = (place.topic, consumer_options(place), ends_of(place.kafka.admin(), place.topic))
    watcher = _processes.Process(target=look, args=(*where, count, there), daemon=True)
    watcher.start()
    here.recv()
    writing, written = _processes.Pipe()
    writer = _processes.Process(
        target=_write, args=(place.database.url, place.topic, rate, count, written), daemon=True
    )
    writer.start()
    committed, seen = array("q", writing.recv_bytes()), array("q", here.recv_bytes())
    writer.join()
    watcher.join()
    if missing := seen[1:].count(0):
        raise RuntimeError(f"{missing} rows of {count} were never seen")
    pace = (count - before - 1) / (committed[count] - committed[before + 1]) * 1e9 / rate
    return summary((seen[n] - committed[n] for n in range(before + 1, count + 1)), pace)


def summary(nanoseconds: Iterable[int], pace: float) -> Latencies:
    """Return what there is to say of latencies."""
    ordered = sorted(nanoseconds)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    return Latencies(cuts[49] / 1e6, cuts[98] / 1e6, ordered[-1] / 1e6, pace)


def _write(url: str, topic: str, rate: int, count: int, answer: Connection) -> None:
    """Commit `count` one-row transactions on several connections; send when each was committed."""
    committed = array("q", bytes(8 * (count + 1)))
    began = time.monotonic() + 0.5

    def write(first: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            for number in range(first, count + 1, _WRITERS):
                time.sleep(max(0.0, began + number / rate - time.monotonic()))
                key = f"chat-{number % KEYS}"
                connection.execute(_ENQUEUE, [topic, key, number, key, _CONTENT])
                committed[number] = time.time_ns()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(1, _WRITERS + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.send_bytes(committed.tobytes())


def _look_into_kafka(
    topic: str, options: dict[str, str | int | bool], ends: list[int], count: int, answer: Connection
) -> None:
    """Poll one message at a time: asking for several with a time-out would add the time-out."""
    consumer = Consumer(options)
    consumer.assign([TopicPartition(topic, n, end) for n, end in enumerate(ends)])
    answer.send("ready")

    def look() -> list[int]:
        message = consumer.poll(0.5)
        number = None if message is None else number_of(message)
        return [] if number is None else [number]

    _record(look, count, answer)
    consumer.close()


def _look_into_history(url: str, last: int, count: int, answer: Connection) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        query = f"select id, user_id from {HISTORY} where id > %s order by id".encode()
        answer.send("ready")

        def look() -> list[int]:
            nonlocal last
            rows: list[tuple[Any, ...]] = connection.execute(query, [last]).fetchall()
            if not rows:
                time.sleep(_LOOK_SECONDS)
                return []
            last = rows[-1][0]
            return [number for _, number in rows]

        _record(look, count, answer)


def _record(look: Callable[[], list[int]], count: int, answer: Connection) -> None:
    """Send when each row was first seen, once all were, or once none has been seen for long."""
    seen = array("q", bytes(8 * (count + 1)))
    left, moved_at = count, time.monotonic()
    while left and time.monotonic() < moved_at + GIVE_UP_SECONDS:
        numbers = look()
        now = time.time_ns()
        for number in numbers:
            if not seen[number]:
                seen[number] = now
                left -= 1
        if numbers:
            moved_at = time.monotonic()
    answer.send_bytes(seen.tobytes())
