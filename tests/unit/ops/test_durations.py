"""Lengths of time as people type them."""

from __future__ import annotations

import argparse

import pytest

from connector.ops.durations import seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90.0),
        ("10m", 600.0),
        ("2h", 7_200.0),
        ("7d", 604_800.0),
        ("2w", 1_209_600.0),
        ("0.5s", 0.5),
        ("0s", 0.0),
        ("1h30m", 5_400.0),
        (" 10m ", 600.0),
    ],
)
def test_a_duration_is_a_number_with_a_unit_or_several(text: str, expected: float) -> None:
    """What people write for a length of time is understood."""
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "10", "m", "-5m", "10 m", "1e3s", "10x", "10M", "inf", "nan", "٣m", "40000d"]
)
def test_anything_else_is_refused(text: str) -> None:
    """A number without a unit is refused too: nobody can tell whether it means seconds or minutes."""
    with pytest.raises(ValueError, match=r"no duration|longer than 100 years"):
        seconds(text)


def test_a_command_line_shows_what_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    """As the type of an option it ends the command with exit code 2 and names the forms that are understood."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--older-than", type=seconds)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--older-than", "soon"])
    assert "like 90s, 10m, 2h, 7d" in capsys.readouterr().err
