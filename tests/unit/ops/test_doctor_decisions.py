"""What the doctor makes of facts that a test cannot bring about on a shared server."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from connector.kafka import GroupMember, GroupState, Rights, TopicState
from connector.ops.consumer_lag import PartitionLag
from connector.ops.database_checks import DatabaseExamination, Refused, Replication, judge_database
from connector.ops.expectations import Expectations
from connector.ops.findings import Finding, Level, as_json, as_lines, failed, size
from connector.ops.kafka_checks import KafkaFacts, judge_kafka
from connector.outbox import Table
from connector.store.bookkeeping import Progress, SlotState
from connector.store.inspection import DatabaseFacts, Others, Role, Server, Session, Slot
from connector.store.queries import Tables
from connector.store.schema import EnqueueTarget

GB = 1 << 30
EXPECTED = Expectations(
    tables=Tables(Table("public", "outbox"), Table("public", "history")),
    publication_name="p",
    slot_name="s",
    wal_budget=4 * GB,
    topics=("t",),
    dead_letter_topic="t.dead",
    topic_partitions=6,
    topic_replication=3,
    group_id="g",
)
SERVER = Server(
    version=180_001,
    version_text="18.1",
    wal_level="logical",
    in_recovery=False,
    most_slots=10,
    slots=1,
    most_walsenders=10,
    walsenders=1,
    slot_keep_bytes=None,
    slot_idle_seconds=None,
    database="app",
    system_identifier="1",
)
SLOT = Slot(
    state=SlotState(1, "reserved", 100, "pgoutput", "app", 1000),
    logical=True,
    active=True,
    failover=True,
    invalidation_reason=None,
    progress=Progress(
        "1", 100, catch_up_owed=False, catch_up_through=None, catch_up_reason=None, published_since=None, timeline=1
    ),
    system_identifier="1",
)
FACTS = DatabaseFacts(
    server=SERVER,
    role=Role("app", superuser=False, replication=True),
    others=Others(serve_reader=False, serve_sink=False),
    session=Session(direct=True, shared=False),
    clock_ahead_seconds=0.0,
    clock_uncertainty_seconds=0.001,
    outbox=None,
    history=None,
    slot_progress=None,
    sink_offsets=None,
    applied_migrations=frozenset(),
    enqueue=EnqueueTarget('"public"."outbox"', is_ours=True, exists=True),
    publication=None,
    slot=SLOT,
    waiting_topics=(),
)
REACHED = Replication("1", "app", in_recovery=False)
SETTINGS = {"min.insync.replicas": "2", "max.message.bytes": "1048588", "cleanup.policy": "delete"}
KAFKA = KafkaFacts(
    topics={"t": TopicState(6, 3, 3, 0), "t.dead": TopicState(1, 3, 3, 0)},
    settings={"t": SETTINGS, "t.dead": SETTINGS},
    group=GroupState("stable", [GroupMember("c", "/10.0.0.1", None, 6)]),
    lags=[PartitionLag("t", 0, 5, 0, 9)],
)


def judged(facts: DatabaseFacts, check: str, replication: Replication | Refused = REACHED) -> Finding:
    """Return the first finding of one check."""
    findings = judge_database(DatabaseExamination(facts, replication, same_url=False, expected=EXPECTED))
    return next(finding for finding in findings if finding.check == check)


def of_server(check: str, **changes: object) -> Finding:
    """Return what a check says of a server that differs so."""
    return judged(replace(FACTS, server=replace(SERVER, **changes)), check)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "level"),
    [(140_009, Level.FAIL), (150_000, Level.OK), (180_006, Level.OK), (190_000, Level.WARNING)],
)
def test_server_versions_15_to_18_are_supported(version: int, level: Level) -> None:
    """An older server fails; a newer one is only untested."""
    assert of_server("server version", version=version).level is level


def test_a_wal_level_below_logical_fails_with_the_statement_that_raises_it() -> None:
    """Logical replication needs wal_level logical, and a restart after the change."""
    found = of_server("wal_level", wal_level="replica")
    assert found.level is Level.FAIL
    assert "alter system set wal_level = logical" in found.remedy


def test_a_standby_fails() -> None:
    """A standby takes no writes."""
    assert of_server("primary", in_recovery=True).level is Level.FAIL


@pytest.mark.parametrize(
    ("keep", "level"),
    [(None, Level.OK), (4 * GB, Level.OK), (8 * GB, Level.OK), (GB, Level.WARNING), (0, Level.WARNING)],
)
def test_max_slot_wal_keep_size_below_the_budget_is_warned_of(keep: int | None, level: Level) -> None:
    """Where it is smaller the server would invalidate the slot before the reader lets it go forward."""
    found = of_server("server's slot limits", slot_keep_bytes=keep)
    assert found.level is level
    assert level is Level.OK or "max_slot_wal_keep_size" in found.remedy


def test_an_idle_slot_timeout_is_warned_of() -> None:
    """A server that drops the slots of readers that are away is told of."""
    assert of_server("server's slot limits", slot_idle_seconds=600).level is Level.WARNING


def test_no_free_slot_matters_only_while_ours_is_not_there() -> None:
    """All slots in use fails before setup, and is fine afterwards."""
    assert of_server("replication slots", slots=10).level is Level.OK
    full = replace(FACTS, server=replace(SERVER, slots=10), slot=replace(SLOT, state=None))
    assert judged(full, "replication slots").level is Level.FAIL


def test_no_free_walsender_matters_more_while_no_reader_runs() -> None:
    """All walsenders in use fails, unless our reader has one of them: then none can stand by."""
    assert of_server("walsenders", walsenders=10).level is Level.WARNING
    full = replace(FACTS, server=replace(SERVER, walsenders=10), slot=replace(SLOT, active=False))
    assert judged(full, "walsenders").level is Level.FAIL


@pytest.mark.parametrize(
    ("ahead", "uncertain", "level"),
    [(0.9, 0.0, Level.OK), (1.5, 0.1, Level.WARNING), (-1.5, 0.1, Level.WARNING), (1.5, 0.6, Level.OK)],
)
def test_clocks_more_than_a_second_apart_are_warned_of(ahead: float, uncertain: float, level: Level) -> None:
    """A difference counts only where the time that the question took does not explain it."""
    facts = replace(FACTS, clock_ahead_seconds=ahead, clock_uncertainty_seconds=uncertain)
    assert judged(facts, "clock").level is level


@pytest.mark.parametrize(
    ("replication", "named"),
    [
        (Replication("2", "app", in_recovery=False), "another database cluster"),
        (Replication("1", "other", in_recovery=False), "leads to database 'other'"),
        (Replication("1", "app", in_recovery=True), "standby"),
        (Refused("no pg_hba.conf entry"), "no pg_hba.conf entry"),
    ],
)
def test_a_replication_url_that_leads_elsewhere_fails(replication: Replication | Refused, named: str) -> None:
    """The stream must come from the primary and the database that the outbox is in."""
    found = judged(FACTS, "replication connection", replication)
    assert found.level is Level.FAIL
    assert named in found.text


def test_a_slot_that_the_server_invalidated_fails_with_its_reason() -> None:
    """A lost slot is named with what the server says of it."""
    assert SLOT.state
    lost = replace(SLOT, state=SLOT.state._replace(wal_status="lost"), invalidation_reason="wal_removed")
    found = judged(replace(FACTS, slot=lost), "slot")
    assert found.level is Level.FAIL
    assert "wal_removed" in found.text


@pytest.mark.parametrize(
    ("retained", "status", "level"),
    [
        (GB, "reserved", Level.OK),
        (3 * GB, "extended", Level.WARNING),
        (5 * GB, "extended", Level.FAIL),
        (GB, "unreserved", Level.WARNING),
    ],
)
def test_retained_wal_is_held_against_the_budget(retained: int, status: str, level: Level) -> None:
    """More than half of the budget is worth a look, more than all of it fails."""
    assert SLOT.state
    slot = replace(SLOT, state=SLOT.state._replace(retained_bytes=retained, wal_status=status))
    assert judged(replace(FACTS, slot=slot), "retained WAL").level is level


@pytest.mark.parametrize(
    ("version", "failover", "named"),
    [(160_000, None, "has no failover slots"), (170_000, True, "survives"), (170_000, False, "is no failover slot")],
)
def test_failover_is_told_and_never_fails(version: int, failover: bool | None, named: str) -> None:
    """Whether the slot survives a failover is information: the table covers what it would miss."""
    facts = replace(FACTS, server=replace(SERVER, version=version), slot=replace(SLOT, failover=failover))
    found = judged(facts, "failover")
    assert found.level is Level.OK
    assert named in found.text


@pytest.mark.parametrize(
    ("state", "needed", "level", "named"),
    [
        (TopicState(6, 3, 3, 0), "2", Level.OK, "partitions 6"),
        (TopicState(6, 3, 3, 0), "4", Level.FAIL, "only 3 replicas"),
        (TopicState(6, 3, 3, 0), "3", Level.WARNING, "one broker's restart"),
        (TopicState(6, 3, 1, 0), "2", Level.FAIL, "1 replicas in sync"),
        (TopicState(6, 3, 3, 2), "2", Level.FAIL, "no leader"),
    ],
)
def test_replicas_must_be_enough_for_acknowledgements(state: TopicState, needed: str, level: Level, named: str) -> None:
    """The producer waits for min.insync.replicas: too few replicas, or too few in sync, fail."""
    facts = replace(
        KAFKA,
        topics={**KAFKA.topics, "t": state},
        settings={**KAFKA.settings, "t": {**SETTINGS, "min.insync.replicas": needed}},
    )
    found = next(finding for finding in judge_kafka(facts, EXPECTED) if finding.check == "topics")
    assert (found.level, named in found.text) == (level, True)


def test_settings_that_the_cluster_does_not_tell_are_skipped() -> None:
    """A client that may not read a topic's settings is told what to allow, and fails nothing."""
    findings = list(judge_kafka(replace(KAFKA, settings={}), EXPECTED))
    assert not failed(findings)
    assert "DescribeConfigs" in next(finding.text for finding in findings if finding.level is Level.SKIPPED)


def test_a_topic_that_only_the_sink_needs_may_be_hidden_from_the_reader() -> None:
    """The account of one process passes with what the other needs; a topic that both need must be seen."""
    without = {topic: state for topic, state in KAFKA.topics.items() if topic != "t.dead"}
    findings = list(judge_kafka(replace(KAFKA, topics=without, hidden=frozenset({"t.dead"})), EXPECTED))
    assert not failed(findings)
    found = next(finding for finding in findings if finding.check == "dead-letter topic")
    assert (found.level, "Write and Describe on topic t.dead" in found.remedy) == (Level.WARNING, True)

    absent = judge_kafka(replace(KAFKA, topics=without), EXPECTED)
    assert [finding.text for finding in absent if finding.level is Level.FAIL] == ["there is no topic t.dead"]
    hidden = judge_kafka(replace(KAFKA, topics={}, hidden=frozenset({"t", "t.dead"})), EXPECTED)
    told = [finding.remedy for finding in hidden if finding.level is Level.FAIL]
    assert told == ["allow Describe on topic t to its account"]


ALL = frozenset({"READ", "WRITE", "DESCRIBE"})
SEEN = frozenset({"DESCRIBE"})


@pytest.mark.parametrize(
    ("rights", "level", "named"),
    [
        (Rights({}, None), Level.SKIPPED, "does not tell"),
        (Rights({"t": ALL, "t.dead": ALL}, ALL), Level.OK, "reader and sink"),
        (Rights({"t": ALL, "t.dead": ALL}, None), Level.OK, "reader and sink"),
        (Rights({"t": ALL - {"WRITE"}, "t.dead": ALL}, ALL), Level.WARNING, "for the reader: allow Write on topic t"),
        (Rights({"t": ALL - {"READ"}, "t.dead": ALL}, ALL), Level.WARNING, "for the sink: allow Read on topic t"),
        (Rights({"t": ALL, "t.dead": SEEN}, ALL), Level.WARNING, "allow Write on topic t.dead"),
        (Rights({"t": ALL, "t.dead": ALL}, frozenset()), Level.WARNING, "allow Read on group g"),
        (Rights({"t": SEEN, "t.dead": ALL}, ALL), Level.FAIL, "neither reader nor sink"),
    ],
)
def test_an_account_that_may_serve_one_process_is_told_what_the_other_needs(
    rights: Rights, level: Level, named: str
) -> None:
    """Rights on topics and group are compared with what each process does; only an account for neither fails."""
    found = next(f for f in judge_kafka(replace(KAFKA, rights=rights), EXPECTED) if f.check == "Kafka rights")
    assert found.level is level
    assert named in f"{found.text} {found.remedy}"


@pytest.mark.parametrize(
    ("group", "named"),
    [
        (GroupState("empty", []), "no members"),
        (GroupState("preparing_rebalancing", [GroupMember("c", "h", None, 0)]), "preparing rebalancing"),
        (GroupState("stable", [GroupMember("a", "h", None, 6), GroupMember("b", "h", None, 0)]), "1 of 2 members"),
        ("not authorised", "not authorised"),
    ],
)
def test_a_group_that_does_not_work_is_worth_a_look(group: GroupState | str, named: str) -> None:
    """No members, an endless rebalance, members without work, and a group that may not be seen."""
    findings = judge_kafka(replace(KAFKA, group=group), EXPECTED)
    found = next(finding for finding in findings if finding.check == "consumer group")
    assert found.level is Level.WARNING
    assert named in found.text


@pytest.mark.parametrize(
    ("committed", "first", "lag", "deleted"),
    [(None, 0, 9, 0), (None, 4, 5, 0), (5, 0, 4, 0), (2, 4, 5, 2), (9, 9, 0, 0)],
)
def test_lag_counts_what_is_still_there_to_read(committed: int | None, first: int, lag: int, deleted: int) -> None:
    """A group that never committed starts at the first message; what was removed unread counts apart."""
    partition = PartitionLag("t", 0, committed, first, 9)
    assert (partition.lag, partition.deleted_unread) == (lag, deleted)


def test_findings_are_a_line_each_with_their_remedy() -> None:
    """Lines start with the level, and end with the remedy; the last one counts."""
    findings = [Finding("a", Level.OK, "fine"), Finding("bc", Level.FAIL, "broken", "mend it")]
    assert as_lines(findings) == [
        "ok       a   fine",
        "FAIL     bc  broken → mend it",
        "",
        "1 ok, 0 to look at, 1 failed",
    ]
    assert json.loads(as_json(findings)) == {
        "ok": False,
        "checks": [
            {"check": "a", "level": "ok", "text": "fine", "remedy": ""},
            {"check": "bc", "level": "fail", "text": "broken", "remedy": "mend it"},
        ],
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 kB"), (4 * GB, "4 GB"), (1536, "1.5 kB"), (-512, "-512 B")],
)
def test_sizes_are_written_as_postgresql_writes_them(count: int, text: str) -> None:
    """Units are powers of 1024, with a digit after the point where it says something."""
    assert size(count) == text
