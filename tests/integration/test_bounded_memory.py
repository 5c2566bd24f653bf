"""Memory stays within bounds whatever waits: a huge transaction, a huge backlog, large rows, a long outage under load.

`BIG=1` runs them at full size: 1,000,000 rows each, and ten minutes without Kafka.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from connector.publishing import MOST_BYTES_IN_FLIGHT
from connector.replication import SENDER_TIMEOUT_SECONDS
from tests.integration.scenario import (
    OUTBOX,
    Connection,
    Tap,
    all_published,
    enqueue,
    in_order,
    is_streaming,
    metric,
    one,
    set_up,
)
from tests.services import Database, Kafka, Process, TcpProxy, environment, eventually

BIG = os.environ.get("BIG") == "1"
ROWS = 1_000_000 if BIG else 60_000
OUTAGE_SECONDS = 600
A_SECOND = 1_000
LIMIT_MB = 150
WITHIN = 1_500 if BIG else 120

Start = Callable[..., Process]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * WITHIN + OUTAGE_SECONDS)]


def write(connection: Connection, topic: str, rows: int) -> None:
    """Insert so many messages of about 400 bytes in one transaction, over a thousand conversations."""
    connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload)"
        " select 'chat_history_persist', %s, 'chat-' || n %% 1000, jsonb_build_object('user_id', n, 'chat_id',"
        "        'chat-' || n %% 1000, 'role', 'user', 'message_content', repeat(md5(n::text), 10))"
        "   from generate_series(1, %s) as n",
        [topic, rows],
    )


def settled(connection: Connection, rows: int, *processes: Process) -> None:
    """Wait until every row is consumed and stored, and hold the processes' most memory to the limit."""
    live = f"select 1 from {OUTBOX} where status in ('pending', 'published') limit 1"
    eventually(lambda: one(connection, live) is None, within=WITHIN, what=f"{rows} rows consumed")
    assert one(connection, f"select count(*) from {OUTBOX} where status = 'consumed'") == rows
    assert one(connection, "select count(distinct outbox_id) from chat_histories") == rows
    assert one(connection, "select count(*) from chat_histories") == rows
    peaks = {process.name: process.peak_rss_mb for process in processes}
    print(f"{rows:,} rows; peak MB: {peaks}")  # noqa: T201 - the figures that the docs quote
    assert max(peaks.values()) < LIMIT_MB


def test_a_huge_transaction_stays_small_in_memory(
    database: Database, durable_kafka: Kafka, topic: str, connector: Start, connector_env: dict[str, str]
) -> None:
    """All rows of one transaction go through reader and sink, and neither of them grows with it."""
    set_up(connector_env)
    reader, sink = connector("reader"), connector("sink")
    with database.connect() as connection:
        write(connection, topic, ROWS)
        settled(connection, ROWS, reader, sink)


def test_a_huge_backlog_stays_small_in_memory(
    database: Database, durable_kafka: Kafka, topic: str, connector: Start, connector_env: dict[str, str]
) -> None:
    """A backlog in the table for a reader without its slot, then one in Kafka for a sink that starts late."""
    set_up(connector_env)
    with database.connect() as connection:
        connection.execute("select pg_drop_replication_slot(%s)", [connector_env["CONNECTOR_SLOT_NAME"]])
        write(connection, topic, ROWS)
        reader = connector("reader")
        pending = f"select 1 from {OUTBOX} where status = 'pending' limit 1"
        eventually(lambda: one(connection, pending) is None, within=WITHIN, what="the publishing of the backlog")
        settled(connection, ROWS, reader, connector("sink"))


@pytest.fixture
def proxy(kafka: Kafka) -> Iterator[TcpProxy]:
    """What stands between the reader and Kafka."""
    with kafka.proxy() as proxy:
        yield proxy
        Process.end_all()


LARGE = 1_000_000
LARGE_ROWS = 80


def write_large(connection: Connection, topic: str, due: str = "null", large: str = "payload") -> None:
    """Insert rows of a megabyte each that nothing makes smaller, more than may be in memory, in one transaction.

    What is `large` is their payload or their headers.
    """
    connection.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, next_retry_at, payload, headers)"
        f" select 'chat_history_persist', %s, 'chat-' || n %% 3, {due},"
        "         jsonb_build_object('user_id', n, 'chat_id', 'chat-' || n %% 3, 'message_content',"
        "                            case %s when 'payload' then noise else 'small' end),"
        "         case %s when 'headers' then jsonb_build_object('large', noise) end"
        f"   from (select n, (select string_agg(encode(sha512((n::text || part)::bytea), 'hex'), '')"
        f"                      from generate_series(1, {LARGE // 128}) as part) as noise"
        f"           from generate_series(1, {LARGE_ROWS}) as n) as given",
        [topic, large, large],
    )


@pytest.mark.parametrize("large", ["payload", "headers"])
def test_large_rows_fill_the_pipe_by_their_bytes_and_the_server_is_answered_all_the_while(  # noqa: PLR0917 - fixtures
    database: Database,
    kafka: Kafka,
    topic: str,
    connector: Start,
    connector_env: dict[str, str],
    proxy: TcpProxy,
    large: str,
) -> None:
    """While Kafka says nothing, few bytes are taken from a session that outlives the server's patience; all arrive."""
    set_up(connector_env)
    session = "select pid, backend_start from pg_stat_activity join pg_stat_replication using (pid, backend_start)"
    session += " where pid = (select active_pid from pg_replication_slots where slot_name = %s)"
    slot = connector_env["CONNECTOR_SLOT_NAME"]
    with database.connect() as connection, Tap(kafka, topic) as tap:
        reader = is_streaming(connector("reader", CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{proxy.port}"))
        tap.has(enqueue(connection, topic, "key", 1))
        before = connection.execute(session, [slot]).fetchone()
        assert before is not None
        proxy.black_hole()
        write_large(connection, topic, large=large)
        full = MOST_BYTES_IN_FLIGHT // LARGE
        eventually(lambda: metric(reader, "in_flight_messages") >= full, what="a full pipe")
        until = time.monotonic() + SENDER_TIMEOUT_SECONDS + 2
        while time.monotonic() < until:
            assert metric(reader, "in_flight_messages") <= full + 2
            assert connection.execute(session, [slot]).fetchone() == before
            time.sleep(0.2)
        proxy.restore()
        tap.has(range(1, LARGE_ROWS + 2), within=60)
        all_published(connection)
        assert in_order(tap.sent)
        assert connection.execute(session, [slot]).fetchone() == before
        assert "reader_interrupted" not in reader.stderr
        assert reader.peak_rss_mb < LIMIT_MB


@pytest.mark.parametrize("large", ["payload", "headers"])
@pytest.mark.parametrize("what", ["caught up with", "due"])
def test_large_rows_of_the_table_are_read_as_kafka_takes_them(  # noqa: PLR0917 - fixtures
    database: Database, kafka: Kafka, topic: str, connector: Start, connector_env: dict[str, str], what: str, large: str
) -> None:
    """Also what does not come by the stream stays small in memory."""
    set_up(connector_env)
    with database.connect() as connection, Tap(kafka, topic) as tap:
        if what == "due":
            write_large(connection, topic, "now() - interval '1 minute'", large)
        else:
            connection.execute("select pg_drop_replication_slot(%s)", [connector_env["CONNECTOR_SLOT_NAME"]])
            write_large(connection, topic, large=large)
        reader = connector("reader")
        tap.has(range(1, LARGE_ROWS + 1), within=60)
        all_published(connection)
        assert in_order(tap.sent)
        assert reader.peak_rss_mb < LIMIT_MB


@pytest.mark.skipif(not BIG, reason="takes more than ten minutes; BIG=1 runs it")
def test_an_outage_of_kafka_under_load_stays_small_in_memory(
    database: Database, durable_own_kafka: Kafka, own_topic: str
) -> None:
    """Kafka goes away while messages are written on and on; when it is back, everything arrives."""
    env = environment(database, durable_own_kafka, own_topic)
    set_up(env)
    reader, sink = Process("reader", env=env).start(), Process("sink", env=env).start()
    with database.connect() as connection:
        write(connection, own_topic, A_SECOND)
        settled(connection, A_SECOND, reader, sink)
        durable_own_kafka.stop()
        rows = A_SECOND
        until = time.monotonic() + OUTAGE_SECONDS
        while time.monotonic() < until:
            write(connection, own_topic, A_SECOND)
            rows += A_SECOND
            time.sleep(1)  # the pace of the writes
        durable_own_kafka.start()
        settled(connection, rows, reader, sink)
