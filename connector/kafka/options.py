"""What the environment may tell librdkafka: every option, judged before anything is connected."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, KafkaException, Producer

from connector.kafka.clients import CLIENT_DEFAULTS, LOG_READER_DEFAULTS, PRODUCER_DEFAULTS, for_consumers
from connector.kafka.tokens import TOKEN_FILE, for_librdkafka, unreadable_token, without_mechanism

_SIDES: Final[Mapping[str, type[Producer | Consumer]]] = {
    "CONNECTOR_KAFKA_": Producer,
    "CONNECTOR_PRODUCER_": Producer,
    "CONNECTOR_CONSUMER_": Consumer,
}


class _Fixed(NamedTuple):
    """An option that a guarantee stands on: why, and what it may be set to all the same, the value in use first."""

    why: str
    values: tuple[str, ...] = ()
    at_least: int | None = None

    def problem(self, value: str) -> str | None:
        """Return why it may not have a value, or None."""
        word = value.strip().lower()
        if word in self.values or (self.at_least is not None and word.isdecimal() and int(word) >= self.at_least):
            return None
        if self.at_least is not None:
            return f"must be {self.at_least} at the least: {self.why}"
        return f"must be {self.values[0]}: {self.why}" if self.values else f"cannot be set: {self.why}"


_TRUE: Final = ("true", "1", "t")
_FALSE: Final = ("false", "0", "f")
_OUTAGE: Final = "an outage is not a message's fault"
_QUEUE: Final = "the queue must hold what the reader has in flight"
# Whatever it says, only those offsets are committed that the sink has stored, once the database has the messages.
_COMMIT: Final = _Fixed("it is a yes or a no", (*_TRUE, *_FALSE))
_ACKS: Final = _Fixed("an acknowledged message must be on every replica", ("all", "-1"))
_TIMEOUT: Final = _Fixed(_OUTAGE, ("0",))
_RETRIES: Final = _Fixed(_OUTAGE, (str(PRODUCER_DEFAULTS["retries"]),))
# What the guarantees stand on is not for the environment to change. Several options have two names.
_FIXED: Final = {
    "enable.idempotence": _Fixed("a retried produce request would double messages", _TRUE),
    "acks": _ACKS,
    "request.required.acks": _ACKS,
    "message.timeout.ms": _TIMEOUT,
    "delivery.timeout.ms": _TIMEOUT,
    "retries": _RETRIES,
    "message.send.max.retries": _RETRIES,
    "delivery.report.only.error": _Fixed("a message is published when Kafka says so", _FALSE),
    "queue.buffering.max.messages": _Fixed(_QUEUE, ("0",), int(PRODUCER_DEFAULTS["queue.buffering.max.messages"])),
    "queue.buffering.max.kbytes": _Fixed(_QUEUE, (), int(PRODUCER_DEFAULTS["queue.buffering.max.kbytes"])),
    "transactional.id": _Fixed("the reader does not use transactions"),
    "isolation.level": _Fixed("what a transaction took back was never sent", ("read_committed",)),
    "metadata.broker.list": _Fixed("it has a variable of its own, CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"),
    "group.id": _Fixed("it has a variable of its own, CONNECTOR_GROUP_ID"),
    "group.instance.id": _Fixed("it has a variable of its own, CONNECTOR_POD_NAME"),
    "enable.auto.offset.store": _Fixed("an offset is committed only after the database has the message", _FALSE),
    "enable.auto.commit": _COMMIT,
    "auto.commit.enable": _COMMIT,
    "partition.assignment.strategy": _Fixed("partitions are taken over cooperatively", ("cooperative-sticky",)),
}


def option_problems(
    kafka: Mapping[str, str], producer: Mapping[str, str], consumer: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield (variable, problem) for options of both sides and of either; no value is shown.

    librdkafka stops at the first option that it refuses, so each is put to it alone, and then all of them together.
    """
    found = False
    for (prefix, client), options in zip(_SIDES.items(), (kafka, producer, consumer), strict=True):
        for name, value in options.items():
            fixed = _FIXED.get(name)
            problem = (fixed and fixed.problem(value)) or _refusal(client, {name: value}, alone=True)
            if problem:
                found = True
                yield prefix + name.upper().replace(".", "_"), problem
    if not found:
        for prefix, options, ours in (
            ("CONNECTOR_PRODUCER_", producer, PRODUCER_DEFAULTS),
            ("CONNECTOR_CONSUMER_", consumer, LOG_READER_DEFAULTS),
        ):
            problem = _refusal(_SIDES[prefix], {**kafka, **options}, alone=False, beneath={**CLIENT_DEFAULTS, **ours})
            if problem:
                yield ("CONNECTOR_KAFKA_*" if kafka else f"{prefix}*"), problem
                return


def _refusal(
    client: type[Producer | Consumer],
    options: Mapping[str, str],
    *,
    alone: bool,
    beneath: Mapping[str, str | int | bool] = {},
) -> str | None:
    """Return why librdkafka refuses options, or None; `alone`, an option that only lacks its companions is fine.

    `beneath` is what holds where the options say nothing.
    """
    if TOKEN_FILE in options:
        problem = unreadable_token(options[TOKEN_FILE]) if alone else without_mechanism(options)
        if alone or problem:
            return problem
    try:
        configuration = {**beneath, "group.id": "check", "log_level": 0, **options, "logger": _silent()}
        client(for_librdkafka(for_consumers(configuration) if client is Consumer else configuration))
    except KafkaException as error:
        text = str(error.args[0].str()).strip()
    except (TypeError, ValueError, AttributeError) as error:
        text = str(error)
    else:
        return None
    if text.startswith("No such configuration property"):
        return f"librdkafka has no option {next(iter(options))}; its CONFIGURATION.md lists them"
    if text.startswith("Failed to create"):
        # The values are fine one by one. Which of them miss each other, or a file, only librdkafka's words tell.
        return None if alone else f"librdkafka says: {without(options.values(), text)}"
    return "librdkafka refuses this value; its CONFIGURATION.md tells what the option takes"


def _silent() -> logging.Logger:
    log = logging.Logger("librdkafka")  # noqa: LOG001 - one that nothing is attached to
    log.disabled = True
    return log


def without(values: Any, text: str) -> str:  # noqa: ANN401
    """Return a text with every value in it blotted out."""
    for value in sorted(values, key=len, reverse=True):
        if len(value) > 1:
            text = text.replace(value, "…")
    return text
