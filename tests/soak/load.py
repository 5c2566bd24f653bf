"""The application: writers with conversations of their own, some of them late, and some messages that must die."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque
from typing import Any, Final

import psycopg

from connector import Outbox

Connection = psycopg.Connection[tuple[Any, ...]]

WRITERS: Final = 4
_CONVERSATIONS_AT_ONCE: Final = 40
_ABORTED: Final = 0.05
_LATE: Final = 0.06
_POISON: Final = 0.003
_LARGE: Final = 0.003
_PAUSE: Final = 0.05
_TEXTS: Final = ("", "quotes ' \" \\", "\U0001f680\u4f60\u597d", "line\nbreak\ttab", "\u202eright to left", "x" * 400)

TABLES: Final = (
    "create table agent_chats (chat_id varchar(36) primary key, late boolean not null);"
    " alter table chat_histories add foreign key (chat_id) references agent_chats"
)


class Load:
    """Writers that commit, and sometimes abort, transactions of random size at a given pace."""

    def __init__(self, url: str, topic: str, seed: int, messages: int, seconds: float) -> None:
        """Prepare to write `messages` within about so many seconds, drawn from `seed`."""
        self._url = url
        self._topic = topic
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._late: list[tuple[float, str]] = []
        self.committed = 0
        """Messages whose commit the database has confirmed."""
        self.in_doubt = 0
        """Messages whose commit the database was asked for and did not answer."""
        quota = -(-messages // WRITERS)
        self._threads = [
            threading.Thread(target=self._write, args=(n, random.Random(f"{seed}/{n}"), quota, quota / seconds))
            for n in range(WRITERS)
        ]
        self._registrar = threading.Thread(target=self._let_late_conversations_begin)

    def start(self) -> None:
        """Begin."""
        for thread in [*self._threads, self._registrar]:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether every message is written."""
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Stop writing, and let every late conversation begin."""
        self._stopping.set()
        for thread in [*self._threads, self._registrar]:
            thread.join()

    # --- writing -------------------------------------------------------------------------------------------------

    def _write(self, writer: int, rng: random.Random, quota: int, pace: float) -> None:
        began = time.monotonic()
        conversations: deque[str] = deque(maxlen=_CONVERSATIONS_AT_ONCE)
        started = written = 0
        connection: Connection | None = None
        while written < quota and not self._stopping.is_set():
            if written > pace * (time.monotonic() - began):
                self._stopping.wait(_PAUSE)
                continue
            try:
                if connection is None:
                    connection = psycopg.connect(self._url, connect_timeout=5)
                while len(conversations) < _CONVERSATIONS_AT_ONCE or rng.random() < 0.2:
                    self._begin(connection, f"w{writer}-{started}", rng)
                    conversations.append(f"w{writer}-{started}")
                    started += 1
                written += self._transaction(connection, list(conversations), rng)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                if connection is not None:
                    connection.close()
                connection = None
                self._stopping.wait(_PAUSE)
        if connection is not None:
            connection.close()

    def _begin(self, connection: Connection, chat: str, rng: random.Random) -> None:
        """Open a conversation, or promise to: then its first messages come before it."""
        if rng.random() < _LATE:
            with self._lock:
                heapq.heappush(self._late, (time.monotonic() + rng.uniform(0.5, 12), chat))
            return
        connection.execute("insert into agent_chats values (%s, false) on conflict do nothing", [chat])
        connection.commit()

    def _transaction(self, connection: Connection, conversations: list[str], rng: random.Random) -> int:
        size = 2_000 if rng.random() < _LARGE else 1 + min(200, int(rng.expovariate(1 / 12)))
        outbox = Outbox(connection)
        aborted = rng.random() < _ABORTED
        for _ in range(size):
            chat = rng.choice(conversations)
            text = f"{rng.getrandbits(64):x} {rng.choice(_TEXTS)}"
            payload: dict[str, object] = {"user_id": rng.getrandbits(62), "chat_id": chat, "message_content": text}
            biz_type, max_retry = "chat_history_persist", 20
            if aborted:
                payload["aborted"] = True
            if rng.random() < _POISON:
                payload["poison"] = poison = rng.choice(["wrong shape", "nobody's", "refused"])
                if poison == "wrong shape":
                    payload["user_id"] = "seven"
                elif poison == "nobody's":
                    biz_type = "nobody_knows_this"
                else:
                    payload["role"], max_retry = "r" * 33, 2
            outbox.enqueue(biz_type, self._topic, chat, payload, max_retry)
        if aborted:
            connection.rollback()
            return 0
        try:
            connection.commit()
        except psycopg.OperationalError:
            with self._lock:
                self.in_doubt += size
            raise
        with self._lock:
            self.committed += size
        return size

    # --- late conversations --------------------------------------------------------------------------------------

    def _let_late_conversations_begin(self) -> None:
        connection: Connection | None = None
        while chat := self._next_late():
            if not chat[1]:
                time.sleep(_PAUSE)
                continue
            try:
                connection = connection or psycopg.connect(self._url, autocommit=True, connect_timeout=5)
                connection.execute("insert into agent_chats values (%s, true) on conflict do nothing", [chat[1]])
            except (psycopg.OperationalError, psycopg.InterfaceError):
                if connection is not None:
                    connection.close()
                connection = None
                with self._lock:
                    heapq.heappush(self._late, chat)
                time.sleep(_PAUSE)
        if connection is not None:
            connection.close()

    def _next_late(self) -> tuple[float, str] | None:
        """Take the conversation that is to begin now; an empty one where none is, None at the end."""
        with self._lock:
            if self._late and (self._stopping.is_set() or self._late[0][0] <= time.monotonic()):
                return heapq.heappop(self._late)
        return None if self._stopping.is_set() and self.done else (0.0, "")
