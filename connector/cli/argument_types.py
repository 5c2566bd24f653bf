"""What a command takes as an argument: from text to a value, or argparse's usage error."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def interval(text: str) -> float:
    """Read the seconds between two looks, from 0.1 to a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:  # noqa: PLR2004 - a refresh that people can follow; a day
        raise argparse.ArgumentTypeError("expected seconds, from 0.1 to 86400")
    return seconds


def positive(number: type[int | float]) -> Callable[[str], float]:
    """Return what reads a number above 0."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value"
    return parse


def outbox_id(text: str) -> int:
    """Read the id of an outbox row."""
    value = int(text)
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no outbox id")
    return value


outbox_id.__name__ = "outbox id"


def utf8(text: str) -> str:
    """Take text that can be sent to the services."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text
