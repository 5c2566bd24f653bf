"""Frames of the replication stream: what a CopyData message holds, in either direction.

Follows "Streaming Replication Protocol", START_REPLICATION, in the PostgreSQL documentation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime

from connector.errors import ProtocolError

POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""Times on the wire are whole microseconds since this instant."""

_xlog_data_header = struct.Struct(">xQQq").unpack_from
_PRIMARY_KEEPALIVE = struct.Struct(">xQqB")
_STANDBY_STATUS_UPDATE = struct.Struct(">cQQQq?")


@dataclass(frozen=True, slots=True)
class XLogData:
    """A piece of the stream; for logical replication, `payload` is exactly one pgoutput message."""

    wal_start: int
    wal_end: int
    send_time: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class PrimaryKeepalive:
    """The server's sign of life; `reply_requested` asks for a status update before it gives the connection up."""

    wal_end: int
    send_time: int
    reply_requested: bool


def decode_frame(data: bytes | memoryview) -> XLogData | PrimaryKeepalive:
    """Return the frame that one CopyData message from the server holds; `data` itself is not kept.

    Raises ProtocolError for a kind that is unknown, and for one that is truncated, too long or malformed.
    """
    size = len(data)
    kind = data[0] if size else None
    if kind == 0x77:  # w
        if size < 25:
            raise ProtocolError(f"XLogData: expected at least 25 bytes, got {size}")
        wal_start, wal_end, send_time = _xlog_data_header(data)
        return XLogData(wal_start, wal_end, send_time, bytes(data[25:]))
    if kind == 0x6B:  # k
        if size != _PRIMARY_KEEPALIVE.size:
            raise ProtocolError(f"PrimaryKeepalive: expected {_PRIMARY_KEEPALIVE.size} bytes, got {size}")
        wal_end, send_time, reply = _PRIMARY_KEEPALIVE.unpack(data)
        if reply > 1:
            raise ProtocolError(f"PrimaryKeepalive: expected 0 or 1 as its reply flag, got {reply}")
        return PrimaryKeepalive(wal_end, send_time, bool(reply))
    if kind is None:
        raise ProtocolError("replication frame: expected at least 1 byte, got 0")
    raise ProtocolError(
        f"replication frame: expected kind 'w' (XLogData) or 'k' (PrimaryKeepalive), got {chr(kind)!r} in {size} bytes"
    )


def encode_standby_status_update(
    written: int, flushed: int, applied: int, client_time: int, reply_requested: bool = False
) -> bytes:
    """Return the CopyData content that confirms positions to the server.

    The server may remove WAL before `flushed`, and never sends it again. The positions are LSNs of the byte after
    the last one that was written, flushed or applied; `client_time` is in microseconds since POSTGRES_EPOCH.
    Raises struct.error for a position that is no unsigned 64-bit number.
    """
    return _STANDBY_STATUS_UPDATE.pack(b"r", written, flushed, applied, client_time, reply_requested)
