"""The begin and the commit of a transaction, decoded from a whole frame at once.

Of one-row transactions they are two frames of three. For every other frame, and for one that is in any way odd, the
answer is None: the careful decoders of `frames` and `pgoutput` know what it is. All that those take for a Begin or a
Commit is found here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Beginning(NamedTuple):
    """When a transaction was committed, and when its Begin was sent, in microseconds since POSTGRES_EPOCH."""

    commit_time: int
    send_time: int


# An XLogData's kind, positions and time; then the message.
_BEGIN = struct.Struct(">cQQqcQqI")
_COMMIT = struct.Struct(">cQQqcBQQq")


def begin_at_once(frame: bytes) -> Beginning | None:
    """Return what a Begin says, or None where the frame holds no Begin."""
    if len(frame) != _BEGIN.size:
        return None
    kind, _, _, send_time, message, _, commit_time, _ = _BEGIN.unpack(frame)
    return Beginning(commit_time, send_time) if kind == b"w" and message == b"B" else None


def commit_at_once(frame: bytes) -> int | None:
    """Return a Commit's `end_lsn`, or None where the frame holds no Commit."""
    if len(frame) != _COMMIT.size:
        return None
    kind, _, _, _, message, flags, _, end_lsn, _ = _COMMIT.unpack(frame)
    return end_lsn if kind == b"w" and message == b"C" and flags == 0 else None
