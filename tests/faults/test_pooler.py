"""PgBouncer between the processes and the database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.pipeline import PipelineFactory
from tests.integration.scenario import metric
from tests.services import Database, Kafka
from tests.services.pgbouncer import pgbouncer


@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
def test_everything_but_the_stream_goes_through_a_pooler(  # noqa: PLR0917 - fixtures
    database: Database, kafka: Kafka, topic: str, tmp_path: Path, pool_mode: str, new_pipeline: PipelineFactory
) -> None:
    """With CONNECTOR_REPLICATION_URL past it, messages arrive, are retried, held and given up as without it.

    Nothing is prepared there: another session's statement of the same name would be run instead.
    """
    with pgbouncer(database, tmp_path, pool_mode) as url:
        variables = {"CONNECTOR_DATABASE_URL": url, "CONNECTOR_REPLICATION_URL": database.url}
        pipeline = new_pipeline(database, kafka, topic, variables)
        pipeline.poison()
        processes = pipeline.start("reader"), pipeline.start("sink")
        for _ in range(5):
            pipeline.enqueue()
        pipeline.prove()
        pipeline.enqueue(due_in=0.1)
        pipeline.prove()
        assert metric(processes[0], 'outbox_rows{status="dead"}') == 1
        assert [process.stop() for process in processes] == [0, 0]
    for process in processes:
        assert "prepared statement" not in process.stderr
