"""Shows how far a long command is, and keeps it within its rate."""

from __future__ import annotations

import time
from typing import Final, TextIO

_BAR: Final = 30
_EVERY_SECONDS: Final = 10.0
_REDRAW_SECONDS: Final = 0.1


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, out: TextIO, what: str, total: int | None) -> None:
        """Show `what` is being done, of a total if that is known."""
        self._out = out
        self._what = what
        self._total = total
        self._terminal = out.isatty()
        self._began = time.monotonic()
        self._shown = self._began
        self.done = 0

    def add(self, number: int) -> None:
        """Count what was done, and show it where it is time to."""
        self.done += number
        now = time.monotonic()
        if now - self._shown >= (_REDRAW_SECONDS if self._terminal else _EVERY_SECONDS):
            self._shown = now
            self._show("\r\x1b[K" if self._terminal else "", "" if self._terminal else "\n")

    def close(self) -> None:
        """Leave the line of the bar."""
        if self._terminal:
            self._show("\r\x1b[K", "\n")

    @property
    def seconds(self) -> float:
        """How long it takes so far."""
        return time.monotonic() - self._began

    def _show(self, before: str, after: str) -> None:
        bar, of = "", ""
        if self._total is not None:
            share = min(1.0, self.done / self._total) if self._total else 1.0
            full = round(share * _BAR)
            bar, of = f"[{'#' * full}{'.' * (_BAR - full)}] " if self._terminal else "", f" of {self._total:,}"
        rate = self.done / max(self.seconds, 0.001)
        self._out.write(f"{before}{bar}{self.done:,}{of} {self._what}, {rate:,.0f} a second{after}")
        self._out.flush()


class Pace:
    """Keeps work at a rate, by pauses; without one it does not pause."""

    def __init__(self, rate: float | None, most: int) -> None:
        """Allow `rate` a second, in batches of at most `most`."""
        self._rate = rate
        self._began = time.monotonic()
        self._done = 0
        # At least a batch a second, so that neither the rate nor the progress comes in jerks.
        self.batch = most if rate is None else max(1, min(most, int(rate)))

    def keep(self, number: int) -> None:
        """Count a batch, and wait until the next one may begin."""
        self._done += number
        if self._rate is not None:
            time.sleep(max(0.0, self._began + self._done / self._rate - time.monotonic()))
