"""Arrays of our own making are what psycopg would have sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.store.arrays import array_of, understand_arrays
from connector.store.connections import connect
from tests.integration.scenario import Connection
from tests.services import Postgres

BIGINTS = st.integers(-(1 << 63), (1 << 63) - 1)
# PostgreSQL holds no text with this character; the server says so.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def connection(postgres: Postgres) -> Iterator[Connection]:
    """A connection that understands them."""
    with connect(postgres.url, name="test") as connection:
        understand_arrays(connection)
        yield connection


@settings(max_examples=200)
@given(st.lists(st.none() | BIGINTS))
def test_bigints_arrive_as_they_were(connection: Connection, values: list[int | None]) -> None:
    """With nulls, and none at all."""
    assert sent(connection, "bigint", values) == values


@settings(max_examples=200)
@given(st.lists(st.none() | TEXTS))
def test_texts_arrive_as_they_were(connection: Connection, values: list[str | None]) -> None:
    """Of every plane of Unicode, with quotes, braces and the word NULL."""
    assert sent(connection, "text", values) == values


@pytest.mark.parametrize(("type_", "values"), [("bigint", [1, 2]), ("text", ["a", "b"])])
def test_usual_values_are_not_left_to_psycopg(type_: str, values: list[object]) -> None:
    """Or nothing here would be tested."""
    assert isinstance(array_of(type_, values), bytes)


@pytest.mark.parametrize(
    ("type_", "values"),
    [("bigint", [1 << 63]), ("bigint", [True]), ("bigint", ["1"]), ("text", ["\ud800"]), ("text", [1]), ("date", [1])],
)
def test_what_does_not_fit_is_left_to_psycopg(type_: str, values: list[object]) -> None:
    """It, or the server, says what is wrong with it."""
    assert array_of(type_, values) == values


def test_a_text_with_a_nul_character_is_refused(connection: Connection) -> None:
    """As a fault of its row, not of the connection."""
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        sent(connection, "text", ["a\0b"])
    assert sent(connection, "text", ["c"]) == ["c"]


def sent(connection: Connection, type_: str, values: Sequence[object]) -> object:
    """Return what the server makes of an array."""
    ((answer,),) = connection.execute(f"select %b::{type_}[]", [array_of(type_, values)]).fetchall()
    return answer
