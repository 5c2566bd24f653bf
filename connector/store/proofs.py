"""The last proof of each kind, kept so that whoever looks later can see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psycopg.types.json import Jsonb

from connector.outbox import trim_error
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables

MOST_SAMPLES = 20
"""So many damaged messages of a proof are kept by name."""


class Unproved(NamedTuple):
    """A damaged message, and what is wrong with it."""

    id: int
    why: str


class Verdict(NamedTuple):
    """What a proof has found: in how many seconds, of which messages, how many are damaged, how, and some of them."""

    seconds: float
    covers: str
    damaged: int
    kinds: Mapping[str, int]
    samples: Sequence[Unproved]


class Recorded(NamedTuple):
    """A verdict as it is kept: whose it is (`reconcile` or `sink`), since when (seconds since 1970), and by whom."""

    prover: str
    at: float
    by: str
    seconds: float
    covers: str
    damaged: int
    kinds: Mapping[str, int]
    samples: Sequence[Unproved]


def record_proof(
    connection: Connection, tables: Tables, prover: str, by: str, verdict: Verdict, *, holds: float = 0.0
) -> None:
    """Keep a verdict in place of the last one, unless that is worse, somebody else's, and not yet `holds` seconds old.

    Raises:
        psycopg.Error: the role may not, the schema is older, or the server is a standby.
    """
    connection.execute(
        tables.query("proofs", "record_proof"),
        {
            **verdict._asdict(),
            "outbox": str(tables.outbox),
            "prover": prover,
            "proved_by": by,
            "kinds": Jsonb(dict(verdict.kinds)),
            "samples": Jsonb([[sample.id, trim_error(sample.why)] for sample in verdict.samples[:MOST_SAMPLES]]),
            "holds": holds,
        },
    )


def last_proofs(connection: Connection, tables: Tables) -> list[Recorded]:
    """Return the last proof of each kind, the latest first.

    Raises:
        psycopg.Error: the role may not read them, or the schema is older.
    """
    records = connection.execute(tables.query("proofs", "last_proofs"), {"outbox": str(tables.outbox)})
    return [Recorded._make((*record[:-1], [Unproved(*sample) for sample in record[-1]])) for record in records]
