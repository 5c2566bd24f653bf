"""A password that is changed under running processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from tests.faults.pipeline import Pipeline, PipelineFactory
from tests.integration.scenario import one, readiness
from tests.services import Database, Kafka, Process, eventually

FIRST, SECOND = "first-password", "second-password"


@pytest.fixture
def guarded(own_database: Database) -> Iterator[Database]:
    """A database in a server that lets the role `rotating` in with its password alone."""
    with psycopg.connect(own_database.server.url, autocommit=True) as connection:
        rules = Path(one(connection, "show hba_file"))
        if not rules.exists():
            pytest.skip(f"{rules} is not on this machine")
        before = rules.read_text("utf-8")
        rules.write_text(f"host all,replication rotating all scram-sha-256\n{before}", "utf-8")
        connection.execute("select pg_reload_conf()")
        connection.execute(f"create role rotating superuser login password '{FIRST}'")
        yield own_database
        rules.write_text(before, "utf-8")
        connection.execute("select pg_reload_conf()")
    Process.end_all()
    with psycopg.connect(own_database.server.url, autocommit=True) as connection:
        connection.execute(f"drop database {own_database.name} with (force)")
        connection.execute("drop role rotating")


def url_of(database: Database, password: str = "", query: str = "") -> str:
    """Return the database's URL as that role."""
    url = urlsplit(database.url)
    account = f"rotating:{password}" if password else "rotating"
    return urlunsplit(url._replace(netloc=f"{account}@{url.netloc.rpartition('@')[2]}", query=query))


def rotate(pipeline: Pipeline) -> None:
    """Change the password, and end every session that was opened with the old one."""
    pipeline.app.execute(f"alter role rotating password '{SECOND}'")
    pipeline.app.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotating'")


def test_a_password_in_a_passfile_may_change_at_any_time(
    guarded: Database, kafka: Kafka, topic: str, tmp_path: Path, new_pipeline: PipelineFactory
) -> None:
    """The file is read anew for each connection, so that nothing has to be started again."""
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:rotating:{FIRST}\n", "utf-8")
    passfile.chmod(0o600)
    url = url_of(guarded, query=f"passfile={passfile}")
    pipeline = new_pipeline(guarded, kafka, topic, {"CONNECTOR_DATABASE_URL": url})
    processes = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    passfile.write_text(f"*:*:*:rotating:{SECOND}\n", "utf-8")
    rotate(pipeline)
    pipeline.enqueue()
    pipeline.prove()
    for process in processes:
        eventually(lambda: readiness(process) == 200, what=f"readiness of {process.name}")  # noqa: B023
    assert [process.returncode for process in processes] == [None, None]


def _names_the_password(process: Process) -> bool:
    answer = process.http("/readyz")
    return answer.status == 503 and "password authentication failed" in answer.body


def test_a_password_in_the_url_needs_a_restart_when_it_changes(
    guarded: Database, kafka: Kafka, topic: str, new_pipeline: PipelineFactory
) -> None:
    """The processes say why they wait, without showing it; started again with the new one they go on."""
    pipeline = new_pipeline(guarded, kafka, topic, {"CONNECTOR_DATABASE_URL": url_of(guarded, FIRST)})
    processes = pipeline.start("reader"), pipeline.start("sink")
    pipeline.enqueue()
    pipeline.prove()
    rotate(pipeline)
    pipeline.enqueue()
    for process in processes:
        eventually(lambda: _names_the_password(process), within=20, what=f"word of it from {process.name}")  # noqa: B023
        assert process.http("/livez").status == 200
        assert process.stop() == 0
        assert FIRST not in process.stderr
    pipeline.env["CONNECTOR_DATABASE_URL"] = url_of(guarded, SECOND)
    pipeline.prove()
