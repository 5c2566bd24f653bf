"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.pipeline import Pipeline
from tests.services import Database, Kafka


@pytest.fixture
def pipeline(database: Database, kafka: Kafka, topic: str) -> Iterator[Pipeline]:
    """A pipeline that is set up, and of which nothing runs yet."""
    pipeline = Pipeline(database, kafka, topic)
    yield pipeline
    pipeline.close()
