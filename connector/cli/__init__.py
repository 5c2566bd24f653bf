"""The command line: reads the settings, puts the parts together, handles signals, and picks the exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from connector.cli import console, demo, looks, processes, prune, reconcile, redrive, setup
from connector.cli.exits import CONFIGURATION, DONE, FAILED, UNAVAILABLE
from connector.errors import ConfigurationError, ConnectorError, ServiceUnavailable, SetupRequired


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    options = parser().parse_args(arguments)
    if os.getpid() == 1:
        # For a container's first process SIGTERM does nothing until a command has a handler of its own.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = options.command(options)
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"outbox-connector: {problem}\n")
        code = CONFIGURATION
    except SetupRequired as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = CONFIGURATION
    except ServiceUnavailable as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = UNAVAILABLE
    except ConnectorError as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = FAILED
    except KeyboardInterrupt:
        code = FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line; each command is a module of this package."""
    commands_of = argparse.ArgumentParser(
        prog="outbox-connector",
        description="Carries a PostgreSQL outbox to Kafka and from there into chat history.",
        epilog="Every setting is an environment variable CONNECTOR_…; the README lists them.",
    )
    commands = commands_of.add_subparsers(metavar="command", required=True)
    for module in (setup, processes, looks, redrive, prune, reconcile, console, demo):
        module.add(commands)
    return commands_of
