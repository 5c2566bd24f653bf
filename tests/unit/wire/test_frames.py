"""Frames of the replication stream decode and encode as the protocol documents them."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import ProtocolError
from connector.wire.frames import (
    POSTGRES_EPOCH,
    PrimaryKeepalive,
    XLogData,
    decode_frame,
    encode_standby_status_update,
)

LSNS = st.integers(0, (1 << 64) - 1)
TIMES = st.integers(-(1 << 63), (1 << 63) - 1)

XLOG_DATA = bytes.fromhex("77 0000001600000028 00000016B374D848 0002C1A7E5F0A3C0") + b"payload"
KEEPALIVE = bytes.fromhex("6B 00000016B374D848 0002C1A7E5F0A3C0 01")


def test_xlog_data_gives_its_positions_time_and_payload() -> None:
    """Every field of a frame laid out by hand arrives in its place."""
    assert decode_frame(XLOG_DATA) == XLogData(0x1600000028, 0x16B374D848, 0x0002C1A7E5F0A3C0, b"payload")


def test_a_keepalive_gives_its_position_time_and_wish_for_a_reply() -> None:
    """Every field of a keepalive laid out by hand arrives in its place."""
    assert decode_frame(KEEPALIVE) == PrimaryKeepalive(0x16B374D848, 0x0002C1A7E5F0A3C0, reply_requested=True)
    assert decode_frame(KEEPALIVE[:-1] + b"\0") == PrimaryKeepalive(
        0x16B374D848, 0x0002C1A7E5F0A3C0, reply_requested=False
    )


def test_the_payload_outlives_the_buffer_it_was_read_from() -> None:
    """A payload decoded from a memoryview is bytes of its own, as libpq frees its buffer."""
    buffer = bytearray(XLOG_DATA)
    frame = decode_frame(memoryview(buffer))
    buffer[:] = b"\0" * len(buffer)
    assert isinstance(frame, XLogData)
    assert type(frame.payload) is bytes
    assert frame.payload == b"payload"


@pytest.mark.parametrize("size", range(1, 25))
def test_a_truncated_xlog_data_names_the_sizes(size: int) -> None:
    """A frame cut anywhere in its header raises ProtocolError with the expected and the actual size."""
    with pytest.raises(ProtocolError, match=f"XLogData: expected at least 25 bytes, got {size}$"):
        decode_frame(XLOG_DATA[:size])


@pytest.mark.parametrize("size", [*range(1, 18), 19, 40])
def test_a_keepalive_of_another_size_names_the_sizes(size: int) -> None:
    """A keepalive that is too short or too long raises ProtocolError with the expected and the actual size."""
    with pytest.raises(ProtocolError, match=f"PrimaryKeepalive: expected 18 bytes, got {size}$"):
        decode_frame(KEEPALIVE.ljust(size, b"\0")[:size])


def test_a_reply_flag_that_is_neither_0_nor_1_is_refused() -> None:
    """A flag that the protocol does not define is no keepalive."""
    with pytest.raises(ProtocolError, match="expected 0 or 1 as its reply flag, got 2"):
        decode_frame(KEEPALIVE[:-1] + b"\2")


def test_no_bytes_are_no_frame() -> None:
    """An empty CopyData message raises ProtocolError."""
    with pytest.raises(ProtocolError, match="expected at least 1 byte, got 0"):
        decode_frame(b"")


@pytest.mark.parametrize("kind", sorted(set(range(256)) - {ord("w"), ord("k")}))
def test_an_unknown_frame_is_refused_whatever_follows(kind: int) -> None:
    """Only the two kinds that the protocol defines are accepted from the server."""
    with pytest.raises(ProtocolError, match=r"expected kind 'w' .* or 'k' "):
        decode_frame(bytes([kind]) + XLOG_DATA[1:])


@given(LSNS, LSNS, TIMES, st.binary())
def test_every_xlog_data_survives_a_round_trip(wal_start: int, wal_end: int, send_time: int, payload: bytes) -> None:
    """The whole range of every field, and any payload, is preserved."""
    data = struct.pack(">cQQq", b"w", wal_start, wal_end, send_time) + payload
    assert decode_frame(data) == XLogData(wal_start, wal_end, send_time, payload)


@given(LSNS, TIMES, st.booleans())
def test_every_keepalive_survives_a_round_trip(wal_end: int, send_time: int, reply_requested: bool) -> None:
    """The whole range of every field is preserved."""
    data = struct.pack(">cQqB", b"k", wal_end, send_time, reply_requested)
    assert decode_frame(data) == PrimaryKeepalive(wal_end, send_time, reply_requested)


@given(st.binary(max_size=64) | st.builds(lambda kind, rest: kind + rest, st.sampled_from([b"w", b"k"]), st.binary()))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    """No bytes from the network make the decoder fail in another way."""
    try:
        decode_frame(data)
    except ProtocolError:
        return


def test_a_status_update_confirms_each_position_in_its_place() -> None:
    """The bytes are those that the protocol documents, written before flushed before applied."""
    assert encode_standby_status_update(3, 2, 1, 4) == bytes.fromhex(
        "72 0000000000000003 0000000000000002 0000000000000001 0000000000000004 00"
    )
    assert encode_standby_status_update(3, 2, 1, 4, reply_requested=True)[-1:] == b"\1"


@given(LSNS, LSNS, LSNS, TIMES, st.booleans())
def test_every_status_update_survives_a_round_trip(
    written: int, flushed: int, applied: int, time: int, r: bool
) -> None:
    """The whole range of every field reaches the server."""
    data = encode_standby_status_update(written, flushed, applied, time, r)
    assert struct.unpack(">cQQQqB", data) == (b"r", written, flushed, applied, time, r)


@pytest.mark.parametrize("position", [-1, 1 << 64])
def test_a_position_outside_64_bits_is_never_confirmed(position: int) -> None:
    """A wrong sum raises, rather than wrapping around to a position that would lose data."""
    with pytest.raises(struct.error):
        encode_standby_status_update(position, 0, 0, 0)
    with pytest.raises(struct.error):
        encode_standby_status_update(0, position, 0, 0)


def test_the_epoch_is_that_of_postgresql() -> None:
    """A time on the wire, added to the epoch as microseconds, is the instant in UTC."""
    assert POSTGRES_EPOCH + timedelta(microseconds=86_400_000_001) == datetime(2000, 1, 2, 0, 0, 0, 1, tzinfo=UTC)
