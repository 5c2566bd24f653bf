"""This connector, with its default settings."""

from __future__ import annotations

from typing import Final

from tests.bench.arena import Arena, Running
from tests.services import Process, eventually

NAME: Final = "outbox-connector"


def start(place: Arena, command: str) -> Running:
    """Start `reader` or `sink`."""
    return Process(command, env=place.env).start()


def start_ready(place: Arena, command: str) -> Running:
    """Start `reader` or `sink`, and wait until it is ready."""
    process = Process(command, env=place.env).start()
    eventually(lambda: process.http("/readyz").status == 200, within=60, what=f"a ready {command}")
    return process


def settle(place: Arena) -> None:
    """Wait until the reader has marked every row."""
    waiting = "select count(*) from (select from public.agent_outbox_messages where status = 'pending' limit 1) as w"
    eventually(lambda: place.ask(waiting) == 0, within=120, what="the last mark")
