"""`demo`: the whole pipeline on this machine."""

from __future__ import annotations

import argparse

from connector.cli.argument_types import positive
from connector.cli.commands import Commands


def add(commands: Commands) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo",
        help="run the whole pipeline on this machine, watch it live, and have it proven",
        description="Starts PostgreSQL and a broker from Python packages, the reader and the sink, and an application"
        " that talks; shows it live, and proves at the end that every message is stored exactly once and in order."
        " Nothing is left behind.",
        epilog="Exit codes: 0 proven, 1 not proven or failed, 130 stopped by Ctrl-C, 69 a service does not answer,"
        " 78 something is not installed or not configured.",
    )
    demo.add_argument("--messages", type=positive(int), default=3000, metavar="N", help="how many (default: 3000)")
    demo.add_argument(
        "--rate", type=positive(float), default=250.0, metavar="N", help="messages a second, at most (default: 250)"
    )
    demo.add_argument(
        "--database",
        metavar="URL",
        help="a real PostgreSQL instead, in a database of its own that is dropped at the end",
    )
    demo.add_argument(
        "--kafka", metavar="HOST:PORT", help="a real Kafka instead, with topics of its own that are deleted at the end"
    )
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from connector.demo.run import DemoOptions, run

    return run(DemoOptions(arguments.messages, arguments.rate, arguments.database, arguments.kafka))
