"""The consumer: a member of a group whose offsets move only after the database has the messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from connector.errors import ServiceUnavailable
from connector.failpoints import Point, reach
from connector.kafka.clients import Kafka
from connector.observability.logs import get_logger

_ANSWER_SECONDS = 5.0
_MOST_BYTES: Final = 1024 * 1024
_TAKEN_AT_ONCE: Final = 50

_log = get_logger("kafka")


class Subscription:
    """A member of a consumer group, cooperative, whose offsets move only when told to."""

    def __init__(
        self,
        kafka: Kafka,
        topics: Sequence[str],
        group_id: str,
        instance_id: str | None,
        on_error: Callable[[KafkaError], None],
    ) -> None:
        """Subscribe; `assigned` is None until the group has answered."""
        self._consumer: Consumer = kafka.consumer(group_id, instance_id, on_error, _on_commit)
        self._kafka = kafka
        self._group_id = group_id
        self._on_error = on_error
        self._paused = False
        self._kept: list[Message] = []
        self._revoked = 0
        self.more_waiting = False
        """Whether the last `take` from Kafka left messages behind, as far as it could tell."""
        self.assigned: set[tuple[str, int]] | None = None
        self.problem: str | None = None
        """What Kafka has against the subscription, such as a topic that is not there."""
        self._consumer.subscribe(
            list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with _or_start_again():
            consumer.incremental_assign(partitions)
        self.assigned = (self.assigned or set()) | {(p.topic, p.partition) for p in partitions}
        if self._paused and partitions:
            consumer.pause(partitions)
        self.problem = None
        _log.info("partitions_assigned", new=len(partitions), all=len(self.assigned))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with _or_start_again():
            consumer.incremental_unassign(partitions)
        self._revoked += 1
        self.assigned = (self.assigned or set()) - {(p.topic, p.partition) for p in partitions}
        # Their next owner, be it us again, reads them anew, together with what the batch at hand loses.
        self._kept = [message for message in self._kept if self.owns(message)]
        _log.info("partitions_revoked", gone=len(partitions), all=len(self.assigned))

    def take(self, most: int, seconds: float) -> list[Message]:
        """Return up to so many messages, or about 1 MiB, waiting so long for the first and not at all for the others.

        Raises:
            ServiceUnavailable: the consumer is at its end, as when another one took its static membership. What it
                had taken and not settled is read again by the next one.
        """
        if self._kept:
            messages, self._kept = self._kept, []
            return messages
        revoked = self._revoked
        first = self._consumer.poll(seconds)
        if first is None:
            return []
        messages = [first]
        size = len(first)
        asked = received = 0
        while asked == received and len(messages) < most and size < _MOST_BYTES:
            asked = min(_TAKEN_AT_ONCE, most - len(messages))
            taken = self._consumer.consume(asked, 0)
            received = len(taken)
            messages += taken
            size += sum(map(len, taken))
        self.more_waiting = asked == received
        messages = [message for message in messages if message.error() is None or self._is_message(message)]
        return messages if self._revoked == revoked else [message for message in messages if self.owns(message)]

    def _is_message(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        # The flag that `fatal()` tells is not set on an error that comes as a message.
        if error.name() == "_FATAL":
            raise ServiceUnavailable(
                f"the consumer cannot go on, and must be started again: {error.str()} ({error.name()});"
                " if it is fenced, its place in the group was given away while Kafka was away,"
                " or another sink has the same CONNECTOR_POD_NAME"
            )
        where = f"group {self._group_id}" if message.topic() is None else f"topic {message.topic()}"
        self.problem = f"{where}: {error.str()} ({error.name()})"
        _log.warning("consumer_error", error=self.problem)
        self._on_error(error)
        return False

    def owns(self, message: Message) -> bool:
        """Tell whether the message's partition is still ours."""
        return (message.topic(), message.partition()) in (self.assigned or ())

    def store(self, ends: Mapping[tuple[str, int], int]) -> None:
        """Let these offsets be committed, by topic and partition: the database has what is before them."""
        for (topic, partition), offset in ends.items():
            if (topic, partition) in (self.assigned or ()):
                try:
                    self._consumer.store_offsets(offsets=[TopicPartition(topic, partition, offset)])
                except KafkaException as error:
                    # The partition went away this moment; its next owner reads the messages again.
                    _log.info("offset_not_stored", topic=topic, partition=partition, error=error.args[0].str())
        self.problem = None

    def pass_by(self) -> None:
        """Let offsets be committed that hold no message: a transaction's end, and what it took back.

        Only while all that was taken is settled. Without it those at a partition's end would count as still to be read.
        """
        with suppress(KafkaException):  # A partition went away this moment; there will be another.
            reached = self._consumer.position(self._consumer.assignment())
            if known := [place for place in reached if place.offset >= 0]:
                self._consumer.store_offsets(offsets=known)

    def put_back(self, messages: Sequence[Message]) -> None:
        """Let the next `take` return these messages first; in vain for those whose partition goes away meanwhile."""
        self._kept = [*messages, *self._kept]

    def end_of(self, partition: tuple[str, int]) -> int:
        """Return the offset behind a partition's last message.

        Raises:
            KafkaException: the broker does not answer.
        """
        # The consumer itself would tell where an open transaction begins, if there is one.
        return self._kafka.admin().log_ranges([partition], _ANSWER_SECONDS)[partition][1]

    def committed(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Return the group's committed offsets, 0 where it has committed none.

        Raises:
            KafkaException: the broker does not answer.
        """
        if not partitions:
            return {}
        answers = self._consumer.committed([TopicPartition(*partition) for partition in partitions], _ANSWER_SECONDS)
        for answer in answers:
            if answer.error is not None:
                raise KafkaException(answer.error)
        return {(answer.topic, answer.partition): max(0, answer.offset) for answer in answers}

    def go_back(self, partition: tuple[str, int], offset: int) -> bool:
        """Read a partition from an offset again, if what is taken or committed of it is further; tell whether it was.

        Raises:
            KafkaException: the broker does not answer, or the partition was assigned only this moment.
        """
        (position,) = self._consumer.position([TopicPartition(*partition)])
        reached = position.offset if position.offset >= 0 else self.committed([partition])[partition]
        if reached <= offset:
            return False
        target = [TopicPartition(*partition, offset)]
        # Stored first: what is stored and further than what is committed would be committed again at the next moment.
        self._consumer.store_offsets(offsets=target)
        self._consumer.commit(offsets=target, asynchronous=False)
        self._consumer.seek(target[0])
        self._kept = [message for message in self._kept if (message.topic(), message.partition()) != partition]
        return True

    def pause(self) -> None:
        """Take no more messages, of partitions to come either."""
        self._paused = True
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        """Take messages again."""
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())

    def idle(self, seconds: float) -> None:
        """Stay in the group without taking messages; what had arrived before is kept for the next `take`.

        Raises:
            ServiceUnavailable: as `take`.
        """
        message = self._consumer.poll(seconds)
        if message is not None and self._is_message(message):
            self._kept.append(message)

    def close(self, within: float) -> None:
        """Commit what is stored and leave the group (a static member keeps its place for a while).

        A broker that does not answer is not waited for longer than so many seconds: the group then finds out by itself,
        and reads again what could not be committed.
        """
        # librdkafka's own close has no time limit, and waits for its broker.
        leaving = threading.Thread(target=self._leave, name="leaving the group", daemon=True)
        leaving.start()
        leaving.join(within)
        if leaving.is_alive():
            _log.warning("group_not_left", seconds=within)

    def _leave(self) -> None:
        # A rebalance that nobody has heard of yet would be answered within the close, where librdkafka may lose the
        # answer that follows it, and wait for itself with Python's lock in its hands (confluentinc/librdkafka#4884).
        with suppress(KafkaException, ServiceUnavailable):
            self._consumer.poll(0)
        self._consumer.close()


def ends_of(messages: Iterable[Message]) -> dict[tuple[str, int], int]:
    """Return by partition the offset behind the last of these messages, which are in the order of their partitions."""
    last = {(message.topic(), message.partition()): message for message in messages}
    return {(topic or "", partition or 0): (message.offset() or 0) + 1 for (topic, partition), message in last.items()}


@contextmanager
def _or_start_again() -> Iterator[None]:
    """Let a rebalance that fails end the process: messages that were being taken meanwhile are in no one's hands."""
    try:
        yield
    except KafkaException as error:
        raise ServiceUnavailable(f"the rebalance of the group failed: {error.args[0].str()}: start again") from error


def _on_commit(error: KafkaError | None, _partitions: list[TopicPartition]) -> None:
    if error is None:
        reach(Point.OFFSET_COMMITTED)
