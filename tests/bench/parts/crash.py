"""SIGKILL at 40 % of a backlog, and a new start at once: what is missing then, and what is doubled."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from tests.bench.arena import HISTORY, Arena, Rows, Running, messages_in
from tests.bench.bench import Bench
from tests.bench.contenders import OUR_READER, OUR_SINK, READERS, Reader, Start
from tests.bench.measure import GIVE_UP_SECONDS, Stuck, read_log

PART: Final = "SIGKILL at 40 %"
_AT: Final = 0.4
_LOOK_SECONDS: Final = 0.02
_QUIET_SECONDS: Final = 3.0
_PATIENCE_SECONDS: Final = 60.0
"""So long nothing may come before what is missing counts as lost: a group takes 45 s to notice that a sink is gone."""


def measure(bench: Bench) -> None:
    """Let each reader be killed once; ours together with our sink, which is killed as well."""
    for reader in READERS:
        if bench.takes_part(reader.name):
            rows = Rows(min(bench.sizes.rows, reader.most_rows or bench.sizes.rows))
            with bench.arena() as place:
                place.load(rows)
                bench.add(PART, reader.name, figures_of(reader, place, rows.count))


def figures_of(reader: Reader, place: Arena, count: int) -> dict[str, float]:
    """Kill a reader, and our sink beside our own reader; return what it did to the rows."""
    admin = place.kafka.admin()
    figures: dict[str, float] = {}

    def published() -> int:
        return messages_in(admin, place.topic)

    def stored() -> int:
        return int(place.ask(f"select coalesce(max(id), 0) from {HISTORY}"))

    def different() -> int:
        return int(place.ask(f"select count(distinct user_id) from {HISTORY}"))

    with ExitStack() as stack:

        def start(begin: Start) -> Running:
            process = begin(place)
            stack.callback(process.stop)
            return process

        sink = start(OUR_SINK.start) if reader is OUR_READER else None
        victim = start(reader.start)
        _await(published, round(_AT * count))
        victim.kill()
        start(reader.start)
        if sink is not None:
            _await(stored, round(_AT * count))
            sink.kill()
            start(OUR_SINK.start)
            _await_the_rest(stored, lambda: different() == count)
            figures["missing in history"] = count - different()
            figures["doubled in history"] = place.ask(f"select count(*) - count(distinct user_id) from {HISTORY}")
        _await_the_rest(published, lambda: read_log(place, count).missing == 0)
    log = read_log(place, count)
    return {"missing on Kafka": log.missing, "doubled on Kafka": log.doubled, **figures}


def _await(progress: Callable[[], int], at: int) -> None:
    last, moved_at = 0, time.monotonic()
    while (done := progress()) < at:
        if done > last:
            last, moved_at = done, time.monotonic()
        elif time.monotonic() > moved_at + GIVE_UP_SECONDS:
            raise Stuck(f"{done:,} of {at:,}, and nothing has moved for {GIVE_UP_SECONDS:.0f} s")
        time.sleep(_LOOK_SECONDS)


def _await_the_rest(progress: Callable[[], int], complete: Callable[[], bool]) -> None:
    """Wait until nothing comes any more, and nothing is missing or has been for long."""
    last, moved_at = -1, time.monotonic()
    while True:
        done = progress()
        if done != last:
            last, moved_at = done, time.monotonic()
        quiet = time.monotonic() - moved_at
        if quiet > _QUIET_SECONDS and (quiet > _PATIENCE_SECONDS or complete()):
            return
        time.sleep(_QUIET_SECONDS / 3)
