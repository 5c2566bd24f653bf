"""How an operator's command reaches the database, and what it makes of a refusal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from connector.errors import ConnectorError, ServiceUnavailable, SetupRequired
from connector.ops.awaited import before
from connector.store.bookkeeping import Connection
from connector.store.connections import connect, describe

_UNDEFINED: Final = frozenset({"42P01", "3F000", "42703"})
_FORBIDDEN: Final = "42501"


def open_database(url: str, name: str, deadline_seconds: float) -> Connection:
    """Connect, waiting for the server up to the start deadline; statements may run as long as they need.

    Raises:
        ServiceUnavailable: it did not answer.
    """
    deadline = time.monotonic() + deadline_seconds
    return before(deadline, "PostgreSQL", lambda: connect(url, name=name, statement_seconds=0, prepare=False))


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the database refuses, or its absence, into the error that tells what to do.

    Raises:
        SetupRequired: a table is missing, or the role lacks a privilege.
        ServiceUnavailable: the server went away.
        ConnectorError: it refuses something else.
    """
    try:
        yield
    except psycopg.Error as error:
        text = describe(error)
        if error.sqlstate in _UNDEFINED:
            raise SetupRequired(f"PostgreSQL: {text}: run `outbox-connector setup`") from error
        if error.sqlstate == _FORBIDDEN:
            raise SetupRequired(
                f"PostgreSQL: {text}: run it as a member of the role outbox_operator, or as the tables' owner"
                " (docs/operations.md)"
            ) from error
        if isinstance(error, psycopg.OperationalError):
            raise ServiceUnavailable(f"PostgreSQL: {text}. What was done is done; run it again for the rest") from error
        raise ConnectorError(f"PostgreSQL: {text}") from error
