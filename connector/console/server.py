"""The console's process: a listening socket, uvicorn behind it, and the sampler beside it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from connector.console.app import make_app
from connector.console.questions import Questions
from connector.console.sampler import Sampler
from connector.errors import ConfigurationError
from connector.observability.health import Health
from connector.observability.logs import get_logger
from connector.ops.flow import Flow
from connector.ops.status import StatusOptions

_MOST_CONNECTIONS = 64
_LONGEST_HEAD = 16 << 10

_log = get_logger("console")


@dataclass(frozen=True, slots=True)
class ConsoleOptions:
    """What the console is told by the settings; without a token it is read-only.

    `stored_types` are the values of `biz_type` that are stored in history; `operator` is who redrives, for the record.
    """

    status: StatusOptions
    dead_letter_topic: str
    stored_types: tuple[str, ...]
    operator: str
    host: str
    port: int
    token: str
    shutdown_seconds: float


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the console."""
        yield


class Console:
    """Serves the page until it is stopped."""

    def __init__(self, options: ConsoleOptions) -> None:
        """Take the port.

        Raises:
            ConfigurationError: the address cannot be listened on, or librdkafka refuses an option.
        """
        health = Health()
        status = options.status
        self._flow = Flow(status)
        self._sampler = Sampler(self._flow.look, health)
        questions = Questions(status, options.dead_letter_topic, options.stored_types)
        self._socket = _listen(options.host, options.port)
        app = make_app(
            self._sampler,
            questions,
            health,
            options.token,
            options.operator,
            local_only=_is_loopback(self._socket.getsockname()[0]),
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MOST_CONNECTIONS,
                h11_max_incomplete_event_size=_LONGEST_HEAD,
                timeout_graceful_shutdown=max(1, int(options.shutdown_seconds) - 1),
            )
        )

    def run(self) -> None:
        """Serve until `stop`."""
        host, port = self._socket.getsockname()[:2]
        self._sampler.start()
        _log.info("http_listening", host=host, port=port)
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._sampler.close()
            self._socket.close()

    def stop(self) -> None:
        """End, once the answers under way are given; safe in a signal handler."""
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address, family=family, backlog=_MOST_CONNECTIONS)
    except socket.gaierror as error:
        raise ConfigurationError(
            [f"CONNECTOR_CONSOLE_HOST: {error.strerror}; set it to an address of this machine"]
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigurationError(
                ["CONNECTOR_CONSOLE_HOST: is no address of this machine; set it to 127.0.0.1, or to 0.0.0.0 for all"]
            ) from None
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
        raise ConfigurationError(
            [f"CONNECTOR_HTTP_PORT: port {port} {reason}; set it to a free port, or to 0 to take any"]
        ) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
