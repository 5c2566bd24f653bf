"""`redrive`: dead and stuck messages, and dead letters, put back."""

from __future__ import annotations

import argparse
import sys

from connector.cli.argument_types import outbox_id, positive, utf8
from connector.cli.commands import Commands
from connector.cli.composition import BOTH, DATABASE, kafka, operator_settings, tables
from connector.cli.exits import DONE
from connector.ops.durations import seconds


def add(commands: Commands) -> None:
    """Add the command."""
    redrive = commands.add_parser(
        "redrive",
        help="put dead or stuck messages back; shows what it would move unless --yes",
        description="Puts dead rows back to pending, with fresh attempts; the reader publishes them at once. Without"
        " --yes it only shows what it would move. Conditions narrow the selection together.",
        epilog="Durations are written like 90s, 10m, 2h or 7d. Each redrive is recorded in outbox_connector_redrives.",
    )
    which = redrive.add_argument_group("which messages (one at least)")
    which.add_argument("--id", type=outbox_id, action="append", metavar="N", help="this outbox id; may be repeated")
    which.add_argument("--key", type=utf8, metavar="KEY", help="messages of this key")
    which.add_argument("--biz-type", type=utf8, metavar="TYPE", help="messages of this biz_type")
    which.add_argument(
        "--error-like",
        type=utf8,
        metavar="TEXT",
        help="messages with this in their last error, in upper or lower case; %% stands for anything",
    )
    which.add_argument(
        "--older-than",
        type=seconds,
        metavar="DURATION",
        help="messages that are dead, or published, for longer than this (10m with --stuck, unless --id or --all)",
    )
    which.add_argument("--all", action="store_true", help="every dead message, or every published one with --stuck")
    which.add_argument(
        "--stuck", action="store_true", help="rows that are published and were never consumed, instead of dead ones"
    )
    which.add_argument(
        "--dead-letters",
        action="store_true",
        help="values in the dead-letter topic that named no row, back to their own topics; with --key, --error-like and"
        " --older-than",
    )
    how = redrive.add_argument_group("how")
    how.add_argument("--yes", action="store_true", help="do it")
    how.add_argument("--reason", type=utf8, metavar="TEXT", help="why, for the record")
    how.add_argument("--rate", type=positive(float), metavar="N", help="messages a second, at most (1000)")
    redrive.set_defaults(command=_redrive, usage_error=redrive.error)


def _redrive(arguments: argparse.Namespace) -> int:
    from connector.ops.redrive import RATE, STUCK_SECONDS, RedriveOptions, redrive, who
    from connector.outbox import Status
    from connector.store.redrives import Selection

    if arguments.dead_letters:
        return _redrive_letters(arguments)
    conditions = (arguments.id, arguments.key, arguments.biz_type, arguments.error_like, arguments.older_than)
    if not (arguments.all or arguments.stuck or any(condition is not None for condition in conditions)):
        arguments.usage_error(
            "say which messages: --id, --key, --biz-type, --error-like, --older-than, --stuck or --all"
        )
    older_than = arguments.older_than
    if arguments.stuck and older_than is None and not (arguments.id or arguments.all):
        # What was published a moment ago is on its way, not stuck.
        older_than = STUCK_SECONDS
    settings = operator_settings(DATABASE)
    redrive(
        RedriveOptions(
            database_url=settings.database_url,
            tables=tables(settings),
            start_deadline_seconds=settings.start_deadline_seconds,
            selection=Selection(
                status=Status.PUBLISHED if arguments.stuck else Status.DEAD,
                ids=None if arguments.id is None else tuple(dict.fromkeys(arguments.id)),
                key=arguments.key,
                biz_type=arguments.biz_type,
                error_like=arguments.error_like,
                older_than=older_than,
            ),
            redriven_by=who(settings.group_instance_id),
            reason=arguments.reason,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        really=arguments.yes,
    )
    return DONE


def _redrive_letters(arguments: argparse.Namespace) -> int:
    from connector.ops.redrive import RATE, who
    from connector.ops.redrive_letters import LetterOptions, redrive_letters

    if arguments.id or arguments.biz_type is not None or arguments.stuck:
        arguments.usage_error("dead letters name no row: --id, --biz-type and --stuck do not go with --dead-letters")
    settings = operator_settings(BOTH)
    redrive_letters(
        LetterOptions(
            database_url=settings.database_url,
            kafka=kafka(settings),
            tables=tables(settings),
            topics=settings.topics,
            dead_letter_topic=settings.dead_letter_topic,
            start_deadline_seconds=settings.start_deadline_seconds,
            key=arguments.key,
            error_like=arguments.error_like,
            older_than=arguments.older_than,
            redriven_by=who(settings.group_instance_id),
            reason=arguments.reason,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        really=arguments.yes,
    )
    return DONE
