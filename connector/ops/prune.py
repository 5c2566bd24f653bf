"""`prune`: removes rows that were settled long ago, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TextIO

import psycopg

from connector.ops.database import open_database, refusals
from connector.ops.durations import written
from connector.ops.progress import Pace, Progress
from connector.store.connections import is_conflict
from connector.store.queries import Tables
from connector.store.retention import Retention, Window

MOST_AT_ONCE: Final = 1_000
RATE: Final = 5_000.0
"""Rows a second unless told otherwise: ten milliseconds of work in each second, as measured."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What `prune` is told by the settings and the command line; `older_than` in seconds, `rate` in rows a second."""

    database_url: str
    tables: Tables
    start_deadline_seconds: float
    older_than: float
    dead: bool
    rate: float


class Pruned(NamedTuple):
    """How many rows were removed, or would be."""

    consumed: int
    dead: int


def prune(options: PruneOptions, out: TextIO, *, dry_run: bool) -> Pruned:
    """Remove what is old enough, or only count it; return how much that is.

    Raises:
        ServiceUnavailable: PostgreSQL did not answer before the start deadline, or went away.
        SetupRequired: a table is missing, or the role lacks a privilege.
    """
    consumed = dead = 0
    connection = open_database(options.database_url, "outbox-connector prune", options.start_deadline_seconds)
    with connection, refusals():
        retention = Retention(connection, options.tables, options.older_than, dead=options.dead)
        progress = Progress(out, "rows counted" if dry_run else "rows removed", None)
        try:
            for window in _windows(retention, options.rate, dry_run=dry_run):
                consumed += window.consumed
                dead += window.dead
                progress.add(window.chosen)
        finally:
            progress.close()
            kinds = f"{consumed:,} consumed" + (f" and {dead:,} dead" if options.dead else "")
            done = "would be removed" if dry_run else f"removed in {progress.seconds:.1f} s"
            out.write(f"{kinds} rows older than {written(options.older_than)} {done}\n")
            out.flush()
    return Pruned(consumed, dead)


def _windows(retention: Retention, rate: float, *, dry_run: bool) -> Iterator[Window]:
    """Go through the rows by id until one window shows that all behind it are too young."""
    pace = Pace(None if dry_run else rate, MOST_AT_ONCE)
    step = retention.count if dry_run else retention.remove
    after = None
    while True:
        try:
            window = step(after, pace.batch)
        except psycopg.Error as error:
            if is_conflict(error):
                continue
            raise
        if window.last_id is None:
            return
        yield window
        if window.young and not window.chosen:
            return
        after = window.last_id
        pace.keep(window.chosen)
