"""How fast a counter has been rising lately, and how that went."""

from __future__ import annotations

from collections import deque
from typing import Final

_SPARKS: Final = "▁▂▃▄▅▆▇█"


class Rate:
    """How fast a counter has been rising lately, a second."""

    def __init__(self, over: float = 1.5, kept: int = 28) -> None:
        """Tell the rate over so many seconds, and remember as many rates for `sparkline`."""
        self._over = over
        self._points: deque[tuple[float, int]] = deque()
        self._history: deque[float] = deque(maxlen=kept)

    def add(self, moment: float, count: int) -> float:
        """Note a count at a moment in seconds, and return the rate over the last seconds."""
        if self._points and self._points[-1][0] < moment:
            before, passed = self._points[-1][1], moment - self._points[-1][0]
            self._history.append(max(0.0, (count - before) / passed))
        self._points.append((moment, count))
        while len(self._points) > 2 and self._points[1][0] <= moment - self._over:  # noqa: PLR2004 - two make a rate
            self._points.popleft()
        (then, before), passed = self._points[0], moment - self._points[0][0]
        return max(0.0, (count - before) / passed) if then < moment else 0.0

    @property
    def known(self) -> bool:
        """Whether there were two counts to tell a rate from."""
        return len(self._points) > 1

    def forget(self) -> None:
        """Start anew: the counter could not be read for a while."""
        self._points.clear()

    def sparkline(self) -> str:
        """Return the rates so far as a row of bars."""
        top = max(self._history, default=0.0)
        if top <= 0:
            return ""
        return "".join(_SPARKS[round(rate / top * (len(_SPARKS) - 1))] for rate in self._history)
