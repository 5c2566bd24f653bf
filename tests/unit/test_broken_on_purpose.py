"""What is broken on purpose can be: the lines are there, the tests are there, and the table shows them."""

from __future__ import annotations

from tests.broken_on_purpose import BREACHES, CHECKOUT, file_of, table


def test_each_invariant_can_be_broken_in_the_code_as_it_is() -> None:
    """Every line that is to be changed stands there once, and its test exists."""
    assert {breach.invariant for breach in BREACHES} == set(range(1, 10))
    for breach in BREACHES:
        code = (CHECKOUT / breach.file).read_text("utf-8")
        assert code.count(breach.good) == 1, f"its line has changed: {breach.what}"
        assert breach.bad != breach.good
        assert file_of(breach.test).name.startswith("test_")


def test_the_table_of_the_architecture_is_the_one_that_is_run() -> None:
    """ARCHITECTURE.md shows each way to break an invariant, with the test that fails."""
    assert table() in (CHECKOUT / "ARCHITECTURE.md").read_text("utf-8")
