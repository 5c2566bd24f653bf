"""What `prune` does to the size of the outbox over a simulated month, with autovacuum at work.

`python -m tests.simulated_month` starts a PostgreSQL of its own, runs two outboxes side by side for about a minute, one
of them pruned each day, and prints a table; `--svg FILE` draws it too.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from connector.demo.embedded import EmbeddedPostgres, scratch_directory
from connector.ops.prune import PruneOptions, prune
from connector.outbox import Table
from connector.store.queries import Tables
from connector.store.schema import migrate
from tests.services.eventually import eventually

Connection = psycopg.Connection[tuple[Any, ...]]

TABLES: Final = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))
_DAY: Final = 86_400.0
_BATCHES: Final = 10
_OUTBOX: Final = "public.agent_outbox_messages"


class Size(NamedTuple):
    """An outbox at a day's end, in bytes; `rows` as many as it holds."""

    table: int
    indexes: int
    rows: int


def live_a_day(connection: Connection, rows: int, days_ago: int) -> None:
    """Enqueue, publish and store so many messages, a tenth at a time, as if it were so many days ago.

    Each row is updated twice, as it is when its mark comes before the sink has stored it.
    """
    at = f"now() - interval '{days_ago} days'"
    for _ in range(_BATCHES):
        connection.execute(
            f"insert into {_OUTBOX} (biz_type, topic, message_key, payload, created_at, updated_at)"
            " select 'chat_history_persist', 'smartflow.agent.outbox', 'chat-' || n %% 100, jsonb_build_object("
            "        'user_id', n, 'chat_id', 'chat', 'role', 'user', 'message_content', repeat(md5(n::text), 5)),"
            f"       {at}, {at} from generate_series(1, %s) as n",
            [rows // _BATCHES],
        )
        for before, after in (("pending", "published"), ("published", "consumed")):
            connection.execute(
                f"update {_OUTBOX} set status = '{after}', {after}_at = {at}, updated_at = {at}"
                f" where status = '{before}'"
            )


def prune_as_of(url: str, days_ago: int, keep_days: int) -> int:
    """Run `prune` as if it were so many days ago; return how many rows it removed."""
    older_than = (days_ago + keep_days) * _DAY
    options = PruneOptions(url, TABLES, 10.0, older_than, dead=False, rate=1e6)
    return prune(options, io.StringIO(), dry_run=False).consumed


def size_of(connection: Connection) -> Size:
    """Measure the outbox."""
    record = connection.execute(
        f"select pg_table_size('{_OUTBOX}'), pg_indexes_size('{_OUTBOX}'), (select count(*) from {_OUTBOX})"
    ).fetchone()
    assert record is not None
    return Size(*record)


def month(url: str, days: int, rows: int, keep_days: int) -> Iterator[tuple[Size, Size]]:
    """Yield, for each day, the sizes of an outbox that is pruned and of one that is not; autovacuum keeps up."""
    with psycopg.connect(url, autocommit=True) as server:
        for name in ("pruned", "kept"):
            server.execute(f"create database {name}")
    base = url.rpartition("/")[0]
    with (
        psycopg.connect(f"{base}/pruned", autocommit=True) as pruned,
        psycopg.connect(f"{base}/kept", autocommit=True) as kept,
    ):
        for connection in (pruned, kept):
            migrate(connection, TABLES)
        for days_ago in reversed(range(days)):
            for connection in (pruned, kept):
                live_a_day(connection, rows, days_ago)
            prune_as_of(f"{base}/pruned", days_ago, keep_days)
            for connection in (pruned, kept):
                await_autovacuum(connection)
            yield size_of(pruned), size_of(kept)


def await_autovacuum(connection: Connection) -> None:
    """Wait until autovacuum has gone over what is dead now."""
    dead = f"select n_dead_tup from pg_stat_user_tables where relid = '{_OUTBOX}'::regclass"

    def is_clean() -> bool:
        record = connection.execute(dead).fetchone()
        rows = connection.execute(f"select reltuples from pg_class where oid = '{_OUTBOX}'::regclass").fetchone()
        assert record is not None
        assert rows is not None
        # The threshold that the outbox's migration sets.
        return bool(record[0] <= 50 + 0.02 * max(0.0, rows[0]))

    eventually(is_clean, within=30, what="autovacuum")


def as_markdown(days: Sequence[tuple[Size, Size]]) -> Iterator[str]:
    """Yield the table of the guide: every fifth day."""
    yield "| day | rows | table | indexes | rows, never pruned | table | indexes |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for day, (pruned, kept) in enumerate(days, start=1):
        if day % 5 == 0 or day == 1:
            cells = [f"{count:,}" if place % 3 == 2 else _mb(count) for place, count in enumerate([*pruned, *kept])]
            order = (2, 0, 1, 5, 3, 4)
            yield "| " + " | ".join([str(day), *(cells[place] for place in order)]) + " |"


def as_svg(days: Sequence[tuple[Size, Size]]) -> str:
    """Return a chart of table and indexes together, over the days."""
    width, height, left, top = 640, 260, 56, 16
    totals = [(pruned.table + pruned.indexes, kept.table + kept.indexes) for pruned, kept in days]
    most = max(kept for _, kept in totals)

    def line(place: int) -> str:
        step = width / max(1, len(totals) - 1)
        points = [f"{left + n * step:.1f},{top + height * (1 - t[place] / most):.1f}" for n, t in enumerate(totals)]
        return " ".join(points)

    def label(place: int, text: str) -> str:
        y = top + height * (1 - totals[-1][place] / most)
        return f'<text x="{left + width + 8}" y="{y + 4:.0f}">{text}: {_mb(totals[-1][place])}</text>'

    bottom, right, font = top + height, left + width + 190, 'font-family="sans-serif" font-size="13"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + 36}" {font} role="img">',
            "<title>Size of the outbox with its indexes over a simulated month, pruned and never pruned</title>",
            f'<rect width="{right}" height="{bottom + 36}" fill="#ffffff"/>',
            f'<path d="M{left} {top}V{bottom}H{left + width}" fill="none" stroke="#666666"/>',
            f'<polyline points="{line(1)}" fill="none" stroke="#b35900" stroke-width="2" stroke-dasharray="6 4"/>',
            f'<polyline points="{line(0)}" fill="none" stroke="#005a9c" stroke-width="2"/>',
            label(1, "never pruned"),
            label(0, "pruned daily"),
            f'<text x="{left - 6}" y="{top + 5}" text-anchor="end">{most / 1e6:.0f} MB</text>',
            f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>',
            f'<text x="{left}" y="{bottom + 22}">day 1</text>',
            f'<text x="{left + width}" y="{bottom + 22}" text-anchor="end">day {len(totals)}</text>',
            "</svg>\n",
        ]
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def main() -> None:
    """Simulate a month and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rows", type=int, default=10_000, help="messages a day")
    parser.add_argument("--keep-days", type=int, default=7)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    with scratch_directory() as directory:
        postgres = EmbeddedPostgres(directory / "postgres", settings={"autovacuum_naptime": "1s"})
        postgres.start()
        try:
            days = []
            for size in month(postgres.url, arguments.days, arguments.rows, arguments.keep_days):
                days.append(size)
                sys.stderr.write(f"\rday {len(days)}")
            sys.stdout.write("\n" + "\n".join(as_markdown(days)) + "\n")
            if arguments.svg:
                arguments.svg.write_text(as_svg(days), "utf-8")
        finally:
            postgres.stop("immediate")


if __name__ == "__main__":
    main()
