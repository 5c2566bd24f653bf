"""A set of outbox ids at a bit each, which ids that a sequence hands out fill densely."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from typing import Final, Self

_SHIFT: Final = 15
_IDS: Final = 1 << _SHIFT
_BYTES: Final = _IDS // 8


class IdSet:
    """Ids in pages of 32,768; a page takes 4 kB, and only pages that hold an id are there."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Put an id in; tell whether it is new."""
        page = self._pages.get(number >> _SHIFT)
        if page is None:
            page = self._pages[number >> _SHIFT] = bytearray(_BYTES)
        place, bit = (number & (_IDS - 1)) >> 3, 1 << (number & 7)
        if page[place] & bit:
            return False
        page[place] |= bit
        return True

    def __contains__(self, number: int) -> bool:
        """Tell whether an id is in."""
        page = self._pages.get(number >> _SHIFT)
        return page is not None and bool(page[(number & (_IDS - 1)) >> 3] & 1 << (number & 7))

    def __len__(self) -> int:
        """Count the ids."""
        return sum(int.from_bytes(page, "little").bit_count() for page in self._pages.values())

    def __iter__(self) -> Iterator[int]:
        """Yield the ids in order."""
        for number in sorted(self._pages):
            yield from _ids(number, int.from_bytes(self._pages[number], "little"))

    def without(self, other: IdSet) -> Iterator[int]:
        """Yield, in order, the ids that the other set has not."""
        for number in sorted(self._pages):
            bits = int.from_bytes(self._pages[number], "little")
            taken = other._pages.get(number)
            yield from _ids(number, bits if taken is None else bits & ~int.from_bytes(taken, "little"))

    def to_json(self) -> dict[str, str]:
        """Return what `from_json` takes."""
        return {str(number): b64encode(zlib.compress(page, 1)).decode() for number, page in self._pages.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, str]) -> Self:
        """Return a set as it was.

        Raises:
            ValueError, zlib.error: the document is not from `to_json`.
        """
        made = cls()
        for number, text in document.items():
            page = bytearray(zlib.decompress(b64decode(text, validate=True)))
            if len(page) != _BYTES:
                raise ValueError(f"a page of {len(page)} bytes")
            made._pages[int(number)] = page
        return made


def _ids(page: int, bits: int) -> Iterator[int]:
    first = page << _SHIFT
    if not bits:
        return
    for place, byte in enumerate(bits.to_bytes(_BYTES, "little")):
        if byte:
            yield from (first + place * 8 + bit for bit in range(8) if byte >> bit & 1)
