"""The connector's commands as real processes, with their logs and their HTTP answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Self
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from connector.demo.embedded import spawn
from tests.services.kafka import Kafka
from tests.services.nursery import Forked
from tests.services.postgres import Database

_CHECKOUT = Path(__file__).parents[2]
_KEPT_LINES = 20_000


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of a process's HTTP port."""

    status: int
    body: str

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.body)


def environment(database: Database, kafka: Kafka, topic: str) -> dict[str, str]:
    """Return the CONNECTOR_ variables for a pipeline of its own through a database and a topic."""
    name = topic.replace("-", "_")
    options = {name.upper().replace(".", "_"): value for name, value in kafka.consumer_options.items()}
    return {
        **{f"CONNECTOR_CONSUMER_{name}": value for name, value in options.items()},
        "CONNECTOR_DATABASE_URL": database.url,
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "CONNECTOR_TOPICS": topic,
        "CONNECTOR_DEAD_LETTER_TOPIC": f"{topic}.dead",
        "CONNECTOR_SLOT_NAME": f"slot_{name}",
        "CONNECTOR_PUBLICATION_NAME": f"publication_{name}",
        "CONNECTOR_GROUP_ID": f"{topic}-group",
        "CONNECTOR_HTTP_PORT": "0",
        "CONNECTOR_SHUTDOWN_SECONDS": "15",
    }


class Process:
    """`python -m connector <command>` with only the given CONNECTOR_ variables in its environment.

    It runs the code that the tests import, and dies with the thread that started it.
    """

    started: ClassVar[list[Process]] = []
    forked: ClassVar[bool] = False
    """Whether those to come are forked from a process that has the imports of a start behind it.

    Not where they find more to import than we do.
    """

    def __init__(self, command: str, *arguments: str, env: Mapping[str, str]) -> None:
        self.name = " ".join(["connector", command, *arguments])
        self._arguments = [command, *arguments]
        self._env = dict(env)
        self._popen: subprocess.Popen[bytes] | Forked | None = None
        self._changed = threading.Condition()
        self._streams: dict[str, deque[str]] = {n: deque(maxlen=_KEPT_LINES) for n in ("stdout", "stderr")}
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT_LINES)
        self._pumps: list[threading.Thread] = []

    def start(self) -> Self:
        """Start it; returns at once."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        env = {**kept, "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(_CHECKOUT), **self._env}
        self._popen = (
            Forked(self._arguments, env=env, cwd=Path("/"))
            if Process.forked and "PYTHONPATH" not in self._env
            else spawn(
                [sys.executable, "-m", "connector", *self._arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                cwd=Path("/"),
            )
        )
        for name, stream in (("stdout", self._popen.stdout), ("stderr", self._popen.stderr)):
            if stream is not None:
                pump = threading.Thread(target=self._pump, args=(name, stream), daemon=True)
                pump.start()
                self._pumps.append(pump)
        Process.started.append(self)
        return self

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal, None while it runs."""
        return self._running().poll()

    @property
    def rss_mb(self) -> float:
        """Its resident memory, in MiB."""
        return int(psutil.Process(self.pid).memory_info().rss) / 2**20

    @property
    def peak_rss_mb(self) -> float:
        """The most resident memory it ever had, in MiB, as Linux keeps it; elsewhere what it has now."""
        status = Path(f"/proc/{self.pid}/status")
        if not status.exists():
            return self.rss_mb
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        return int(peak[1]) / 1024 if peak else 0.0

    @property
    def cpu_seconds(self) -> float:
        """The processor's time that it has taken so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def stdout(self) -> str:
        """What it printed, the last lines of it; complete once it has ended."""
        return "\n".join(self._streams["stdout"])

    @property
    def stderr(self) -> str:
        """What it logged, the last lines of it; complete once it has ended."""
        return "\n".join(self._streams["stderr"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log lines that are JSON objects, the last of them."""
        with self._changed:
            return list(self._events)

    def wait(self, within: float = 60.0) -> int:
        """Wait for its end and return its exit code; the test fails if it takes longer than `within` seconds."""
        try:
            code = self._running().wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self.name} did not end within {within:g} s")
        for pump in self._pumps:
            pump.join()
        return code

    def stop(self, within: float = 30.0) -> int:
        """Send SIGTERM, wait, and return the exit code; the test fails if it takes longer than `within` seconds."""
        if self.returncode is None:
            self._running().send_signal(signal.SIGTERM)
        return self.wait(within)

    def terminate(self) -> None:
        """Send SIGTERM and return at once; nothing if it has ended."""
        if self.returncode is None:
            self._running().send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL and wait; nothing if it has ended."""
        self._running().kill()
        self._running().wait()
        for pump in self._pumps:
            pump.join()

    def wait_for_log(self, event: str, within: float = 20.0, **fields: Any) -> dict[str, Any]:
        """Return the first log line of that event with those fields, or fail at the deadline or the process's end.

        Lines that came before the call count too.
        """
        deadline = time.monotonic() + within
        with self._changed:
            while True:
                for line in self._events:
                    if line.get("event") == event and fields.items() <= line.items():
                        return line
                ended = not any(pump.is_alive() for pump in self._pumps)
                if ended or not self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
                    if ended:
                        pytest.fail(f"{self.name} ended with code {self.returncode} and never logged {event} {fields}")
                    if time.monotonic() >= deadline:
                        pytest.fail(f"{self.name} did not log {event} {fields} within {within:g} s")

    def http(self, path: str, within: float = 5.0) -> Response:
        """GET a path of its HTTP port, which it logs when it starts; any status is an answer."""
        port = self.wait_for_log("http_listening")["port"]
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=within) as answer:
                return Response(answer.status, answer.read().decode())
        except HTTPError as error:
            with error:
                return Response(error.code, error.read().decode())

    @classmethod
    def end_all(cls) -> None:
        """Kill what a test left running."""
        while cls.started:
            cls.started.pop().kill()

    def _running(self) -> subprocess.Popen[bytes] | Forked:
        if self._popen is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._popen

    def _pump(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in _decoded(stream):
                self._streams[name].append(line)
                if name == "stderr" and line.startswith("{"):
                    self._record(line)
        with self._changed:
            self._changed.notify_all()

    def _record(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()


def _decoded(stream: Iterable[bytes]) -> Iterable[str]:
    return (line.decode("utf-8", "replace").rstrip("\n") for line in stream)
