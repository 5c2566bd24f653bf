"""How far a long command is, and how it keeps to its rate."""

from __future__ import annotations

import io
import time

import pytest

from connector.ops.columns import printable, table
from connector.ops.durations import written
from connector.ops.progress import Pace, Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_that_is_drawn_over_itself() -> None:
    """The last state of it stays, with a line's end."""
    terminal = _Terminal()
    progress = Progress(terminal, "put back", 10)
    progress.add(5)
    progress.close()
    last = terminal.getvalue().rpartition("\r")[2]
    assert last.startswith(f"\x1b[K[{'#' * 15}{'.' * 15}] 5 of 10 put back, ")
    assert last.endswith(" a second\n")


def test_elsewhere_nothing_is_drawn_and_short_work_says_nothing() -> None:
    """A log gets whole lines, one in ten seconds at the most, and no control sequences."""
    log = io.StringIO()
    progress = Progress(log, "put back", 10)
    progress.add(5)
    progress.close()
    assert not log.getvalue()
    progress._shown -= 60
    progress.add(1)
    assert log.getvalue().startswith("6 of 10 put back, ")
    assert log.getvalue().endswith("\n")


@pytest.mark.parametrize(("rate", "batch"), [(None, 500), (0.5, 1), (20.0, 20), (10_000.0, 500)])
def test_a_batch_is_no_larger_than_a_seconds_work(rate: float | None, batch: int) -> None:
    """So that a low rate does not come in jerks."""
    assert Pace(rate, 500).batch == batch


def test_a_pace_waits_as_long_as_its_rate_says_and_without_one_not_at_all() -> None:
    """Counted from the beginning, so that slow work is not slowed further."""
    pace = Pace(100.0, 500)
    began = time.monotonic()
    pace.keep(10)
    pace.keep(10)
    assert time.monotonic() - began >= 0.2
    unbound = Pace(None, 500)
    unbound.keep(10**9)


def test_text_of_others_is_shown_on_one_line_without_what_steers_a_terminal() -> None:
    """Control characters and line ends are dots; what is too long ends in an ellipsis."""
    assert printable("a\x1b[2Jb\nc\u202e", 20) == "a·[2Jb·c·"
    assert printable("x" * 30, 5) == "xxxx…"
    assert list(table(("id", "error"), [("7", "e"), ("4711", "")])) == ["id    error", "7     e", "4711"]


@pytest.mark.parametrize(
    ("duration", "expected"), [(0.4, "0s"), (90, "90s"), (150, "2m"), (7_200, "2h"), (90_000, "25h"), (604_800, "7d")]
)
def test_a_duration_is_written_as_people_would(duration: float, expected: str) -> None:
    """Rounded to the largest unit of which there are two at least."""
    assert written(duration) == expected
