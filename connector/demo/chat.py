"""The demo's application: conversations whose messages are enqueued in the transactions that make them."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush
from random import Random
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from connector import Outbox
from connector.outbox import DEFAULT_MAX_RETRY
from connector.store.connections import connect, describe
from connector.store.queries import Tables

CHATS: Final = sql.Identifier("public", "agent_chats")
DOOMED_MAX_RETRY: Final = 3

_AT_ONCE: Final = 20
_LONGEST_CONVERSATION: Final = 12
_ONE_LATE_IN: Final = 100
_ENOUGH_FOR_TROUBLE: Final = 4
# Before the second retry, which comes 3 s after the first attempt: some recover at the first one, some at the second.
_LATE_SECONDS: Final = (0.4, 2.6)

_LINES: Final = {
    "user": (
        "How do I change the address of my order?",
        "Und wie lange dauert die Lieferung nach Köln?",
        "Thanks 🙏 one more thing:",
        "それは保証の対象ですか。",
        "It says 'payment declined' — what now?",
    ),
    "assistant": (
        "Let me look that up for you.",
        "Done. You will get a confirmation by e-mail.",
        "Zwei bis drei Werktage.",
        "はい、二年間の保証が付いています。",
        "I see two attempts; the second one went through ✅",
    ),
}


class Arrival(Enum):
    """When a conversation's row is there for its messages to refer to."""

    IN_TIME = auto()
    LATE = auto()
    NEVER = auto()


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation; its id is the key of its messages."""

    chat_id: str
    user_id: int
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Turn:
    """What one transaction enqueues: one or two lines of a conversation, each with its role."""

    conversation: Conversation
    lines: tuple[tuple[str, str], ...]
    first: bool


def plan(messages: int) -> list[Turn]:
    """Return the transactions that enqueue exactly so many messages, always the same for the same number.

    From 4 messages on, about one in a hundred, and at least a conversation, comes before its conversation does, and
    one message's conversation never comes.
    """
    random = Random(messages)  # noqa: S311 - repeatable, not secret
    doomed = 1 if messages >= _ENOUGH_FOR_TROUBLE else 0
    waiting: deque[deque[Turn]] = deque()
    planned = late = 0
    while planned < messages - doomed:
        length = min(messages - doomed - planned, random.randint(2, _LONGEST_CONVERSATION))
        arrival = Arrival.LATE if doomed and late * _ONE_LATE_IN <= planned else Arrival.IN_TIME
        waiting.append(_turns(random, length, arrival))
        planned += length
        late += length if arrival is Arrival.LATE else 0
    turns: list[Turn] = []
    talking: list[deque[Turn]] = []
    while waiting or talking:
        while waiting and len(talking) < _AT_ONCE:
            talking.append(waiting.popleft())
        conversation = random.choice(talking)
        turns.append(conversation.popleft())
        if not conversation:
            talking.remove(conversation)
    if doomed:
        turns[len(turns) // 3 : len(turns) // 3] = _turns(random, 1, Arrival.NEVER)
    return turns


def _turns(random: Random, length: int, arrival: Arrival) -> deque[Turn]:
    chat_id = str(UUID(int=random.getrandbits(128), version=4))
    conversation = Conversation(chat_id, random.randint(1, 9_999), arrival)
    turns: deque[Turn] = deque()
    number = 0
    while number < length:
        roles = ("user", "assistant")[: min(length - number, random.randint(1, 2))]
        lines = []
        for role in roles:
            number += 1
            lines.append((role, f"{random.choice(_LINES[role])} ({number} of {length})"))
        turns.append(Turn(conversation, tuple(lines), first=not turns))
    return turns


class Chat:
    """Carries a plan out at a rate of so many messages a second, on a thread and a connection of its own."""

    def __init__(self, url: str, topic: str, tables: Tables, turns: list[Turn], rate: float) -> None:
        self._url = url
        self._topic = topic
        self._rate = rate
        self._turns = turns
        self._open_chat = tables.query("demo", "open_chat", chats=CHATS)
        self._random = Random(len(turns))  # noqa: S311 - repeatable, not secret
        self._late: list[tuple[float, str, Conversation]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chat", daemon=True)
        self.total = sum(len(turn.lines) for turn in turns)
        self.enqueued = 0
        """Messages committed so far."""
        self.doomed: set[int] = set()
        """The outbox ids of messages whose conversation never comes."""
        self.problem: str | None = None
        """What the database had against it, if it had to give up."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will be enqueued, and no late conversation is to come."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def stop(self) -> None:
        """Stop talking, after the transaction at hand."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with connect(self._url, name="outbox-connector demo") as connection:
                self._talk(connection)
        except psycopg.Error as error:
            self.problem = describe(error)

    def _talk(self, connection: psycopg.Connection[Any]) -> None:
        started = time.monotonic()
        for turn in self._turns:
            if not self._wait_until(started + self.enqueued / self._rate, connection):
                return
            self._enqueue(connection, turn)
        while self._late and self._wait_until(self._late[0][0], connection):
            pass

    def _wait_until(self, moment: float, connection: psycopg.Connection[Any]) -> bool:
        """Create the late conversations that are due up to a moment, each in its time; False if asked to stop."""
        while self._late and self._late[0][0] <= max(moment, time.monotonic()):
            due, _, conversation = heappop(self._late)
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return False
            self._create(connection, conversation)
        return not self._stopping.wait(max(0.0, moment - time.monotonic()))

    def _enqueue(self, connection: psycopg.Connection[Any], turn: Turn) -> None:
        conversation = turn.conversation
        doomed = conversation.arrival is Arrival.NEVER
        with connection.transaction():
            if turn.first and conversation.arrival is Arrival.IN_TIME:
                self._create(connection, conversation)
            outbox = Outbox(connection)
            ids = [
                outbox.create_chat_history_message(
                    self._topic,
                    conversation.chat_id,
                    {
                        "user_id": conversation.user_id,
                        "chat_id": conversation.chat_id,
                        "role": role,
                        "message_content": content,
                    },
                    max_retry=DOOMED_MAX_RETRY if doomed else DEFAULT_MAX_RETRY,
                )
                for role, content in turn.lines
            ]
        self.enqueued += len(ids)
        if doomed:
            self.doomed.update(ids)
        if turn.first and conversation.arrival is Arrival.LATE:
            due = time.monotonic() + self._random.uniform(*_LATE_SECONDS)
            heappush(self._late, (due, conversation.chat_id, conversation))

    def _create(self, connection: psycopg.Connection[Any], conversation: Conversation) -> None:
        connection.execute(self._open_chat, {"chat_id": conversation.chat_id, "user_id": conversation.user_id})
