"""`redrive`: dead or stuck rows back to pending, after a look at what that would move."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TextIO
from uuid import uuid4

import psycopg

from connector.ops.columns import LONGEST_CELL, LONGEST_ERROR, REASONS, SAMPLES, printable, table
from connector.ops.database import open_database, refusals
from connector.ops.durations import written
from connector.ops.progress import Pace, Progress
from connector.outbox import Status
from connector.store.connections import is_conflict
from connector.store.queries import Tables
from connector.store.redrives import Preview, Redrives, Run, Selection

MOST_AT_ONCE: Final = 500
RATE: Final = 1_000.0
"""Rows a second unless told otherwise: far below what a pipeline carries, so that its own messages keep their pace."""

STUCK_SECONDS: Final = 600.0
"""How long a row is published before it counts as stuck, unless told otherwise."""

_LONGEST_REASON: Final = 250


@dataclass(frozen=True, slots=True)
class RedriveOptions:
    """What `redrive` is told by the settings and the command line; `rate` is in rows a second."""

    database_url: str
    tables: Tables
    start_deadline_seconds: float
    selection: Selection
    redriven_by: str
    reason: str | None
    rate: float


def redrive(options: RedriveOptions, out: TextIO, *, really: bool) -> int:
    """Show what would be moved, and move it if `really`; return how many rows were moved.

    Raises:
        ServiceUnavailable: PostgreSQL did not answer before the start deadline, or went away.
        SetupRequired: a table is missing, or the role lacks a privilege.
    """
    connection = open_database(options.database_url, "outbox-connector redrive", options.start_deadline_seconds)
    moved = 0
    with connection, refusals():
        redrives = Redrives(connection, options.tables)
        started_at = redrives.clock()
        selection = options.selection
        preview = redrives.preview(selection, started_at, reasons=REASONS, samples=SAMPLES)
        out.writelines(f"{line}\n" for line in as_lines(preview, selection))
        out.writelines(f"{line}\n" for line in left_out(selection, redrives.statuses(selection.ids or ())))
        if not preview.rows:
            return 0
        if not really:
            out.write("\nNothing was changed. With --yes they are put back.\n")
            return 0
        out.flush()
        run = Run(uuid4(), options.redriven_by, options.reason, started_at)
        progress = Progress(out, "put back", preview.rows)
        try:
            for number in _batches(redrives, selection, run, options.rate):
                moved += number
                progress.add(number)
        finally:
            progress.close()
            of = f"{moved:,} of " if moved < preview.rows else ""
            messages = _count(max(moved, preview.rows), selection)
            out.write(f"{of}{messages} put back to pending in {progress.seconds:.1f} s\n")
            out.flush()
    return moved


def _batches(redrives: Redrives, selection: Selection, run: Run, rate: float) -> Iterator[int]:
    pace = Pace(rate, MOST_AT_ONCE)
    after = None
    while True:
        try:
            moved = redrives.move(selection, run, after, pace.batch)
        except psycopg.Error as error:
            if is_conflict(error):
                continue
            raise
        if not moved:
            return
        after = moved[-1]
        yield len(moved)
        pace.keep(len(moved))


def who(pod: str | None) -> str:
    """Return the user of the operating system and where it is: the pod, or else this machine, as `user@machine`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = f"uid {os.getuid()}"
    return f"{user}@{pod or socket.gethostname()}"


# --- what is shown ---------------------------------------------------------------------------------------------------


def as_lines(preview: Preview, selection: Selection) -> Iterator[str]:
    """Tell what a selection holds: how many rows, for which reasons, and some of them."""
    if not preview.rows:
        yield f"{_count(0, selection)} selected"
        return
    yield f"{_count(preview.rows, selection)} selected"
    yield ""
    yield f"{'rows':>10}  last error"
    shown = 0
    for reason in preview.reasons:
        shown += reason.rows
        yield f"{reason.rows:>10,}  {printable(reason.error, _LONGEST_REASON) if reason.error else '(none)'}"
    if shown < preview.rows:
        yield f"{preview.rows - shown:>10,}  others"
    yield ""
    yield from table(
        ("id", "biz_type", "key", "retries", "since", "last error"),
        [
            (
                str(row.outbox_id),
                printable(row.biz_type, LONGEST_CELL),
                printable(row.key, LONGEST_CELL),
                str(row.retry_count),
                "?" if row.age is None else written(row.age),
                printable(row.error or "", LONGEST_ERROR),
            )
            for row in preview.samples
        ],
    )
    if preview.rows > len(preview.samples):
        yield f"… and {preview.rows - len(preview.samples):,} more"


def left_out(selection: Selection, statuses: dict[int, str]) -> Iterator[str]:
    """Tell of ids that were asked for and cannot be put back."""
    for outbox_id in selection.ids or ():
        status = statuses.get(outbox_id)
        if status is None:
            yield f"#{outbox_id}: there is no such row"
        elif status == Status.CONSUMED:
            yield f"#{outbox_id} is consumed: it is stored, and stays so"
        elif status != selection.status:
            stuck = ", unless it is stuck: see --stuck" if status == Status.PUBLISHED else ""
            yield f"#{outbox_id} is {status}: it is left alone{stuck}"


def _count(rows: int, selection: Selection) -> str:
    kind = "dead" if selection.status == Status.DEAD else "stuck"
    return f"{rows:,} {kind} message{'' if rows == 1 else 's'}"
