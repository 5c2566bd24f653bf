"""A program as a child process, with a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from connector.demo.embedded import spawn

_STOP_SECONDS: Final = 20.0
_CHECKOUT: Final = Path(__file__).parents[2]


class Child:
    """Dies with the thread that started it."""

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path, env: Mapping[str, str]) -> None:
        self._name = name
        self._command = command
        self._folder = folder
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_module(cls, name: str, module: str, *arguments: str, folder: Path, env: Mapping[str, str]) -> Self:
        """Make one of a module of this checkout, in our own interpreter."""
        env = {**env, "PYTHONPATH": str(_CHECKOUT), "PATH": os.environ.get("PATH", os.defpath)}
        return cls(name, [sys.executable, "-m", module, *arguments], folder, env)

    def start(self) -> Self:
        """Start it; returns at once."""
        with self._log.open("ab") as log:
            self._process = spawn(self._command, stdout=log.fileno(), env=self._env, cwd=self._folder)
        return self

    @property
    def _log(self) -> Path:
        return self._folder / f"{self._name.replace(' ', '-').lower()}.log"

    @property
    def pid(self) -> int:
        """Its process id; raises RuntimeError, with the end of its log, if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            log = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{self._name} ended with code {self._process.returncode}:\n{log[-4000:]}")
        return self._process.pid

    def kill(self) -> None:
        """End it with SIGKILL; nothing if it has ended."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
