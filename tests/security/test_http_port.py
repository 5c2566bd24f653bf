"""The port of a running process: read-only, and whoever leans on it stops nothing."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from http.client import HTTPConnection

import pytest

from tests.services import Database, Process, eventually

CROWD = 300
MOST_GROWTH_MB = 24


def port_of(process: Process) -> int:
    """Return the port that it has logged."""
    return int(process.wait_for_log("http_listening")["port"])


def status(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    """Send one request and return the status of the answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_a_crowd_that_says_little_or_too_much_stops_neither_work_nor_probes(
    database: Database, topic: str, connector: Callable[..., Process]
) -> None:
    """Hundreds of connections that trickle, and heads without end, cost little memory and pass within seconds."""
    assert connector("setup").wait() == 0
    reader, sink = connector("reader"), connector("sink")
    reader.wait_for_log("streaming")
    eventually(lambda: sink.http("/readyz").status == 200, within=30, what="readiness")
    port, before = port_of(sink), sink.rss_mb
    with contextlib.ExitStack() as stack, database.connect() as app:
        for number in range(CROWD):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with contextlib.suppress(OSError):
                client.sendall(b"GET /livez HTTP/1.1\r\nX: " + (b"x" * 100_000 if number % 3 == 0 else b"x"))
        app.execute(
            "select outbox_enqueue('chat_history_persist', %s, 'c', '{\"user_id\": 1, \"chat_id\": \"c\"}')", [topic]
        )
        eventually(
            lambda: app.execute("select count(*) from chat_histories").fetchall() == [(1,)],
            within=20,
            what="a message through the crowd",
        )
        assert sink.rss_mb < before + MOST_GROWTH_MB
        # The connections are still open on our side: the server has let go of them.
        eventually(
            lambda: status(port, "GET", "/livez") == 200, within=20, what="a probe's answer", ignoring=(OSError,)
        )
    assert sink.stop() == 0
    assert "Traceback" not in sink.stderr


def test_a_running_process_can_be_read_and_nothing_else(connector: Callable[..., Process]) -> None:
    """No method but GET and HEAD, no page but its three, no head beyond its bound."""
    assert connector("setup").wait() == 0
    port = port_of(connector("reader"))
    for path in ("/livez", "/readyz", "/metrics"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert status(port, method, path) == 405
    for path in ("/", "/../../etc/passwd", "/livez/../metrics", "/%2e%2e/", "/debug", "/quit"):
        assert status(port, "GET", path) == 404
    assert status(port, "GET", "/livez", {"X-Large": "x" * 15_000}) == 200
    with contextlib.suppress(ConnectionError):
        assert status(port, "GET", "/livez", {"X-Larger": "x" * 20_000}) == 431
