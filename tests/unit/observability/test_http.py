"""Probes and scrapes are answered, whatever else comes to the port."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from connector.errors import ConfigurationError
from connector.observability import http as module
from connector.observability import logs
from connector.observability.health import Health
from connector.observability.http import HttpServer
from connector.observability.metrics import CONTENT_TYPE, ReaderMetrics


class Service:
    """A server with the health and the metrics that it shows."""

    def __init__(self) -> None:
        self.health = Health()
        self.metrics = ReaderMetrics()
        self.server = HttpServer(0, self.health, self.metrics)

    def get(
        self, path: str, method: str = "GET", host: str = "127.0.0.1"
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request and give status, headers and body."""
        connection = http.client.HTTPConnection(host, self.server.port, timeout=10)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=10)


@pytest.fixture
def service() -> Iterator[Service]:
    """Serve on a free port."""
    running = Service()
    yield running
    running.server.close()


def test_readiness_is_a_status_with_its_reasons(service: Service) -> None:
    """A probe reads the status, a person the reasons."""
    assert service.get("/readyz")[0] == 503
    service.health.ready("database")
    service.health.ready("kafka", "no broker answers")
    status, headers, body = service.get("/readyz")
    assert (status, headers["Content-Type"]) == (503, "application/json")
    assert json.loads(body) == {"ok": False, "parts": {"database": "ready", "kafka": "no broker answers"}}
    service.health.ready("kafka")
    assert service.get("/readyz")[0] == 200


def test_liveness_is_a_status_with_its_reasons(service: Service) -> None:
    """A stuck part turns the probe."""
    assert service.get("/livez")[0] == 200
    service.health.watch("loop", stuck_after=-1)
    status, _, body = service.get("/livez?verbose")
    assert status == 503
    assert "has not moved" in json.loads(body)["parts"]["loop"]


def test_metrics_come_in_prometheus_text_format(service: Service) -> None:
    """With the content type that says so."""
    status, headers, body = service.get("/metrics")
    assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE)
    assert b"outbox_connector_published_total 0.0\n" in body


def test_a_head_request_gets_the_headers_alone(service: Service) -> None:
    """They are those of the page itself."""
    status, headers, body = service.get("/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize("path", ["/", "/metrics/", "/LIVEZ", "/../etc/passwd", "/readyz/x"])
def test_there_are_no_other_pages(service: Service, path: str) -> None:
    """What is not one of the three is not found."""
    assert service.get(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(service: Service, method: str) -> None:
    """Only reading is allowed, and the answer says so."""
    status, headers, _ = service.get("/livez", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_answers_name_no_version_of_anything(service: Service) -> None:
    """Nobody learns from them which Python runs here."""
    assert service.get("/livez")[1]["Server"].strip() == "outbox-connector"


def test_a_reason_shows_no_secret(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that end up as reasons are redacted as those in logs are."""
    monkeypatch.setattr(logs, "_secrets", logs._pattern(["hunter2"]))
    service.health.ready("database", "cannot connect with hunter2")
    assert b"cannot connect with ***" in service.get("/readyz")[2]


def test_a_taken_port_is_a_problem_of_the_setting(service: Service) -> None:
    """The variable is named, and what to do."""
    with pytest.raises(ConfigurationError, match=r"CONNECTOR_HTTP_PORT: port \d+ is taken; set it to a free port"):
        HttpServer(service.server.port, service.health, service.metrics)


def test_a_port_taken_on_one_address_is_taken() -> None:
    """Probes would otherwise reach somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ConfigurationError, match="is taken"):
        HttpServer(other.getsockname()[1], Health(), ReaderMetrics())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_both_families_of_addresses_are_served(service: Service) -> None:
    """Clusters of either kind can probe."""
    assert service.get("/livez", host="::1")[0] == 200


def test_a_closed_server_frees_its_port_and_closes_again(service: Service) -> None:
    """Closing is final, and harmless when repeated."""
    port = service.server.port
    service.server.close()
    service.server.close()
    HttpServer(port, service.health, service.metrics).close()


def test_a_request_without_end_is_refused_at_its_bound(service: Service) -> None:
    """No client makes the process hold more than some kilobytes for it."""
    with service.connect() as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"x" * 20_000)
        assert client.recv(100).startswith(b"HTTP/1.0 431 ")


def test_a_request_that_trickles_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for a request is bounded as a whole, and the connection is then closed."""
    monkeypatch.setattr(module, "_READ_SECONDS", 0.1)
    with service.connect() as client:
        client.sendall(b"GET /livez")
        assert client.recv(100) == b""


def test_garbage_is_answered_and_forgotten(service: Service) -> None:
    """The next probe finds everything as it was."""
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\n\n", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with service.connect() as client:
            client.sendall(garbage)
            with contextlib.suppress(ConnectionError):
                client.shutdown(socket.SHUT_WR)
                while client.recv(1000):
                    pass
    assert service.get("/livez")[0] == 200


def test_connections_beyond_the_bound_are_closed_and_the_bound_recovers(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle connections cost a bounded number of threads, for a bounded time."""
    monkeypatch.setattr(module, "_READ_SECONDS", 30)
    idle = [service.connect() for _ in range(module._MOST_CONNECTIONS)]
    try:
        with service.connect() as one_more:
            assert one_more.recv(1) == b""
    finally:
        for client in idle:
            client.close()
    deadline = time.monotonic() + 10
    status = None
    while status is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            status = service.get("/livez")[0]
    assert status == 200


def test_scrapes_that_wait_for_a_database_leave_the_probes_alone(service: Service) -> None:
    """A hanging query makes the metrics late, never the process dead."""
    entered, answered = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert answered.wait(10)

    service.metrics.on_scrape(hang)
    statuses: list[int] = []
    scrapers = [
        threading.Thread(target=lambda: statuses.append(service.get("/metrics")[0]))
        for _ in range(module._MOST_SCRAPES + 3)
    ]
    for scraper in scrapers:
        scraper.start()
    assert entered.wait(10)
    assert service.get("/livez")[0] == 200
    while len(statuses) < 3:
        assert service.get("/livez")[0] == 200
    answered.set()
    for scraper in scrapers:
        scraper.join()
    assert sorted(statuses) == [200, 200, 503, 503, 503]


def test_a_page_that_fails_is_an_error_and_not_the_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client learns that it failed but not why, and other pages go on."""
    monkeypatch.setattr(service.metrics, "render", lambda: 1 / 0)
    status, _, body = service.get("/metrics")
    assert (status, body) == (500, b"500 Internal Server Error\n")
    assert service.get("/livez")[0] == 200
