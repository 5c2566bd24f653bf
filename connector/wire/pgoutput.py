"""Messages of the pgoutput plugin: one decoder each, strict to the byte.

Follows "Logical Replication Message Formats" in the PostgreSQL documentation, for a stream started with
proto_version '1', binary 'true' and messages 'true'. Positions are LSNs; times are microseconds since POSTGRES_EPOCH.

Only inserts are read for their values. The tuples of updates and deletes are checked as strictly, then dropped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from connector.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Begin:
    """A transaction starts; `final_lsn` is the position of its commit record."""

    final_lsn: int
    commit_time: int
    xid: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A transaction ends; `end_lsn`, the byte after its commit record, is the position to confirm."""

    commit_lsn: int
    end_lsn: int
    commit_time: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The transaction was itself replicated, from the origin called `name`, where it committed at `commit_lsn`."""

    commit_lsn: int
    name: str


@dataclass(frozen=True, slots=True)
class Column:
    """A published column; `is_key` tells that it belongs to the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    is_key: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """The shape of a table, sent before its first row and again after it changes.

    `replica_identity` is pg_class.relreplident: d (default), n (nothing), f (full) or i (index).
    """

    oid: int
    schema: str
    name: str
    replica_identity: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Type:
    """The name of a type that is not built in, sent before the first relation that uses it."""

    oid: int
    schema: str
    name: str


@dataclass(frozen=True, slots=True)
class Insert:
    """A new row: each value in its type's binary form (its `send` function's), or None for NULL, in column order."""

    relation_oid: int
    values: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """A row of the relation changed."""

    relation_oid: int


@dataclass(frozen=True, slots=True)
class Delete:
    """A row of the relation was removed."""

    relation_oid: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """The relations were emptied."""

    relation_oids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """What a session passed to pg_logical_emit_message; `lsn` is its own position.

    One that is not `transactional` arrives at once, outside Begin and Commit, even when its session rolls back.
    """

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message: TypeAlias = Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | LogicalMessage

_INT8 = struct.Struct(">B")
_INT16 = struct.Struct(">h")
_INT32 = struct.Struct(">i")
_OID = struct.Struct(">I")
_LSN = struct.Struct(">Q")
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")
_COLUMN_TYPE = struct.Struct(">Ii")

_BINARY, _NULL, _TEXT, _UNCHANGED, _NEW, _KEY, _OLD = b"bntuNKO"


def decode(payload: bytes) -> Message:
    """Return the message that `payload`, the content of one XLogData frame, holds.

    Raises ProtocolError, and nothing else, for bytes that are no such message: of an unknown kind, truncated, with
    something after their end, with a negative count or length, with a flag or a tuple format that proto_version 1
    does not define, or with a name that is not UTF-8.
    """
    if not payload:
        raise ProtocolError("pgoutput message: expected at least 1 byte, got 0")
    kind = payload[0]
    if kind == 0x49:  # I
        return _insert(payload)
    known = _DECODERS.get(kind)
    if known is None:
        raise ProtocolError(
            f"pgoutput message: unknown kind {chr(kind)!r} in {len(payload)} bytes; "
            "is the stream started with proto_version '1'?"
        )
    name, decoder = known
    reader = _Reader(name, payload)
    message = decoder(reader)
    reader.end()
    return message


class _Reader:
    """Reads a message from its second byte to its end, and never past it."""

    __slots__ = ("_data", "_name", "_position")

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._data = data
        self._position = 1

    def fail(self, complaint: str) -> ProtocolError:
        return ProtocolError(f"{self._name}: {complaint} (byte {self._position} of {len(self._data)})")

    def take(self, size: int, what: str) -> bytes:
        left = len(self._data) - self._position
        if size > left:
            raise self.fail(f"{what}: expected {size} bytes, got {left}")
        start = self._position
        self._position += size
        return self._data[start : self._position]

    def fields(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size, what))

    def number(self, layout: struct.Struct, what: str) -> int:
        return self.fields(layout, what)[0]

    def count(self, layout: struct.Struct, what: str) -> int:
        count = self.number(layout, what)
        if count < 0:
            raise self.fail(f"{what}: negative: {count}")
        return count

    def flags(self, defined: int, what: str) -> int:
        flags = self.number(_INT8, what)
        if flags & ~defined:
            raise self.fail(f"{what}: expected only bits of {defined:#x}, got {flags:#x}")
        return flags

    def text(self, what: str) -> str:
        end = self._data.find(0, self._position)
        if end < 0:
            raise self.fail(f"{what}: expected a zero byte at its end, got {len(self._data) - self._position} without")
        raw = self._data[self._position : end]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what}: not UTF-8: {raw!r}; set client_encoding to UTF8") from error
        self._position = end + 1
        return text

    def end(self) -> None:
        left = len(self._data) - self._position
        if left:
            raise self.fail(f"expected {self._position} bytes, got {left} more")


def _begin(reader: _Reader) -> Begin:
    return Begin(*reader.fields(_BEGIN, "final LSN, time and xid"))


def _commit(reader: _Reader) -> Commit:
    flags, commit_lsn, end_lsn, commit_time = reader.fields(_COMMIT, "flags, two LSNs and time")
    if flags:
        raise reader.fail(f"flags: expected 0, got {flags:#x}")
    return Commit(commit_lsn, end_lsn, commit_time)


def _origin(reader: _Reader) -> Origin:
    return Origin(reader.number(_LSN, "commit LSN"), reader.text("name"))


def _relation(reader: _Reader) -> Relation:
    oid = reader.number(_OID, "oid")
    schema = reader.text("schema")
    name = reader.text("name")
    replica_identity = chr(reader.number(_INT8, "replica identity"))
    if replica_identity not in "dnfi":
        raise reader.fail(f"replica identity: expected d, n, f or i, got {replica_identity!r}")
    columns = tuple([_column(reader) for _ in range(reader.count(_INT16, "number of columns"))])
    return Relation(oid, schema, name, replica_identity, columns)


def _column(reader: _Reader) -> Column:
    is_key = bool(reader.flags(0b1, "column flags"))
    name = reader.text("column name")
    type_oid, type_modifier = reader.fields(_COLUMN_TYPE, "column type and modifier")
    return Column(name, type_oid, type_modifier, is_key)


def _type(reader: _Reader) -> Type:
    return Type(reader.number(_OID, "oid"), reader.text("schema"), reader.text("name"))


def _insert(payload: bytes) -> Insert:
    """Decode an insert, by far the most frequent message, in one short loop.

    It checks as little as lets it never accept what `_insert_carefully` would refuse: a length is read unsigned, so a
    negative or an overlong one moves past the end, where the next read or the last comparison finds it. Whatever
    is odd is left to the careful decoder, which knows how to complain.
    """
    try:
        relation_oid, tuple_kind, count = _insert_header(payload)
        position = 8
        values: list[bytes | None] = [None] * count
        for index in range(count):
            column_kind = payload[position]
            if column_kind == _BINARY:
                start = position + 5
                (length,) = _length_at(payload, position + 1)
                position = start + length
                values[index] = payload[start:position]
            elif column_kind == _NULL:
                position += 1
            else:
                return _insert_carefully(payload)
    except (IndexError, struct.error):
        return _insert_carefully(payload)
    if position != len(payload) or tuple_kind != _NEW or count < 0:
        return _insert_carefully(payload)
    # Through the slots: the __init__ of a frozen dataclass takes a tenth longer over the whole row.
    insert = _new_object(Insert)
    _set_relation_oid(insert, relation_oid)
    _set_values(insert, tuple(values))
    return insert


_insert_header = struct.Struct(">xIBh").unpack_from
_length_at = struct.Struct(">I").unpack_from
_new_object = object.__new__
_set_relation_oid: Callable[[Insert, int], None] = Insert.__dict__["relation_oid"].__set__
_set_values: Callable[[Insert, tuple[bytes | None, ...]], None] = Insert.__dict__["values"].__set__


def _insert_carefully(payload: bytes) -> Insert:
    reader = _Reader("Insert", payload)
    relation_oid = reader.number(_OID, "relation")
    tuple_kind = reader.number(_INT8, "tuple kind")
    if tuple_kind != _NEW:
        raise reader.fail(f"tuple of relation {relation_oid}: expected 'N', got {chr(tuple_kind)!r}")
    values: list[bytes | None] = []
    for index in range(reader.count(_INT16, "number of columns")):
        what = f"column {index} of relation {relation_oid}"
        column_kind = reader.number(_INT8, what)
        if column_kind == _NULL:
            values.append(None)
        elif column_kind == _BINARY:
            values.append(reader.take(reader.count(_INT32, what), what))
        else:
            remedy = "; start the stream with binary 'true'" if column_kind == _TEXT else ""
            raise reader.fail(f"{what}: expected 'b' (binary) or 'n' (null), got {chr(column_kind)!r}{remedy}")
    reader.end()
    return Insert(relation_oid, tuple(values))


def _update(reader: _Reader) -> Update:
    relation_oid = reader.number(_OID, "relation")
    tuple_kind = reader.number(_INT8, "tuple kind")
    if tuple_kind in (_KEY, _OLD):
        _pass_tuple(reader)
        tuple_kind = reader.number(_INT8, "tuple kind")
    if tuple_kind != _NEW:
        raise reader.fail(f"tuple of relation {relation_oid}: expected 'K' or 'O', then 'N', got {chr(tuple_kind)!r}")
    _pass_tuple(reader)
    return Update(relation_oid)


def _delete(reader: _Reader) -> Delete:
    relation_oid = reader.number(_OID, "relation")
    tuple_kind = reader.number(_INT8, "tuple kind")
    if tuple_kind not in (_KEY, _OLD):
        raise reader.fail(f"tuple of relation {relation_oid}: expected 'K' or 'O', got {chr(tuple_kind)!r}")
    _pass_tuple(reader)
    return Delete(relation_oid)


def _pass_tuple(reader: _Reader) -> None:
    for index in range(reader.count(_INT16, "number of columns")):
        what = f"column {index}"
        column_kind = reader.number(_INT8, what)
        if column_kind in (_BINARY, _TEXT):
            reader.take(reader.count(_INT32, what), what)
        elif column_kind not in (_NULL, _UNCHANGED):
            raise reader.fail(f"{what}: expected 'b', 't', 'n' or 'u', got {chr(column_kind)!r}")


def _truncate(reader: _Reader) -> Truncate:
    count = reader.count(_INT32, "number of relations")
    reader.flags(0b11, "options")
    oids = reader.take(_OID.size * count, "relations")
    return Truncate(tuple([oid for (oid,) in _OID.iter_unpack(oids)]))


def _logical_message(reader: _Reader) -> LogicalMessage:
    transactional = bool(reader.flags(0b1, "flags"))
    lsn = reader.number(_LSN, "LSN")
    prefix = reader.text("prefix")
    content = reader.take(reader.count(_INT32, "length of content"), "content")
    return LogicalMessage(transactional, lsn, prefix, content)


_DECODERS: dict[int, tuple[str, Callable[[_Reader], Message]]] = {
    ord("B"): ("Begin", _begin),
    ord("C"): ("Commit", _commit),
    ord("D"): ("Delete", _delete),
    ord("M"): ("LogicalMessage", _logical_message),
    ord("O"): ("Origin", _origin),
    ord("R"): ("Relation", _relation),
    ord("T"): ("Truncate", _truncate),
    ord("U"): ("Update", _update),
    ord("Y"): ("Type", _type),
}
