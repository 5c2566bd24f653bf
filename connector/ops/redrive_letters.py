"""`redrive --dead-letters`: values that named no row, from the dead-letter topic back to their own topics."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TextIO
from uuid import uuid4

from connector.errors import ConnectorError
from connector.kafka import Kafka, Letter, LetterBox
from connector.ops.awaited import before
from connector.ops.columns import printable, table
from connector.ops.database import open_database, refusals
from connector.ops.durations import written
from connector.ops.progress import Pace, Progress
from connector.store.queries import Tables
from connector.store.redrives import Place, Redrives, Run, SentBack

_MOST_AT_ONCE: Final = 100
_SAMPLES: Final = 5
_REASONS: Final = 10
_LONGEST_CELL: Final = 24
_LONGEST_ERROR: Final = 100


@dataclass(frozen=True, slots=True)
class LetterOptions:
    """What `redrive --dead-letters` is told; letters of other topics than `topics` are left alone. Times in seconds."""

    database_url: str
    kafka: Kafka
    tables: Tables
    topics: tuple[str, ...]
    dead_letter_topic: str
    start_deadline_seconds: float
    key: str | None
    error_like: str | None
    older_than: float | None
    redriven_by: str
    reason: str | None
    rate: float


@dataclass(slots=True)
class _Found:
    """What a look at all letters has found."""

    letters: int = 0
    sent_before: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    samples: list[Letter] = field(default_factory=list)


def redrive_letters(options: LetterOptions, out: TextIO, *, really: bool) -> int:
    """Show which letters would be sent back, and send them if `really`; return how many were sent.

    Raises:
        ServiceUnavailable: PostgreSQL or Kafka did not answer before the start deadline, or went away.
        SetupRequired: a table or the dead-letter topic is missing, or the role lacks a privilege.
        ConnectorError: Kafka refuses a letter.
    """
    box = LetterBox(options.kafka, options.dead_letter_topic)
    sent = 0
    deadline = time.monotonic() + options.start_deadline_seconds
    connection = open_database(options.database_url, "outbox-connector redrive", options.start_deadline_seconds)
    with connection, refusals():
        redrives = Redrives(connection, options.tables)
        run = Run(uuid4(), options.redriven_by, options.reason, redrives.clock())
        ends = before(deadline, "Kafka", box.ends)
        found = _look(options, box, ends, redrives, run)
        out.writelines(f"{line}\n" for line in _as_lines(found, run))
        if not found.letters:
            return 0
        if not really:
            out.write("\nNothing was sent. With --yes they are sent back to their topics.\n")
            return 0
        out.flush()
        progress = Progress(out, "sent back", found.letters)
        try:
            for number in _batches(options, box, ends, redrives, run):
                sent += number
                progress.add(number)
        finally:
            progress.close()
            out.write(f"{_count(sent)} sent back in {progress.seconds:.1f} s\n")
            out.flush()
    return sent


def _look(options: LetterOptions, box: LetterBox, ends: dict[int, int], redrives: Redrives, run: Run) -> _Found:
    found = _Found()
    for letters in box.read(ends):
        wanted = [letter for letter in letters if _is_selected(letter, options, run)]
        done = redrives.sent_back(options.dead_letter_topic, [_place(letter) for letter in wanted])
        for letter in wanted:
            obstacle = _obstacle(letter, options)
            if (letter.partition, letter.offset) in done:
                found.sent_before += 1
            elif obstacle is not None:
                found.left[obstacle] += 1
            else:
                found.letters += 1
                found.reasons[re.sub(r"\b\d+\b", "N", letter.reason[:300])] += 1
                if len(found.samples) < _SAMPLES:
                    found.samples.append(letter._replace(value=None))
    return found


def _batches(
    options: LetterOptions, box: LetterBox, ends: dict[int, int], redrives: Redrives, run: Run
) -> Iterator[int]:
    pace = Pace(options.rate, _MOST_AT_ONCE)
    for letters in box.read(ends):
        wanted = [
            letter for letter in letters if _is_selected(letter, options, run) and _obstacle(letter, options) is None
        ]
        for start in range(0, len(wanted), pace.batch):
            sent, problem = _send(options, box, redrives, run, wanted[start : start + pace.batch])
            yield sent
            if problem is not None:
                raise ConnectorError(f"Kafka did not take every letter: {problem}. What it took is recorded")
            pace.keep(sent)


def _send(
    options: LetterOptions, box: LetterBox, redrives: Redrives, run: Run, letters: list[Letter]
) -> tuple[int, str | None]:
    """Send what was not sent before, and record what Kafka has taken; return how much that is, and what went wrong."""
    with redrives.letters():
        done = redrives.sent_back(options.dead_letter_topic, [_place(letter) for letter in letters])
        taken, problem = box.send_back([letter for letter in letters if (letter.partition, letter.offset) not in done])
        redrives.record_letters(
            run,
            options.dead_letter_topic,
            [
                SentBack(
                    _place(letter),
                    letter.topic,
                    None if letter.key is None else letter.key.decode("utf-8", "replace"),
                    letter.reason,
                )
                for letter in taken
            ],
        )
    return len(taken), problem


def _is_selected(letter: Letter, options: LetterOptions, run: Run) -> bool:
    if options.key is not None and letter.key != options.key.encode():
        return False
    if options.older_than is not None and letter.time / 1000 > run.started_at.timestamp() - options.older_than:
        return False
    if options.error_like is None:
        return True
    pattern = ".*".join(map(re.escape, options.error_like.split("%")))
    return re.search(pattern, letter.reason, re.IGNORECASE | re.DOTALL) is not None


def _obstacle(letter: Letter, options: LetterOptions) -> str | None:
    if letter.topic not in options.topics:
        return f"of topic {printable(letter.topic, _LONGEST_ERROR)!r}, which is not in CONNECTOR_TOPICS"
    if not letter.complete:
        return "whose value was too large for the dead-letter topic: the original lies where their headers say"
    return None


def _place(letter: Letter) -> Place:
    return Place(letter.partition, letter.offset, letter.time)


def _as_lines(found: _Found, run: Run) -> Iterator[str]:
    yield f"{_count(found.letters)} selected"
    if found.letters:
        yield ""
        yield f"{'letters':>10}  reason"
        for reason, letters in found.reasons.most_common(_REASONS):
            yield f"{letters:>10,}  {printable(reason, _LONGEST_ERROR)}"
        if others := found.letters - sum(letters for _, letters in found.reasons.most_common(_REASONS)):
            yield f"{others:>10,}  others"
        yield ""
        yield from table(
            ("partition", "offset", "topic", "key", "since", "reason"),
            [
                (
                    str(letter.partition),
                    str(letter.offset),
                    printable(letter.topic, _LONGEST_CELL),
                    printable((letter.key or b"").decode("utf-8", "replace"), _LONGEST_CELL),
                    written(run.started_at.timestamp() - letter.time / 1000),
                    printable(letter.reason, _LONGEST_ERROR),
                )
                for letter in found.samples
            ],
        )
        if found.letters > len(found.samples):
            yield f"… and {found.letters - len(found.samples):,} more"
    if found.sent_before:
        yield f"left: {found.sent_before:,} that were sent back before"
    for obstacle, letters in found.left.items():
        yield f"left: {letters:,} {obstacle}"


def _count(letters: int) -> str:
    return f"{letters:,} dead letter{'' if letters == 1 else 's'}"
