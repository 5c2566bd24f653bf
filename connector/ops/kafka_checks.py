"""What `doctor` makes of the facts about Kafka. Every check is a pure decision over facts that were gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from connector.kafka import GroupState, Rights, TopicState
from connector.ops.consumer_lag import PartitionLag
from connector.ops.expectations import Expectations
from connector.ops.findings import Finding, Verdict, fail, listed, ok, serving, size, skipped, warning

_SETUP: Final = "run `outbox-connector setup`"
_ORDINARY_MESSAGE: Final = 1_000_000
_UNTOLD: Final = Rights({}, None)
_SHORT_RETENTION_MS: Final = 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class KafkaFacts:
    """Everything that `doctor` asks of Kafka. A text in place of a fact tells why it could not be had.

    `hidden` are topics that this client may not see, be they there or not.
    """

    topics: Mapping[str, TopicState]
    settings: Mapping[str, Mapping[str, str]]
    group: GroupState | str
    lags: Sequence[PartitionLag] | str
    hidden: frozenset[str] = frozenset()
    rights: Rights = _UNTOLD


Check = Callable[[KafkaFacts, Expectations], Iterable[Verdict]]


def judge_kafka(facts: KafkaFacts, expected: Expectations) -> Iterator[Finding]:
    """Make every check, in the order in which one would mend things."""
    for name, check in CHECKS.items():
        for verdict in check(facts, expected):
            yield Finding(name, *verdict)


def skip_kafka(reason: str) -> Iterator[Finding]:
    """Tell of every check that it could not be made."""
    for name in CHECKS:
        yield Finding(name, *skipped(reason))


def _topics(facts: KafkaFacts, expected: Expectations) -> Iterator[Verdict]:
    for topic in expected.topics:
        yield from _topic(facts, topic, expected.topic_replication, expected.topic_partitions)


def _dead_letter_topic(facts: KafkaFacts, expected: Expectations) -> Iterator[Verdict]:
    topic = expected.dead_letter_topic
    if topic in facts.hidden:
        # As with the database's roles: only the sink needs it, and the doctor may run as the reader.
        yield warning(
            f"this client may not see topic {topic}; fine if the sink uses another account",
            f"for the sink: allow Write and Describe on topic {topic}",
        )
    else:
        yield from _topic(facts, topic, expected.topic_replication)


def _topic(facts: KafkaFacts, topic: str, replication: int, partitions: int | None = None) -> Iterator[Verdict]:
    state, settings = facts.topics.get(topic), facts.settings.get(topic)
    if state is None:
        if topic in facts.hidden:
            yield fail(f"this client may not see topic {topic}", f"allow Describe on topic {topic} to its account")
        else:
            yield fail(f"there is no topic {topic}", _SETUP)
        return
    problems = [*_shape(topic, state, replication, partitions)]
    if not settings:
        yield from problems
        yield skipped(f"the cluster does not tell the settings of topic {topic}: allow DescribeConfigs on it")
        return
    problems += [*_durability(topic, state, settings), *_size_limit(topic, settings), *_retention(topic, settings)]
    yield from problems or [
        ok(f"{topic}: partitions {state.partitions}, replicas {state.replication}, messages up to {_limit(settings)}")
    ]


def _shape(topic: str, state: TopicState, replication: int, partitions: int | None) -> Iterator[Verdict]:
    if state.leaderless:
        yield fail(
            f"{topic}: {state.leaderless} of {state.partitions} partitions have no leader", "bring their brokers back"
        )
    if partitions is not None and state.partitions != partitions:
        yield warning(
            f"{topic} has {state.partitions} partitions, CONNECTOR_TOPIC_PARTITIONS is {partitions}",
            "let the setting say what is there; adding partitions moves keys, so do it only while nothing is in flight",
        )
    if state.replication < replication:
        yield warning(
            f"{topic} has {state.replication} replicas, CONNECTOR_TOPIC_REPLICATION is {replication}",
            "reassign its partitions to more brokers",
        )


def _durability(topic: str, state: TopicState, settings: Mapping[str, str]) -> Iterator[Verdict]:
    needed = _number(settings, "min.insync.replicas", 1)
    if needed > state.replication:
        yield fail(
            f"{topic}: min.insync.replicas is {needed}, but there are only {state.replication} replicas: Kafka takes"
            " no message",
            f"set min.insync.replicas to at most {state.replication}, or add replicas",
        )
    elif state.in_sync < needed:
        yield fail(
            f"{topic}: a partition has {state.in_sync} replicas in sync; min.insync.replicas is {needed}",
            "bring the missing brokers back",
        )
    elif needed == state.replication > 1:
        yield warning(
            f"{topic}: min.insync.replicas is {needed} of {state.replication} replicas, so that one broker's restart"
            " stops publishing",
            f"set min.insync.replicas to {needed - 1}",
        )


def _size_limit(topic: str, settings: Mapping[str, str]) -> Iterator[Verdict]:
    if _number(settings, "max.message.bytes", _ORDINARY_MESSAGE) < _ORDINARY_MESSAGE:
        yield warning(
            f"{topic}: max.message.bytes allows only {_limit(settings)}; a larger row is dead at once",
            "raise it, unless payloads are that small",
        )


def _retention(topic: str, settings: Mapping[str, str]) -> Iterator[Verdict]:
    if "compact" in settings.get("cleanup.policy", ""):
        yield fail(
            f"{topic} is compacted: Kafka deletes a message once a later one of its key is there, read or not",
            f"kafka-configs.sh --bootstrap-server … --alter --topic {topic} --add-config cleanup.policy=delete",
        )
    retention = _number(settings, "retention.ms", -1)
    if 0 <= retention < _SHORT_RETENTION_MS:
        yield warning(
            f"{topic} keeps messages for {retention / 3_600_000:.1f} h only: a sink away for longer misses some",
            "raise retention.ms; `outbox-connector redrive --stuck` publishes again what was missed",
        )


def _number(settings: Mapping[str, str], name: str, otherwise: int) -> int:
    text = settings.get(name) or ""
    return int(text) if text.lstrip("-").isdigit() else otherwise


def _limit(settings: Mapping[str, str]) -> str:
    limit = _number(settings, "max.message.bytes", -1)
    return "an unknown size" if limit < 0 else size(limit)


def _rights(facts: KafkaFacts, expected: Expectations) -> Iterator[Verdict]:
    """Tell which process this client's account may serve."""
    if not facts.rights.topics and facts.rights.group is None:
        yield skipped("the cluster does not tell what this client may do")
        return
    reader = _allow("reader", _lacks_for_reader(facts, expected))
    yield serving("this client's account", reader, _allow("sink", _lacks_for_sink(facts, expected)))


def _lacks_for_reader(facts: KafkaFacts, expected: Expectations) -> list[str]:
    return [f"Write on topic {topic}" for topic in expected.topics if not _may(facts, topic, "WRITE")]


def _lacks_for_sink(facts: KafkaFacts, expected: Expectations) -> list[str]:
    dead, group = expected.dead_letter_topic, facts.rights.group
    lacks = [f"Read on topic {topic}" for topic in expected.topics if not _may(facts, topic, "READ")]
    if group is not None and "READ" not in group:
        lacks.append(f"Read on group {expected.group_id}")
    if dead in facts.hidden or not _may(facts, dead, "WRITE"):
        lacks.append(f"Write on topic {dead}")
    return lacks


def _may(facts: KafkaFacts, topic: str, operation: str) -> bool:
    told = facts.rights.topics.get(topic)
    return told is None or operation in told  # of a topic that is missing or hidden another check tells


def _allow(process: str, rights: Sequence[str]) -> str:
    return f"for the {process}: allow {', '.join(rights)}" if rights else ""


def _group(facts: KafkaFacts, expected: Expectations) -> Iterator[Verdict]:
    group, start = facts.group, "start a sink"
    name = expected.group_id
    if isinstance(group, str):
        yield warning(f"group {name} cannot be asked: {group}", "allow Describe on the group")
        return
    if group.state == "unknown":
        yield skipped(f"the cluster does not tell the state of group {name}")
        return
    idle = sum(not member.partitions for member in group.members)
    if not group.members:
        yield warning(f"group {name} has no members ({group.state})", start)
    elif group.state != "stable":
        yield warning(
            f"group {name} is {group.state.replace('_', ' ')} with {len(group.members)} members",
            "ask again in a moment; if it stays so, a member fails its heartbeats",
        )
    elif idle:
        yield warning(
            f"group {name}: {idle} of {len(group.members)} members have no partition to read",
            "run no more sinks than there are partitions, or add partitions",
        )
    else:
        members = listed(member.instance_id or member.client_id for member in group.members)
        yield ok(f"group {name} is stable with {len(group.members)} members: {members}")


def _lag(facts: KafkaFacts, expected: Expectations) -> Iterator[Verdict]:
    if isinstance(facts.lags, str):
        yield skipped(facts.lags)
        return
    behind = sum(partition.lag for partition in facts.lags)
    lost = [partition for partition in facts.lags if partition.deleted_unread]
    running = not isinstance(facts.group, str) and bool(facts.group.members)
    if lost:
        places = listed(f"{partition.topic}/{partition.partition}" for partition in lost)
        yield fail(
            f"Kafka deleted {sum(partition.deleted_unread for partition in lost)} messages before group"
            f" {expected.group_id} had read them, in {places}",
            "publish the rows again with `outbox-connector redrive --stuck --yes`, then raise retention.ms",
        )
    if behind and not running:
        yield warning(f"{behind} messages wait for a sink", "start a sink")
    elif not lost:
        yield ok(f"{behind} messages to read in {len(facts.lags)} partitions")


CHECKS: Final[Mapping[str, Check]] = {
    "topics": _topics,
    "dead-letter topic": _dead_letter_topic,
    "Kafka rights": _rights,
    "consumer group": _group,
    "consumer lag": _lag,
}
