"""Whether a process can do its work (readiness) and whether it still moves at all (liveness)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Watch:
    stuck_after: float
    last_beat: float


class Health:
    """What the parts of a process say about themselves; safe to use from any thread.

    A part is any name. `clock` gives seconds and never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reasons: dict[str, str | None] = {}
        self._watches: dict[str, _Watch] = {}

    def ready(self, part: str, reason_not_ready: str | None = None) -> None:
        """Say that `part` can do its work, or why it cannot."""
        with self._lock:
            self._reasons[part] = reason_not_ready

    def watch(self, part: str, stuck_after: float) -> None:
        """Take `part` for stuck whenever it has not called `beat` for `stuck_after` seconds, from now on."""
        with self._lock:
            self._watches[part] = _Watch(stuck_after, self._clock())

    def beat(self, part: str) -> None:
        """Say that `part` has just moved; does nothing for a part that is not watched."""
        watch = self._watches.get(part)
        if watch is not None:
            watch.last_beat = self._clock()

    def unwatch(self, part: str) -> None:
        """Stop watching `part`, because it has ended as it should."""
        with self._lock:
            self._watches.pop(part, None)

    def readiness(self) -> tuple[bool, dict[str, str]]:
        """Tell whether every part is ready, and each part's `ready` or its reason; without any part it is not."""
        with self._lock:
            reasons = dict(self._reasons)
        if not reasons:
            return False, {"process": "starting"}
        is_ready = all(reason is None for reason in reasons.values())
        return is_ready, {part: "ready" if reason is None else reason for part, reason in reasons.items()}

    def liveness(self) -> tuple[bool, dict[str, str]]:
        """Tell whether no watched part is stuck, and each part's `alive` or since when it has not moved."""
        with self._lock:
            watches = dict(self._watches)
        now = self._clock()
        parts = {}
        is_alive = True
        for part, watch in watches.items():
            silence = now - watch.last_beat
            if silence > watch.stuck_after:
                is_alive = False
                parts[part] = f"has not moved for {silence:.0f} s; at most {watch.stuck_after:g} s are normal"
            else:
                parts[part] = "alive"
        return is_alive, parts
