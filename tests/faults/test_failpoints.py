"""A crash, or an error that nobody expects, at each point where the order of two steps matters: nothing comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from connector.failpoints import Point
from tests.faults.pipeline import KEYS, Pipeline
from tests.integration.scenario import all_published, catch_up_owed, one, write_wal
from tests.services import eventually
from tests.services.kafka import EMBEDDED_IS_INCOMPLETE


def _rows(pipeline: Pipeline) -> None:
    pipeline.enqueue()


def _a_row_for_no_topic(pipeline: Pipeline) -> None:
    pipeline.enqueue(1)
    pipeline.spent.add(pipeline.insert(KEYS[0], "dead", topic=f"{pipeline.topic}-nowhere", max_retry=1))
    pipeline.enqueue(1)


def _rows_that_are_due_later(pipeline: Pipeline) -> None:
    pipeline.enqueue(due_in=0.1)


def _rows_without_a_slot(pipeline: Pipeline) -> None:
    pipeline.enqueue()

    def dropped() -> bool:
        pipeline.app.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %s", [pipeline.slot]
        )
        return True

    eventually(dropped, what="dropping the slot", ignoring=(psycopg.errors.ObjectInUse,))
    pipeline.enqueue(50)


def _rows_passed_by_the_slot(pipeline: Pipeline) -> None:
    pipeline.enqueue()

    def advanced() -> bool:
        pipeline.app.execute("select pg_replication_slot_advance(%s, pg_current_wal_lsn())", [pipeline.slot])
        return True

    eventually(advanced, what="advancing the slot", ignoring=(psycopg.errors.ObjectInUse,))
    pipeline.enqueue()


def _more_than_the_budget(pipeline: Pipeline) -> None:
    if one(pipeline.app, "select count(*) from pg_replication_slots where slot_name = %s", [pipeline.slot]) == 0:
        pipeline.app.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [pipeline.slot])
    pipeline.enqueue()
    write_wal(pipeline.app, 12)


def _messages(pipeline: Pipeline) -> None:
    if "reader" not in pipeline.processes:
        pipeline.poison()
        pipeline.start("reader")
    pipeline.enqueue()
    pipeline.send_garbage()
    all_published(pipeline.app)


@dataclass(frozen=True, slots=True)
class Crash:
    """How a point is reached: by which process, the `nth` time, with what to do, and with which settings."""

    command: str
    stage: Callable[[Pipeline], None]
    nth: int = 1
    also: str = ""
    variables: dict[str, str] = field(default_factory=dict)


# The bookkeeper is busy recording a position, so that none is confirmed.
_LATE: Any = {"also": "lsn_recorded=delay:30", "variables": {"CONNECTOR_WAL_BUDGET": "8MB"}}

CRASHES = {
    Point.LEADERSHIP_TAKEN: Crash("reader", _rows),
    Point.ROW_READ: Crash("reader", _rows, nth=8),
    Point.ROW_PRODUCED: Crash("reader", _rows, nth=8),
    Point.ROWS_ACKNOWLEDGED: Crash("reader", _rows),
    Point.FAILURES_WRITTEN: Crash(
        "reader",
        _a_row_for_no_topic,
        variables={"CONNECTOR_PRODUCER_TOPIC_METADATA_PROPAGATION_MAX_MS": "500"},
    ),
    Point.ROWS_MARKED: Crash("reader", _rows),
    Point.LSN_RECORDED: Crash("reader", _rows),
    Point.LSN_CONFIRMED: Crash("reader", _rows, nth=2),
    Point.CATCH_UP_OWED: Crash("reader", _rows_passed_by_the_slot),
    Point.SLOT_MADE: Crash("reader", _rows_without_a_slot),
    Point.SLOT_RECORDED: Crash("reader", _rows_without_a_slot),
    Point.CATCH_UP_HALF_WAY: Crash("reader", _rows_without_a_slot),
    Point.CATCH_UP_ACKNOWLEDGED: Crash("reader", _rows_without_a_slot),
    Point.CATCH_UP_DONE: Crash("reader", _rows_without_a_slot),
    Point.SLOT_OWED: Crash("reader", _more_than_the_budget, **_LATE),
    Point.SLOT_DROPPED: Crash("reader", _more_than_the_budget, **_LATE),
    Point.RETRY_PICKED: Crash("reader", _rows_that_are_due_later),
    Point.RETRY_PRODUCED: Crash("reader", _rows_that_are_due_later),
    Point.RETRY_MARKED: Crash("reader", _rows_that_are_due_later),
    Point.BATCH_CONSUMED: Crash("sink", _messages),
    Point.DEAD_LETTER_SENT: Crash("sink", _messages),
    Point.STATEMENT_RUN: Crash("sink", _messages),
    Point.BATCH_COMMITTED: Crash("sink", _messages),
    Point.OFFSET_STORED: Crash("sink", _messages),
    Point.OFFSET_COMMITTED: Crash("sink", _messages),
}

OWING = {
    Point.CATCH_UP_OWED,
    Point.SLOT_MADE,
    Point.SLOT_RECORDED,
    Point.CATCH_UP_HALF_WAY,
    Point.CATCH_UP_ACKNOWLEDGED,
    Point.SLOT_OWED,
    Point.SLOT_DROPPED,
}
"""Where a catch-up is written down, and not written off yet."""


@pytest.mark.parametrize("point", Point, ids=str)
def test_a_crash_or_an_error_at_any_point_loses_doubles_and_reorders_nothing(pipeline: Pipeline, point: Point) -> None:
    """SIGKILL at the point, then an error at it: after each the next process makes up for it."""
    if point is Point.FAILURES_WRITTEN and not pipeline.kafka.complete:
        pytest.skip(EMBEDDED_IS_INCOMPLETE)
    crash = CRASHES[point]
    for action, code in (("kill", -9), ("raise", 1)):
        crash.stage(pipeline)
        failpoints = [f"{point}={action}@{crash.nth}", crash.also]
        process = pipeline.start(crash.command, CONNECTOR_FAILPOINTS=",".join(failpoints), **crash.variables)
        process.wait_for_log("failpoint_reached", point=point, action=action)
        assert process.wait(20) == code
        assert catch_up_owed(pipeline.app) or point not in OWING
        if action == "kill" and crash.command == "reader":
            pipeline.start("sink")
    assert process.wait_for_log("uncaught_exception")
    before = pipeline.lsn()
    pipeline.enqueue(1)
    pipeline.start(crash.command)
    pipeline.prove()
    eventually(lambda: pipeline.confirmed_beyond(before), what="the slot's going forward")


def test_each_point_is_crashed_at() -> None:
    """No point is left out."""
    assert set(CRASHES) == set(Point)
