"""The dead-letter topic, read from its beginning, and its letters sent back to the topics they came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from connector.errors import ServiceUnavailable, SetupRequired
from connector.kafka.clients import Kafka
from connector.kafka.dead_letters import HEADER_PREFIX
from connector.kafka.deliveries import Fate, Headers, fate_of, headers_of
from connector.kafka.log_scan import LogScan, Partition

_CLAIM_SECONDS: Final = 30.0
"""For how long Kafka may take to end what an earlier run has begun."""
_SEND_SECONDS: Final = 20.0
"""For how long a few letters are on their way at the most, before they are given up for this time."""
_TAKE_BACK_SECONDS: Final = 5.0

_FROM: Final = "redriven_from"


class Letter(NamedTuple):
    """A dead letter: where it lies, the message as it was, why it was refused, and where it came from."""

    partition: int
    offset: int
    time: int
    """When it was written, in milliseconds since 1970."""
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    topic: str
    """Where it came from; empty where it does not tell."""
    origin: str
    """Its partition and offset there, as partition/offset."""
    complete: bool
    """Whether its value is whole: one too large for the dead-letter topic was left out."""
    size: int
    """How many bytes its value has, or had."""


class Sending(NamedTuple):
    """What became of letters that were sent in one transaction: Kafka has all of them, or none."""

    taken: bool
    why: str = ""
    """What it has against them, or what went wrong; the rest is of what was not taken."""
    fate: Fate = Fate.NOT_ITS_FAULT
    """What it has against one of them; the others it may take."""
    certain: bool = False
    """Whether it has none of them. Otherwise only the next `claim` makes that certain."""
    fenced: bool = False
    """Whether somebody else has claimed the letters since."""


class LetterBox:
    """Reads the letters in no consumer group, and sends them back in transactions."""

    def __init__(self, kafka: Kafka, topic: str, silence_seconds: float = 30.0) -> None:
        """Remember the dead-letter topic, and for how long Kafka may say nothing; nothing is connected yet."""
        self._kafka = kafka
        self._topic = topic
        # As a group's id only what librdkafka insists on; as a transactional id what a claim is bound to.
        self._own_name = f"{topic}.redrive"
        self._silence_seconds = silence_seconds
        self._producer: Producer | None = None

    def stretches(self) -> dict[Partition, tuple[int, int]]:
        """Return where the letters lie now: the first offset and the one past the last of each partition.

        Raises:
            KafkaException: Kafka does not answer.
            SetupRequired: there is no such topic.
        """
        ranges = self._ranges([self._topic])
        if not ranges:
            raise SetupRequired(
                f"there is no dead-letter topic {self._topic} that this client may see: run `outbox-connector setup`,"
                " or let its account describe and read the topic"
            )
        return ranges

    def ends(self, topics: Iterable[str]) -> dict[str, dict[int, int]]:
        """Return where each partition of these topics ends now; nothing for a topic that is not there.

        Raises:
            KafkaException: Kafka does not answer.
        """
        ends: dict[str, dict[int, int]] = {topic: {} for topic in topics}
        for (topic, partition), (_, end) in self._ranges(ends).items():
            ends[topic][partition] = end
        return ends

    def _ranges(self, topics: Iterable[str]) -> dict[Partition, tuple[int, int]]:
        admin = self._kafka.admin()
        states = admin.topics(timeout=5)
        return admin.log_ranges(
            [(topic, number) for topic in topics if topic in states for number in range(states[topic].partitions)]
        )

    def read(self, stretches: Mapping[Partition, tuple[int, int]]) -> Iterator[list[Letter]]:
        """Yield the letters of these stretches, a few at a time, each partition in its order.

        Raises:
            KafkaException, ServiceUnavailable: Kafka brings none of them.
        """
        for messages in self._scan(stretches):
            yield [_letter(message) for message in messages]

    def _scan(self, stretches: Mapping[Partition, tuple[int, int]]) -> Iterator[list[Message]]:
        scan = LogScan(self._kafka, self._own_name, self._silence_seconds)
        try:
            yield from scan.messages(stretches)
        finally:
            scan.close()

    def copied(self, places: Iterable[tuple[int, int]], since: Mapping[str, Mapping[int, int]]) -> set[tuple[int, int]]:
        """Return those letters, by partition and offset, of which topics hold a copy from these offsets on.

        Raises:
            KafkaException, ServiceUnavailable: Kafka does not bring what the topics hold.
        """
        named = {self._name(*place): place for place in places}
        stretches = {}
        for (topic, partition), (first, end) in self._ranges(since).items():
            begin = since[topic].get(partition, 0)
            # Beyond the end it was of a topic that has been made anew.
            stretches[topic, partition] = (first if begin > end else max(first, begin), end)
        copied = set()
        for messages in self._scan(stretches):
            for message in messages:
                # The last one: a letter that came back before tells of its first time as well.
                name = dict(headers_of(message)).get(_FROM)
                if isinstance(name, bytes) and name in named:
                    copied.add(named[name])
        return copied

    def claim(self) -> None:
        """Be the only one that can send letters of this topic, until somebody else claims them.

        Whoever did so before can add nothing any more, and what they had begun is ended: what topics hold is certain.

        Raises:
            SetupRequired: this client may not do so, or the brokers know no transactions.
            ServiceUnavailable: Kafka did not do so in time.
        """
        if self._producer is not None:
            return
        name = self._own_name
        producer = self._kafka.producer(lambda _error: None, name)
        try:
            producer.init_transactions(_CLAIM_SECONDS)
        except KafkaException as error:
            code, text = error.args[0].code(), error.args[0].str()
            if code == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                raise SetupRequired(
                    f"Kafka: {text}: allow Write and Describe on the transactional id {name} to this client's account"
                    " (docs/operations.md)"
                ) from error
            if code == KafkaError._UNSUPPORTED_FEATURE:  # noqa: SLF001 - it has no public name
                raise SetupRequired(
                    f"Kafka: {text}: letters are sent back in transactions, which these brokers do not know"
                ) from error
            raise ServiceUnavailable(
                f"Kafka: {text}: letters are sent back in transactions, and none could be begun as {name}."
                " If it stays so, see whether the topic __transaction_state has leaders, and replicas enough"
            ) from error
        self._producer = producer

    def send_back(self, letters: Sequence[Letter]) -> Sending:
        """Send letters to their topics, in this order and in one transaction.

        Where each came from stands in its header `redriven_from`, as topic/partition/offset. It takes a `claim`, and
        another one whenever letters were not taken.
        """
        producer, self._producer = self._producer, None
        assert producer is not None
        errors: list[KafkaError] = []

        def sent(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                errors.append(error)

        try:
            producer.begin_transaction()
            for letter in letters:
                producer.produce(
                    letter.topic,
                    letter.value,
                    letter.key,
                    headers=[*letter.headers, (_FROM, self._name(letter.partition, letter.offset))],
                    on_delivery=sent,
                )
            producer.commit_transaction(_SEND_SECONDS)
        except KafkaException as failure:
            certain = _take_back(producer)
            return _judged([*errors, failure.args[0]], certain=certain)
        except BufferError as failure:
            certain = _take_back(producer)
            return Sending(taken=False, why=str(failure), fate=Fate.NEIGHBOUR_REFUSED, certain=certain)
        except BaseException:
            _take_back(producer)
            raise
        # One that something failed with is not used again: librdkafka loses count of what it sends.
        self._producer = producer
        return Sending(taken=True)

    def _name(self, partition: int, offset: int) -> bytes:
        return f"{self._topic}/{partition}/{offset}".encode()


def _take_back(producer: Producer) -> bool:
    """Take back what was sent in the open transaction, and hear what became of it; tell whether that is certain."""
    try:
        producer.abort_transaction(_TAKE_BACK_SECONDS)
        producer.poll(0)
    except KafkaException:
        return False
    return True


def _judged(errors: Sequence[KafkaError], *, certain: bool) -> Sending:
    """Return what errors of letters, and the last one of their transaction, mean for them."""
    blamed = next((error for error in errors if fate_of(error) is not Fate.NOT_ITS_FAULT), errors[-1])
    return Sending(
        taken=False,
        why=f"{blamed.str()} ({blamed.name()})",
        fate=fate_of(blamed),
        certain=certain,
        fenced=errors[-1].code() == KafkaError._FENCED,  # noqa: SLF001 - it has no public name
    )


def _letter(message: Message) -> Letter:
    told = {name: value or b"" for name, value in headers_of(message) if name.startswith(HEADER_PREFIX)}

    def text(name: str) -> str:
        value = told.get(HEADER_PREFIX + name, b"")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    value = message.value()
    left_out = text("value_bytes")
    return Letter(
        message.partition() or 0,
        message.offset() or 0,
        message.timestamp()[1],
        message.key(),
        value,
        [(name, value) for name, value in headers_of(message) if not name.startswith(HEADER_PREFIX)],
        text("reason"),
        text("topic"),
        f"{text('partition')}/{text('offset')}",
        complete=f"{HEADER_PREFIX}value_bytes" not in told,
        size=int(left_out) if re.fullmatch(r"[0-9]{1,15}", left_out) else len(value or b""),
    )
