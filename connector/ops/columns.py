"""Text in columns, as a terminal can show it: safe and short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

LONGEST_CELL: Final = 24
LONGEST_ERROR: Final = 100
REASONS: Final = 10
SAMPLES: Final = 5
"""So many reasons, and messages, are shown of a selection."""


def printable(text: str, longest: int) -> str:
    """Return a text on one line, without what would steer a terminal, at most so long."""
    plain = "".join(letter if letter.isprintable() else "·" for letter in text[: longest + 1])
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines with columns as wide as their widest cell; the last is not padded."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head) - 1)]
    for row in [head, *rows]:
        yield "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
