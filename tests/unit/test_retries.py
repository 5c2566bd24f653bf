"""When the reader looks at the table: clocks and hints only."""

from __future__ import annotations

import math
from itertools import pairwise

from connector.retries import Agenda


def test_a_hint_during_a_look_is_not_forgotten() -> None:
    """The look may have read the table before what was hinted was there."""
    agenda = agenda_at_rest()
    agenda.looking()
    agenda.hint(100.0, 2.0)
    agenda.looked(100.01, None)
    assert agenda.look_at() <= 102.0


def test_a_look_that_failed_is_still_due() -> None:
    """The database may be back in a moment."""
    agenda = agenda_at_rest()
    agenda.hint(100.0, 0.0)
    agenda.looking()
    assert agenda.look_at() <= 100.0


def test_what_a_hint_told_of_is_looked_for_again_until_its_commit_must_be_seen() -> None:
    """Its commit is in the stream before other sessions see it; how much before, a synchronous standby decides."""
    agenda = agenda_at_rest()
    agenda.hint(100.0, 0.0)
    looks = look_until_at_rest(agenda)
    assert looks[0] == 100.0
    assert 104.0 < looks[-1] < 107.0
    assert max(later - earlier for earlier, later in pairwise(looks)) <= 1.0
    assert len(looks) < 15


def test_a_row_that_falls_due_later_is_waited_for() -> None:
    """Whether a hint or the table told of it."""
    agenda = agenda_at_rest()
    agenda.hint(100.0, 60.0)
    assert agenda.look_at() == 160.0
    agenda.looking()
    agenda.looked(160.0, 7.0)
    assert agenda.look_at() == 167.0


def agenda_at_rest() -> Agenda:
    """Return one that has looked at a table in which nothing waits."""
    agenda = Agenda(0.0)
    agenda.looking()
    agenda.looked(0.0, None)
    assert agenda.look_at() == math.inf
    return agenda


def look_until_at_rest(agenda: Agenda) -> list[float]:
    """Look whenever it says so, see nothing, and return when that was."""
    looks: list[float] = []
    while (at := agenda.look_at()) < math.inf:
        looks.append(at)
        agenda.looking()
        agenda.looked(at, None)
    return looks
