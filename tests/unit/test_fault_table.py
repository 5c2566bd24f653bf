"""The table of faults: each line names what shows it, and that is there."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "faults.md").read_text("utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
FAULTS = [row for row in ROWS if row[0] not in {"fault", "---"}]


def test_every_fault_has_its_four_cells_and_names_a_test() -> None:
    """Fault, what is seen, outcome, test."""
    assert len(FAULTS) > 30
    for row in FAULTS:
        assert len(row) == 4, row
        assert all(cell.strip() for cell in row)
        assert re.search(r"`test_\w+`", row[3])


def test_every_test_that_the_table_names_exists() -> None:
    """A test that is renamed or removed takes its line along."""
    tests = "".join(path.read_text("utf-8") for path in (CHECKOUT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    assert {name for row in FAULTS for name in re.findall(r"`(test_\w+)`", row[3])} <= defined


def test_every_event_and_metric_that_the_table_names_exists() -> None:
    """What the user is told to see is what the code says."""
    code = "".join(path.read_text("utf-8") for path in (CHECKOUT / "connector").rglob("*.py"))
    named = {name for row in FAULTS for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:\{[^`]*\})?`", row[1])}
    known = set(re.findall(r'"([a-z_]+)"', code))
    known |= {f"{name}_total" for name in known}
    assert named <= known
