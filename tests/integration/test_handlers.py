"""Handlers of other packages: the example of the guide, and packages that are not as they should be."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.outbox_table import OutboxTable
from tests.integration.scenario import metric, readiness, set_up
from tests.services import Database, Process, eventually

CHECKOUT = Path(__file__).parents[2]
EXAMPLE = CHECKOUT / "docs" / "examples" / "chat_titles"
GROUP = "outbox_connector.handlers"


@pytest.fixture
def outbox(database: Database, connector_env: dict[str, str]) -> Iterator[OutboxTable]:
    """The tables of a fresh database, with everything else that `setup` makes."""
    set_up(connector_env)
    outbox = OutboxTable(database)
    yield outbox
    outbox.close()


@pytest.fixture
def titles(outbox: OutboxTable) -> OutboxTable:
    """The same, with the example's table, as its docstring makes it."""
    outbox.connection.execute(_table_of_the_example())
    return outbox


def installed(directory: Path, name: str, entry_points: dict[str, str], *sources: Path) -> str:
    """Make a package that is installed as pip would leave it; return the PYTHONPATH that has it."""
    metadata = directory / f"{name}-1.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n", "utf-8")
    lines = [f"[{GROUP}]", *(f"{biz_type} = {value}" for biz_type, value in entry_points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for source in sources:
        (directory / source.name).write_text(source.read_text("utf-8"), "utf-8")
    return os.pathsep.join([str(CHECKOUT), str(directory)])


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The example package, installed."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    return installed(tmp_path, "chat_titles", project["entry-points"][GROUP], EXAMPLE / "chat_titles.py")


def wait_for(outbox: OutboxTable, outbox_id: int, status: str = "consumed") -> None:
    """Wait until a row has that status."""
    eventually(lambda: outbox.status(outbox_id) == status, within=30, what=f"row {outbox_id} becoming {status}")


def test_a_handler_of_another_package_stores_its_messages_beside_the_built_in_one(
    titles: OutboxTable, topic: str, path: str, connector: Callable[..., Process]
) -> None:
    """The guide's example: the last title of each chat stays, chat history is stored too, bad payloads are dead."""

    def change(chat_id: str, title: object) -> int:
        return titles.new(chat_id, topic, {"chat_id": chat_id, "title": title}, biz_type="chat_title_changed")

    rows = [change("c1", "one"), titles.new("c1", topic), change("c2", "a"), change("c1", "two"), change("c2", "b")]
    wrong = change("c1", 7)
    too_long = titles.new(
        "c3", topic, {"chat_id": "c3", "title": "x" * 201}, biz_type="chat_title_changed", max_retry=1
    )
    last = change("c1", "three")
    connector("reader")
    sink = connector("sink", PYTHONPATH=path)
    for outbox_id in (*rows, last):
        wait_for(titles, outbox_id)
    wait_for(titles, too_long, "dead")
    stored = titles.connection.execute("select chat_id, title, outbox_id from chat_titles order by 1").fetchall()
    assert stored == [("c1", "three", last), ("c2", "b", rows[4])]
    assert titles.history() == [rows[1]]
    assert titles.status(wrong) == "dead"
    assert "`title`" in (titles.row(wrong).last_error or "")
    assert "too long" in (titles.row(too_long).last_error or "")
    assert metric(sink, "consumed_total") == len(rows) + 1


def test_messages_of_a_handler_wait_for_its_table(
    outbox: OutboxTable, topic: str, path: str, connector: Callable[..., Process]
) -> None:
    """A table that is not there yet burns no retry: the sink is not ready until somebody makes it."""
    row = outbox.new("c1", topic, {"chat_id": "c1", "title": "one"}, biz_type="chat_title_changed")
    connector("reader")
    sink = connector("sink", PYTHONPATH=path)
    postponed = sink.wait_for_log("batch_postponed", within=30)
    assert "chat_titles" in postponed["error"]
    assert readiness(sink) == 503
    outbox.connection.execute(_table_of_the_example())
    wait_for(outbox, row)
    assert outbox.row(row).retry_count == 0


BROKEN_HANDLERS = """
class Base:
    columns = {"value": "text"}
    statement = "insert into values_of (value, outbox_id) select a.value, a.outbox_id from accepted as a"

class Raising(Base):
    def parse(self, payload):
        return [payload["value"]]

class TooFew(Base):
    def parse(self, payload):
        return [] if payload["value"] == "odd" else [payload["value"]]

class Unadaptable(Base):
    def parse(self, payload):
        return [object() if payload["value"] == "odd" else payload["value"]]

class Braces(Raising):
    statement = "insert into {nothing}"

class Brace(Raising):
    statement = "select '{'"

class Percent(Raising):
    statement = "select 7 % 2"
"""


@pytest.mark.parametrize("name", ["Raising", "TooFew", "Unadaptable"])
def test_a_defect_of_a_handler_costs_only_the_message_that_shows_it(
    outbox: OutboxTable, topic: str, tmp_path: Path, connector: Callable[..., Process], name: str
) -> None:
    """A `parse` that raises what it should not, or returns nonsense, is a failure of its message: retry, then dead."""
    outbox.connection.execute("create table values_of (value text, outbox_id bigint unique)")
    source = tmp_path / "source" / "broken_handlers.py"
    source.parent.mkdir()
    source.write_text(BROKEN_HANDLERS, "utf-8")
    path = installed(tmp_path / "packages", "broken", {"value": f"broken_handlers:{name}"}, source)
    odd = {} if name == "Raising" else {"value": "odd"}
    before = outbox.new("key", topic, {"value": "1"}, biz_type="value")
    bad = outbox.new("key", topic, odd, biz_type="value", max_retry=2)
    after = outbox.new("key", topic, {"value": "2"}, biz_type="value")
    connector("reader")
    sink = connector("sink", PYTHONPATH=path)
    sink.wait_for_log("retry_scheduled", outbox_id=bad, within=30)
    wait_for(outbox, bad, "dead")
    wait_for(outbox, after)
    assert sink.returncode is None
    stored = outbox.connection.execute("select outbox_id from values_of order by outbox_id").fetchall()
    assert stored == [(before,), (after,)]
    assert outbox.row(after).retry_count == 0
    assert outbox.row(bad).last_error


@pytest.mark.parametrize(
    ("entry_points", "told"),
    [
        ({"value": "no_such_module:Handler"}, "no_such_module"),
        ({"value": "collections:OrderedDict"}, "lacks columns, statement or parse"),
        ({"value": "strange_statement:Braces"}, "{nothing}"),
        ({"value": "strange_statement:Brace"}, "brace"),
        ({"value": "strange_statement:Percent"}, "%"),
        ({"chat_history_persist": "strange_statement:Raising"}, "'chat_history_persist' has two handlers"),
    ],
)
def test_a_handler_that_is_none_is_a_problem_of_the_configuration(
    outbox: OutboxTable, tmp_path: Path, connector: Callable[..., Process], entry_points: dict[str, str], told: str
) -> None:
    """It is told by its entry point, and the sink exits with 78 before it takes a message."""
    source = tmp_path / "source" / "strange_statement.py"
    source.parent.mkdir()
    source.write_text(BROKEN_HANDLERS, "utf-8")
    sink = connector("sink", PYTHONPATH=installed(tmp_path / "packages", "strange", entry_points, source))
    assert sink.wait(20) == 78
    assert told in sink.stderr


def _table_of_the_example() -> str:
    docstring = (EXAMPLE / "chat_titles.py").read_text("utf-8")
    return docstring[docstring.index("create table") : docstring.index("grant")]
