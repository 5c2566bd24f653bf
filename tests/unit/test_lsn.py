"""LSNs read and write as PostgreSQL does it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.lsn import format_lsn, parse_lsn


@pytest.mark.parametrize(
    ("text", "lsn"),
    [
        ("0/0", 0),
        ("0/1", 1),
        ("1/0", 1 << 32),
        ("16/B374D848", 0x16B374D848),
        ("FFFFFFFF/FFFFFFFF", (1 << 64) - 1),
    ],
)
def test_an_lsn_reads_and_writes_as_postgresql_prints_it(text: str, lsn: int) -> None:
    """Both directions agree with the text form of pg_lsn, up to its limits."""
    assert parse_lsn(text) == lsn
    assert format_lsn(lsn) == text


def test_lower_case_and_leading_zeros_are_the_same_position() -> None:
    """PostgreSQL accepts both as input, and newer versions print the second half with its zeros."""
    assert parse_lsn("16/b374d848") == parse_lsn("00000016/B374D848") == 0x16B374D848
    assert parse_lsn("0/00000028") == 0x28


@pytest.mark.parametrize(
    "text",
    ["", "/", "0", "0/", "/0", "0/0/0", " 0/0", "0/0\n", "-1/0", "0x1/0", "1_0/0", "G/0", "123456789/0", "0/٣"],
)
def test_text_that_is_no_lsn_is_refused(text: str) -> None:
    """What the pg_lsn type refuses raises ValueError, even where int() would be lenient."""
    with pytest.raises(ValueError, match="is no LSN"):
        parse_lsn(text)


@pytest.mark.parametrize("lsn", [-1, 1 << 64])
def test_a_number_outside_64_bits_is_never_written_as_an_lsn(lsn: int) -> None:
    """A wrong sum raises ValueError, rather than naming a position that looks real."""
    with pytest.raises(ValueError, match="is no LSN"):
        format_lsn(lsn)


@given(st.integers(0, (1 << 64) - 1))
def test_every_lsn_survives_a_round_trip(lsn: int) -> None:
    """Writing and reading an LSN gives the same position."""
    assert parse_lsn(format_lsn(lsn)) == lsn


@given(st.text(max_size=20))
def test_any_text_is_an_lsn_or_a_value_error(text: str) -> None:
    """No text makes parse_lsn fail in another way, nor leave 64 bits."""
    try:
        lsn = parse_lsn(text)
    except ValueError:
        return
    assert 0 <= lsn < 1 << 64
