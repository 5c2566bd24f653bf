"""Names from the settings are names and nothing else, whatever is in them."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from connector.outbox import Table
from tests.integration.scenario import is_streaming
from tests.integration.test_setup import _psql
from tests.services import Database, Kafka, Process, environment, eventually


class Names(NamedTuple):
    """What PostgreSQL may be asked to call things."""

    schema: str
    outbox: str
    history: str
    publication: str
    group: str

    def tables(self) -> tuple[Table, Table]:
        """Return the two tables."""
        return Table(self.schema, self.outbox), Table(self.schema, self.history)


NAMES: Mapping[str, Names] = {
    "quotes, semicolons, dollars, braces, per cent": Names(
        'we"ird; $enqueue$ {history}',
        "o'ut\"; drop table x; -- $enqueue$ %s {outbox} $0$",
        'h"i\\s; $roles$ $1$ %(ids)s %% {0} $publication$ /*',
        "p\"u'b; $publication$ $slot$ %s %(x)s {name}",
        "g'r\"p; %s {x} $$",
    ),
    "63 bytes of unicode, and one character": Names("%", "☃" * 21, "ж" * 31 + "h", "𝄞" * 15 + "pub", "ü" * 200),
}


@pytest.fixture(params=list(NAMES.values()), ids=list(NAMES))
def names(request: pytest.FixtureRequest) -> Names:
    """One set of names after the other."""
    given: Names = request.param
    return given


@pytest.fixture
def long_topic(kafka: Kafka) -> Iterator[str]:
    """A topic whose name is as long as the outbox allows."""
    with kafka.topic(partitions=1) as topic:
        yield f"{topic}.".ljust(128, "x")


@pytest.fixture
def env(names: Names, database: Database, kafka: Kafka, long_topic: str) -> dict[str, str]:
    """A pipeline in a schema of that name."""
    with database.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(names.schema)))
    outbox, history = names.tables()
    return environment(database, kafka, long_topic) | {
        "CONNECTOR_OUTBOX_TABLE": str(outbox),
        "CONNECTOR_HISTORY_TABLE": str(history),
        "CONNECTOR_PUBLICATION_NAME": names.publication,
        "CONNECTOR_SLOT_NAME": secrets.token_hex(4).ljust(63, "_"),
        "CONNECTOR_GROUP_ID": f"{names.group}{long_topic[:20]}",
        "CONNECTOR_DEAD_LETTER_TOPIC": long_topic[:30] + "dead",
    }


@pytest.mark.slow
def test_the_whole_pipeline_works_under_any_name(env: dict[str, str], names: Names, database: Database) -> None:
    """Setup, reader, sink with a failure among its messages, and every command of an operator."""
    setup = Process("setup", env=env).start()
    assert setup.wait() == 0, setup.stderr
    reader, sink = (Process(name, env=env).start() for name in ("reader", "sink"))
    outbox, history = names.tables()
    function = sql.Identifier(names.schema.replace("%", "%%"), "outbox_enqueue")
    enqueue = sql.SQL("select {}('chat_history_persist', %s, %s, %s, 1)").format(function)
    with database.connect() as app:
        for chat in ("c", "far too long for the column that it is to be stored in", "d"):
            payload = {"user_id": 1, "chat_id": chat, "message_content": "'; --", "role": "user"}
            app.execute(enqueue, [env["CONNECTOR_TOPICS"], chat[:4], Jsonb(payload)])
        is_streaming(reader)
        statuses = f"select array_agg(status order by id) from {outbox}"
        eventually(
            lambda: app.execute(statuses).fetchall() == [(["consumed", "dead", "consumed"],)],
            within=30,
            what="two messages stored and one refused",
        )
        assert app.execute(f"select count(*) from {history}").fetchall() == [(2,)]
        for path in ("/readyz", "/metrics"):
            assert reader.http(path).status == sink.http(path).status == 200
        assert 'outbox_rows{status="consumed"} 2' in sink.http("/metrics").body
        started = {
            command: Process(*command, env=env).start()
            for command in (
                ("doctor",),
                ("status", "--json"),
                ("redrive", "--all", "--yes", "--reason", "'; --"),
                ("reconcile",),
                ("prune", "--older-than", "1s", "--dry-run"),
            )
        }
        for command, process in started.items():
            assert process.wait() in ({0, 1} if command == ("reconcile",) else {0}), process.stdout + process.stderr
            assert "Traceback" not in process.stderr
    for process in (reader, sink):
        assert process.stop() == 0
        assert "metrics_left_out" not in process.stderr


def test_the_printed_sql_works_under_any_name(env: dict[str, str], names: Names, database: Database) -> None:
    """Run through psql it makes what setup makes."""
    printed = Process("setup", "--print-sql", env=env).start()
    assert printed.wait() == 0
    # The roles are the whole server's, and not this test's.
    script = printed.stdout.partition("roles with the least privilege")[0]
    for _ in range(2):
        ran = subprocess.run(
            [_psql(), "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-q", database.url],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    with database.connect() as connection:
        found = {name for (name,) in connection.execute("select pubname from pg_publication")}
        assert found == {names.publication}
    setup = Process("setup", env=env).start()
    assert setup.wait() == 0, setup.stderr
    assert "schema: up to date" in setup.stdout
