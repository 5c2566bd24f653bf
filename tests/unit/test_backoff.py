"""The waits between attempts are the promised ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.backoff import backoff


@pytest.mark.parametrize(("failures", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 32), (20, 32)])
def test_the_wait_doubles_with_each_failure_up_to_32_seconds(failures: int, seconds: int) -> None:
    """The sequence is 1, 2, 4, 8, 16, 32, and 32 for ever after."""
    assert backoff(failures) == seconds


@pytest.mark.parametrize("failures", [0, -1, -(2**63)])
def test_no_failures_at_all_wait_one_second(failures: int) -> None:
    """Zero and negative counts are treated as the first failure."""
    assert backoff(failures) == 1


@given(st.integers())
def test_no_count_of_failures_leaves_the_bounds_or_shortens_the_wait(failures: int) -> None:
    """Whatever the count, the wait is 1 to 32 seconds and never shorter than for one failure fewer."""
    assert 1 <= backoff(failures - 1) <= backoff(failures) <= 32
