"""Where one measurement takes place: a fresh database with the connector's schema, a fresh topic, and the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import psycopg
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from connector.demo.embedded import scratch_directory
from tests.services import Database, Kafka, Postgres, Process, environment

PARTITIONS: Final = 6
KEYS: Final = 1_000
OUTBOX: Final = "public.agent_outbox_messages"
HISTORY: Final = "public.chat_histories"

# The broker's own clock says when a message was there: the same for each contender, and nobody has to look on.
_TOPIC: Final = {"message.timestamp.type": "LogAppendTime"}

# Half of a content compresses, as text does; that it comes again after so many rows is too long ago for lz4.
_CONTENTS: Final = 2_000
_MAKE_CONTENTS: Final = """
create unlogged table if not exists bench_contents_{bytes} (id integer primary key, content text not null);
insert into bench_contents_{bytes}
select n, left(string_agg(md5(n || '-' || i) || ' and then the customer said: ok ', ''), {bytes})
  from generate_series(0, {last}) as n, generate_series(0, {bytes} / 64) as i
 group by n
    on conflict do nothing;
analyze bench_contents_{bytes}
"""
_ROW: Final = (
    f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status, published_at, consumed_at)"
    f" select 'chat_history_persist', %(topic)s, 'chat-' || n %% {KEYS},"
    f" jsonb_build_object('user_id', n, 'chat_id', 'chat-' || n %% {KEYS}, 'role', 'user',"
    f" 'message_content', (select c.content from bench_contents_{{bytes}} as c where c.id = n %% {_CONTENTS})),"
    " %(status)s::text, case when %(status)s::text <> 'pending' then now() end,"
    " case when %(status)s::text = 'consumed' then now() end"
    " from generate_series(%(first)s::bigint, %(last)s::bigint) as n"
)


class Running(Protocol):
    """A process at work."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def kill(self) -> None:
        """End it with SIGKILL; nothing if it has ended."""

    def stop(self) -> object:
        """Ask it to end, and wait."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A backlog: so many rows, so many a transaction, with contents of so many bytes, beside rows that are consumed."""

    count: int
    a_transaction: int = 100
    bytes: int = 380
    already: int = 0


@dataclass(frozen=True, slots=True)
class Arena:
    """A database and a topic of one measurement."""

    database: Database
    kafka: Kafka
    topic: str
    env: Mapping[str, str]
    directory: Path
    looking: psycopg.Connection[Any]
    """What `ask` asks over: a new connection for each look would take a part of the cores from whoever is measured."""

    @property
    def slot(self) -> str:
        """The slot, which is there before the rows."""
        return self.env["CONNECTOR_SLOT_NAME"]

    @property
    def publication(self) -> str:
        """The publication that every contender reads: inserts of pending rows, with a column list."""
        return self.env["CONNECTOR_PUBLICATION_NAME"]

    def load(self, rows: Rows, status: str = "pending") -> None:
        """Write the backlog, and leave the table as autovacuum would."""
        with self.database.connect() as connection:
            connection.execute("set synchronous_commit = off")
            _insert(connection, self.topic, rows, status)
            connection.execute(f"vacuum analyze {OUTBOX}")
            connection.execute("checkpoint")

    def ask(self, query: str) -> Any:
        """Return the only value that a query has for an answer."""
        record = self.looking.execute(query.encode()).fetchone()
        assert record is not None
        return record[0]


@contextmanager
def arena(postgres: Postgres, kafka: Kafka, *, already: Rows | None = None) -> Iterator[Arena]:
    """Make ready a database that holds `already` consumed rows, and then the slot."""
    with (
        postgres.database() as database,
        kafka.topic(PARTITIONS, _TOPIC) as topic,
        scratch_directory() as directory,
        database.connect(prepare_threshold=None) as looking,
    ):
        env = {n: v for n, v in environment(database, kafka, topic).items() if not n.startswith("CONNECTOR_CONSUMER_")}
        # The defaults of the connector are what is measured.
        del env["CONNECTOR_SHUTDOWN_SECONDS"]
        place = Arena(database, kafka, topic, env, directory, looking)
        run("setup", env)
        with database.connect() as connection:
            if already is not None:
                connection.execute(f"select pg_drop_replication_slot('{place.slot}')")
                connection.execute("truncate outbox_connector_slots")
                _insert(connection, topic, already, "consumed")
                connection.execute(f"vacuum analyze {OUTBOX}")
        if already is not None:
            run("setup", env)
        try:
            yield place
        finally:
            Process.end_all()


def run(command: str, env: Mapping[str, str]) -> None:
    """Run a command of the connector to its end."""
    process = Process(command, env=env).start()
    if process.wait() != 0:
        raise RuntimeError(f"`{command}` failed:\n{process.stderr}\n{process.stdout}")


def _insert(connection: psycopg.Connection[Any], topic: str, rows: Rows, status: str) -> None:
    step = rows.a_transaction
    values = {"topic": topic, "status": status}
    statement = _ROW.format(bytes=rows.bytes).encode()
    connection.execute(_MAKE_CONTENTS.format(bytes=rows.bytes, last=_CONTENTS - 1).encode())
    with connection.cursor() as cursor:
        for first in range(1, rows.count + 1, step):
            cursor.execute(statement, {**values, "first": first, "last": min(first + step - 1, rows.count)})


def ends_of(admin: AdminClient, topic: str) -> list[int]:
    """Return the offset behind the last message of each partition of a topic."""
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    ends = admin.list_offsets({TopicPartition(topic, n): latest for n in range(PARTITIONS)})
    found = {partition.partition: end.result(20).offset for partition, end in ends.items()}
    return [found[n] for n in range(PARTITIONS)]


def messages_in(admin: AdminClient, topic: str) -> int:
    """Return how many messages a topic holds."""
    return sum(ends_of(admin, topic))
