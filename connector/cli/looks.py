"""`doctor` and `status`: what may be wrong, and how it goes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from connector.cli.argument_types import interval
from connector.cli.commands import Commands
from connector.cli.composition import doctor_options, quiet_settings, status_options
from connector.cli.exits import DONE, FAILED, UNAVAILABLE
from connector.cli.signals import interrupt_on_signals

if TYPE_CHECKING:
    from connector.ops.status import StatusOptions


def add(commands: Commands) -> None:
    """Add the two commands."""
    doctor = commands.add_parser("doctor", help="check everything that can be wrong; exits 1 if any check fails")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.set_defaults(command=_doctor)

    status = commands.add_parser("status", help="show backlog, slot and consumer lag")
    status.add_argument("--json", action="store_true", help="print JSON, one object a line")
    status.add_argument("--watch", action="store_true", help="show it again and again until Ctrl-C")
    status.add_argument("--interval", type=interval, default=2.0, metavar="SECONDS", help="between two looks (2)")
    status.set_defaults(command=_status)


def _doctor(arguments: argparse.Namespace) -> int:
    from connector.ops.doctor import examine
    from connector.ops.findings import as_json, as_lines, failed

    findings = examine(doctor_options(quiet_settings()))
    print(as_json(findings) if arguments.json else "\n".join(as_lines(findings)), flush=True)
    return FAILED if failed(findings) else DONE


def _status(arguments: argparse.Namespace) -> int:
    from connector.ops.status import Status, as_json, as_lines

    options = status_options(quiet_settings())
    if arguments.watch:
        return _watch(options, arguments.interval, as_objects=arguments.json)
    snapshot = Status(options).look()
    print(as_json(snapshot) if arguments.json else "\n".join(as_lines(snapshot)), flush=True)
    if arguments.json:
        sys.stderr.writelines(f"outbox-connector: {problem}\n" for problem in snapshot.problems)
    if snapshot.service_away:
        return UNAVAILABLE
    return FAILED if snapshot.problems else DONE


def _watch(options: StatusOptions, interval: float, *, as_objects: bool) -> int:
    from connector.ops.flow import Flow, Look
    from connector.ops.status import as_json
    from connector.ops.terminal import as_picture, as_text, can_be_drawn_on, watch

    flow = Flow(options)
    drawn = not as_objects and can_be_drawn_on(sys.stdout)

    def text_of(look: Look) -> str:
        if as_objects:
            return as_json(look.snapshot)
        return as_picture(look, flow, interval) if drawn else as_text(look)

    interrupt_on_signals()
    try:
        watch(flow.look, text_of, sys.stdout, interval, drawn=drawn)
    except KeyboardInterrupt:
        return DONE
