"""Waits for a service that a command needs, up to the start deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psycopg

from connector.errors import ServiceUnavailable
from connector.kafka import KafkaException
from connector.replication import StreamEnded
from connector.store.connections import describe

T = TypeVar("T")


def before(deadline: float, what: str, attempt: Callable[[], T], *, pause: float = 0.5) -> T:
    """Try every `pause` seconds until it works or the deadline, on the monotonic clock, is over.

    Raises:
        ServiceUnavailable: it never worked.
    """
    while True:
        try:
            return attempt()
        except (psycopg.OperationalError, KafkaException, StreamEnded) as error:
            if time.monotonic() > deadline:
                text = describe(error) if isinstance(error, psycopg.Error) else str(error)
                raise ServiceUnavailable(f"{what} stayed away past the start deadline: {text}") from error
            time.sleep(pause)
