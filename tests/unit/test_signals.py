"""What ends a process that was asked to stop and does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

_STUCK = """
import ctypes, os, signal
from connector.cli.signals import stop_on_signals
def drain():
    {drain}
stop_on_signals(drain, within=0.0)
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""


@pytest.mark.parametrize(
    ("drain", "told"),
    [
        ("pass", "shutdown_overran"),
        # Unlike CDLL it keeps the interpreter's lock while it calls.
        ("ctypes.PyDLL(None).sleep(600)", "in drain"),
    ],
    ids=["a drain without end", "a library that keeps the interpreter's lock"],
)
def test_a_process_that_does_not_stop_in_its_time_is_ended(drain: str, told: str) -> None:
    """With 1, and with word of what it waits for: no orchestrator has to kill it first."""
    process = subprocess.run(
        [sys.executable, "-c", _STUCK.format(drain=drain)], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 1, process.stderr
    assert told in process.stderr + process.stdout
