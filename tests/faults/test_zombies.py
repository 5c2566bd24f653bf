"""Processes that are stopped and wake up when others have long taken over: they do no harm."""

from __future__ import annotations

import signal

import pytest

from tests.faults.pipeline import Pipeline
from tests.integration.scenario import OUTBOX, one
from tests.services import eventually


@pytest.mark.slow
@pytest.mark.parametrize("point", ["statement_run", "batch_committed"])
@pytest.mark.usefixtures("complete_kafka")
def test_a_sink_that_hangs_and_wakes_up_stores_nothing_twice(pipeline: Pipeline, point: str) -> None:
    """SIGSTOP in the midst of a batch: another sink takes over; woken, the first one goes on and changes nothing."""
    pipeline.start("reader")
    zombie = pipeline.start("sink", CONNECTOR_POD_NAME="zombie", CONNECTOR_FAILPOINTS=f"{point}=delay:2@1")
    zombie.wait_for_log("partitions_assigned")
    pipeline.enqueue()
    zombie.wait_for_log("failpoint_reached", point=point)
    zombie._running().send_signal(signal.SIGSTOP)
    try:
        pipeline.enqueue()
        pipeline.start("sink").wait_for_log("partitions_assigned", all=6, within=40)
        pipeline.enqueue()
        if point == "batch_committed":
            pipeline.prove()
        else:
            # It holds its rows: the server ends its transaction after a while, or it wakes up.
            wait = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            wait += " and datname = current_database()"
            eventually(lambda: one(pipeline.app, wait), what="the other sink's wait for the rows")
    finally:
        zombie._running().send_signal(signal.SIGCONT)
    pipeline.enqueue()
    pipeline.prove()
    assert one(pipeline.app, f"select count(*) from {OUTBOX} where status <> 'consumed'") == 0
    assert zombie.returncode is None
    zombie.wait_for_log("partitions_assigned")
