"""The decoder of a whole frame at once: it agrees with the careful ones, or leaves the frame to them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import ProtocolError
from connector.outbox import Fence, OutboxRow
from connector.row import RowDecoder
from connector.wire.frames import XLogData, decode_frame
from connector.wire.pgoutput import Column, Insert, Relation, decode

OID = 16_385
TYPES = {
    "id": 20,
    "biz_type": 1043,
    "topic": 1043,
    "message_key": 1043,
    "payload": 3802,
    "headers": 3802,
    "status": 1043,
    "retry_count": 23,
    "next_retry_at": 1184,
    "updated_at": 1184,
}
COLUMNS = tuple(Column(name, oid, -1, is_key=name == "id") for name, oid in TYPES.items())
RELATION = Relation(OID, "public", "agent_outbox_messages", "d", COLUMNS)
INT8 = st.integers(-(1 << 63), (1 << 63) - 1)
JSONB = st.binary(max_size=60).map(lambda text: b"\x01" + text)


def frame(*values: bytes | None, oid: int = OID) -> bytes:
    """Return the frame of an insert of these values."""
    fields = [b"n" if value is None else b"b" + struct.pack(">I", len(value)) + value for value in values]
    insert = b"I" + struct.pack(">IBh", oid, ord("N"), len(values)) + b"".join(fields)
    return b"w" + struct.pack(">QQq", 1, 2, 3) + insert


def carefully(decoder: RowDecoder, data: bytes) -> OutboxRow | None:
    """Return what the careful decoders make of a frame of our relation; None if they refuse it."""
    try:
        decoded = decode_frame(data)
        if not isinstance(decoded, XLogData):
            return None
        message = decode(decoded.payload)
        return decoder(message.values) if isinstance(message, Insert) and message.relation_oid == OID else None
    except ProtocolError:
        return None


USUAL = st.builds(
    lambda outbox_id, biz_type, topic, key, payload, headers, retry_count, updated_at: (
        struct.pack(">q", outbox_id),
        biz_type.encode(),
        topic.encode(),
        key.encode(),
        payload,
        headers,
        b"pending",
        struct.pack(">i", retry_count),
        None,
        struct.pack(">q", updated_at),
    ),
    INT8,
    st.text(max_size=10),
    st.text(max_size=10),
    st.text(max_size=10),
    JSONB,
    st.none() | JSONB,
    st.integers(-(1 << 31), (1 << 31) - 1),
    INT8,
)


@given(st.lists(USUAL, min_size=1, max_size=5))
def test_a_usual_insert_is_decoded_at_once_and_as_the_careful_decoders_do(rows: list[tuple[bytes | None, ...]]) -> None:
    """With or without headers, one after the other, whatever its texts and numbers."""
    decoder = RowDecoder(RELATION)
    for values in rows:
        row = decoder.at_once(frame(*values))
        assert row is not None
        assert row == carefully(decoder, frame(*values))
        assert (type(row), type(row.fence)) == (OutboxRow, Fence)


@pytest.mark.parametrize("headers", [None, b"\x01{}"])
def test_a_damaged_frame_is_never_decoded_to_something_else(headers: bytes | None) -> None:
    """Any byte changed to any other, any number of them cut off: what is decoded at once is decoded rightly."""
    numbers = struct.pack(">i", 3), None, struct.pack(">q", 9)
    whole = frame(struct.pack(">q", 7), b"biz", b"topic", b"key", b"\x01{}", headers, b"pending", *numbers)
    decoder = RowDecoder(RELATION)
    changed = (whole[:at] + bytes([byte]) + whole[at + 1 :] for at in range(len(whole)) for byte in range(256))
    for damaged in (*changed, *(whole[:size] for size in range(len(whole))), whole + b"n"):
        row = decoder.at_once(damaged)
        assert row is None or row == carefully(decoder, damaged), damaged


@given(st.lists(st.none() | st.binary(max_size=12) | JSONB, min_size=10, max_size=10))
def test_values_of_any_kind_are_decoded_alike_or_left_to_the_careful_decoders(values: list[bytes | None]) -> None:
    """Nulls, lengths that are none of their type's, another format of jsonb."""
    decoder = RowDecoder(RELATION)
    row = decoder.at_once(frame(*values))
    assert row is None or row == carefully(decoder, frame(*values))


def test_what_is_not_usual_is_left_to_the_careful_decoders() -> None:
    """A due time, another status or relation, columns in another order: None."""
    usual: list[bytes | None] = [struct.pack(">q", 7), b"b", b"t", b"k", b"\x01{}", None, b"pending"]
    usual += [struct.pack(">i", 0), None, struct.pack(">q", 9)]
    decoder = RowDecoder(RELATION)
    assert decoder.at_once(frame(*usual)) is not None
    assert decoder.at_once(frame(*usual, oid=OID + 1)) is None
    assert decoder.at_once(frame(*usual[:8], struct.pack(">q", 1), usual[9])) is None
    assert decoder.at_once(frame(*usual[:6], b"penting", *usual[7:])) is None
    turned = RowDecoder(RELATION.__class__(OID, "public", "agent_outbox_messages", "d", COLUMNS[::-1]))
    assert turned.at_once(frame(*usual)) is None
    assert turned(tuple(usual[::-1])) == decoder.at_once(frame(*usual))
