"""Servers that let nobody in without encryption, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from connector.demo.embedded import scratch_directory
from tests.security.certificates import Authority
from tests.security.services import SecurePostgres, secure_kafka
from tests.services.kafka import ApacheKafka

KAFKA_PASSWORD = "kafka-pa55word"  # noqa: S105 - opens nothing but a broker that lives for a minute


@pytest.fixture(scope="package")
def directory() -> Iterator[Path]:
    """A directory that the servers' accounts can reach."""
    with scratch_directory() as directory:
        yield directory


@pytest.fixture(scope="package")
def authority(directory: Path) -> Authority:
    """Whom servers and clients trust."""
    return Authority(directory / "authority", "authority")


@pytest.fixture(scope="package")
def secure_postgres(directory: Path, authority: Authority) -> Iterator[SecurePostgres]:
    """A PostgreSQL that takes encrypted connections only."""
    server = SecurePostgres(directory / "postgres", authority)
    yield server
    server.close()


@pytest.fixture(scope="package")
def broker(directory: Path, authority: Authority) -> Iterator[ApacheKafka]:
    """A Kafka with a listener for each way to log in."""
    broker = secure_kafka(directory / "kafka", authority, KAFKA_PASSWORD)
    try:
        broker.start()
        yield broker
    finally:
        broker.close()
