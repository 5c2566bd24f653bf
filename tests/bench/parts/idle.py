"""A minute in which nothing happens: what each process costs, what it asks the database, and what WAL it makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import psycopg

from tests.bench.arena import HISTORY, Arena, Rows, messages_in
from tests.bench.bench import Bench
from tests.bench.contenders import OUR_READER, OUR_SINK, READERS, Start
from tests.bench.measure import Meter
from tests.services import eventually

PART: Final = "a minute idle"
NOBODY: Final = "nobody"
_ROWS: Final = Rows(1_000)
# For three quarters of a minute the reader looks for what somebody may have changed last, and for two the sink for what
# it has stored last.
_SETTLE_SECONDS: Final = 150.0


def measure(bench: Bench) -> None:
    """Let each process do some work, and then nothing; and look on with nobody there, for the server's own share."""
    with _without_autovacuum(bench.postgres.url):
        _measure(bench)


@contextmanager
def _without_autovacuum(url: str) -> Iterator[None]:
    """Keep the server from writing WAL of its own accord."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("alter system set autovacuum = off")
        connection.execute("select pg_reload_conf()")
        try:
            yield
        finally:
            connection.execute("alter system reset autovacuum")
            connection.execute("select pg_reload_conf()")


def _measure(bench: Bench) -> None:
    seconds = bench.sizes.idle_seconds
    with bench.arena() as place:
        place.load(_ROWS)
        bench.add(PART, NOBODY, _look_on(place, seconds))
    for reader in READERS:
        if bench.takes_part(reader.name):
            with bench.arena() as place:
                place.load(_ROWS)
                bench.add(PART, reader.name, figures_of(place, reader.start, seconds))
    with bench.arena() as place:
        place.load(_ROWS)
        bench.add(PART, f"{OUR_SINK.name}, sink", figures_of(place, OUR_SINK.start, seconds, after=OUR_READER.start))


def figures_of(place: Arena, start: Start, seconds: float, *, after: Start | None = None) -> dict[str, float]:
    """Let a process have worked, and measure it while there is nothing to do; `after` is one that worked before it."""
    admin = place.kafka.admin()
    with ExitStack() as stack:
        if after is not None:
            before = after(place)
            stack.callback(before.stop)
            eventually(lambda: messages_in(admin, place.topic) == _ROWS.count, within=60, what="every row published")
            before.stop()
        process = start(place)
        stack.callback(process.stop)
        done = f"select count(*) from {HISTORY}"
        eventually(
            lambda: (messages_in(admin, place.topic) if after is None else place.ask(done)) == _ROWS.count,
            within=120,
            what="every row",
        )
        return _look_on(place, seconds, Meter([process]))


def _look_on(place: Arena, seconds: float, meter: Meter | None = None) -> dict[str, float]:
    """Look on from another database, so that nothing of the looking is counted."""
    with psycopg.connect(place.database.server.url, autocommit=True) as connection:

        def state() -> tuple[float, int, int, float]:
            record = connection.execute(
                "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,"
                " (select coalesce(sum(s.calls), 0)::bigint from pg_stat_statements as s"
                "   join pg_database as d on d.oid = s.dbid where d.datname = %s)",
                [place.database.name],
            ).fetchone()
            assert record is not None
            return time.monotonic(), record[0], record[1], meter.cpu() if meter else 0.0

        time.sleep(_SETTLE_SECONDS)
        began, wal, queries, cpu = state()
        time.sleep(seconds)
        ended, wal_after, queries_after, cpu_after = state()
    minutes = (ended - began) / 60
    figures = {
        "queries a minute": (queries_after - queries) / minutes,
        "WAL kB a minute": (wal_after - wal) / 1024 / minutes,
    }
    return figures if meter is None else {"CPU %": (cpu_after - cpu) / (ended - began) * 100, **figures}
