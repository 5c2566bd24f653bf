"""What a delivery report means for its message, and how large a message is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Final, cast

from confluent_kafka import KafkaError, Message

Delivery = Callable[[KafkaError | None, Message], None]
Header = tuple[str, str | bytes | None]
Headers = list[Header]

# Below the 100 MB at which a broker drops the connection instead of answering: beyond it no answer would ever come.
LARGEST_MESSAGE: Final = 64 * 1024 * 1024
RECORD_OVERHEAD: Final = 100
"""About what a message takes on the wire besides its key, value and headers, in bytes."""


class Fate(Enum):
    """What a failed delivery means for its message."""

    TOO_LARGE = auto()
    TOPIC_REFUSED = auto()
    NEIGHBOUR_REFUSED = auto()
    NOT_ITS_FAULT = auto()


_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_REFUSED: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001 - librdkafka's local errors have no public name
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.POLICY_VIOLATION,
        KafkaError.INVALID_RECORD,
        KafkaError._INVALID_ARG,  # noqa: SLF001
    }
)


def fate_of(error: KafkaError) -> Fate:
    """Tell what a delivery error means for the message it came for."""
    if error.code() in _TOO_LARGE:
        return Fate.TOO_LARGE
    if error.code() == KafkaError._INVALID_DIFFERENT_RECORD:  # noqa: SLF001
        # A broker that checks records refuses a batch for one of them, and says which.
        return Fate.NEIGHBOUR_REFUSED
    return Fate.TOPIC_REFUSED if error.code() in _REFUSED else Fate.NOT_ITS_FAULT


def size_of(value: bytes | None, key: bytes | None, headers: Iterable[Header]) -> int:
    """Return about how many bytes a message takes on the wire, uncompressed."""
    told = sum(len(name) + len(content or b"") for name, content in headers)
    return len(value or b"") + len(key or b"") + told + RECORD_OVERHEAD


def headers_of(message: Message) -> Headers:
    """Return a consumed message's headers, none as an empty list; what a delivery report brings never has any."""
    return cast("Headers", message.headers() or [])
