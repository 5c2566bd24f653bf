"""The network between the processes and their services: cut, unplugged, half-open, slow. Nothing is lost by it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit, urlunsplit

import pytest

from connector.replication import ReplicationConnection
from connector.store.connections import connect
from tests.faults.pipeline import Pipeline, PipelineFactory
from tests.integration.scenario import metric, readiness
from tests.services import Database, Kafka, Process, TcpProxy, eventually

# As an operator would set it to hear of a lost peer sooner than within 20 seconds.
WATCHFUL = "keepalives_idle=1&keepalives_interval=1&keepalives_count=2&tcp_user_timeout=3000"

FAULTS: dict[str, tuple[Callable[[TcpProxy], None], bool]] = {
    "cut": (TcpProxy.cut, True),
    "unplugged": (TcpProxy.unplug, True),
    "half-open": (TcpProxy.half_open, False),
    "slow": (lambda proxy: proxy.delay(0.1), False),
}
"""Each with whether the services are out of reach meanwhile, new connections included."""


@pytest.fixture
def through_postgresql(
    database: Database, kafka: Kafka, topic: str, new_pipeline: PipelineFactory
) -> Iterator[tuple[Pipeline, TcpProxy]]:
    """A pipeline that reaches PostgreSQL through a proxy."""
    url = urlsplit(database.url)
    with TcpProxy(url.hostname or "", url.port or 0) as proxy:
        address = f"{url.username}@127.0.0.1:{proxy.port}"
        variables = {"CONNECTOR_DATABASE_URL": urlunsplit(url._replace(netloc=address, query=WATCHFUL))}
        pipeline = new_pipeline(database, kafka, topic, variables)
        yield pipeline, proxy
        Process.end_all()


@pytest.fixture
def through_kafka(
    database: Database, own_kafka: Kafka, own_topic: str, new_pipeline: PipelineFactory
) -> Iterator[tuple[Pipeline, TcpProxy]]:
    """A pipeline that reaches Kafka through a proxy."""
    with own_kafka.proxy() as proxy:
        variables = {
            "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{proxy.port}",
            # How long librdkafka waits for an answer, and for a connection: a minute and 10 s unless it is told.
            "CONNECTOR_KAFKA_SOCKET_TIMEOUT_MS": "4000",
            "CONNECTOR_KAFKA_SOCKET_CONNECTION_SETUP_TIMEOUT_MS": "2000",
        }
        pipeline = new_pipeline(database, own_kafka, own_topic, variables)
        yield pipeline, proxy
        Process.end_all()


def _survive(pipeline: Pipeline, proxy: TcpProxy, fault: str) -> tuple[Process, Process]:
    """Let the fault come and go while rows are enqueued, and prove the outcome."""
    strike, out_of_reach = FAULTS[fault]
    processes = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    strike(proxy)
    pipeline.enqueue()
    if out_of_reach:
        for process in processes:
            eventually(lambda: readiness(process) == 503, within=40, what=f"word of it from {process.name}")  # noqa: B023 - called at once
            assert process.http("/livez").status == 200
        pipeline.enqueue()
        proxy.restore()
    pipeline.enqueue()
    pipeline.prove(within=60)
    for process in processes:
        eventually(lambda: readiness(process) == 200, within=30, what=f"readiness of {process.name}")  # noqa: B023
        assert process.returncode is None
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_network_to_postgresql_may_fail_in_any_way(
    through_postgresql: tuple[Pipeline, TcpProxy], fault: str
) -> None:
    """Both processes say that the database is away, stay alive, and go on by themselves; no retry is spent."""
    _survive(*through_postgresql, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_network_to_kafka_may_fail_in_any_way(through_kafka: tuple[Pipeline, TcpProxy], fault: str) -> None:
    """Both processes say that Kafka is away, stay alive, and go on by themselves; no retry is spent."""
    reader, _ = _survive(*through_kafka, fault)
    assert metric(reader, "publish_failures_total") == 0


@pytest.mark.parametrize("kind", ["ordinary", "replication"])
def test_a_peer_that_is_gone_without_a_word_is_noticed_within_half_a_minute(database: Database, kind: str) -> None:
    """The kernel is told how long to wait, on a connection with something on its way, and on an idle one."""
    with ExitStack() as stack:
        fileno = (
            stack.enter_context(connect(database.url, name="test")).fileno()
            if kind == "ordinary"
            else stack.enter_context(closing(ReplicationConnection.open(database.url))).fileno()
        )
        side = stack.enter_context(socket.socket(fileno=os.dup(fileno)))
        idle = side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        probes = side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        between = side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert side.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert idle + probes * between <= 30
        assert 0 < side.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000


def test_the_url_may_say_how_soon_a_lost_peer_is_noticed(database: Database) -> None:
    """What an operator writes into the URL wins over what the connector would choose."""
    url = f"{database.url}?tcp_user_timeout=4000"
    with connect(url, name="test") as connection, socket.socket(fileno=os.dup(connection.fileno())) as side:
        assert side.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4000
        assert side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10


def _as_another(place: int, bytes_: bytes) -> Callable[[re.Match[bytes]], bytes]:
    return lambda found: found[0][:place] + bytes_ + found[0][place + len(bytes_) :]


# A frame's kind, its positions and time, then an insert: its kind, its relation, a new row of ten columns.
INSERT = rb"w.{24}I.{4}N\x00\x0a"
NONSENSE = {
    "the frame's kind": _as_another(0, b"x"),
    "the message's kind": _as_another(25, b"J"),
    "the relation": _as_another(26, b"\x00\x00\x00\x01"),
    "the row's kind": _as_another(30, b"K"),
    "the number of columns": _as_another(31, b"\x00\x09"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_stream_that_makes_no_sense_stops_the_reader_and_loses_nothing(
    through_postgresql: tuple[Pipeline, TcpProxy], what: str
) -> None:
    """It ends with an error, and confirms no position behind what it could not read; another reader reads that."""
    pipeline, proxy = through_postgresql
    reader = pipeline.start("reader")
    pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    before = pipeline.lsn()
    proxy.tamper(lambda chunk: re.sub(INSERT, NONSENSE[what], chunk, count=1, flags=re.DOTALL))
    pipeline.enqueue()
    assert reader.wait(20) == 1
    assert not pipeline.confirmed_beyond(before)
    proxy.tamper(lambda chunk: chunk)
    pipeline.prove()
