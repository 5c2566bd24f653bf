"""`prune`: rows of long ago removed."""

from __future__ import annotations

import argparse
import sys

from connector.cli.argument_types import positive
from connector.cli.commands import Commands
from connector.cli.composition import DATABASE, operator_settings, tables
from connector.cli.exits import DONE
from connector.ops.durations import seconds


def add(commands: Commands) -> None:
    """Add the command."""
    prune = commands.add_parser(
        "prune",
        help="remove rows that were consumed long ago",
        description="Removes consumed rows in small batches, beside a running pipeline. History is not touched.",
        epilog="Durations are written like 90s, 10m, 2h or 7d.",
    )
    prune.add_argument(
        "--older-than",
        type=seconds,
        default=seconds("7d"),
        metavar="DURATION",
        help="consumed for longer than this (7d)",
    )
    prune.add_argument("--dead", action="store_true", help="also rows that are dead for longer than that")
    prune.add_argument("--dry-run", action="store_true", help="only count them")
    prune.add_argument("--rate", type=positive(float), metavar="N", help="rows a second, at most (5000)")
    prune.set_defaults(command=_prune)


def _prune(arguments: argparse.Namespace) -> int:
    from connector.ops.prune import RATE, PruneOptions, prune

    settings = operator_settings(DATABASE)
    prune(
        PruneOptions(
            database_url=settings.database_url,
            tables=tables(settings),
            start_deadline_seconds=settings.start_deadline_seconds,
            older_than=arguments.older_than,
            dead=arguments.dead,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        dry_run=arguments.dry_run,
    )
    return DONE
