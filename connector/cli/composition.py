"""What the settings mean to each part: read once, and handed on as that part's options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from connector.cli.signals import interrupt_on_signals
from connector.observability.logs import configure_logging
from connector.settings import Settings, load_settings

if TYPE_CHECKING:
    from connector.handlers.chat_history import ChatHistoryHandler
    from connector.kafka import Kafka
    from connector.ops.doctor import DoctorOptions
    from connector.ops.setup import SetupOptions
    from connector.ops.status import StatusOptions
    from connector.reader import ReaderOptions
    from connector.sink import SinkOptions
    from connector.store.queries import Tables

DATABASE: Final = frozenset({"database"})
BOTH: Final = frozenset({"database", "kafka"})


def process_settings(needs: frozenset[str]) -> Settings:
    """Read the settings for a process, and log as they say."""
    settings = load_settings(needs=needs)
    configure_logging(settings.log_level, settings.log_format, settings.secrets())
    return settings


def quiet_settings(needs: frozenset[str] = BOTH) -> Settings:
    """Read the settings for a command whose output tells everything that librdkafka would log."""
    settings = load_settings(needs=needs)
    level = settings.log_level if settings.log_level == "debug" else "critical"
    configure_logging(level, settings.log_format, settings.secrets())
    return settings


def operator_settings(needs: frozenset[str]) -> Settings:
    """Read the settings for a command that changes things a batch at a time and may be interrupted between them."""
    interrupt_on_signals()
    return quiet_settings(needs)


def tables(settings: Settings) -> Tables:
    """Return the tables that the settings name."""
    from connector.store.queries import Tables

    return Tables(settings.outbox_table, settings.history_table)


def kafka(settings: Settings) -> Kafka:
    """Return how the settings reach Kafka."""
    from connector.kafka import Kafka

    return Kafka(
        settings.kafka_bootstrap_servers, settings.kafka_options, settings.producer_options, settings.consumer_options
    )


def in_history() -> dict[str, ChatHistoryHandler]:
    """Return the handlers that store in the history table, by `biz_type`; where others store is not known."""
    from connector.handlers import load_handlers
    from connector.handlers.chat_history import ChatHistoryHandler

    return {
        biz_type: handler for biz_type, handler in load_handlers().items() if isinstance(handler, ChatHistoryHandler)
    }


def reader_options(settings: Settings) -> ReaderOptions:
    """Return the reader's options."""
    from connector.reader import ReaderOptions

    return ReaderOptions(
        database_url=settings.database_url,
        replication_url=settings.replication_url,
        kafka=kafka(settings),
        tables=tables(settings),
        slot_name=settings.slot_name,
        publication_name=settings.publication_name,
        topics=settings.topics,
        group_id=settings.group_id,
        wal_budget=settings.wal_budget,
        shutdown_seconds=settings.shutdown_seconds,
        start_deadline_seconds=settings.start_deadline_seconds,
    )


def sink_options(settings: Settings) -> SinkOptions:
    """Return the sink's options."""
    from connector.sink import SinkOptions

    return SinkOptions(
        database_url=settings.database_url,
        kafka=kafka(settings),
        tables=tables(settings),
        topics=settings.topics,
        group_id=settings.group_id,
        group_instance_id=settings.group_instance_id,
        dead_letter_topic=settings.dead_letter_topic,
        strict=settings.key_ordering == "strict",
        shutdown_seconds=settings.shutdown_seconds,
        start_deadline_seconds=settings.start_deadline_seconds,
    )


def setup_options(settings: Settings) -> SetupOptions:
    """Return `setup`'s options."""
    from connector.ops.setup import SetupOptions

    return SetupOptions(
        database_url=settings.database_url,
        replication_url=settings.replication_url,
        kafka=kafka(settings),
        tables=tables(settings),
        publication_name=settings.publication_name,
        slot_name=settings.slot_name,
        topics=settings.topics,
        dead_letter_topic=settings.dead_letter_topic,
        topic_partitions=settings.topic_partitions,
        topic_replication=settings.topic_replication,
        start_deadline_seconds=settings.start_deadline_seconds,
    )


def doctor_options(settings: Settings) -> DoctorOptions:
    """Return `doctor`'s options."""
    from connector.ops.doctor import DoctorOptions
    from connector.ops.expectations import Expectations

    return DoctorOptions(
        database_url=settings.database_url,
        replication_url=settings.replication_url,
        kafka=kafka(settings),
        group_instance_id=settings.group_instance_id,
        expected=Expectations(
            tables=tables(settings),
            publication_name=settings.publication_name,
            slot_name=settings.slot_name,
            wal_budget=settings.wal_budget,
            topics=settings.topics,
            dead_letter_topic=settings.dead_letter_topic,
            topic_partitions=settings.topic_partitions,
            topic_replication=settings.topic_replication,
            group_id=settings.group_id,
        ),
    )


def status_options(settings: Settings) -> StatusOptions:
    """Return `status`'s options."""
    from connector.ops.status import StatusOptions

    return StatusOptions(
        database_url=settings.database_url,
        kafka=kafka(settings),
        tables=tables(settings),
        slot_name=settings.slot_name,
        topics=settings.topics,
        group_id=settings.group_id,
    )
