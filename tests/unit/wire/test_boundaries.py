"""The decoders of a transaction's boundaries agree with the careful ones on any bytes, or leave the frame to them."""

from __future__ import annotations

import struct

from hypothesis import example, given
from hypothesis import strategies as st

from connector.errors import ProtocolError
from connector.wire.boundaries import Beginning, begin_at_once, commit_at_once
from connector.wire.frames import XLogData, decode_frame
from connector.wire.pgoutput import Begin, Commit, Message, decode

HEADER = struct.pack(">cQQq", b"w", 1, 2, 3)
BEGIN = HEADER + b"B" + struct.pack(">QqI", 4, -5, 6)
COMMIT = HEADER + b"C" + struct.pack(">BQQq", 0, 7, 8, 9)

# Bytes as such, and with one of them changed, left out or added where they are nearly right.
NEARLY = st.tuples(st.sampled_from([BEGIN, COMMIT]), st.integers(0, 60), st.binary(max_size=2), st.integers(0, 2)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + parts[3] :]
)


def carefully(frame: bytes) -> tuple[Message | None, int]:
    """Return what the careful decoders make of a frame, and when it was sent."""
    try:
        decoded = decode_frame(frame)
        return (decode(decoded.payload), decoded.send_time) if isinstance(decoded, XLogData) else (None, 0)
    except ProtocolError:
        return None, 0


@given(st.one_of(NEARLY, st.binary(max_size=60)))
@example(BEGIN)
@example(COMMIT)
@example(COMMIT.replace(b"C\x00", b"C\x01"))
@example(b"k" + BEGIN[1:])
@example(b"k" + COMMIT[1:])
def test_a_boundary_at_once_is_what_the_careful_decoders_say(frame: bytes) -> None:
    """A Begin and a Commit and nothing else, with the same values."""
    message, send_time = carefully(frame)
    begin = Beginning(message.commit_time, send_time) if isinstance(message, Begin) else None
    assert begin_at_once(frame) == begin
    assert commit_at_once(frame) == (message.end_lsn if isinstance(message, Commit) else None)


def test_boundaries_are_known() -> None:
    """The two frames as a server sends them."""
    assert begin_at_once(BEGIN) == (-5, 3)
    assert commit_at_once(COMMIT) == 8
