"""What somebody does to the outbox table under a running pipeline: nothing is lost, and who can go on does."""

from __future__ import annotations

import psycopg
import pytest

from tests.faults.pipeline import Pipeline
from tests.integration.scenario import OUTBOX, readiness
from tests.services import eventually


def _running(pipeline: Pipeline) -> None:
    pipeline.start("reader")
    pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()


@pytest.mark.parametrize(
    "change",
    ["add column note text not null default 'x'", "alter column max_retry type bigint"],
)
def test_a_change_of_the_table_that_does_not_matter_is_not_noticed(pipeline: Pipeline, change: str) -> None:
    """A column more, or a wider one: the stream describes the table anew if it must, and everything goes on."""
    _running(pipeline)
    pipeline.app.execute(f"alter table {OUTBOX} {change}")
    pipeline.enqueue()
    pipeline.prove()
    assert pipeline.processes["reader"].returncode is None


@pytest.mark.parametrize(
    "change", ["biz_type type text", "message_key type text", "payload type json", "retry_count type bigint"]
)
def test_the_type_of_a_published_column_cannot_be_changed(pipeline: Pipeline, change: str) -> None:
    """PostgreSQL refuses it while the publication is there, so that the stream never changes its shape."""
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="publication"):
        pipeline.app.execute(f"alter table {OUTBOX} alter column {change}")


def test_a_table_that_is_renamed_for_a_while_loses_nothing(pipeline: Pipeline) -> None:
    """Rows that are enqueued under the other name come from the table once it has its name back."""
    _running(pipeline)
    reader = pipeline.processes["reader"]
    pipeline.app.execute(f"alter table {OUTBOX} rename to elsewhere")
    pipeline.enqueue(table="public.elsewhere")
    reader.wait_for_log("reader_interrupted")
    assert readiness(reader) == 503
    pipeline.app.execute("alter table public.elsewhere rename to agent_outbox_messages")
    pipeline.enqueue()
    pipeline.prove()
    eventually(lambda: readiness(reader) == 200, what="readiness")


@pytest.mark.parametrize("other", ["public.elsewhere", "another.agent_outbox_messages"], ids=["name", "schema"])
def test_a_table_that_has_another_name_for_a_moment_keeps_its_order(pipeline: Pipeline, other: str) -> None:
    """What is enqueued under that name comes by the stream, in its place, whether or not anybody notices the name."""
    _running(pipeline)
    reader = pipeline.processes["reader"]
    schema, name = other.split(".")
    changed = "set schema another" if schema == "another" else f"rename to {name}"
    back = "set schema public" if schema == "another" else "rename to agent_outbox_messages"
    pipeline.app.execute("create schema another")
    with pipeline.app.transaction():
        pipeline.app.execute(f"alter table {OUTBOX} {changed}")
        pipeline.enqueue(table=other)
    pipeline.app.execute(f"alter table {other} {back}")
    pipeline.enqueue()
    pipeline.prove()
    assert "overlooked_rows_found" not in reader.stderr
