"""The connector's processes for tests that are not about how one starts: forked from one that has imported everything.

Half of a start's time, and a fifth of all that the tests compute, are imports.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO
from unittest.mock import patch

_IMPORTED = [
    "connector.cli.processes",
    "connector.handlers.chat_history",
    "connector.observability.http",
    "connector.observability.tracing",
    "connector.ops.proof",
    "connector.ops.setup",
    "connector.reader",
    "connector.sink",
    "connector.store.gauges",
    __name__,
]
_DEATH_SIGNAL = 1

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(_IMPORTED)


class Forked:
    """A command of the connector in a process of its own session, as `subprocess.Popen` would be one.

    It dies with the process that it is forked from, and that one with us.
    """

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        """Start it."""
        stdout, its_stdout = _forking.Pipe(duplex=False)
        stderr, its_stderr = _forking.Pipe(duplex=False)
        self._process = _forking.Process(target=_run, args=(arguments, dict(env), str(cwd), its_stdout, its_stderr))
        # It would import the main module too, which is pytest.
        with patch.dict(vars(sys.modules["__main__"]), {"__file__": None, "__spec__": None}):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdout, self.stderr = _file(stdout), _file(stderr)
        its_stdout.close()
        its_stderr.close()

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it did not.
        """
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL, if it still runs."""
        self.send_signal(signal.SIGKILL)


def _file(end: Connection) -> IO[bytes]:
    with end:
        return os.fdopen(os.dup(end.fileno()), "rb")


def _run(arguments: list[str], env: dict[str, str], cwd: str, stdout: Connection, stderr: Connection) -> None:
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL))
    os.setsid()
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, end in ((1, stdout), (2, stderr)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)

    from connector.cli import main  # noqa: PLC0415 - the tests' own process need not have it

    try:
        main(arguments)
    except Exception as error:  # noqa: BLE001 - as an interpreter ends with whatever nobody has caught
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
