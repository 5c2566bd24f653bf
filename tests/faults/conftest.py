"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.faults.pipeline import Pipeline, PipelineFactory
from tests.services import Database, Kafka


@pytest.fixture
def new_pipeline() -> Iterator[PipelineFactory]:
    """Make a pipeline that is set up, and of which nothing runs yet, with further CONNECTOR_ variables."""
    with ExitStack() as stack:
        yield lambda *of: stack.enter_context(closing(Pipeline(*of)))


@pytest.fixture
def pipeline(database: Database, kafka: Kafka, topic: str, new_pipeline: PipelineFactory) -> Pipeline:
    """A pipeline that is set up, and of which nothing runs yet."""
    return new_pipeline(database, kafka, topic, {})
