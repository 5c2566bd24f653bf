"""Turns a signal into an exception at the next pause, so that nothing is cut off half-way: no start, no clean-up."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Final, Self

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAP: Final = 0.05


class Interrupted(BaseException):
    """A signal asked for the end; `code` is the exit code a shell would show, 130 for Ctrl-C."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(signal.Signals(number).name)


class Interruption:
    """Takes SIGINT, SIGTERM and SIGHUP over while it is entered; only `pause` raises because of them."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back; after one has come, another changes nothing any more."""
        for number, handler in self._before.items():
            signal.signal(number, handler if self._asked is None else signal.SIG_IGN)  # type: ignore[arg-type]

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Interrupted: a signal has come, before or meanwhile.
        """
        until = time.monotonic() + seconds
        # A flag and short naps: a lock or a condition would not be safe to use from a signal handler.
        while True:
            if self._asked is not None:
                raise Interrupted(self._asked)
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _NAP))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._asked = self._asked or number
