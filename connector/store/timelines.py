"""Which cluster a connection leads to, and on which timeline: the promotion of a standby begins a new one."""

from __future__ import annotations

import psycopg

from connector.store.bookkeeping import Connection
from connector.store.queries import Tables


def timeline_of(connection: Connection, tables: Tables) -> str | None:
    """Return cluster and timeline as one text; None on a standby, and where a hosted server does not tell.

    Raises:
        psycopg.Error: the connection broke.
    """
    try:
        record = connection.execute(tables.query("sink", "timeline")).fetchone()
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.InsufficientPrivilege):
        return None
    return None if record is None else record[0]
