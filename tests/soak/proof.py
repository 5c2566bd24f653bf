"""The proof after a run: every row of the outbox, of history and of Kafka, held to what was committed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

Connection = psycopg.Connection[tuple[Any, ...]]

_POISON: Final = "o.payload ? 'poison'"

# What is wrong, each with the ids of the rows that it is wrong with.
_QUESTIONS: Final = {
    # Good messages without their row of history, whatever their status says.
    "lost": f"""
        select o.id from agent_outbox_messages o
         where not {_POISON} and not exists (select from chat_histories h where h.outbox_id = o.id)""",
    # A second row, a row for a message that nobody committed, or that was to die.
    "doubled": f"""
        select h.outbox_id from chat_histories h group by h.outbox_id having count(*) > 1
        union all
        select h.outbox_id from chat_histories h left join agent_outbox_messages o on o.id = h.outbox_id
         where o.id is null or {_POISON} or o.payload ? 'aborted'""",
    "reordered": """
        select outbox_id from (
            select outbox_id, lag(outbox_id) over (partition by chat_id order by id) as before from chat_histories
        ) as pairs where outbox_id < before""",
    "stuck": f"""
        select o.id from agent_outbox_messages o
         where o.status <> (case when {_POISON} then 'dead' else 'consumed' end)""",
    "differing": """
        select o.id from agent_outbox_messages o join chat_histories h on h.outbox_id = o.id
         where h.message_content is distinct from o.payload->>'message_content'
            or h.chat_id is distinct from o.message_key
            or h.user_id::text is distinct from o.payload->>'user_id'""",
    # A retry that no fault of the message explains: an outage has cost it one.
    "charged": f"""
        select o.id from agent_outbox_messages o
         where o.retry_count > 0 and not {_POISON}
           and not exists (select from agent_chats c where c.chat_id = o.message_key and c.late)""",
}
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Proof:
    """How many rows each thing is wrong with; all but the first four must be 0."""

    written: int
    stored: int
    dead_by_plan: int
    copies_in_kafka: int
    lost: int
    doubled: int
    reordered: int
    stuck: int
    differing: int
    charged: int
    missing_in_kafka: int
    invented_in_kafka: int
    samples: dict[str, list[int]]

    @property
    def wrong(self) -> dict[str, int]:
        """What is wrong, with how many rows."""
        counts = {name: count for name, count in asdict(self).items() if isinstance(count, int)}
        return {name: count for name, count in list(counts.items())[4:] if count}


def prove(connection: Connection, bootstrap_servers: str, topic: str) -> Proof:
    """Compare the three, row by row."""
    wrong = {name: [n for (n,) in connection.execute(question)] for name, question in _QUESTIONS.items()}
    outbox = {n for (n,) in connection.execute("select id from agent_outbox_messages")}
    copies = list(_copies(bootstrap_servers, topic))
    wrong["missing_in_kafka"] = sorted(outbox - set(copies))
    wrong["invented_in_kafka"] = sorted(set(copies) - outbox)
    return Proof(
        written=len(outbox),
        stored=_count(connection, "select count(*) from chat_histories"),
        dead_by_plan=_count(
            connection, f"select count(*) from agent_outbox_messages o where {_POISON} and o.status = 'dead'"
        ),
        copies_in_kafka=len(copies),
        samples={name: ids[:_SHOWN] for name, ids in wrong.items() if ids},
        **{name: len(ids) for name, ids in wrong.items()},
    )


def _count(connection: Connection, query: str) -> int:
    record = connection.execute(query).fetchone()
    assert record is not None
    return int(record[0])


def _copies(bootstrap_servers: str, topic: str) -> Iterable[int]:
    """Yield the outbox id of every message of a topic."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "proof",
            "enable.auto.commit": False,
            "enable.partition.eof": False,
            "log_level": 0,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
        ends = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=20)[1] for n in partitions}
        consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in ends])
        unread = {n for n, end in ends.items() if end}
        while unread:
            for message in consumer.consume(10_000, 5):
                if message.error() is not None:
                    continue
                partition, offset, value = message.partition(), message.offset(), message.value()
                assert partition is not None
                assert offset is not None
                assert value is not None
                yield int(json.loads(value)["outbox_id"])
                if offset >= ends[partition] - 1:
                    unread.discard(partition)
    finally:
        consumer.close()
