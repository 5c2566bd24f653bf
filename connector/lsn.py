"""Log sequence numbers: positions in the write-ahead log, carried as plain integers of bytes.

PostgreSQL writes them as two hexadecimal halves, `16/B374D848` ("pg_lsn Type" in its documentation).
"""

from __future__ import annotations

import re

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_HIGHEST = (1 << 64) - 1


def parse_lsn(text: str) -> int:
    """Return the byte position that PostgreSQL writes as `text`, such as `16/B374D848`.

    Raises ValueError for anything that the `pg_lsn` type itself would refuse.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no LSN: expected two hexadecimal halves, such as 16/B374D848")
    return int(match[1], 16) << 32 | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """Return `lsn` as PostgreSQL writes it; raises ValueError for a number outside 64 unsigned bits."""
    if not 0 <= lsn <= _HIGHEST:
        raise ValueError(f"{lsn} is no LSN: expected 0 to 2**64 - 1")
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
