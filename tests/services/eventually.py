"""Waiting for a condition with a deadline, in place of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

import pytest

T = TypeVar("T")


def eventually(
    condition: Callable[[], T],
    within: float = 10.0,
    what: str = "the condition",
    ignoring: tuple[type[Exception], ...] = (),
) -> T:
    """Return the first true value of `condition`, polled for `within` seconds; fail the test with its last value.

    Exceptions of the kinds in `ignoring` count as "not yet"; others pass through.
    """
    deadline = time.monotonic() + within
    pause = 0.005
    while True:
        last: object
        try:
            last = value = condition()
            if value:
                return value
        except ignoring as error:
            last = error
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {within:g} s; last value: {last!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def eventually_none(left: Callable[[], Collection[object]], within: float = 10.0, what: str = "the end of it") -> None:
    """Wait until `left` gives nothing, polled for `within` seconds; fail the test with what is left."""

    def none_left() -> bool:
        if remaining := left():
            raise _StillThereError(f"{remaining!r:.500}")
        return True

    eventually(none_left, within=within, what=what, ignoring=(_StillThereError,))


class _StillThereError(Exception):
    pass
