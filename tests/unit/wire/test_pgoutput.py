"""pgoutput messages decode as the protocol documents them, and everything else is refused."""

from __future__ import annotations

import re
import struct
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from connector.errors import ProtocolError
from connector.wire.pgoutput import (
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Truncate,
    Type,
    Update,
    decode,
)

# One of each kind, laid out by hand: spaces in the hexadecimal part the fields.
BY_HAND: dict[str, tuple[bytes, Message]] = {
    "begin": (
        bytes.fromhex("42 00000016B374D848 0002C1A7E5F0A3C0 000002F1"),
        Begin(final_lsn=0x16B374D848, commit_time=0x0002C1A7E5F0A3C0, xid=753),
    ),
    "commit": (
        bytes.fromhex("43 00 00000016B374D848 00000016B374D878 0002C1A7E5F0A3C0"),
        Commit(commit_lsn=0x16B374D848, end_lsn=0x16B374D878, commit_time=0x0002C1A7E5F0A3C0),
    ),
    "origin": (bytes.fromhex("4F 00000016B374D848") + b"elsewhere\0", Origin(0x16B374D848, "elsewhere")),
    "relation": (
        bytes.fromhex("52 00004010")
        + b"public\0agent_outbox_messages\0d"
        + bytes.fromhex("0002")
        + bytes.fromhex("01")
        + b"id\0"
        + bytes.fromhex("00000014 FFFFFFFF")
        + bytes.fromhex("00")
        + "größe\0".encode()
        + bytes.fromhex("00000413 00000044"),
        Relation(
            oid=0x4010,
            schema="public",
            name="agent_outbox_messages",
            replica_identity="d",
            columns=(Column("id", 20, -1, is_key=True), Column("größe", 1043, 68, is_key=False)),
        ),
    ),
    "relation in pg_catalog without columns": (
        bytes.fromhex("52 FFFFFFFF") + b"\0t\0n" + bytes.fromhex("0000"),
        Relation(oid=0xFFFFFFFF, schema="", name="t", replica_identity="n", columns=()),
    ),
    "type": (bytes.fromhex("59 00004020") + b"public\0mood\0", Type(0x4020, "public", "mood")),
    "insert": (
        bytes.fromhex("49 00004010 4E 0004")
        + bytes.fromhex("62 00000008 000000000000002A")
        + bytes.fromhex("6E")
        + bytes.fromhex("62 00000000")
        + bytes.fromhex("62 00000003")
        + b"\1{}",
        Insert(0x4010, (b"\0\0\0\0\0\0\0*", None, b"", b"\1{}")),
    ),
    "insert that ends in nulls": (
        bytes.fromhex("49 00004010 4E 0003 62 00000001 FF 6E 6E"),
        Insert(0x4010, (b"\xff", None, None)),
    ),
    "insert without columns": (bytes.fromhex("49 00004010 4E 0000"), Insert(0x4010, ())),
    "update": (bytes.fromhex("55 00004010 4E 0003 74 00000002 3432 75 6E"), Update(0x4010)),
    "update with key": (bytes.fromhex("55 00004010 4B 0001 62 00000001 01 4E 0001 62 00000001 02"), Update(0x4010)),
    "update with old row": (bytes.fromhex("55 00004010 4F 0001 6E 4E 0001 62 00000000"), Update(0x4010)),
    "delete with key": (bytes.fromhex("44 00004010 4B 0002 62 00000001 01 6E"), Delete(0x4010)),
    "delete with old row": (bytes.fromhex("44 00004010 4F 0001 74 00000001 31"), Delete(0x4010)),
    "truncate": (bytes.fromhex("54 00000002 03 00004010 FFFFFFFF"), Truncate((0x4010, 0xFFFFFFFF))),
    "message": (
        bytes.fromhex("4D 01 00000016B374D848") + b"outbox\0" + bytes.fromhex("00000004") + b"\0\1\2\3",
        LogicalMessage(transactional=True, lsn=0x16B374D848, prefix="outbox", content=b"\0\1\2\3"),
    ),
    "message outside a transaction": (
        bytes.fromhex("4D 00 00000016B374D848") + b"\0" + bytes.fromhex("00000000"),
        LogicalMessage(transactional=False, lsn=0x16B374D848, prefix="", content=b""),
    ),
}

each_kind = pytest.mark.parametrize(("payload", "message"), BY_HAND.values(), ids=BY_HAND.keys())


@each_kind
def test_each_kind_of_message_gives_its_fields(payload: bytes, message: Message) -> None:
    """Every field of a message laid out by hand arrives in its place, in a value of its own type."""
    assert decode(payload) == message


@each_kind
def test_a_message_cut_anywhere_is_refused(payload: bytes, message: Message) -> None:
    """Every strict prefix of a message raises ProtocolError: none is taken for a shorter message."""
    for size in range(len(payload)):
        with pytest.raises(ProtocolError):
            decode(payload[:size])


@each_kind
@pytest.mark.parametrize("more", [b"\0", b"n", b"N\0\0", b"b\0\0\0\0"])
def test_anything_after_the_end_of_a_message_is_refused(payload: bytes, message: Message, more: bytes) -> None:
    """Bytes left over mean that the message was not understood."""
    with pytest.raises(ProtocolError, match=f"got {len(more)} more"):
        decode(payload + more)


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(b"BCDIMORTUY")))
def test_an_unknown_kind_is_refused_whatever_follows(kind: int) -> None:
    """Kinds that proto_version 1 does not define, those of streamed transactions among them, are never skipped."""
    with pytest.raises(ProtocolError, match="unknown kind"):
        decode(bytes([kind]) + bytes(20))


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "pgoutput message: expected at least 1 byte, got 0"),
    "begin too short": (bytes.fromhex("42 00"), "Begin: .*expected 20 bytes, got 1"),
    "commit with flags": (b"C\1" + bytes(24), "Commit: flags: expected 0, got 0x1"),
    "origin without an end": (bytes.fromhex("4F 0000000000000001 61"), "Origin: name: expected a zero byte"),
    "origin not in UTF-8": (bytes.fromhex("4F 0000000000000001 FF 00"), "Origin: name: not UTF-8"),
    "schema not in UTF-8": (b"R\0\0\0\1\xc3\0t\0d\0\0", "Relation: schema: not UTF-8"),
    "relation not in UTF-8": (b"R\0\0\0\1s\0\xed\xa0\x80\0d\0\0", "Relation: name: not UTF-8"),
    "column not in UTF-8": (b"R\0\0\0\1s\0t\0d\0\1\0\xff\0" + bytes(8), "Relation: column name: not UTF-8"),
    "replica identity unknown": (b"R\0\0\0\1s\0t\0x\0\0", "Relation: replica identity: .*'x'"),
    "negative number of columns": (b"R\0\0\0\1s\0t\0d\xff\xff", "Relation: number of columns: negative: -1"),
    "column flags unknown": (b"R\0\0\0\1s\0t\0d\0\1\2c\0" + bytes(8), "Relation: column flags: .*0x2"),
    "type not in UTF-8": (b"Y\0\0\0\1s\0\xff\0", "Type: name: not UTF-8"),
    "insert of an old row": (b"I\0\0\0\1O\0\0", "Insert: tuple of relation 1: expected 'N', got 'O'"),
    "insert with a negative number of columns": (b"I\0\0\0\1N\xff\xff", "Insert: number of columns: negative: -1"),
    "insert with a text column": (
        b"I\0\0\0\1N\0\2nt\0\0\0\1x",
        "Insert: column 1 of relation 1: expected 'b' .*, got 't'; start the stream with binary 'true'",
    ),
    "insert with an unchanged column": (b"I\0\0\0\1N\0\1u", "Insert: column 0 of relation 1: expected 'b' .*got 'u'"),
    "insert with a negative length": (b"I\0\0\0\1N\0\1b\xff\xff\xff\xff", "column 0 of relation 1: negative: -1"),
    "insert with a length past the end": (
        b"I\0\0\0\1N\0\1b\0\0\0\5abc",
        "Insert: column 0 of relation 1: expected 5 bytes, got 3",
    ),
    "update without a new row": (b"U\0\0\0\1X\0\0", "Update: tuple of relation 1: .*'X'"),
    "update with two keys": (b"U\0\0\0\1K\0\0K\0\0", "Update: tuple of relation 1: .*'K'"),
    "update with an unknown column": (b"U\0\0\0\1N\0\1x", "Update: column 0: .*'x'"),
    "update with a negative length": (b"U\0\0\0\1N\0\1t\xff\xff\xff\xff", "Update: column 0: negative: -1"),
    "delete of a new row": (b"D\0\0\0\1N\0\0", "Delete: tuple of relation 1: .*'N'"),
    "delete with a negative number of columns": (b"D\0\0\0\1K\x80\0", "Delete: number of columns: negative: -32768"),
    "truncate of a negative number": (b"T\xff\xff\xff\xff\0", "Truncate: number of relations: negative: -1"),
    "truncate of more than there is": (
        b"T\x7f\xff\xff\xff\0\0\0\0\1",
        "Truncate: relations: expected 8589934588 bytes",
    ),
    "truncate with unknown options": (b"T\0\0\0\0\4", "Truncate: options: .*0x4"),
    "message with unknown flags": (b"M\2" + bytes(8) + b"p\0\0\0\0\0", "LogicalMessage: flags: .*0x2"),
    "prefix not in UTF-8": (b"M\0" + bytes(8) + b"\xff\0\0\0\0\0", "LogicalMessage: prefix: not UTF-8"),
    "message of a negative length": (
        b"M\0" + bytes(8) + b"p\0\xff\xff\xff\xff",
        "LogicalMessage: length of content: negative: -1",
    ),
}


@pytest.mark.parametrize(("payload", "complaint"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_is_refused_with_what_is_wrong_where(payload: bytes, complaint: str) -> None:
    """The error names the message, its part, and what was expected against what came."""
    with pytest.raises(ProtocolError, match=complaint):
        decode(payload)


def test_a_negative_length_never_moves_an_insert_backwards() -> None:
    """A length that would end the tuple exactly, were it taken as a signed offset, is still refused."""
    back_to_the_null = struct.pack(">i", -5)
    with pytest.raises(ProtocolError, match=re.escape("negative: -5")):
        decode(b"I\0\0\0\1N\0\2b" + back_to_the_null + b"n")


def test_more_columns_than_a_signed_number_holds_are_refused_even_if_all_are_there() -> None:
    """A count with its highest bit set is negative, not large."""
    with pytest.raises(ProtocolError, match="negative"):
        decode(b"I\0\0\0\1N\x80\0" + b"n" * 0x8000)


def test_an_insert_is_as_immutable_and_hashable_as_any_message() -> None:
    """The quick way by which inserts are made leaves a value that nothing can change afterwards."""
    payload, message = BY_HAND["insert"]
    insert = decode(payload)
    assert hash(insert) == hash(message)
    assert repr(insert) == repr(message)
    with pytest.raises(FrozenInstanceError):
        insert.relation_oid = 1  # type: ignore[union-attr, misc]


OIDS = st.integers(0, (1 << 32) - 1)
LSNS = st.integers(0, (1 << 64) - 1)
TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
COLUMNS = st.builds(Column, NAMES, OIDS, st.integers(-(1 << 31), (1 << 31) - 1), st.booleans())
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Begin, LSNS, TIMES, OIDS),
    st.builds(Commit, LSNS, LSNS, TIMES),
    st.builds(Origin, LSNS, NAMES),
    st.builds(Relation, OIDS, NAMES, NAMES, st.sampled_from("dnfi"), st.lists(COLUMNS, max_size=5).map(tuple)),
    st.builds(Type, OIDS, NAMES, NAMES),
    st.builds(Insert, OIDS, st.lists(st.none() | st.binary(max_size=300), max_size=12).map(tuple)),
    st.builds(Update, OIDS),
    st.builds(Delete, OIDS),
    st.builds(Truncate, st.lists(OIDS, max_size=5).map(tuple)),
    st.builds(LogicalMessage, st.booleans(), LSNS, NAMES, st.binary(max_size=50)),
)


def encode(message: Message) -> bytes:  # noqa: C901, PLR0911 - one case for each kind
    """Lay a message out as a server does; the tuples that Update and Delete drop are made up."""
    made_up = b"\0\4nu" + b"t\0\0\0\2hi" + b"b\0\0\0\1\xff"
    match message:
        case Begin(final_lsn, time, xid):
            return struct.pack(">cQqI", b"B", final_lsn, time, xid)
        case Commit(commit_lsn, end_lsn, time):
            return struct.pack(">cBQQq", b"C", 0, commit_lsn, end_lsn, time)
        case Origin(commit_lsn, name):
            return struct.pack(">cQ", b"O", commit_lsn) + name.encode() + b"\0"
        case Relation(oid, schema, name, identity, columns):
            head = struct.pack(">cI", b"R", oid) + f"{schema}\0{name}\0{identity}".encode()
            return head + struct.pack(">h", len(columns)) + b"".join(map(encode_column, columns))
        case Type(oid, schema, name):
            return struct.pack(">cI", b"Y", oid) + f"{schema}\0{name}\0".encode()
        case Insert(oid, values):
            fields = [b"n" if value is None else struct.pack(">ci", b"b", len(value)) + value for value in values]
            return struct.pack(">cIch", b"I", oid, b"N", len(values)) + b"".join(fields)
        case Update(oid):
            return struct.pack(">cI", b"U", oid) + b"K" + made_up + b"N" + made_up
        case Delete(oid):
            return struct.pack(">cI", b"D", oid) + b"O" + made_up
        case Truncate(oids):
            return struct.pack(f">ciB{len(oids)}I", b"T", len(oids), 0, *oids)
        case LogicalMessage(transactional, lsn, prefix, content):
            head = struct.pack(">cBQ", b"M", transactional, lsn) + prefix.encode() + b"\0"
            return head + struct.pack(">i", len(content)) + content


def encode_column(column: Column) -> bytes:
    """Lay a column of a relation out as a server does."""
    tail = struct.pack(">Ii", column.type_oid, column.type_modifier)
    return bytes([column.is_key]) + column.name.encode() + b"\0" + tail


@given(MESSAGES)
def test_every_message_survives_a_round_trip(message: Message) -> None:
    """The whole range of every field is preserved."""
    assert decode(encode(message)) == message


@given(MESSAGES, st.data())
def test_every_message_cut_anywhere_is_refused(message: Message, data: st.DataObject) -> None:
    """Whatever a message holds, none of its prefixes is taken for a message."""
    payload = encode(message)
    size = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ProtocolError):
        decode(payload[:size])


@given(
    st.binary(max_size=64)
    | st.builds(lambda kind, rest: bytes([kind]) + rest, st.sampled_from(b"BCDIMORTUY"), st.binary(max_size=64))
)
@example(b"I\0\0\0\1N\x7f\xff")
@example(b"I\0\0\0\1N\0\1b\x7f\xff\xff\xff")
def test_any_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    """No bytes make the decoder fail in another way, or accept what a server would lay out differently."""
    try:
        message = decode(payload)
    except ProtocolError:
        return
    if isinstance(message, Begin | Commit | Origin | Relation | Type | Insert | LogicalMessage):
        assert encode(message) == payload


@given(MESSAGES, st.data())
def test_a_message_with_a_byte_changed_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    """Damage next to valid messages, where counts and lengths lie, raises ProtocolError or nothing."""
    payload = bytearray(encode(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        damaged = decode(bytes(payload))
    except ProtocolError:
        return
    if isinstance(damaged, Begin | Commit | Origin | Relation | Type | Insert | LogicalMessage):
        assert encode(damaged) == payload
