"""The processes of a run: started again whenever they end, as an orchestrator would, and measured."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil

from tests.services import Process

# A service stayed away past the start deadline, or somebody has killed it: an orchestrator starts it again.
EXPECTED_ENDS = frozenset({-signal.SIGKILL, 69})
_LAST_WORDS = 6_000


class Supervised:
    """One process, by its name."""

    def __init__(self, name: str, start: Callable[[], Process]) -> None:
        self.name = name
        self._start = start
        self._start_at = 0.0
        self.process: Process | None = None
        self.largest_mb = 0.0
        self.ends: Counter[int] = Counter()
        """How often it ended with which code."""
        self.trouble: list[str] = []
        """Each end that no fault explains: the code, and the last words."""

    def tend(self) -> None:
        """Start it if it is down and its time has come; measure it if it runs."""
        if self.process is not None and (code := self.process.returncode) is not None:
            self.ends[code] += 1
            if code not in EXPECTED_ENDS:
                self.trouble.append(f"{self.name} ended with code {code}:\n{self.process.stderr[-_LAST_WORDS:]}")
            self.process = None
            self._start_at = max(self._start_at, time.monotonic() + 0.2)
        if self.process is None and time.monotonic() >= self._start_at:
            self.process = self._start()
        self.measure()

    def measure(self) -> None:
        """Take note of its resident memory."""
        if self.process is not None:
            with suppress(psutil.Error, OSError):
                self.largest_mb = max(self.largest_mb, self.process.peak_rss_mb)

    def kill(self, down_for: float) -> bool:
        """End it with SIGKILL, and leave it down for so many seconds; tell whether it was there."""
        if self.process is None or self.process.returncode is not None:
            return False
        self._start_at = time.monotonic() + down_for
        self.process.kill()
        self.ends[-signal.SIGKILL] += 1
        self.process = None
        return True

    def freeze(self) -> Callable[[], None] | None:
        """Stop it with SIGSTOP and return what lets it go on; None if it is not there."""
        if self.process is None or self.process.returncode is not None:
            return None
        frozen = self.process
        os.kill(frozen.pid, signal.SIGSTOP)

        def thaw() -> None:
            if frozen.returncode is None:
                os.kill(frozen.pid, signal.SIGCONT)

        return thaw

    def stop(self) -> int | None:
        """End it with SIGTERM and return its exit code; None if it was down."""
        process, self.process = self.process, None
        return None if process is None else process.stop()
