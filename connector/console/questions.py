"""What the page asks of the database and of Kafka when somebody wants to know, a few questions at a time."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple
from uuid import uuid4

import psycopg

from connector.kafka import Copies, LetterBox, find_copies
from connector.ops.latest_letters import LatestLetters, grouped, read_latest
from connector.ops.redrive import RATE
from connector.ops.redrive_letters import LetterOptions, redrive_letters
from connector.ops.status import StatusOptions
from connector.store.bookkeeping import Connection
from connector.store.comparison import Comparison
from connector.store.connections import connect, is_conflict
from connector.store.messages import Conversation, DeadGroup, Found, Life, Messages, Page
from connector.store.proofs import MOST_SAMPLES, Recorded, Unproved, last_proofs
from connector.store.redrives import Place, Redrives, Run, Selection

MOST_ROWS: Final = 500
"""So many dead rows of a group are listed, and can be put back at once."""

_AT_ONCE: Final = 4
_PROVED_IDS: Final = 10_000
_PROVED_AT_ONCE: Final = 1_000
_PROOF_HOLDS_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 5
# A copy carries its producer's clock, and the mark follows the acknowledgement.
_SECONDS_BEFORE_MARK: Final = 20.0
# The first attempts follow each other within this time: 1 + 2 + 4 + 8 + 16 + 32 seconds, and a little.
_SECONDS_OF_RETRIES: Final = 70.0
_REDRIVES_LOOKED_AT: Final = 3
_CLOCKS_DIFFER: Final = 2.0


class ProofResult(NamedTuple):
    """What a comparison of outbox and history found, `at` in seconds since 1970; `unsettled` are on their way."""

    at: float
    seconds: float
    first_id: int
    last_id: int
    unsettled: int
    damaged: int
    samples: Sequence[Unproved]


class Busy(Exception):
    """As many questions are being answered as are allowed at once."""


class Questions:
    """Each question has a connection of its own, so that none outlives an outage; safe to use from any thread."""

    def __init__(self, whom: StatusOptions, dead_letter_topic: str, stored_types: Sequence[str]) -> None:
        """Remember whom to ask; `stored_types` are the values of `biz_type` that are stored in history."""
        self._database_url = whom.database_url
        self._kafka = whom.kafka
        self._tables = whom.tables
        self._topics = whom.topics
        self._group_id = whom.group_id
        self._dead_letter_topic = dead_letter_topic
        self._stored_types = stored_types
        self._proving = threading.Lock()
        self.last_proof: ProofResult | None = None
        """The latest comparison of outbox and history, whoever asked for it."""
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        self._room_for_letters = threading.BoundedSemaphore(1)

    @contextmanager
    def _turn(self, room: threading.BoundedSemaphore | None = None) -> Iterator[None]:
        room = room or self._room
        if not room.acquire(timeout=_ANSWER_SECONDS):
            raise Busy
        try:
            yield
        finally:
            room.release()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with (
            self._turn(),
            connect(
                self._database_url,
                name="outbox-connector console",
                statement_seconds=_ANSWER_SECONDS,
                lock_seconds=_ANSWER_SECONDS,
                connect_seconds=_ANSWER_SECONDS,
                prepare=False,
            ) as connection,
        ):
            yield connection

    @contextmanager
    def _messages(self) -> Iterator[Messages]:
        with self._connection() as connection:
            connection.execute("set default_transaction_read_only = on")
            yield Messages(connection, self._tables)

    def life(self, outbox_id: int) -> Life | None:
        """Return what has become of a message; None if neither outbox nor history has it."""
        with self._messages() as messages:
            return messages.life(outbox_id)

    def of_key(self, key: str, before: int | None) -> Page:
        """Return the messages of a key, below an id if one is given."""
        with self._messages() as messages:
            return messages.of_key(key, before)

    def of_conversation(self, chat_id: str, before: int | None) -> Conversation:
        """Return what history has of a conversation, below an id of it if one is given."""
        with self._messages() as messages:
            return messages.of_conversation(chat_id, before)

    def dead_by_reason(self) -> Sequence[DeadGroup]:
        """Return the dead rows grouped by what they died of."""
        with self._messages() as messages:
            return messages.dead_by_reason()

    def dead_of_reason(self, reason: str, biz_type: str) -> Sequence[Found]:
        """Return the dead rows of one group."""
        with self._messages() as messages:
            return messages.dead_of_reason(reason, biz_type, MOST_ROWS)

    def copies(self, outbox_id: int) -> Copies | None:
        """Look for a message's copies in Kafka around the times in its row; None if there is no such row.

        Raises:
            KafkaException: Kafka does not answer.
            ServiceUnavailable: Kafka stopped answering.
        """
        life = self.life(outbox_id)
        if life is None or life.message is None:
            return None
        message = life.message
        starts = [message.created, *(redrive.moment for redrive in life.redrives[:_REDRIVES_LOOKED_AT])]
        times = [(start - _CLOCKS_DIFFER, start + _SECONDS_OF_RETRIES) for start in starts if start is not None]
        if message.published is not None:
            times.append((message.published - _SECONDS_BEFORE_MARK, message.published + _CLOCKS_DIFFER))
        with self._turn():
            return find_copies(self._kafka, self._group_id, message.topic, outbox_id, times)

    def letters(self) -> LatestLetters:
        """Return the latest letters of the dead-letter topic, grouped by their reason; one look at a time.

        Raises:
            KafkaException, ServiceUnavailable: Kafka does not answer.
            SetupRequired: there is no dead-letter topic.
        """
        topic = self._dead_letter_topic
        with self._turn(self._room_for_letters):
            with self._turn():
                letters, held, complete = read_latest(LetterBox(self._kafka, topic, _ANSWER_SECONDS))
            with self._connection() as connection:
                groups = grouped(letters, Redrives(connection, self._tables), topic, self._topics)
        return LatestLetters(topic, held, len(letters), complete, groups)

    def redrive_letters(self, places: Sequence[Place], by: str, reason: str | None) -> int:
        """Send these letters back but for those that were before, as `redrive --dead-letters` does; return how many.

        Raises:
            ConnectorError: Kafka or PostgreSQL refuses, or does not answer; what was sent until then is recorded.
        """
        options = LetterOptions(
            database_url=self._database_url,
            kafka=self._kafka,
            tables=self._tables,
            topics=self._topics,
            dead_letter_topic=self._dead_letter_topic,
            start_deadline_seconds=_ANSWER_SECONDS,
            redriven_by=by,
            reason=reason,
            rate=RATE,
            places=frozenset(places),
        )
        with self._turn():
            return redrive_letters(options, io.StringIO(), really=True)

    def recorded_proofs(self) -> list[Recorded]:
        """Return the last proofs of `reconcile` and of the sinks, the latest first."""
        with self._connection() as connection:
            return last_proofs(connection, self._tables)

    def prove(self) -> ProofResult:
        """Compare the latest messages with history, once at a time and not again within some seconds."""
        with self._proving:
            last = self.last_proof
            if last is not None and time.time() < last.at + _PROOF_HOLDS_SECONDS:
                return last
            with self._connection() as connection:
                self.last_proof = self._compare(Comparison(connection, self._tables))
            return self.last_proof

    def _compare(self, comparison: Comparison) -> ProofResult:
        began = time.time()
        last = comparison.last_id()
        first = after = max(0, last - _PROVED_IDS)
        found: dict[int, str] = {}
        while after < last:
            end, unproved = comparison.unproved([], after, last, _PROVED_AT_ONCE, self._stored_types)
            found |= unproved
            if end is None:
                break
            after = end
        damaged = {outbox_id: why for outbox_id, why in found.items() if why != "unsettled"}
        return ProofResult(
            at=began,
            seconds=time.time() - began,
            first_id=first + 1,
            last_id=last,
            unsettled=len(found) - len(damaged),
            damaged=len(damaged),
            samples=[Unproved(outbox_id, why) for outbox_id, why in sorted(damaged.items())[:MOST_SAMPLES]],
        )

    def redrive(self, ids: Sequence[int], by: str, reason: str | None) -> int:
        """Put those of up to `MOST_ROWS` rows back that are dead, all in one transaction; return how many."""
        with self._connection() as connection:
            redrives = Redrives(connection, self._tables)
            run = Run(uuid4(), by, reason, redrives.clock())
            selection = Selection(ids=tuple(dict.fromkeys(ids)))
            while True:
                try:
                    return len(redrives.move(selection, run, None, MOST_ROWS))
                except psycopg.Error as error:
                    if not is_conflict(error):
                        raise
