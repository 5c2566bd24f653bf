"""The guides are true: metrics and log events are those that there are, links lead somewhere, queries run."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from connector.observability.metrics import Metrics, ReaderMetrics, SinkMetrics
from tests.integration.scenario import set_up
from tests.services import Database

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
# What these do to a server or to its roles is more than a test on a shared one may.
NOT_RUN = re.compile(
    r"alter system|pg_reload_conf|checkpoint|pg_terminate_backend|rollback prepared|setval|pg_drop_replication_slot"
    r"|(create|alter|drop) role|grant "
)


def rows_below(page: Path, heading: str) -> Iterator[list[str]]:
    """Give the cells of each row of the tables in a section."""
    section = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading + "\n")]
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def shown_by(metrics: Metrics) -> set[str]:
    """Return the names on a process's page, with the labels that have several values, and without the prefix."""
    names = set()
    for family in metrics._registry.collect():
        name = family.name.removeprefix("outbox_connector_") + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le", "version", "python"}
        labels |= {"status"} if name == "outbox_rows" else set()
        names.add(f"{name}{{{','.join(sorted(labels))}}}" if labels else name)
    return names


@pytest.mark.parametrize(("page", "heading"), [("docs/operations.md", "Metrics"), ("README.md", "Operations")])
def test_the_tables_of_metrics_hold_those_that_there_are(page: str, heading: str) -> None:
    """Every metric is in the table, with the process that shows it, and no other."""
    reader, sink = shown_by(ReaderMetrics()), shown_by(SinkMetrics())
    whose = {"reader": reader - sink, "sink": sink - reader, "both": reader & sink}
    told: dict[str, set[str]] = defaultdict(set)
    for cells in rows_below(ROOT / page, heading):
        if cells[1] in whose:
            told[cells[1]].add(cells[0].strip("`"))
    assert told == whose


def logged_events() -> dict[str, set[str]]:
    """Return the events that the connector's code logs, with their levels; the demo has a view instead."""
    events: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "connector").rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            if re.fullmatch(r"_?log|get_logger\(.*\)", ast.unparse(node.func.value)):
                level = "error" if node.func.attr == "exception" else node.func.attr
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        events[part.value].add(level)
    return events


def test_the_table_of_log_events_holds_those_that_there_are() -> None:
    """Every event is in the table with its level, and no other."""
    told: dict[str, set[str]] = {}
    for cells in rows_below(OPERATIONS, "Log events"):
        for event in re.findall(r"`(\w+)`", cells[0]):
            told[event] = set(cells[1].split(", "))
    logged = logged_events()
    assert logged.keys() <= told.keys()
    for event, levels in logged.items():
        assert levels <= told[event], event
    # Some are named where they are handed over to what logs them.
    code = "".join(path.read_text() for path in (ROOT / "connector").rglob("*.py"))
    assert [event for event in told if f'"{event}"' not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """The file is there, and so is the heading or the place that a link names."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if place:
            assert place in places(target), link


def places(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them of headings, and those that it sets itself."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def test_the_queries_of_the_guides_run(database: Database, connector_env: dict[str, str]) -> None:
    """What an operator is told to ask, PostgreSQL answers; nothing that this changes is kept."""
    set_up(connector_env)
    ran = 0
    with database.connect() as connection:
        for page in (OPERATIONS, *sorted((ROOT / "docs" / "guides").glob("*.md"))):
            for block in re.findall(r"^ *```sql\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
                too_old = "select slot_name, synced" in block and connection.info.server_version < 170_000
                if NOT_RUN.search(block) or too_old:
                    continue
                statements = re.sub(r"\\watch.*", "", block)
                connection.execute("begin")
                connection.execute(statements.encode())
                connection.execute("rollback")
                ran += 1
    assert ran > 10


def test_uninstalling_leaves_nothing_but_history(database: Database, connector_env: dict[str, str]) -> None:
    """The statements of the guide take away all that `setup` made; roles, which are the cluster's, aside."""
    set_up(connector_env)
    (block,) = re.findall(r"^## Uninstall\n.*?```sql\n(.*?)```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    block = block.replace("'outbox_connector'", f"'{connector_env['CONNECTOR_SLOT_NAME']}'")
    block = block.replace("publication outbox_connector", f"publication {connector_env['CONNECTOR_PUBLICATION_NAME']}")
    with database.connect() as connection:
        for statement in block.split(";"):
            if not re.search(r"drop (owned|role)", statement):
                connection.execute(statement.encode())
        left = connection.execute(
            "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'"
            " union all select proname from pg_proc where pronamespace = 'public'::regnamespace"
            " union all select pubname from pg_publication"
            " union all select slot_name from pg_replication_slots where database = current_database()"
        ).fetchall()
    assert left == [("chat_histories",)]
