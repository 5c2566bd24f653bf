"""Failpoints: what the environment may say of them, what they do, and that the documentation knows each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from connector import failpoints
from connector.errors import ConfigurationError
from connector.failpoints import Failpoint, FailpointError, Point, arm, parse, reach
from connector.settings import describe, load_settings

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """No failpoint outlives its test."""
    yield
    failpoints.armed.clear()


def test_failpoints_are_read_with_their_action_and_their_occurrence() -> None:
    """The forms that the module's docstring names, and blanks between them."""
    assert parse("row_read=kill, lsn_recorded=delay:0.5 ,slot_made=raise@3,") == {
        Point.ROW_READ: Failpoint("kill"),
        Point.LSN_RECORDED: Failpoint("delay", 0.5),
        Point.SLOT_MADE: Failpoint("raise", nth=3),
    }
    assert parse("") == {}


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        "row_read",
        "row_read=",
        "row_read=explode",
        "row_read=delay",
        "row_read=kill@0",
        "row_read=kill@x",
    ],
)
def test_an_unknown_failpoint_or_action_is_a_problem_of_the_configuration(text: str) -> None:
    """It is told by its variable, like every other problem."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings({"CONNECTOR_FAILPOINTS": f"row_produced=kill,{text}"}, needs=frozenset())
    assert caught.value.problems[0].startswith("CONNECTOR_FAILPOINTS: entry 2")


def test_failpoints_are_no_setting_for_users() -> None:
    """The variable is known, and not in the table of settings."""
    assert load_settings({}, needs=frozenset()).failpoints == {}
    assert "CONNECTOR_FAILPOINTS" not in {variable for variable, _, _ in describe()}


def test_nothing_happens_at_a_point_that_is_not_armed() -> None:
    """Neither without any failpoint, nor with others."""
    for point in Point:
        reach(point)
    arm({Point.ROW_READ: Failpoint("raise")}, lambda _point, _action: None)
    reach(Point.ROW_PRODUCED)


def test_a_point_raises_each_time_or_the_nth_time_alone() -> None:
    """What happens is told first."""
    told: list[tuple[Point, str]] = []
    arm(
        {Point.ROW_READ: Failpoint("raise"), Point.SLOT_MADE: Failpoint("raise", nth=2)},
        lambda point, action: told.append((point, action)),
    )
    for _ in range(2):
        with pytest.raises(FailpointError):
            reach(Point.ROW_READ)
    reach(Point.SLOT_MADE)
    with pytest.raises(FailpointError):
        reach(Point.SLOT_MADE)
    reach(Point.SLOT_MADE)
    assert told == [(Point.ROW_READ, "raise")] * 2 + [(Point.SLOT_MADE, "raise")]


def test_a_kill_leaves_no_time_for_anything() -> None:
    """The process is gone by SIGKILL before its next statement."""
    code = "arm(parse('row_read=kill'), lambda point, action: None); reach(Point.ROW_READ); print('still here')"
    done = subprocess.run(
        [sys.executable, "-c", f"from connector.failpoints import *; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, "")


def test_the_table_of_crash_points_names_each_failpoint() -> None:
    """ARCHITECTURE.md tells of each what is there and what happens next, and of none that does not exist."""
    text = ARCHITECTURE.read_text("utf-8").partition("## Where it may crash")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]
    assert set(named) == set(Point)
    assert all(cell.strip() for row in rows for cell in row[1:5])
