"""`setup`: schema, publication, slot and topics."""

from __future__ import annotations

import argparse
import sys

from connector.cli.commands import Commands
from connector.cli.composition import BOTH, process_settings, setup_options
from connector.cli.exits import DONE


def add(commands: Commands) -> None:
    """Add the command."""
    setup = commands.add_parser("setup", help="make schema, publication, slot and topics; safe to run again")
    setup.add_argument("--print-sql", action="store_true", help="print the SQL instead of running it")
    setup.set_defaults(command=_setup)


def _setup(arguments: argparse.Namespace) -> int:
    from connector.ops.setup import print_sql, setup

    if arguments.print_sql:
        sys.stdout.write(print_sql(setup_options(process_settings(frozenset()))) + "\n")
        return DONE
    setup(setup_options(process_settings(BOTH)), lambda line: print(line, flush=True))
    return DONE
