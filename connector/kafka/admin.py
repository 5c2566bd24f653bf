"""The few administrative calls: topics, their settings, the group and its lag."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
    TopicDescription,
)

# A coordinator or a leader is there, and needs a moment: after its start, or because it was another broker just now.
_ABOUT_TO_ANSWER: Final = frozenset(
    {
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
    }
)


class TopicState(NamedTuple):
    """A topic as the cluster describes it; `in_sync` is the fewest replicas in sync of any of its partitions."""

    partitions: int
    replication: int
    in_sync: int = 0
    leaderless: int = 0


class GroupMember(NamedTuple):
    """A member of a consumer group, and how many partitions it has."""

    client_id: str
    host: str
    instance_id: str | None
    partitions: int


class GroupState(NamedTuple):
    """A consumer group as its coordinator describes it: `stable`, `empty`, or `dead`, which is a group never seen."""

    state: str
    members: list[GroupMember]


class Rights(NamedTuple):
    """What this client may do to topics and to a group, by Kafka's names, as far as the cluster tells."""

    topics: Mapping[str, frozenset[str]]
    group: frozenset[str] | None


class Admin:
    """The few administrative calls: topics, their settings, the group's lag."""

    def __init__(self, client: AdminClient, troubles: deque[KafkaError]) -> None:
        """Use an admin client, and what its `error_cb` puts into `troubles`."""
        self._client = client
        self._troubles = troubles

    def trouble(self) -> str | None:
        """Return what last stood between this client and a broker, such as a refused password; None for nothing."""
        self._client.poll(0)
        told = [error for error in self._troubles if error.code() != KafkaError._ALL_BROKERS_DOWN]  # noqa: SLF001
        return told[-1].str() if told else None

    def topics(self, timeout: float = 10) -> dict[str, TopicState]:
        """Return every topic that this client may see.

        Raises:
            KafkaException: no broker answered in time.
        """
        metadata = self._client.list_topics(timeout=timeout)
        return {
            name: TopicState(
                len(topic.partitions),
                max((len(p.replicas) for p in topic.partitions.values()), default=0),
                min((len(p.isrs) for p in topic.partitions.values()), default=0),
                sum(p.leader < 0 for p in topic.partitions.values()),
            )
            for name, topic in metadata.topics.items()
            if topic.error is None
        }

    def hidden(self, topics: Sequence[str], timeout: float = 5) -> frozenset[str]:
        """Return those of the topics that this client may not see, whether they are there or not."""
        return frozenset(topic for topic, found in self._described(topics, timeout) if _is_hidden(found))

    def rights(self, topics: Sequence[str], group_id: str, timeout: float = 5) -> Rights:
        """Return what this client may do; nothing is told of topics that it may not see, or by some brokers at all."""
        of_topics = {}
        for topic, found in self._described(topics, timeout, rights=True):
            if not isinstance(found, KafkaException) and found.authorized_operations is not None:
                of_topics[topic] = _names(found.authorized_operations)
        try:
            operations = self._group(group_id, timeout, rights=True).authorized_operations
        except KafkaException as error:
            operations = [] if error.args[0].code() == KafkaError.GROUP_AUTHORIZATION_FAILED else None
        return Rights(of_topics, None if operations is None else _names(operations))

    def _described(
        self, topics: Sequence[str], timeout: float, *, rights: bool = False
    ) -> Iterator[tuple[str, TopicDescription | KafkaException]]:
        """Yield each topic with its description, or why it cannot be had."""
        if not topics:
            return
        futures = self._client.describe_topics(
            TopicCollection([*topics]), include_authorized_operations=rights, request_timeout=timeout
        )
        for topic, future in futures.items():
            try:
                found: TopicDescription | KafkaException = future.result()
            except KafkaException as error:
                found = error
            yield topic, found

    def create_topics(self, names: Sequence[str], partitions: int, replication: int, timeout: float = 30) -> list[str]:
        """Make the topics that are not there; return the names of those made.

        Raises:
            KafkaException: the cluster refuses one of them.
        """
        if not names:
            return []
        made = []
        futures = self._client.create_topics(
            [NewTopic(name, num_partitions=partitions, replication_factor=replication) for name in names],
            operation_timeout=timeout,
            request_timeout=timeout,
        )
        for name, future in futures.items():
            try:
                future.result()
                made.append(name)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
        return made

    def require_leaders(self, topics: Sequence[str], timeout: float = 5) -> None:
        """Make sure that topics are known and each of their partitions is led; those hidden from this client pass.

        Raises:
            KafkaException: a topic is not known yet, or a partition has no leader that answers.
        """
        if not topics:
            return
        partitions: list[tuple[str, int]] = []
        for topic, found in self._described(topics, timeout):
            if not isinstance(found, KafkaException):
                partitions += [(topic, partition.id) for partition in found.partitions]
            elif not _is_hidden(found):
                raise found
        self.log_ranges(partitions, timeout)

    def topic_settings(self, topics: Iterable[str], timeout: float = 5) -> dict[str, dict[str, str]]:
        """Return the settings of each topic that the cluster tells about; none for those it does not."""
        resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
        settings: dict[str, dict[str, str]] = {}
        if not resources:
            return settings
        for resource, future in self._client.describe_configs(resources, request_timeout=timeout).items():
            try:
                settings[resource.name] = {name: entry.value for name, entry in future.result().items()}
            except KafkaException:
                continue
        return settings

    def group_offsets(self, group_id: str, timeout: float = 10) -> dict[tuple[str, int], int]:
        """Return the committed offset of each partition that the group has committed.

        Raises:
            KafkaException: the group cannot be asked.
        """
        # librdkafka crashes the process where the broker that it asks for offsets is not the coordinator, or not yet
        # (confluentinc/librdkafka#5040). Describing the group bears that answer, and waits for the coordinator.
        self.group(group_id, timeout)
        request = confluent_kafka.ConsumerGroupTopicPartitions(group_id)
        ask = self._client.list_consumer_group_offsets
        (offsets,) = _answers(lambda seconds: ask([request], request_timeout=seconds), timeout).values()
        return {
            (entry.topic, entry.partition): entry.offset
            for entry in offsets.topic_partitions
            if entry.offset is not None and entry.offset >= 0
        }

    def group(self, group_id: str, timeout: float = 5) -> GroupState:
        """Return a group's state and members.

        Raises:
            KafkaException: the group cannot be asked.
        """
        group = self._group(group_id, timeout)
        members = [
            GroupMember(
                member.client_id,
                member.host,
                member.group_instance_id,
                len(member.assignment.topic_partitions) if member.assignment else 0,
            )
            for member in group.members
        ]
        return GroupState(group.state.name.lower(), members)

    def _group(self, group_id: str, timeout: float, *, rights: bool = False) -> Any:  # noqa: ANN401 - the library's own
        ask = self._client.describe_consumer_groups
        (group,) = _answers(
            lambda seconds: ask([group_id], include_authorized_operations=rights, request_timeout=seconds), timeout
        ).values()
        return group

    def log_ranges(
        self, partitions: Iterable[tuple[str, int]], timeout: float = 5
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the first offset and the one past the last of each partition.

        Raises:
            KafkaException: a partition cannot be asked.
        """
        wanted = list(partitions)
        first = self._offsets(wanted, OffsetSpec.earliest(), timeout)  # type: ignore[no-untyped-call]
        end = self._offsets(wanted, OffsetSpec.latest(), timeout)  # type: ignore[no-untyped-call]
        return {place: (first[place], end[place]) for place in wanted}

    def offsets_at(
        self, ranges: Mapping[tuple[str, int], tuple[int, int]], moment: float, timeout: float = 10
    ) -> dict[tuple[str, int], int]:
        """Return each partition's first offset that is not older than a moment, given its first and end offset.

        Raises:
            KafkaException: a partition cannot be asked.
        """
        spec = OffsetSpec.for_timestamp(max(0, round(moment * 1000)))
        found = self._offsets(ranges, spec, timeout)
        # Negative where every message is older.
        return {
            place: end if found[place] < 0 else min(end, max(first, found[place]))
            for place, (first, end) in ranges.items()
        }

    def _offsets(
        self, partitions: Iterable[tuple[str, int]], spec: OffsetSpec, timeout: float
    ) -> dict[tuple[str, int], int]:
        wanted = {TopicPartition(topic, partition): spec for topic, partition in partitions}
        if not wanted:
            return {}
        ask = self._client.list_offsets
        answers = _answers(lambda seconds: ask(wanted, request_timeout=seconds), timeout)
        return {(place.topic, place.partition): answer.offset for place, answer in answers.items()}


def _is_hidden(found: TopicDescription | KafkaException) -> bool:
    return isinstance(found, KafkaException) and found.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED


def _names(operations: Iterable[Enum]) -> frozenset[str]:
    return frozenset(operation.name for operation in operations)


def _answers(ask: Callable[[float], Mapping[Any, Any]], timeout: float) -> dict[Any, Any]:
    """Return the answers to what is asked with a time-out; it is asked again while one is only about to come."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return {of: future.result() for of, future in ask(max(deadline - time.monotonic(), 1)).items()}
        except KafkaException as error:
            if error.args[0].code() not in _ABOUT_TO_ANSWER or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
