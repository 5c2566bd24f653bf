"""Lengths of time as people type them: `90s`, `10m`, `2h`, `7d`, `1h30m`."""

from __future__ import annotations

import argparse
import re
from typing import Final

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_LONGEST: Final = 36_500 * _UNITS["d"]
_WRITTEN: Final = ("d", "h", "m")
_PART = r"\d+(?:\.\d+)?[smhdw]"
_DURATION = re.compile(rf"(?:{_PART})+", re.ASCII)


class NotADuration(argparse.ArgumentTypeError, ValueError):
    """A text that names no length of time; argparse shows its message as it is."""


def seconds(text: str) -> float:
    """Return how many seconds a duration is; fit as the `type` of a command's option.

    Raises:
        NotADuration: the text is not one or more numbers with a unit each, or is longer than 100 years.
    """
    compact = text.strip()
    if not _DURATION.fullmatch(compact):
        raise NotADuration(f"{text!r} is no duration: expected a number with a unit, like 90s, 10m, 2h, 7d or 1h30m")
    total = sum(float(part[:-1]) * _UNITS[part[-1]] for part in re.findall(_PART, compact))
    if total > _LONGEST:
        raise NotADuration(f"{text!r} is longer than 100 years")
    return total


def written(duration: float) -> str:
    """Write a number of seconds as people would type it, rounded to a unit of which there are two at least."""
    for unit in _WRITTEN:
        if duration >= 2 * _UNITS[unit]:
            return f"{duration / _UNITS[unit]:.0f}{unit}"
    return f"{duration:.0f}s"
