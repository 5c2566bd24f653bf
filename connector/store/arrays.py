"""Columns of a batch as PostgreSQL's binary arrays, which can be made before the statement that takes them is run.

psycopg makes arrays too, an element at a time and only when a statement is run: while the server waits for it. What is
not as plain as the values here is left to psycopg.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg.types.string import BytesBinaryDumper

_NULL: Final = b"\xff\xff\xff\xff"
# Dimensions, whether there are nulls, the element's type, the number of elements, the index of the first.
_HEAD: Final = struct.Struct(">iiIii")
_length: Final = struct.Struct(">i").pack
_bigint: Final = struct.Struct(">iq").pack


class BigintArray(bytes):
    """A `bigint[]` as it goes over the wire."""


class TextArray(bytes):
    """A `text[]` as it goes over the wire."""


class _BigintArrayDumper(BytesBinaryDumper):
    oid = 1016


class _TextArrayDumper(BytesBinaryDumper):
    oid = 1009


def understand_arrays(connection: psycopg.Connection[Any]) -> None:
    """Let a connection send the arrays of this module; its `client_encoding` must be UTF8."""
    connection.adapters.register_dumper(BigintArray, _BigintArrayDumper)
    connection.adapters.register_dumper(TextArray, _TextArrayDumper)


def array_of(type_: str, values: Sequence[object]) -> bytes | list[object]:
    """Return values as an array of a PostgreSQL type, or as a list for psycopg to make something of."""
    make = _MAKERS.get(type_)
    array = make(values) if make is not None and values else None
    return list(values) if array is None else array


def _bigints(values: Sequence[Any]) -> BigintArray | None:
    kinds = set(map(type, values))
    if not kinds <= {int, type(None)}:
        return None
    try:
        elements = [_NULL if value is None else _bigint(8, value) for value in values]
    except struct.error:
        return None
    return BigintArray(_HEAD.pack(1, type(None) in kinds, 20, len(values), 1) + b"".join(elements))


def _texts(values: Sequence[Any]) -> TextArray | None:
    kinds = set(map(type, values))
    if not kinds <= {str, type(None)}:
        return None
    pieces = [_HEAD.pack(1, type(None) in kinds, 25, len(values), 1)]
    try:
        for value in values:
            if value is None:
                pieces.append(_NULL)
            else:
                text = value.encode()
                pieces += _length(len(text)), text
    except UnicodeEncodeError:
        return None
    return TextArray(b"".join(pieces))


_MAKERS: Final[Mapping[str, Callable[[Sequence[Any]], bytes | None]]] = {"bigint": _bigints, "text": _texts}

SENT_AS_BINARY: Final = frozenset(_MAKERS)
"""Types whose text would have to be quoted here and parsed there, which costs more than to store it."""
