"""Serves `/livez`, `/readyz` and `/metrics` to whoever watches the process, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from connector.errors import ConfigurationError
from connector.observability.health import Health
from connector.observability.logs import get_logger, redact
from connector.observability.metrics import CONTENT_TYPE, Metrics

_LONGEST_HEAD = 16 << 10
_READ_SECONDS = 5.0
_MOST_CONNECTIONS = 32
# Rendering may wait for a slow database; scrapes that pile up behind it must leave room for the probes.
_MOST_SCRAPES = 2

_log = get_logger("http")


class HttpServer:
    """The three pages on `port` of all addresses, served from daemon threads until `close`.

    `port` 0 takes a free one; the attribute `port` tells which it is. Raises ConfigurationError if it cannot be taken.
    """

    def __init__(self, port: int, health: Health, metrics: Metrics) -> None:
        self._server = _listen(port, health, metrics)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="http", daemon=True)
        self._thread.start()
        _log.info("http_listening", port=self.port)

    def close(self) -> None:
        """Stop listening; answers under way are not waited for. Further calls do nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _listen(port: int, health: Health, metrics: Metrics) -> _Server:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return _DualStackServer(port, health, metrics)
        # Without IPv6, or to learn from the plainer attempt why it failed.
        return _Server(port, health, metrics)
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
    problem = f"CONNECTOR_HTTP_PORT: port {port} {reason}; set it to a free port, or to 0 to take any"
    raise ConfigurationError([problem])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int, health: Health, metrics: Metrics) -> None:
        self.pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]] = {
            "/livez": lambda: _verdict(*health.liveness()),
            "/readyz": lambda: _verdict(*health.readiness()),
            "/metrics": self._metrics_page,
        }
        self._metrics = metrics
        self._scrapes = threading.BoundedSemaphore(_MOST_SCRAPES)
        self._connections = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer asks the DNS for this host's name here, which can take long and is of no use.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class has it
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as the base class
        if not isinstance(sys.exception(), OSError):
            _log.exception("http_request_failed")

    def _metrics_page(self) -> tuple[HTTPStatus, str, bytes]:
        if not self._scrapes.acquire(blocking=False):
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"earlier scrapes are still waiting\n"
        try:
            return HTTPStatus.OK, CONTENT_TYPE, self._metrics.render()
        finally:
            self._scrapes.release()


class _DualStackServer(_Server):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "outbox-connector"
    sys_version = ""
    timeout = _READ_SECONDS
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain"

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(self._head())

    def _head(self) -> bytes:
        """Read the request's head within bounds of size and of time, however slowly it trickles in."""
        deadline = time.monotonic() + _READ_SECONDS
        head = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head and b"\n\n" not in head:
                self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                chunk = self.connection.recv(4096)
                head += chunk
                if not chunk:
                    break
                if len(head) > _LONGEST_HEAD:
                    self.wfile.write(b"HTTP/1.0 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
                    return b""
            self.connection.settimeout(_READ_SECONDS)
            return head
        return b""

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            status, content_type, body = page()
        except Exception:  # noqa: BLE001 - logged here, and the server goes on
            _log.exception("http_page_failed", page=self.path)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self) -> None:
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the base class looks for these names
    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log no request: probes come every few seconds."""


def _verdict(good: bool, parts: dict[str, str]) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    shown = {part: redact(text) for part, text in parts.items()}
    body = json.dumps({"ok": good, "parts": shown}, indent=2) + "\n"
    return status, "application/json", body.encode()
