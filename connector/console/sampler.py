"""Looks at the pipeline every few seconds and keeps the last minutes for the charts."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from connector.observability.health import Health
from connector.observability.logs import get_logger
from connector.ops.flow import Look

INTERVAL_SECONDS: Final = 2.0
KEPT_SECONDS: Final = 900
"""How far back the charts go."""

# A look waits for PostgreSQL and then for Kafka, each several times, with time limits of their own.
_STUCK_AFTER_SECONDS: Final = 180.0

_log = get_logger("console")


class Numbered(NamedTuple):
    """A look with its number, which counts up from 1."""

    number: int
    look: Look


class Sampler(threading.Thread):
    """Takes looks until it is closed; a service that is away is part of what is seen."""

    def __init__(self, look: Callable[[], Look], health: Health) -> None:
        """Prepare the thread."""
        super().__init__(name="sampler", daemon=True)
        self._look = look
        self._health = health
        self._looks: deque[Numbered] = deque(maxlen=round(KEPT_SECONDS / INTERVAL_SECONDS))
        self._closed = threading.Event()
        health.ready("console", "has not looked yet")
        health.watch("sampler", _STUCK_AFTER_SECONDS)

    def run(self) -> None:
        """Look again and again."""
        number = 0
        while not self._closed.is_set():
            began = time.monotonic()
            number += 1
            try:
                self._looks.append(Numbered(number, self._look()))
            except Exception:  # noqa: BLE001 - logged, and the next look may succeed
                _log.exception("look_failed")
            self._health.beat("sampler")
            self._health.ready("console")
            self._closed.wait(max(0.0, INTERVAL_SECONDS - (time.monotonic() - began)))

    def close(self) -> None:
        """Take no further look."""
        self._closed.set()

    def since(self, number: int) -> Sequence[Numbered]:
        """Return the looks after the one with this number, those that are kept."""
        looks = tuple(self._looks)
        # A number from the future is that of an earlier process.
        if not looks or number > looks[-1].number:
            return looks
        return [look for look in looks if look.number > number]
