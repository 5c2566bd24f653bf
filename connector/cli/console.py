"""`console`: the web page."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from connector.cli.commands import Commands
from connector.cli.composition import BOTH, in_history, process_settings, status_options
from connector.cli.exits import DONE
from connector.cli.signals import stop_on_signals
from connector.errors import ConfigurationError
from connector.observability.logs import get_logger


def add(commands: Commands) -> None:
    """Add the command."""
    console = commands.add_parser(
        "console",
        help="serve a web page that shows the pipeline, finds messages and, with a token, redrives dead ones",
        description="Serves a web page on CONNECTOR_CONSOLE_HOST (127.0.0.1) and CONNECTOR_HTTP_PORT (8080) until"
        " stopped. It is read-only unless CONNECTOR_CONSOLE_TOKEN is set.",
    )
    console.set_defaults(command=_console)


def _console(_: argparse.Namespace) -> int:
    settings = process_settings(BOTH)
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ConfigurationError(
            [f"the console needs {' and '.join(missing)}, not installed here: pip install 'outbox-connector[console]'"]
        )
    from connector.console.server import Console, ConsoleOptions
    from connector.ops.redrive import who

    console = Console(
        ConsoleOptions(
            status=status_options(settings),
            dead_letter_topic=settings.dead_letter_topic,
            stored_types=tuple(in_history()),
            operator=who(settings.group_instance_id),
            host=settings.console_host,
            port=settings.http_port,
            token=settings.console_token,
            shutdown_seconds=settings.shutdown_seconds,
        )
    )
    stop_on_signals(console.stop, settings.shutdown_seconds)
    console.run()
    get_logger("cli").info("stopped")
    return DONE
