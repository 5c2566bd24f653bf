"""Whether history keeps the order of the outbox within each key, for any number of keys in bounded memory."""

from __future__ import annotations

from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

MOST_KEYS: Final = 250_000
"""Keys whose last place is remembered at once; the others are left to a further pass over ids and places."""

MOST_STRAGGLERS: Final = 10_000
"""Stragglers that are looked into; beyond it they are only counted."""


class Share(NamedTuple):
    """The keys whose hash ends in certain bits."""

    mask: int
    bits: int


EVERY_KEY: Final = Share(0, 0)


class KeyOrder:
    """Sees messages in outbox order, and finds those that history has behind a later one of their key.

    Where there are too many keys to remember it gives up half of them, and `left` says which: they take a pass of their
    own. So the result is exact, whatever the number of keys.
    """

    def __init__(self, share: Share = EVERY_KEY) -> None:
        self.share = share
        self.left: list[Share] = []
        self.stragglers: dict[int, int] = {}
        """By its place in history, each message that later ones of its key overtook, with the last one's outbox id."""
        self.beyond = 0
        """How many more there were than are remembered."""
        self._last: dict[int, int] = {}

    def see(self, key: int, outbox_id: int, place: int) -> None:
        """Take the next message: the hash of its topic and key, and its place in history."""
        mask, bits = self.share
        if key & mask != bits:
            return
        last = self._last.get(key)
        if last is None:
            self._last[key] = place
            if len(self._last) > MOST_KEYS:
                self._halve()
        elif place > last:
            self._last[key] = place
        elif place < last:
            if last in self.stragglers or len(self.stragglers) < MOST_STRAGGLERS:
                self.stragglers[last] = outbox_id
            else:
                self.beyond += 1

    def _halve(self) -> None:
        mask, bits = self.share
        mask, high = mask << 1 | 1, mask + 1
        self.left.append(Share(mask, bits | high))
        self.share = Share(mask, bits)
        self._last = {key: place for key, place in self._last.items() if key & mask == bits}

    def turn_to_what_is_left(self) -> bool:
        """Begin anew with keys that were given up; tell whether there are any."""
        self._last = {}
        if not self.left:
            return False
        self.share = self.left.pop()
        return True

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {
            "share": self.share,
            "left": self.left,
            "stragglers": list(self.stragglers.items()),
            "beyond": self.beyond,
            "last": [
                b64encode(array("q", numbers).tobytes()).decode() for numbers in (self._last, self._last.values())
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return an order as it was.

        Raises:
            ValueError, KeyError, TypeError: the document is not from `to_json`.
        """
        made = cls(Share(*document["share"]))
        made.left = [Share(*share) for share in document["left"]]
        made.stragglers = dict(document["stragglers"])
        made.beyond = document["beyond"]
        keys, places = (array("q", b64decode(text, validate=True)) for text in document["last"])
        made._last = dict(zip(keys, places, strict=True))
        return made
