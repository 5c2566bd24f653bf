"""Rows of history that name no message: those from before the connector, and second copies that somebody has made.

They are walked by their blocks, since no index on history is to be relied on but that on `outbox_id`. Only what is no
older than the first message can be a copy of one; so many of these are remembered at a time, and the messages' rows are
walked beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from connector.store.comparison import Comparison
from connector.store.connections import again_on_conflict

MOST_NAMED: Final = 10_000
"""Copies that are remembered by name; beyond it they are only counted."""

_FEW: Final = 100_000
_BLOCKS: Final = 1_000
_MOST_AT_ONCE: Final = 100_000
_MOST_ALIKE: Final = 5


@dataclass(slots=True)
class WithoutId:
    """What was found; times are in microseconds since 1970."""

    least: int | None = None
    """When the oldest row that names a message was made: what is older cannot be another copy of it."""
    block: int = 0
    """The first block of history that is not compared yet."""
    rows: int = 0
    newest: int | None = None
    copies: dict[int, int] = field(default_factory=dict)
    """By its outbox id, a message that one of them holds again, with that one's id."""
    more_copies: int = 0
    alike: list[tuple[int, int]] = field(default_factory=list)
    """A few that have the content of a message, at another time: their ids, and the messages'."""
    more_alike: int = 0
    left_out: bool = False
    """They were too many to be looked at for the sake of a few messages."""

    def compare(
        self,
        comparison: Comparison,
        ranges: Callable[[], Iterator[tuple[int, int]]],
        step: Callable[[int], None],
        *,
        all_messages: bool,
    ) -> None:
        """Go on from where it is to the end of history.

        `ranges` gives those of the messages, each by the id before it and its last one; `step` is told of rows read.
        """
        few, blocks = comparison.rows_without_id(_FEW)
        if few == _FEW and not all_messages:
            self.left_out = True
            return
        # A few are found by the index on outbox_id, whatever the size of history.
        length = _BLOCKS if few == _FEW else max(1, blocks)
        while few and self.block < blocks:
            rows, newest, contents = self.rows, self.newest, dict[int, list[tuple[int, int]]]()
            remembered, block = 0, self.block
            while remembered < _MOST_AT_ONCE and block < blocks:
                some = range(block, block + length)
                count, latest = again_on_conflict(comparison.count_without_id, some)
                rows += count
                newest = max((moment for moment in (newest, latest) if moment is not None), default=None)
                if self.least is not None and latest is not None and latest >= self.least:
                    since = self.least / 1_000_000 - 1
                    for content in again_on_conflict(comparison.content_without_id, some, since):
                        contents.setdefault(content.hashed, []).append((content.created, content.number))
                        remembered += 1
                block = some.stop
                step(count)
            if contents:
                self._look_for(contents, comparison, ranges, step)
            self.rows, self.newest, self.block = rows, newest, block

    def _look_for(
        self,
        contents: dict[int, list[tuple[int, int]]],
        comparison: Comparison,
        ranges: Callable[[], Iterator[tuple[int, int]]],
        step: Callable[[int], None],
    ) -> None:
        for after, through in ranges():
            stored = again_on_conflict(comparison.content_of_range, after, through)
            for content in stored:
                for created, place in contents.get(content.hashed, ()):
                    if created == content.created:
                        self._copy(content.number, place)
                    elif len(self.alike) < _MOST_ALIKE:
                        self.alike.append((place, content.number))
                    else:
                        self.more_alike += 1
            step(len(stored))

    def _copy(self, outbox_id: int, place: int) -> None:
        if outbox_id in self.copies or len(self.copies) < MOST_NAMED:
            self.copies[outbox_id] = place
        else:
            self.more_copies += 1
