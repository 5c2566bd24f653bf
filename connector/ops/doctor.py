"""`doctor`: checks everything that can be wrong before it goes wrong.

It gathers facts from PostgreSQL and Kafka side by side, each within its time, and lets pure checks decide on them. A
check that cannot be made because an earlier one failed is reported as skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import psycopg

from connector.kafka import Admin, Kafka, KafkaException
from connector.observability.logs import redact
from connector.ops.consumer_lag import consumer_lag
from connector.ops.database_checks import DatabaseExamination, Refused, Replication, judge_database, skip_database
from connector.ops.expectations import Expectations
from connector.ops.findings import Finding, fail, ok, skipped
from connector.ops.kafka_checks import KafkaFacts, judge_kafka, skip_kafka
from connector.replication import ReplicationConnection
from connector.store.bookkeeping import Connection
from connector.store.connections import connect, describe
from connector.store.inspection import DatabaseFacts, Inspection

T = TypeVar("T")

ANSWER_SECONDS: Final = 5
"""How long a server is waited for, each time something is asked of it."""

_SERVICE_SECONDS: Final = 20.0
_POSTGRES: Final = "PostgreSQL"
_REPLICATION: Final = "PostgreSQL for replication"
_KAFKA: Final = "Kafka"


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """How to reach both services, and what is expected of them."""

    database_url: str
    replication_url: str
    kafka: Kafka
    group_instance_id: str | None
    expected: Expectations


def examine(options: DoctorOptions) -> list[Finding]:
    """Make every check. A service that is away costs seconds, and its checks are skipped.

    Raises:
        ConfigurationError: librdkafka refuses an option.
    """
    admin = options.kafka.admin()
    database = _Answer(lambda: _ask_database(options))
    replication: _Answer[Replication] | None = None
    kafka = _Answer(lambda: _ask_kafka(admin, options.expected))
    facts = database.within(_SERVICE_SECONDS)
    same_url = options.replication_url == options.database_url
    if not (same_url and isinstance(facts, _Away)):
        # Only now, so that this connection is not counted among the walsenders.
        replication = _Answer(lambda: _ask_replication(options.replication_url))
    stream = _Away("") if replication is None else replication.within(_SERVICE_SECONDS)
    findings = [
        *_database_findings(options, facts, stream, same_url=same_url),
        *_kafka_findings(options, kafka.within(_SERVICE_SECONDS), admin.trouble()),
    ]
    return [finding._replace(text=redact(finding.text), remedy=redact(finding.remedy)) for finding in findings]


@dataclass(frozen=True, slots=True)
class _Away:
    """Why a service gave no answer."""

    reason: str


class _Answer(Generic[T]):
    """What a service answers to questions that run beside others; one that hangs is left behind."""

    def __init__(self, ask: Callable[[], T]) -> None:
        """Begin to ask."""
        self._ask = ask
        self._answer: T | _Away | None = None
        self._trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except psycopg.Error as error:
            self._answer = _Away(" ".join(describe(error).split()))
        except KafkaException as error:
            self._answer = _Away(error.args[0].str())
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody sees it
            self._trouble = error

    def within(self, seconds: float) -> T | _Away:
        """Return the answer, or why there is none; any other error of the asking is raised."""
        self._thread.join(seconds)
        if self._trouble is not None:
            raise self._trouble
        if self._answer is None:
            return _Away(f"no answer within {seconds:.0f} s")
        return self._answer


def _ask_database(options: DoctorOptions) -> DatabaseFacts:
    expected = options.expected
    with _connection(options) as connection:
        inspection = Inspection(connection, expected.tables)
        return inspection.database(expected.publication_name, expected.slot_name, lambda: _connection(options))


def _connection(options: DoctorOptions) -> Connection:
    return connect(
        options.database_url,
        name="outbox-connector doctor",
        statement_seconds=ANSWER_SECONDS,
        lock_seconds=ANSWER_SECONDS,
        connect_seconds=ANSWER_SECONDS,
        prepare=False,
    )


def _ask_replication(url: str) -> Replication:
    connection = ReplicationConnection.open(url, ANSWER_SECONDS)
    try:
        system = connection.identify()
        return Replication(system.identifier, system.database, connection.in_recovery())
    finally:
        connection.close()


def _ask_kafka(admin: Admin, expected: Expectations) -> KafkaFacts:
    topics = admin.topics(ANSWER_SECONDS)
    wanted = (*expected.topics, expected.dead_letter_topic)
    ours = [topic for topic in wanted if topic in topics]
    partitions = [
        (topic, partition)
        for topic in expected.topics
        if topic in topics and not topics[topic].leaderless
        for partition in range(topics[topic].partitions)
    ]
    return KafkaFacts(
        topics,
        admin.topic_settings(ours, ANSWER_SECONDS),
        _or_why_not(lambda: admin.group(expected.group_id, ANSWER_SECONDS)),
        _or_why_not(lambda: consumer_lag(admin, expected.group_id, partitions, ANSWER_SECONDS)),
        admin.hidden([topic for topic in wanted if topic not in topics], ANSWER_SECONDS),
        admin.rights(ours, expected.group_id, ANSWER_SECONDS),
    )


def _or_why_not(question: Callable[[], T]) -> T | str:
    try:
        return question()
    except KafkaException as error:
        return str(error.args[0].str())


def _database_findings(
    options: DoctorOptions, facts: DatabaseFacts | _Away, stream: Replication | _Away, *, same_url: bool
) -> Iterator[Finding]:
    if isinstance(facts, _Away):
        remedy = "see that the server runs, and that CONNECTOR_DATABASE_URL and the PG* variables lead to it"
        yield Finding(_POSTGRES, *fail(f"cannot be reached: {facts.reason}", remedy))
    else:
        server = facts.server
        yield Finding(_POSTGRES, *ok(f"database {server.database} answers role {facts.role.name}"))
    if isinstance(facts, _Away):
        if same_url:
            yield Finding(_REPLICATION, *skipped("the same address as PostgreSQL"))
        elif isinstance(stream, _Away):
            remedy = "see that CONNECTOR_REPLICATION_URL leads to the server itself, and for a role with REPLICATION"
            yield Finding(_REPLICATION, *fail(f"cannot be reached: {stream.reason}", remedy))
        else:
            yield Finding(_REPLICATION, *ok("answers"))
        yield from skip_database("PostgreSQL cannot be reached")
        return
    replication = Refused(stream.reason) if isinstance(stream, _Away) else stream
    yield from judge_database(DatabaseExamination(facts, replication, same_url, options.expected))


def _kafka_findings(options: DoctorOptions, facts: KafkaFacts | _Away, trouble: str | None) -> Iterator[Finding]:
    if isinstance(facts, _Away):
        reason = trouble or facts.reason
        remedy = "see that the brokers run, that CONNECTOR_KAFKA_BOOTSTRAP_SERVERS names them, and that the addresses"
        remedy += " they advertise can be reached from here"
        yield Finding(_KAFKA, *fail(f"cannot be reached: {reason}", remedy))
        yield from skip_kafka("Kafka cannot be reached")
        return
    yield Finding(_KAFKA, *ok(f"{options.kafka.bootstrap_servers} answers"))
    yield from judge_kafka(facts, options.expected)
