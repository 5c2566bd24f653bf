"""Where the demo runs: on embedded services, or in a database, topics and a group of its own on real ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from connector.demo.embedded import QUICK_GROUP, EmbeddedBroker, EmbeddedPostgres
from connector.errors import ConfigurationError, ServiceUnavailable
from connector.settings import Settings
from connector.store.connections import connect, describe
from connector.store.queries import Tables

Pause = Callable[[float], None]

OLDEST_POSTGRES: Final = 150_000
_CONNECT_SECONDS: Final = 5
_KAFKA_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """A service in use: what people call it, and the variables that lead the connector to it."""

    name: str
    variables: Mapping[str, str]


@contextmanager
def embedded_postgres(directory: Path, pause: Pause) -> Iterator[Service]:
    """Run a PostgreSQL of our own below a directory."""
    server = EmbeddedPostgres(directory, pause=pause)
    try:
        server.start()
        with psycopg.connect(server.url) as connection:
            name = f"embedded PostgreSQL {_version(connection.info.server_version)}"
        yield Service(name, {"CONNECTOR_DATABASE_URL": server.url})
    finally:
        # Its data goes too: nobody waits for its last checkpoint.
        server.stop("immediate")


@contextmanager
def embedded_broker(directory: Path, pause: Pause) -> Iterator[Service]:
    """Run a broker of our own below a directory."""
    broker = EmbeddedBroker(directory, pause=pause)
    try:
        broker.start()
        variables = {
            f"CONNECTOR_CONSUMER_{name.upper().replace('.', '_')}": quick for name, quick in QUICK_GROUP.items()
        }
        variables["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"] = broker.bootstrap_servers
        yield Service("embedded broker", variables)
    finally:
        broker.stop()


def check_postgres(url: str, tables: Tables) -> str:
    """Look whether the server is one that the demo can use, and return what to call it.

    Raises:
        ServiceUnavailable: it cannot be reached.
        ConfigurationError: it is too old, or its `wal_level` is not `logical`.
    """
    with _connect(url) as connection:
        ((version, wal_level),) = connection.execute(tables.query("demo", "server_settings"))
        host = connection.info.host
    if version < OLDEST_POSTGRES:
        raise ConfigurationError([f"--database: PostgreSQL {_version(version)} is too old: 15 to 18 are supported"])
    if wal_level != "logical":
        remedy = "set wal_level = logical in its postgresql.conf and restart it"
        raise ConfigurationError([f"--database: the server's wal_level is {wal_level}: {remedy}"])
    return f"PostgreSQL {_version(version)} on {host}"


@contextmanager
def scratch_database(url: str, name: str, called: str, tables: Tables) -> Iterator[Service]:
    """Make a database on a real server; at the end it goes, with the replication slot of the same name."""
    database = sql.Identifier(name)
    try:
        with _connect(url) as connection:
            connection.execute(tables.query("demo", "create_database", database=database))
    except psycopg.Error as error:
        problem = f"--database: cannot create the database {name}: {describe(error)}"
        raise ConfigurationError([f"{problem}. Use a role with CREATEDB and REPLICATION"]) from error
    try:
        yield Service(called, {"CONNECTOR_DATABASE_URL": make_conninfo(url, dbname=name)})
    finally:
        try:
            with _connect(url) as connection:
                _drop_slot(connection, name, tables)
                connection.execute(tables.query("demo", "drop_database", database=database))
        except (psycopg.Error, ServiceUnavailable) as error:
            text = describe(error) if isinstance(error, psycopg.Error) else str(error)
            _left_behind(f"the database and the slot {name}", text)


def _drop_slot(connection: psycopg.Connection[Any], name: str, tables: Tables) -> None:
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        connection.execute(tables.query("demo", "end_slot_users"), {"slot": name})
        try:
            connection.execute(tables.query("demo", "drop_slot"), {"slot": name})
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def check_kafka(settings: Settings) -> AdminClient:
    """Look whether Kafka answers, and return a client for its clean-up.

    Raises:
        ServiceUnavailable: no broker answers.
        ConfigurationError: librdkafka refuses an option.
    """
    servers = settings.kafka_bootstrap_servers
    try:
        client = AdminClient({**settings.kafka_options, "bootstrap.servers": servers, "log_level": 0})
    except KafkaException as error:
        raise ConfigurationError([f"CONNECTOR_KAFKA_*: librdkafka says: {error.args[0].str()}"]) from None
    try:
        client.list_topics(timeout=_KAFKA_SECONDS)
    except KafkaException as error:
        raise ServiceUnavailable(f"--kafka: no broker answers at {servers}: {error.args[0].str()}") from None
    return client


@contextmanager
def scratch_topics(client: AdminClient, servers: str, name: str) -> Iterator[Service]:
    """Use a real Kafka; at the end the topics whose names begin with `name` go, and the group of that name."""
    try:
        yield Service(f"Kafka on {servers.split(',', maxsplit=1)[0]}", {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": servers})
    finally:
        _delete_topics(client, name)
        _delete_group(client, name)


def _delete_topics(client: AdminClient, name: str) -> None:
    try:
        topics = [topic for topic in client.list_topics(timeout=_KAFKA_SECONDS).topics if topic.startswith(name)]
        for deleted in client.delete_topics(topics, request_timeout=_KAFKA_SECONDS).values() if topics else ():
            deleted.result()
    except KafkaException as error:
        _left_behind(f"the topics {name}*", error.args[0].str())


def _delete_group(client: AdminClient, name: str) -> None:
    """Delete the group, which must have no member: one that was killed stays for its session timeout."""
    deadline = time.monotonic() + _KAFKA_SECONDS
    while True:
        try:
            for deleted in client.delete_consumer_groups([name], request_timeout=_KAFKA_SECONDS).values():
                deleted.result()
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.GROUP_ID_NOT_FOUND:
                return
            if code != KafkaError.NON_EMPTY_GROUP or time.monotonic() > deadline:
                _left_behind(f"the consumer group {name}", error.args[0].str())
                return
            time.sleep(0.2)
        else:
            return


def _connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    # The database that a role is given by default need not exist; the one for such errands nearly always does.
    dbname = conninfo_to_dict(url).get("dbname") or "postgres"
    try:
        return connect(
            make_conninfo(url, dbname=dbname), name="outbox-connector demo", connect_seconds=_CONNECT_SECONDS
        )
    except psycopg.OperationalError as error:
        raise ServiceUnavailable(f"--database: PostgreSQL cannot be reached: {describe(error)}") from None


def _version(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"


def _left_behind(what: str, why: str) -> None:
    sys.stderr.write(f"outbox-connector: {what} could not be removed: {why}. Remove it by hand\n")
