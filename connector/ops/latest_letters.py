"""The latest letters of the dead-letter topic by what they were refused for, within bounds of number, size and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from connector.kafka import Letter, LetterBox, Partition
from connector.ops.redrive_letters import obstacle, place, shape, where
from connector.store.redrives import Redrives

MOST_LETTERS: Final = 1_000
"""So many of the latest letters are looked at, and can be sent back at once."""

_MOST_SECONDS: Final = 10.0
_MOST_BYTES: Final = 64 << 20
_MOST_GROUPS: Final = 100
_SAMPLES: Final = 3
_LONGEST_TEXT: Final = 300


class LetterSample(NamedTuple):
    """Where a letter lies, when it was written (seconds since 1970), and where it came from.

    `value` is the beginning of it as text, None where it has none; `size` is how many bytes all of it had.
    """

    partition: int
    offset: int
    at: float
    origin: str
    key: str | None
    value: str | None
    size: int


class LetterGroup(NamedTuple):
    """Letters of one topic that were refused for the same: `reason` is without the numbers that differ.

    `sendable` are those that can be sent back, each as partition, offset and time, or `obstacle` tells why none can.
    """

    reason: str
    topic: str
    letters: int
    sent_before: int
    obstacle: str | None
    sendable: Sequence[Sequence[int]]
    samples: Sequence[LetterSample]


class LatestLetters(NamedTuple):
    """The largest groups of the letters that were looked at, of those that the topic holds.

    `complete` unless a bound of size or time was met.
    """

    topic: str
    held: int
    looked_at: int
    complete: bool
    groups: Sequence[LetterGroup]


def read_latest(box: LetterBox, most: int = MOST_LETTERS) -> tuple[list[Letter], int, bool]:
    """Return the latest letters, their values cut, how many the topic holds, and whether no other bound was met.

    Raises:
        KafkaException, ServiceUnavailable: Kafka does not answer.
        SetupRequired: there is no dead-letter topic.
    """
    stretches = box.stretches()
    deadline = time.monotonic() + _MOST_SECONDS
    letters: list[Letter] = []
    size, complete = 0, True
    for batch in box.read(_ends(stretches, most)):
        letters += map(_cut, batch)
        size += sum(len(letter.value or b"") + len(letter.key or b"") for letter in batch)
        if size > _MOST_BYTES or time.monotonic() > deadline:
            complete = False
            break
    letters.sort(key=lambda letter: (letter.time, letter.partition, letter.offset), reverse=True)
    return letters, sum(end - first for first, end in stretches.values()), complete


def _ends(stretches: Mapping[Partition, tuple[int, int]], most: int) -> dict[Partition, tuple[int, int]]:
    """Return the ends of the stretches: of each as much as of the others, while there is more in all than `most`."""
    ends = {}
    shortest_first = sorted(stretches.items(), key=lambda item: item[1][1] - item[1][0])
    for number, (partition, (first, end)) in enumerate(shortest_first):
        share = min(end - first, most // (len(stretches) - number))
        ends[partition] = (end - share, end)
        most -= share
    return ends


def _cut(letter: Letter) -> Letter:
    return letter._replace(key=_beginning(letter.key), value=_beginning(letter.value), headers=[])


def _beginning(value: bytes | None) -> bytes | None:
    return None if value is None else value[: 4 * _LONGEST_TEXT]


def grouped(letters: Sequence[Letter], redrives: Redrives, topic: str, topics: Sequence[str]) -> list[LetterGroup]:
    """Group letters of a dead-letter topic, the largest group first; none of another topic than `topics` goes back."""
    done = redrives.sent_back(topic, [place(letter) for letter in letters])
    by_reason: dict[tuple[str, str, str | None], list[Letter]] = {}
    for letter in letters:
        by_reason.setdefault((shape(letter), letter.topic, obstacle(letter, topics)), []).append(letter)
    largest = sorted(by_reason.items(), key=lambda item: len(item[1]), reverse=True)[:_MOST_GROUPS]
    return [
        LetterGroup(
            reason,
            source[:_LONGEST_TEXT],
            len(of_group),
            sum(where(letter) in done for letter in of_group),
            what,
            [[*place(letter)] for letter in of_group if what is None and where(letter) not in done],
            [_sample(letter) for letter in of_group[:_SAMPLES]],
        )
        for (reason, source, what), of_group in largest
    ]


def _sample(letter: Letter) -> LetterSample:
    return LetterSample(
        letter.partition,
        letter.offset,
        letter.time / 1000,
        letter.origin[:_LONGEST_TEXT],
        _text(letter.key),
        _text(letter.value),
        letter.size,
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")[:_LONGEST_TEXT]
