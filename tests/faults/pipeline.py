"""A pipeline that is set up, what is enqueued in it, and the proof that all of it came out as it must."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Producer
from psycopg.types.json import Jsonb

from tests.integration.scenario import OUTBOX, PROGRESS, Connection, one, set_up
from tests.services import Database, Kafka, Process, environment, eventually

HISTORY = "public.chat_histories"
KEYS = ("key-1", "key-2", "key-3")
TOO_LONG = "c" * 37


class Pipeline:
    """One database and one topic, with the processes between them."""

    def __init__(
        self, database: Database, kafka: Kafka, topic: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.database = database
        self.kafka = kafka
        self.topic = topic
        self.env = environment(database, kafka, topic) | dict(variables or {})
        self.slot = self.env["CONNECTOR_SLOT_NAME"]
        set_up(self.env)
        self.app: Connection = database.connect()
        self.wanted: dict[int, str] = {}
        """The status that each row must come to."""
        self.spent: set[int] = set()
        """Rows that may have paid for a failure."""
        self.processes: dict[str, Process] = {}

    def close(self) -> None:
        """Close what the test itself has opened."""
        self.app.close()

    def start(self, command: str, **variables: str) -> Process:
        """Start the reader or the sink; it is the one that `tend` keeps running."""
        # Named, a sink that was killed has its partitions back at once.
        process = Process(command, env=self.env | {"CONNECTOR_POD_NAME": command} | variables).start()
        self.processes[command] = process
        return process

    def tend(self) -> None:
        """Start again what has ended, as an orchestrator would."""
        for command, process in list(self.processes.items()):
            if process.returncode is not None:
                self.start(command)

    def enqueue(self, rows: int = 5, due_in: float | None = None, table: str = OUTBOX) -> list[int]:
        """Enqueue so many rows on each of three keys, in one transaction."""
        with self.app.transaction():
            return [
                self.insert(key, message_content=str(number), table=table, due_in=due_in)
                for number in range(rows)
                for key in KEYS
            ]

    def insert(
        self,
        key: str,
        wanted: str = "consumed",
        *,
        topic: str = "",
        table: str = OUTBOX,
        due_in: float | None = None,
        max_retry: int = 20,
        **payload: Any,
    ) -> int:
        """Enqueue one row, which must come to a status; `payload` changes that of a good message."""
        document = {"user_id": 7, "chat_id": key, "message_content": "hello", "role": "user", **payload}
        outbox_id = int(
            one(
                self.app,
                f"insert into {table} (biz_type, topic, message_key, payload, max_retry, next_retry_at)"
                " values (%s, %s, %s, %s, %s, clock_timestamp() + %s::float * interval '1 second') returning id",
                ["chat_history_persist", topic or self.topic, key, Jsonb(document), max_retry, due_in],
            )
        )
        self.wanted[outbox_id] = wanted
        return outbox_id

    def send_garbage(self) -> None:
        """Put a value into the topic that names no row."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers, "log_level": 0})
        producer.produce(self.topic, json.dumps({"no": "envelope"}).encode(), KEYS[0])
        assert producer.flush(20) == 0

    def poison(self) -> None:
        """Enqueue a row that the database refuses twice and that is dead then, and one behind it that has to wait."""
        self.spent.add(self.insert("poisoned", "dead", chat_id=TOO_LONG, max_retry=2))
        self.insert("poisoned")

    def lsn(self) -> str:
        """Return how far the WAL is written."""
        return str(one(self.app, "select pg_current_wal_lsn()"))

    def statuses(self) -> dict[int, str]:
        """Return each row's status."""
        return dict(self.app.execute(f"select id, status from {OUTBOX}").fetchall())

    def unlike(self) -> dict[int, str]:
        """Return the rows that have not come to what they must, with their status."""
        return {outbox_id: status for outbox_id, status in self.statuses().items() if self.wanted[outbox_id] != status}

    def is_settled(self) -> bool:
        """Tell whether every row has come to what it must; what has ended meanwhile is started again."""
        self.tend()
        return not self.unlike()

    def prove(self, within: float = 30.0) -> None:
        """Wait until every row is settled, then hold history to the outbox and the slot to its record."""
        eventually(self.is_settled, within=within, what="the settling of every row")
        stored = self.app.execute(
            f"select o.message_key, h.outbox_id from {HISTORY} as h left join {OUTBOX} as o on o.id = h.outbox_id"
            " order by h.id"
        ).fetchall()
        wanted = [outbox_id for outbox_id, status in self.wanted.items() if status == "consumed"]
        assert sorted(outbox_id for _, outbox_id in stored) == sorted(wanted), "not each message once"
        by_key = defaultdict(list)
        for key, outbox_id in stored:
            by_key[key].append(outbox_id)
        for key, ids in by_key.items():
            assert ids == sorted(ids), f"the order of {key}: {ids}"
        paid = {outbox_id for (outbox_id,) in self.app.execute(f"select id from {OUTBOX} where retry_count > 0")}
        assert paid <= self.spent, "retries that are not the messages' fault"
        eventually(self._is_slot_as_recorded, within=within, what="a slot that is as it is recorded")

    def _is_slot_as_recorded(self) -> bool:
        """Tell whether nothing is owed; the slot is never further than its record."""
        ahead, owed = self.app.execute(
            f"select s.confirmed_flush_lsn > p.confirmed_lsn, p.catch_up_owed from {PROGRESS} as p"
            " left join pg_replication_slots as s using (slot_name)"
        ).fetchone() or (None, None)
        assert ahead is not True
        self.tend()
        return (ahead, owed) == (False, False)

    def confirmed_beyond(self, lsn: str) -> bool:
        """Tell whether the slot is confirmed further than a position."""
        query = "select confirmed_flush_lsn > %s::pg_lsn from pg_replication_slots where slot_name = %s"
        return bool(one(self.app, query, [lsn, self.slot]))


PipelineFactory = Callable[[Database, Kafka, str, Mapping[str, str]], Pipeline]
