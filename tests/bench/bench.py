"""What the parts of the bench share: the services, the sizes, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from tests.bench import limits
from tests.bench.arena import KEYS, Arena, Rows, arena
from tests.bench.results import Results
from tests.services import Kafka, Postgres

_SERVER: Final = {
    "shared_preload_libraries": "pg_stat_statements",
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work there is; the rest follows from `rows`."""

    rows: int = 500_000
    steady_seconds: float = 30.0
    warm_up_seconds: float = 10.0
    warm_up_rows: int = 20_000
    idle_seconds: float = 60.0

    @property
    def backlog(self) -> Rows:
        """The backlog that everything is compared on."""
        return Rows(self.rows)

    @property
    def already(self) -> int:
        """Rows that are in a large outbox already: 10,000,000 beside a backlog of 500,000."""
        return self.rows * 20

    @property
    def large(self) -> int:
        """The large backlog: 3,000,000 beside one of 500,000."""
        return self.rows * 6

    @property
    def few(self) -> int:
        """The backlog of payloads of 10 kB."""
        return max(1, self.rows // 10)


@dataclass(frozen=True, slots=True)
class Bench:
    """A run of the bench."""

    postgres: Postgres
    kafka: Kafka
    sizes: Sizes
    results: Results
    say: Callable[[str], None]

    @contextmanager
    def arena(self, *, already: Rows | None = None) -> Iterator[Arena]:
        """Give a fresh database and topic."""
        with arena(self.postgres, self.kafka, already=already) as place:
            yield place

    def warm_up(self) -> None:
        """Use the broker as a backlog does, and as single messages do, and the database as a sink does.

        A JVM that has just started is slow, and so is memory that nobody has used yet: whoever came first would pay.
        """
        with self.arena() as place:
            place.load(self.sizes.backlog, "published")
            limits.store(place, self.sizes.rows)
            limits.produce(place, self._messages(self.sizes.rows))
            limits.pass_one_by_one(place, self._messages(self.sizes.warm_up_rows))

    @staticmethod
    def _messages(count: int) -> Iterator[tuple[bytes, bytes]]:
        return ((b"chat-%d" % (n % KEYS), b"%d and then the customer said: ok " % n * 12) for n in range(count))

    def add(self, part: str, contender: str, figures: Mapping[str, float]) -> None:
        """Take the figures of one run, and tell them."""
        self.results.add(part, contender, figures)
        told = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.say(f"  {part}: {contender}: {told}")

    def takes_part(self, contender: str) -> bool:
        """Tell whether a contender could be had."""
        return contender not in self.results.left_out


def configure(postgres: Postgres) -> None:
    """Give a server of our own the memory of a server, and let it count statements."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        for name, value in _SERVER.items():
            connection.execute(f"alter system set {name} = '{value}'".encode())
    postgres.restart()
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("create extension if not exists pg_stat_statements")
