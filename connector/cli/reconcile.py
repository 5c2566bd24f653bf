"""`reconcile`: the proof that outbox, Kafka and history agree."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from connector.cli.argument_types import positive
from connector.cli.commands import Commands
from connector.cli.composition import in_history, kafka, quiet_settings, tables
from connector.cli.exits import DONE, FAILED
from connector.cli.signals import interrupt_on_signals
from connector.ops.durations import seconds


def add(commands: Commands) -> None:
    """Add the command."""
    reconcile = commands.add_parser(
        "reconcile",
        help="prove that outbox, Kafka and history agree; exits 1 and names the messages if they do not",
        description="Compares outbox, Kafka and history, message by message, beside a running pipeline. It only reads,"
        " and takes part in no consumer group.",
    )
    reconcile.add_argument("--since", type=seconds, metavar="2h", help="only what was enqueued since (all)")
    reconcile.add_argument(
        "--stuck-after", type=seconds, default=600.0, metavar="10m", help="how long a message may take (10m)"
    )
    reconcile.add_argument("--json", action="store_true", help="print one JSON object; notes go to stderr")
    reconcile.add_argument(
        "--samples", type=int, default=10, metavar="N", help="damaged messages of a kind to name (10)"
    )
    reconcile.add_argument("--rate", type=positive(float), metavar="N", help="rows a second at most")
    reconcile.add_argument(
        "--state", type=Path, metavar="FILE", help="keep the place in a file: an interrupted run goes on from there"
    )
    reconcile.add_argument(
        "--copies", type=Path, metavar="FILE", help="write what Kafka has of the messages named to a file, to mend from"
    )
    reconcile.set_defaults(command=_reconcile)


def _reconcile(arguments: argparse.Namespace) -> int:
    from connector.ops.reconcile import ReconcileOptions, Reconciliation, as_json, as_lines
    from connector.ops.redrive import who

    settings = quiet_settings()
    options = ReconcileOptions(
        database_url=settings.database_url,
        kafka=kafka(settings),
        tables=tables(settings),
        topics=settings.topics,
        group_id=settings.group_id,
        parsers={biz_type: handler.parse for biz_type, handler in in_history().items()},
        strict=settings.key_ordering == "strict",
        since=arguments.since,
        stuck_after=arguments.stuck_after,
        rate=arguments.rate,
        most_samples=max(0, arguments.samples),
        state=arguments.state,
        copies=arguments.copies,
        start_deadline_seconds=settings.start_deadline_seconds,
        proved_by=who(settings.group_instance_id),
    )
    interrupt_on_signals()
    watched = sys.stderr.isatty()

    def tell(what: str) -> None:
        if watched:
            sys.stderr.write(f"\r\x1b[K{what} …")
            sys.stderr.flush()

    try:
        report = Reconciliation(options, tell).run()
    finally:
        if watched:
            sys.stderr.write("\r\x1b[K")
    print(as_json(report) if arguments.json else "\n".join(as_lines(report)), flush=True)
    if arguments.json:
        sys.stderr.writelines(f"outbox-connector: {note}\n" for note in report.notes)
    return DONE if report.ok else FAILED
