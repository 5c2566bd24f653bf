"""What a signal does to a command."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable

from connector.cli.exits import FAILED
from connector.observability.logs import get_logger


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt, also where it was started in the background, ignoring SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def stop_on_signals(stop: Callable[[], None], within: float) -> None:
    """Let the first signal ask to drain; the second one, or the end of the time in seconds, does not ask."""
    on_signal = _stopper(stop, within)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def _stopper(stop: Callable[[], None], within: float) -> Callable[[int, object], None]:
    """Return a signal handler: the first signal asks to drain, the second one, or the end of the time, does not ask."""

    def give_up() -> None:
        get_logger("cli").error("shutdown_overran", seconds=within)
        os._exit(FAILED)

    asked = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if asked.is_set():
            os._exit(FAILED)
        asked.set()
        # Where a library keeps Python's lock no thread of ours can end us; this one needs none, and exits with 1.
        faulthandler.dump_traceback_later(within + 3.0, exit=True)
        timer = threading.Timer(within + 2.0, give_up)
        timer.daemon = True
        timer.start()
        stop()

    return on_signal
