"""How long a failed message waits before its next attempt."""

from __future__ import annotations

LONGEST_SECONDS = 32


def backoff(failures: int) -> int:
    """Return the wait in seconds after the given number of failures: 1, 2, 4, 8, 16, 32, 32 and so on.

    Zero or fewer failures wait 1 second.
    """
    if failures >= LONGEST_SECONDS.bit_length():
        return LONGEST_SECONDS
    return 1 << max(failures - 1, 0)


DELAYS = tuple(backoff(failures) for failures in range(1, 1 + LONGEST_SECONDS.bit_length()))
"""The waits in seconds after the 1st, 2nd, … failure; the last one holds for all that follow."""
