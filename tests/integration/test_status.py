"""`status` tells where the pipeline stands, for people and for programs."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connector.cli.composition import status_options
from connector.demo.embedded import free_port, spawn
from connector.enqueue import Outbox
from connector.ops.flow import Flow, Look
from connector.ops.status import Status, as_json, as_lines
from connector.settings import load_settings
from tests.integration.outbox_table import PAYLOAD
from tests.integration.scenario import OUTBOX, PROGRESS, all_published, enqueue, is_streaming, set_up
from tests.services import Database, Kafka, Process, eventually

NOTHING = {"pending": 0, "published": 0, "consumed": 0, "dead": 0}


@pytest.fixture
def env(connector_env: dict[str, str]) -> dict[str, str]:
    """The variables of a pipeline that is set up, and not running."""
    set_up(connector_env)
    return connector_env


def status_of(env: dict[str, str], **variables: str) -> Any:
    """Return what `status --json` would print, decoded."""
    settings = load_settings(env | variables, needs=frozenset({"database", "kafka"}))
    status = Status(status_options(settings))
    try:
        return json.loads(as_json(status.look()))
    finally:
        status.close()


def test_json_has_the_contracts_keys_and_nothing_more(env: dict[str, str], connector: Callable[..., Process]) -> None:
    """`status --json` prints one object with backlog, slot, consumer and oldest age; the exit code is 0."""
    status = connector("status", "--json")
    assert status.wait() == 0
    (line,) = status.stdout.splitlines()
    document = json.loads(line)
    assert document.keys() == {
        "outbox",
        "outbox_exact",
        "outbox_estimated",
        "slot",
        "consumer",
        "oldest_unconsumed_age_seconds",
    }
    assert document["outbox"] == NOTHING
    assert document["outbox_exact"] is True
    assert document["oldest_unconsumed_age_seconds"] is None
    slot = document["slot"]
    assert slot["name"] == env["CONNECTOR_SLOT_NAME"]
    assert (slot["exists"], slot["active"], slot["wal_status"]) == (True, False, "reserved")
    assert (slot["catch_up_owed"], slot["catch_up_reason"]) == (False, None)
    assert isinstance(slot["lag_bytes"], int)
    assert isinstance(slot["retained_bytes"], int)
    assert document["consumer"]["group"] == env["CONNECTOR_GROUP_ID"]
    assert document["consumer"]["lag"] == 0
    assert not status.stderr


def test_the_backlog_is_counted_by_status_and_its_age_told(env: dict[str, str], database: Database, topic: str) -> None:
    """Rows are counted by status, and the oldest one that is neither consumed nor dead gives the age."""
    with database.connect() as connection:
        ids = enqueue(connection, topic, "key", 1, 2, 3, 4, 5, 6)
        for outbox_id, status in zip(ids, ["consumed", "dead", "published"], strict=False):
            connection.execute(f"update {OUTBOX} set status = %s where id = %s", [status, outbox_id])
        connection.execute(f"update {OUTBOX} set created_at = now() - interval '1 hour' where id <= %s", [ids[2]])
    document = status_of(env)
    assert document["outbox"] == {"pending": 3, "published": 1, "consumed": 1, "dead": 1}
    assert 3600 <= document["oldest_unconsumed_age_seconds"] < 3700


def test_a_running_pipeline_shows_its_reader_and_its_sink(
    durable_kafka: Kafka, env: dict[str, str], database: Database, topic: str, connector: Callable[..., Process]
) -> None:
    """The slot is active while a reader streams, and the lag counts what the sink has not read, by partition."""
    is_streaming(connector("reader"))
    with database.connect() as connection:
        enqueue(connection, topic, "one key", *range(10))
        all_published(connection)
    document = status_of(env)
    assert document["slot"]["active"] is True
    assert document["slot"]["active_pid"] > 0
    consumer = document["consumer"]
    assert (consumer["lag"], consumer["members"]) == (10, 0)
    assert len(consumer["partitions"]) == 6
    (behind,) = [partition for partition in consumer["partitions"] if partition["lag"]]
    assert behind == {"topic": topic, "partition": behind["partition"], "committed": None, "end": 10, "lag": 10}
    connector("sink")
    eventually(lambda: status_of(env)["consumer"]["lag"] == 0, within=30, what="the reading of everything")
    document = status_of(env)
    assert (document["consumer"]["state"], document["consumer"]["members"]) == ("stable", 1)
    assert document["outbox"]["pending"] == document["outbox"]["published"] == 0


def test_a_missing_slot_and_an_owed_catch_up_are_told(env: dict[str, str], database: Database) -> None:
    """Without a slot, or with a catch-up written down, it says that the table will be asked, and why."""
    with database.connect() as connection:
        connection.execute(f"update {PROGRESS} set catch_up_owed = true, catch_up_reason = 'a test'")
        slot = status_of(env)["slot"]
        assert (slot["catch_up_owed"], slot["catch_up_reason"]) == (True, "a test")
        connection.execute("select pg_drop_replication_slot(%s)", [env["CONNECTOR_SLOT_NAME"]])
    slot = status_of(env)["slot"]
    assert (slot["exists"], slot["active"], slot["wal_status"], slot["lag_bytes"]) == (False, False, None, None)
    assert slot["catch_up_owed"] is True


def test_people_get_a_table(env: dict[str, str], database: Database, topic: str) -> None:
    """Without `--json` the same is said in lines that start with what they are about."""
    with database.connect() as connection:
        enqueue(connection, topic, "key", 1, 2)
    status = Status(status_options(load_settings(env, needs=frozenset({"database", "kafka"}))))
    lines = as_lines(status.look())
    status.close()
    assert [line.split()[0] for line in lines] == ["outbox", "oldest", "slot", "consumer"]
    assert "pending 2" in lines[0]
    assert "NO READER" in lines[2]


def test_a_service_that_is_away_leaves_the_rest_to_be_seen(
    env: dict[str, str], connector: Callable[..., Process]
) -> None:
    """With a service away the other one's part is shown, the problem is told, and the exit code is 69."""
    nowhere = f"127.0.0.1:{free_port()}"
    status = connector("status", "--json", CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=nowhere)
    assert status.wait() == 69
    document = json.loads(status.stdout)
    assert document["outbox"] == NOTHING
    assert document["consumer"]["lag"] is None
    assert "Kafka" in status.stderr

    status = connector("status", CONNECTOR_DATABASE_URL=f"postgresql://me:tell-nobody@{nowhere}/app")
    assert status.wait() == 69
    assert "PostgreSQL" in status.stdout
    assert env["CONNECTOR_GROUP_ID"] in status.stdout
    assert "tell-nobody" not in status.stdout + status.stderr


def test_before_setup_it_names_setup(connector: Callable[..., Process]) -> None:
    """On an empty database it says what to run, and exits with 1."""
    status = connector("status")
    assert status.wait() == 1
    assert "outbox-connector setup" in status.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_into_a_pipe_prints_an_object_a_line_until_interrupted(
    env: dict[str, str], connector: Callable[..., Process], number: signal.Signals
) -> None:
    """`--watch --json` goes on until Ctrl-C, which ends it with 0 and no complaint."""
    status = connector("status", "--watch", "--json", "--interval", "0.2")
    eventually(lambda: status.stdout.count("\n") >= 2, within=20, what="three looks")
    os.kill(status.pid, number)
    assert status.wait(10) == 0
    assert all(json.loads(line)["outbox"] == NOTHING for line in status.stdout.splitlines())
    assert not status.stderr


def test_watching_outlives_an_outage(
    env: dict[str, str], database: Database, connector: Callable[..., Process]
) -> None:
    """A lost connection is shown as long as it lasts, and made again."""
    status = connector("status", "--watch", "--json", "--interval", "0.2")
    eventually(lambda: status.stdout, within=20, what="a first look")
    with database.connect() as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name = 'outbox-connector status'"
        )
    looks = len(status.stdout.splitlines())
    eventually(lambda: len(status.stdout.splitlines()) > looks + 2, within=20, what="further looks")
    assert json.loads(status.stdout.splitlines()[-1])["outbox"] == NOTHING
    os.kill(status.pid, signal.SIGINT)
    assert status.wait(10) == 0


def test_watching_in_a_terminal_draws_over_the_last_look(env: dict[str, str]) -> None:
    """In a terminal each look starts at the top left, and Ctrl-C ends it with 0."""
    ours, theirs = pty.openpty()
    variables = {"PATH": os.environ["PATH"], "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2]), **env}
    process = spawn(
        [sys.executable, "-m", "connector", "status", "--watch", "--interval", "0.2"],
        stdout=theirs,
        env=variables,
        cwd=Path("/"),
    )
    os.close(theirs)
    seen = b""
    try:
        while seen.count(b"\x1b[H") < 3:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"pending 0" in seen
    assert b"\x1b[J" in seen
    assert b"Traceback" not in seen


def test_watching_tells_rates_latency_retries_and_deaths(
    durable_kafka: Kafka, env: dict[str, str], database: Database, topic: str, connector: Callable[..., Process]
) -> None:
    """From the second look on it tells what passes each stage a second, and all along what waits and what died."""
    flow = Flow(status_options(load_settings(env, needs=frozenset({"database", "kafka"}))))
    is_streaming(connector("reader"))
    connector("sink")
    with database.connect() as connection:
        ids = enqueue(connection, topic, "key", 1, 2, due_in=3600)
        connection.execute(
            f"update {OUTBOX} set status = 'dead', last_error = 'too bad', updated_at = now() where id = %s", [ids[0]]
        )
        assert flow.look().enqueued is None
        Outbox(connection).create_chat_history_message(topic, "chat", PAYLOAD)
        eventually(lambda: flow.look().latency, within=30, what="a message stored")
        look = eventually(lambda: (look := flow.look()).stored and look, within=30, what="a committed offset")
    flow.close()
    assert isinstance(look, Look)
    assert look.enqueued
    assert look.published
    assert look.latency is not None
    assert (look.latency.messages, 0 < look.latency.p50 == look.latency.p99 < 60) == (1, True)
    assert look.retries is not None
    assert (look.retries.waiting, look.retries.due) == (1, 0)
    assert 3500 < (look.retries.next_in or 0) <= 3600
    (death,) = look.deaths
    assert (death.outbox_id, death.key, death.error) == (ids[0], "key", "too bad")
    assert (death.age or 0) >= 0


@pytest.mark.parametrize("interval", ["0", "nan", "soon"])
def test_an_interval_that_is_none_is_a_matter_of_usage(connector: Callable[..., Process], interval: str) -> None:
    """An interval has to be a number of seconds that leaves something to be seen."""
    status = connector("status", "--watch", "--interval", interval)
    assert status.wait() == 2
    assert "--interval" in status.stderr
