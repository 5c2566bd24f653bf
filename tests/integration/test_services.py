"""The services that the other tests stand on."""

from __future__ import annotations

import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest
from confluent_kafka import Consumer, Producer

from tests.services import Database, Kafka, Postgres, TcpProxy, eventually


def _send(kafka: Kafka, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    producer.produce(topic, value, key=b"key")
    assert producer.flush(20) == 0


def _first_value(kafka: Kafka, topic: str) -> bytes:
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": secrets.token_hex(6),
            "auto.offset.reset": "earliest",
            **kafka.consumer_options,
        }
    )
    consumer.subscribe([topic])
    try:
        message = eventually(lambda: consumer.poll(0.2), within=30, what="a message")
        assert message is not None
        assert message.error() is None
        value = message.value()
        assert isinstance(value, bytes)
        return value
    finally:
        consumer.close()


def test_postgresql_is_of_a_supported_version_and_logs_logically(database: Database) -> None:
    """The shared PostgreSQL is 15 to 18 with wal_level logical, and `database` is empty."""
    with database.connect() as connection:
        assert connection.execute("SHOW wal_level").fetchone() == ("logical",)
        assert connection.execute("SELECT current_database()").fetchone() == (database.name,)
        assert connection.execute("SELECT 1 FROM pg_tables WHERE schemaname = 'public'").fetchone() is None
    assert 15 <= database.server.version <= 18


def test_a_database_is_dropped_with_a_slot_that_is_in_use(postgres: Postgres) -> None:
    """A test that leaves a slot behind does not keep its database from being dropped."""
    with postgres.database() as database, database.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('left_behind', 'pgoutput')")
    with psycopg.connect(postgres.url) as connection:
        assert connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database.name]).fetchone() is None


def test_kafka_gives_back_what_was_sent(kafka: Kafka, topic: str) -> None:
    """A message sent to `topic` is read from it."""
    _send(kafka, topic, b"hello")
    assert _first_value(kafka, topic) == b"hello"


def test_an_own_postgresql_survives_a_crash(own_postgres: Postgres) -> None:
    """What was committed is there after an immediate stop and a start, under the same URL."""
    url = own_postgres.url
    with own_postgres.database() as database:
        with database.connect() as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        own_postgres.stop("immediate")
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2)
        own_postgres.start()
        assert own_postgres.url == url
        with database.connect() as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)


def test_an_own_kafka_keeps_its_messages_over_a_kill(durable_own_kafka: Kafka, own_topic: str) -> None:
    """What was acknowledged is there after a SIGKILL and a start, under the same address."""
    servers = durable_own_kafka.bootstrap_servers
    _send(durable_own_kafka, own_topic, b"kept")
    durable_own_kafka.kill()
    durable_own_kafka.start()
    assert durable_own_kafka.bootstrap_servers == servers
    assert _first_value(durable_own_kafka, own_topic) == b"kept"


@pytest.fixture
def echo() -> Iterator[TcpProxy]:
    """A proxy before a server that says again what it hears."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while heard := self.request.recv(1_000):
                    self.request.sendall(heard)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with TcpProxy("127.0.0.1", server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()


def _client(proxy: TcpProxy) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    try:
        client.sendall(b"hello")
    except OSError:
        # A proxy that cuts may be faster than we are.
        client.close()
        raise
    return client


def test_a_proxy_passes_cuts_swallows_delays_and_passes_again(echo: TcpProxy) -> None:
    """What a fault is called is what the two sides see of it."""
    with _client(echo) as client:
        assert client.recv(5) == b"hello"
        echo.delay(0.2)
        began = time.monotonic()
        client.sendall(b"later")
        assert client.recv(5) == b"later"
        assert time.monotonic() - began >= 0.4
        echo.restore()
        echo.black_hole()
        client.sendall(b"kept")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(5)
        client.settimeout(20)
        echo.restore()
        assert client.recv(5) == b"kept"
        echo.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionResetError), _client(echo) as refused:
        refused.recv(1)
    echo.restore()
    with _client(echo) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(5) == b"hello"
        assert client.recv(5) == b""
    eventually(lambda: echo.connections == 0, what="the end of the connection")
