"""When the reader has to look at the table: for the next due attempt, and for rows that were overlooked.

There is no fixed polling. The agenda sleeps until the earliest due time it was told of, by a hint in the stream, by a
failure of its own, or by its last look at the table. The sweep is the slow exception, for what no hint announces.
"""

from __future__ import annotations

import math

SWEEP_SECONDS = 30.0
"""How often the sweep looks for rows that an operator changed by hand, or whose mark was lost."""

_LONGEST_HINT = 11  # digits of milliseconds: three years

_SHORTEST_WAIT = 0.05
"""Hints cost nothing to send: however many arrive, the table is looked at no more often than this."""

UNSEEN_SECONDS = 5.0
"""For so long what the stream brings is looked for in the table: it comes with its commit, which other sessions may see
later; where a standby is synchronous, once it has it."""

_LONGEST_UNSEEN_PAUSE = 1.0


class Agenda:
    """The next moments at which to look. All times are seconds on one monotonic clock."""

    def __init__(self, now: float) -> None:
        """Start with a look at once: nobody knows what fell due while no reader ran."""
        self._due = now
        self._sweep = now + SWEEP_SECONDS
        self._earliest = now
        self._hinted = math.inf
        self._hinted_at = -math.inf

    def expect(self, now: float, due_in: float) -> None:
        """Take note that a row falls due in so many seconds."""
        self._hinted = min(self._hinted, now + max(0.0, due_in))

    def hint(self, now: float, due_in: float) -> None:
        """Take note that a row falls due in so many seconds, though the table may not show it yet."""
        self.expect(now, due_in)
        self._hinted_at = now

    def looking(self) -> None:
        """Take note that a look at the table begins: what is hinted from now on, it may not show."""
        self._due = self.look_at()
        self._hinted = math.inf

    def looked(self, now: float, next_due_in: float | None) -> None:
        """Take note of a look at the table, and of what it showed; None when nothing waits."""
        self._earliest = now + _SHORTEST_WAIT
        self._due = math.inf if next_due_in is None else now + next_due_in
        since_hint = now - self._hinted_at
        if since_hint < UNSEEN_SECONDS:
            # It may not show yet what was hinted: once more after as long again.
            self._due = min(self._due, now + min(since_hint, _LONGEST_UNSEEN_PAUSE))

    def swept(self, now: float) -> None:
        """Take note of a sweep."""
        self._sweep = now + SWEEP_SECONDS

    def look_at(self) -> float:
        """Return when to look for due rows next; infinite when nothing is known to wait."""
        return max(min(self._due, self._hinted), self._earliest)

    def sweep_at(self) -> float:
        """Return when to sweep next."""
        return self._sweep


def due_in_seconds(content: bytes) -> float:
    """Read a hint. Any role may send one, so whatever else it holds means: look now."""
    return int(content) / 1000 if len(content) <= _LONGEST_HINT and content.isdigit() else 0.0
