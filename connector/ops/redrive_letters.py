"""`redrive --dead-letters`: values that named no row, from the dead-letter topic back to their own topics."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TextIO
from uuid import uuid4

from connector.errors import ConnectorError, ServiceUnavailable
from connector.kafka import Fate, Kafka, KafkaException, Letter, LetterBox, Partition, Sending
from connector.ops.awaited import before
from connector.ops.columns import LONGEST_CELL, LONGEST_ERROR, REASONS, SAMPLES, printable, table
from connector.ops.database import open_database, refusals
from connector.ops.durations import written
from connector.ops.progress import Pace, Progress
from connector.store.bookkeeping import Connection
from connector.store.queries import Tables
from connector.store.redrives import Place, Redrives, Run, SentBack

_MOST_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class LetterOptions:
    """What `redrive --dead-letters` is told; letters of other topics than `topics` are left alone. Times in seconds."""

    database_url: str
    kafka: Kafka
    tables: Tables
    topics: tuple[str, ...]
    dead_letter_topic: str
    start_deadline_seconds: float
    redriven_by: str
    reason: str | None
    rate: float
    key: str | None = None
    error_like: str | None = None
    older_than: float | None = None
    places: frozenset[Place] | None = None
    """Only the letters at these, if they are given."""


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

    def connected() -> Connection:
        return open_database(options.database_url, "outbox-connector redrive", deadline - time.monotonic())

    # What is written on the one is durable while the other one's transaction keeps the lock.
    with connected() as connection, connected() as locking, refusals(), _kafka_refusals():
        redrives = Redrives(connection, options.tables)
        run = Run(uuid4(), options.redriven_by, options.reason, redrives.clock())
        stretches = _around(options.places, before(deadline, "Kafka", box.stretches))
        found = _look(options, box, stretches, redrives, run)
        out.writelines(f"{line}\n" for line in _as_lines(found, run))
        if not found.letters:
            return 0
        if not really:
            out.write("\nNothing was sent. With --yes they are sent back to their topics.\n")
            return 0
        out.flush()
        progress = Progress(out, "sent back", found.letters)
        sender = _Sender(options, box, redrives, Redrives(locking, options.tables), run)
        try:
            for number in sender.batches(stretches):
                sent += number
                progress.add(number)
        finally:
            progress.close()
            out.write(f"{_count(sent)} sent back in {progress.seconds:.1f} s\n")
            if sender.found:
                out.write(f"{_count(sender.found)} of these had been sent by a run that was interrupted\n")
            out.flush()
    return sent


def _around(
    places: frozenset[Place] | None, stretches: dict[Partition, tuple[int, int]]
) -> dict[Partition, tuple[int, int]]:
    """Return the part of each stretch that holds the places."""
    if places is None:
        return stretches
    parts = {}
    for (topic, number), (first, end) in stretches.items():
        if offsets := [each.offset for each in places if each.partition == number]:
            parts[topic, number] = (max(first, min(offsets)), min(end, max(offsets) + 1))
    return parts


@contextmanager
def _kafka_refusals() -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise ServiceUnavailable(
            f"Kafka: {error.args[0].str()}. What was done is done; run it again for the rest"
        ) from error


def _look(
    options: LetterOptions, box: LetterBox, stretches: dict[Partition, tuple[int, int]], redrives: Redrives, run: Run
) -> _Found:
    found = _Found()
    for letters in box.read(stretches):
        wanted = [letter for letter in letters if _is_selected(letter, options, run)]
        done = redrives.sent_back(options.dead_letter_topic, [place(letter) for letter in wanted])
        for letter in wanted:
            why = obstacle(letter, options.topics)
            if where(letter) in done:
                found.sent_before += 1
            elif why is not None:
                found.left[why] += 1
            else:
                found.letters += 1
                found.reasons[shape(letter)] += 1
                if len(found.samples) < SAMPLES:
                    found.samples.append(letter._replace(value=None))
    return found


@dataclass(slots=True)
class _Sender:
    """Sends letters, a batch at a time: written down, sent, recorded. `lock` has a connection of its own."""

    options: LetterOptions
    box: LetterBox
    redrives: Redrives
    lock: Redrives
    run: Run
    found: int = 0
    """How many an interrupted run had sent already."""
    problems: list[str] = field(default_factory=list)
    closed: set[str] = field(default_factory=set)
    """Topics that take nothing."""

    def batches(self, stretches: dict[Partition, tuple[int, int]]) -> Iterator[int]:
        """Yield how many letters were sent, batch by batch, those that an interrupted run had sent among them."""
        pace = Pace(self.options.rate, _MOST_AT_ONCE)
        for letters in self.box.read(stretches):
            wanted = [
                letter
                for letter in letters
                if _is_selected(letter, self.options, self.run) and obstacle(letter, self.options.topics) is None
            ]
            for start in range(0, len(wanted), pace.batch):
                with self.lock.letters():
                    sent = self._send(wanted[start : start + pace.batch])
                yield sent
                if self.problems:
                    raise ConnectorError(
                        f"Kafka did not take every letter: {self.problems[0]}. What it took is recorded"
                    )
                pace.keep(sent)

    def _send(self, letters: list[Letter], *, again: bool = False) -> int:
        """Send what was not sent before, or try it once `again`; return how much that is."""
        topic, redrives = self.options.dead_letter_topic, self.redrives
        sent, left = self._announced(letters)
        if not left:
            return sent
        sending = self.box.send_back(left)
        if sending.taken:
            redrives.record_letters(self.run, topic, [_sent_back(letter) for letter in left])
            return sent + len(left)
        if sending.certain:
            redrives.record_letters(self.run, topic, [], [place(letter) for letter in left])
        if sending.fenced and not again:
            # Another run has had its turn since the last batch.
            return sent + self._send(left, again=True)
        return sent + self._not_taken(left, sending)

    def _announced(self, letters: list[Letter]) -> tuple[int, list[Letter]]:
        """Return how many an interrupted run turns out to have sent, and those that can be sent now, written down."""
        topic = self.options.dead_letter_topic
        letters = self._not_sent(letters)
        if not letters:
            return 0, []  # A claim would disturb another run for nothing.
        self.box.claim()
        # From here on nobody else can send any, so that what is looked at stays as it is.
        letters = self._not_sent(letters)
        found = self._find(letters)
        self.found += len(found)
        left = [letter for letter in letters if where(letter) not in found]
        ends = self.box.ends({letter.topic for letter in left})
        for name in sorted(name for name in ends.keys() - self.closed if not ends[name]):
            self.problems.append(f"topic {name}: there is none that this client may see")
            self.closed.add(name)
        left = [letter for letter in left if letter.topic not in self.closed]
        if left:
            self.redrives.announce_letters(topic, [_sent_back(letter) for letter in left], ends)
        return len(found), left

    def _not_taken(self, letters: list[Letter], sending: Sending) -> int:
        """Send those that Kafka has nothing against; return how many these are."""
        why = sending.why
        if sending.fate is not Fate.NOT_ITS_FAULT:
            if len(letters) > 1:
                half = len(letters) // 2
                return self._send(letters[:half]) + self._send(letters[half:])
            why = f"topic {letters[0].topic}: {why}"
        if sending.fate is Fate.TOPIC_REFUSED:
            self.closed.add(letters[0].topic)
        self.problems.append(why)
        return 0

    def _not_sent(self, letters: list[Letter]) -> list[Letter]:
        done = self.redrives.sent_back(self.options.dead_letter_topic, [place(letter) for letter in letters])
        return [letter for letter in letters if where(letter) not in done]

    def _find(self, letters: list[Letter]) -> set[tuple[int, int]]:
        """Record those of these letters that an interrupted run has sent, and return them."""
        topic = self.options.dead_letter_topic
        under_way = self.redrives.under_way(topic, [place(letter) for letter in letters])
        if not under_way:
            return set()
        since: dict[str, dict[int, int]] = {}
        for letter in letters:
            if (ends := under_way.get(where(letter))) is not None:
                of_topic = since.setdefault(letter.topic, dict(ends))
                for partition, end in ends.items():
                    of_topic[partition] = min(end, of_topic.get(partition, end))
        copied = self.box.copied(under_way, since)
        self.redrives.record_letters(
            self.run, topic, [_sent_back(letter) for letter in letters if where(letter) in copied]
        )
        return copied


def _is_selected(letter: Letter, options: LetterOptions, run: Run) -> bool:
    if options.places is not None and place(letter) not in options.places:
        return False
    if options.key is not None and letter.key != options.key.encode():
        return False
    if options.older_than is not None and letter.time / 1000 > run.started_at.timestamp() - options.older_than:
        return False
    if options.error_like is None:
        return True
    pattern = ".*".join(map(re.escape, options.error_like.split("%")))
    return re.search(pattern, letter.reason, re.IGNORECASE | re.DOTALL) is not None


def shape(letter: Letter) -> str:
    """Return what a letter was refused for without the numbers that differ from letter to letter."""
    return re.sub(r"\b\d+\b", "N", letter.reason[:300])


def obstacle(letter: Letter, topics: Sequence[str]) -> str | None:
    """Return why a letter cannot be sent back; None if it can."""
    if letter.topic not in topics:
        return f"of topic {printable(letter.topic, LONGEST_ERROR)!r}, which is not in CONNECTOR_TOPICS"
    if not letter.complete:
        return "whose value was too large for the dead-letter topic: the original lies where their headers say"
    return None


def where(letter: Letter) -> tuple[int, int]:
    """Return a letter's partition and offset."""
    return letter.partition, letter.offset


def place(letter: Letter) -> Place:
    """Return where a letter lies, and since when."""
    return Place(letter.partition, letter.offset, letter.time)


def _sent_back(letter: Letter) -> SentBack:
    key = None if letter.key is None else letter.key.decode("utf-8", "replace")
    return SentBack(place(letter), letter.topic, key, letter.reason)


def _as_lines(found: _Found, run: Run) -> Iterator[str]:
    yield f"{_count(found.letters)} selected"
    if found.letters:
        yield ""
        yield f"{'letters':>10}  reason"
        for reason, letters in found.reasons.most_common(REASONS):
            yield f"{letters:>10,}  {printable(reason, LONGEST_ERROR)}"
        if others := found.letters - sum(letters for _, letters in found.reasons.most_common(REASONS)):
            yield f"{others:>10,}  others"
        yield ""
        yield from table(
            ("partition", "offset", "topic", "key", "since", "reason"),
            [
                (
                    str(letter.partition),
                    str(letter.offset),
                    printable(letter.topic, LONGEST_CELL),
                    printable((letter.key or b"").decode("utf-8", "replace"), LONGEST_CELL),
                    written(run.started_at.timestamp() - letter.time / 1000),
                    printable(letter.reason, LONGEST_ERROR),
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
