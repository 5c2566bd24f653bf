"""The connector's own commands as child processes, configured by their environment and watched from outside."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from connector.demo.embedded import spawn
from connector.errors import ConfigurationError, ConnectorError, ServiceUnavailable

Event = dict[str, Any]

READY_SECONDS: Final = 60.0
_HTTP_SECONDS: Final = 3.0
_ERRORS: Final[Mapping[int, Callable[[str], ConnectorError]]] = {
    69: ServiceUnavailable,
    78: lambda text: ConfigurationError([text]),
}


class Child:
    """`outbox-connector <command>`, with nothing but `environ`; its output goes to a file below `directory`."""

    def __init__(self, command: str, environ: Mapping[str, str], directory: Path) -> None:
        """Start it; returns at once."""
        self.command = command
        self._path = directory / f"{command}.log"
        self._read = 0
        self._port: int | None = None
        self._asked = False
        # It imports what we import, whether we are installed or run from a checkout.
        path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        with self._path.open("wb") as log:
            self._process = spawn(
                [sys.executable, "-P", "-m", "connector", command],
                stdout=log.fileno(),
                env={**environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                cwd=directory,
            )

    def new_events(self) -> list[Event]:
        """Return what it has logged since the last call."""
        with self._path.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        events = []
        for line in whole.splitlines():
            if line.startswith(b"{"):
                with suppress(ValueError):
                    events.append(json.loads(line))
        for event in events:
            if event.get("event") == "http_listening":
                self._port = event["port"]
        return events

    def await_success(self, pause: Callable[[float], None]) -> None:
        """Wait for the end of a command that ends by itself.

        Raises:
            ConnectorError: it failed; the text is its own last line.
        """
        while self._process.poll() is None:
            pause(0.05)
        if self._process.returncode != 0:
            raise _ERRORS.get(self._process.returncode, ConnectorError)(f"{self.command}: {self._last_words()}")

    def await_ready(self, pause: Callable[[float], None]) -> None:
        """Wait until its `/readyz` says so.

        Raises:
            ConnectorError: it has ended, or is not ready in time.
        """
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self.check()
            self.new_events()
            status, body = self._get("/readyz")
            if status == http.client.OK:
                return
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"the {self.command} is not ready after {READY_SECONDS:.0f} s: {body}")
            pause(0.05)

    def check(self) -> None:
        """Do nothing while it runs.

        Raises:
            ConnectorError: it has ended; the text is its own last line.
        """
        if self._process.poll() is not None:
            raise ConnectorError(f"the {self.command} ended with code {self._process.returncode}: {self._last_words()}")

    def metrics(self) -> dict[str, float]:
        """Return its metrics by name, without our prefix and summed over labels; empty if it does not answer."""
        status, body = self._get("/metrics")
        metrics: dict[str, float] = {}
        if status == http.client.OK:
            for family in text_string_to_metric_families(body):
                for sample in family.samples:
                    name = sample.name.removeprefix("outbox_connector_")
                    metrics[name] = metrics.get(name, 0.0) + sample.value
        return metrics

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once: a second one would cut the draining short."""
        if not self._asked and self._process.poll() is None:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def stop(self, within: float) -> int:
        """Ask it to stop and return its exit code, which is that of a kill if it takes longer than so many seconds."""
        self.ask_to_stop()
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _get(self, page: str) -> tuple[int, str]:
        if self._port is None:
            return 0, "it does not listen yet"
        # Not urllib, which would ask a proxy that the environment names.
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_HTTP_SECONDS)
        try:
            connection.request("GET", page)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()

    def _last_words(self) -> str:
        """Return what it said last: an error for people, a logged one, or the end of a traceback."""
        lines = [line for line in self._path.read_text("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        try:
            event = json.loads(last)
        except ValueError:
            return last.removeprefix("outbox-connector: ")
        return str(event.get("error") or event.get("exception") or last).strip().splitlines()[-1]
