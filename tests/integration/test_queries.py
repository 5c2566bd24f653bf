"""The plans of the hot queries on a table of 200,000 rows, most of them consumed: none may read the whole table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from connector.backoff import DELAYS
from connector.handlers.chat_history import ChatHistoryHandler
from connector.outbox import Table
from connector.store.connections import connect
from connector.store.queries import Tables
from connector.store.schema import migrate
from connector.store.settlement import Settlement
from tests.integration.scenario import OUTBOX, Connection
from tests.services import Database, Postgres

TABLES = Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))
ROWS = 200_000

PRIMARY = "agent_outbox_messages_pkey"
PENDING = "agent_outbox_messages_pending_idx"
PUBLISHED = "agent_outbox_messages_published_idx"
DUE = "agent_outbox_messages_due_idx"
UNSETTLED = "agent_outbox_messages_unsettled_idx"
DEAD = "agent_outbox_messages_dead_idx"


@pytest.fixture(scope="module")
def large(postgres: Postgres) -> Iterator[Database]:
    """A database whose outbox is large and mostly settled, as it is after some days of work."""
    with postgres.database() as database, database.connect() as connection:
        migrate(connection, TABLES)
        connection.execute(
            f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status, retry_count, next_retry_at)"
            " select 'chat_history_persist', 'topic', 'key-' || n % 5000,"
            "        jsonb_build_object('user_id', 1, 'chat_id', 'key', 'message_content', repeat('x', 100)),"
            "        case when n % 1000 = 1 then 'pending' when n % 1000 = 2 then 'published'"
            "             when n % 1000 = 3 then 'dead' when n % 10000 = 4 then 'pending' else 'consumed' end,"
            "        case when n % 10000 = 4 then 1 else 0 end,"
            "        case when n % 10000 = 4 then now() + (n - 100000) * interval '1 second' end"
            f"   from generate_series(1, {ROWS}) as n"
        )
        connection.execute(f"update {OUTBOX} set updated_at = now() - interval '1 minute' where status <> 'consumed'")
        connection.execute(f"vacuum analyze {OUTBOX}")
        yield database


@pytest.fixture
def session(large: Database) -> Iterator[Connection]:
    """A connection with the settings that the connector's own have; what it changes is rolled back.

    And cleaned up: an index that has grown by what was rolled back costs more than it is worth to the next plan.
    """
    with connect(large.url, name="test") as connection:
        yield from _and_undone(connection)


@pytest.fixture
def at_work(large: Database) -> Iterator[Connection]:
    """The same with the settings of the sink's connection, and of the reader's bookkeeping."""
    with connect(large.url, name="test", by_index=True) as connection:
        yield from _and_undone(connection)


def _and_undone(connection: Connection) -> Iterator[Connection]:
    connection.execute("begin")
    yield connection
    connection.execute("rollback")
    connection.execute(f"vacuum {OUTBOX}")
    connection.execute(f"reindex index {DUE}")


def plan_of(session: Connection, statement: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of the plan that the prepared statement is run with."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)[bs]", statement)))
    text = re.sub(r"%\((\w+)\)[bs]", lambda found: f"${names.index(found[1]) + 1}", statement).replace("%%", "%")
    session.execute("deallocate all")
    session.execute(f"prepare hot as {text}".encode())
    values = ", ".join("%s" for _ in names)
    call = f"explain (analyze, format json) execute hot{f'({values})' if names else ''}"
    # EXECUTE takes no parameters of the protocol: the arguments go into its text.
    literal = psycopg.ClientCursor(session).execute(call, [arguments[name] for name in names]).fetchone()
    assert literal is not None
    plan = literal[0] if isinstance(literal[0], list) else json.loads(literal[0])
    nodes: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        nodes.append(node)
        for child in node.get("Plans", []):
            walk(child)

    walk(plan[0]["Plan"])
    return nodes


def check(nodes: Sequence[dict[str, Any]], *expected: str, forbidden: Sequence[str] = ()) -> None:
    """Assert that the outbox is reached by just these indexes, and by no scan of all of it."""
    scans = [node for node in nodes if node.get("Relation Name") == "agent_outbox_messages"]
    sequential = [node for node in scans if node["Node Type"] == "Seq Scan" and node["Actual Loops"] > 0]
    assert not sequential
    used = {node["Index Name"] for node in nodes if "Index Name" in node}
    assert set(expected) <= used, used
    assert not used & set(forbidden)
    for node in nodes:
        if node.get("Index Name", "").startswith("agent_outbox") and node["Node Type"] != "Bitmap Index Scan":
            read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            assert read <= 5_000, node


def ids_of(session: Connection, status: str, limit: int = 1_000) -> list[int]:
    """Return ids of rows with a status."""
    query = f"select id from {OUTBOX} where status = %s order by id limit %s"
    return [outbox_id for (outbox_id,) in session.execute(query, [status, limit])]


def reader_query(session: Connection, name: str) -> str:
    """Return a statement of reader.sql."""
    return TABLES.query("reader", name).as_string(session)


def sink_query(session: Connection, name: str) -> str:
    """Return a statement of sink.sql."""
    return TABLES.query("sink", name).as_string(session)


@pytest.mark.parametrize("size", [1, 2_000])
def test_marking_looks_its_rows_up(at_work: Connection, size: int) -> None:
    """`mark_published` finds each row by its id, for one as for a full batch."""
    ids = (ids_of(at_work, "pending") * 20)[:size] if size == 1 else list(range(1, size + 1))
    nodes = plan_of(
        at_work,
        reader_query(at_work, "mark_published"),
        {
            "ids": ids,
            "retry_counts": [0] * size,
            "updated_ats": [0] * size,
            "next_retry_ats": [None] * size,
        },
    )
    check(nodes, PRIMARY)


def test_due_rows_come_from_their_own_index(at_work: Connection) -> None:
    """`due_rows` reads in due order, just the rows that are due."""
    nodes = plan_of(at_work, reader_query(at_work, "due_rows"), {"limit": 1_000})
    check(nodes, DUE)
    assert [node["Actual Loops"] for node in nodes if node.get("Index Name") == PENDING] == [0]


def test_what_a_row_with_a_due_time_of_its_own_must_not_overtake_is_one_entry_of_an_index(at_work: Connection) -> None:
    """`due_rows` looks the oldest row up that is still to be published, once, and only for such rows."""
    at_work.execute(
        f"insert into {OUTBOX} (biz_type, topic, message_key, payload, next_retry_at)"
        " select 'b', 't', 'k', '{}', now() - interval '1 hour' from generate_series(1, 20)"
    )
    nodes = plan_of(at_work, reader_query(at_work, "due_rows"), {"limit": 1_000})
    check(nodes, DUE, PENDING)
    assert [(node["Actual Loops"], node["Actual Rows"]) for node in nodes if node.get("Index Name") == PENDING] == [
        (1, 1)
    ]


def test_the_next_due_time_is_one_entry_of_an_index(at_work: Connection) -> None:
    """`seconds_to_next_due` reads a single row."""
    nodes = plan_of(at_work, reader_query(at_work, "seconds_to_next_due"), {})
    check(nodes, DUE)
    assert sum(node["Actual Rows"] for node in nodes if node.get("Index Name") == DUE) <= 1


def test_the_sweep_reads_only_pending_rows(at_work: Connection) -> None:
    """`overlooked_rows` goes through the index of pending rows."""
    nodes = plan_of(at_work, reader_query(at_work, "overlooked_rows"), {"quiet_seconds": 10, "limit": 1_000})
    check(nodes, PENDING)


def test_the_catch_up_reads_pending_rows_in_order_without_sorting(session: Connection) -> None:
    """`catch_up_rows` streams from the index of pending rows: it starts at once, whatever the backlog."""
    nodes = plan_of(session, reader_query(session, "catch_up_rows"), {"through": ROWS})
    check(nodes, PENDING)
    assert not [node for node in nodes if node["Node Type"] == "Sort"]


def test_the_highest_pending_id_comes_from_the_end_of_an_index(session: Connection) -> None:
    """`highest_pending_id` reads backwards to the first row that fits."""
    nodes = plan_of(session, reader_query(session, "highest_pending_id"), {})
    check(nodes, PENDING)
    assert sum(node["Actual Rows"] for node in nodes if node.get("Index Name") == PENDING) <= 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("size", [1, 1_000])
@pytest.mark.parametrize("failing", [True, False], ids=["some retried", "none retried"])
@pytest.mark.parametrize("plain", [True, False], ids=["store_plain_batch", "store_batch"])
def test_storing_looks_its_rows_up(at_work: Connection, size: int, *, strict: bool, failing: bool, plain: bool) -> None:
    """Both statements find their rows by id, and what may hold them back by key, through indexes alone."""
    handler = ChatHistoryHandler()
    if not failing:
        at_work.execute(f"update {OUTBOX} set status = 'dead', next_retry_at = null where next_retry_at is not null")
    ids = ids_of(at_work, "published", 200) if size == 1 else list(range(2, size + 2))
    ids = ids[:size]
    arguments: dict[str, Any] = {"outbox_ids": ids, "strict": strict}
    values = {"user_id": 1, "chat_id": "c", "message_content": "x", "role": "user", "created_at": None}
    for column in handler.columns:
        arguments[f"column_{column}"] = [values[column]] * len(ids)
    settlement = Settlement(at_work, TABLES, {"chat_history_persist": handler}, strict=strict)
    statements = settlement._plain_statements if plain else settlement._statements
    nodes = plan_of(at_work, statements["chat_history_persist"].as_string(at_work), arguments)
    check(nodes, PRIMARY)
    if strict and failing:
        assert UNSETTLED in {node.get("Index Name") for node in nodes}
    if plain:
        # Rows are updated, and so locked, in the order of their ids, or two batches could lock each other out.
        (place,) = [place for place, node in enumerate(nodes) if node.get("Operation") == "Update"]
        (scan,) = [node for node in nodes[place:] if node.get("Alias") == "o" and "Index Name" in node]
        assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", PRIMARY)


@pytest.mark.parametrize("size", [1, 500])
def test_scheduling_retries_looks_its_rows_up(at_work: Connection, size: int) -> None:
    """`schedule_retries` finds its rows by id."""
    arguments = {
        "ids": list(range(1, size + 1)),
        "attempts": [0] * size,
        "errors": ["no"] * size,
        "costs": [1] * size,
        "delays": list(DELAYS),
    }
    check(plan_of(at_work, sink_query(at_work, "schedule_retries"), arguments), PRIMARY)


@pytest.mark.parametrize("size", [1, 500])
def test_giving_up_looks_its_rows_up(at_work: Connection, size: int) -> None:
    """`mark_dead` finds its rows by id."""
    arguments = {"ids": list(range(1, size + 1)), "attempts": [0] * size, "errors": ["no"] * size}
    check(plan_of(at_work, sink_query(at_work, "mark_dead"), arguments), PRIMARY)


def test_a_row_that_is_stored_already_is_found_by_its_id(at_work: Connection) -> None:
    """`mark_already_stored` reads one row."""
    check(plan_of(at_work, sink_query(at_work, "mark_already_stored"), {"id": 17}), PRIMARY)


def test_counting_the_backlog_reads_only_the_backlog(session: Connection) -> None:
    """`count_live_rows` uses the partial indexes of the statuses, never the table."""
    statement = TABLES.query("gauges", "count_live_rows").as_string(session)
    for bound in (100_000, None):
        check(plan_of(session, statement, {"bound": bound}), PENDING, PUBLISHED, DEAD)


def test_the_oldest_age_is_looked_for_in_the_beginnings_of_two_indexes(session: Connection) -> None:
    """`oldest_unconsumed_age` reads the first pending and the first published rows, and no more than it is told to."""
    nodes = plan_of(session, TABLES.query("gauges", "oldest_unconsumed_age").as_string(session), {"bound": 10})
    check(nodes, PENDING, PUBLISHED)
    assert sum(node["Actual Rows"] for node in nodes if "Index Name" in node) <= 20


def test_counting_held_rows_reads_only_rows_in_retry(session: Connection) -> None:
    """`count_held` goes through the indexes of rows that wait."""
    nodes = plan_of(session, TABLES.query("gauges", "count_held").as_string(session), {"bound": 100_000})
    check(nodes)
    assert {DUE, UNSETTLED} & {node.get("Index Name") for node in nodes}


@pytest.mark.parametrize(
    ("name", "arguments", "index"),
    [
        ("latest_id", {}, PRIMARY),
        ("retries", {"bound": 1_000}, DUE),
        ("latency", {"bound": 5_000, "sample": 500, "seconds": 30.0}, PRIMARY),
        ("deaths", {"bound": 1_000, "limit": 5}, DEAD),
    ],
)
def test_watching_reads_a_bounded_number_of_rows(
    session: Connection, name: str, arguments: dict[str, Any], index: str
) -> None:
    """What `status --watch` and the console ask every few seconds takes its rows from the end of an index."""
    check(plan_of(session, TABLES.query("gauges", name).as_string(session), arguments), index)


@pytest.mark.parametrize(
    ("name", "arguments", "index"),
    [
        ("message", {"id": 17, "longest": 100}, PRIMARY),
        ("waits_for", {"id": ROWS, "key": "key-4", "topic": "topic"}, UNSETTLED),
        ("of_key", {"before": ROWS, "rows": 5_000, "key": "key-1", "limit": 50}, PRIMARY),
        ("looked_down_to", {"before": ROWS, "rows": 5_000}, PRIMARY),
        ("unsettled_of_key", {"key": "key-4", "limit": 50}, UNSETTLED),
        ("dead_of_key", {"key": "key-3", "rows": 1_000, "limit": 50}, DEAD),
        ("not_in_history", {"chat_id": "other", "rows": 1_000, "limit": 50}, DEAD),
        ("dead_by_reason", {"rows": 1_000, "limit": 100}, DEAD),
        ("dead_of_reason", {"rows": 1_000, "limit": 100, "reason": "", "biz_type": "chat_history_persist"}, DEAD),
    ],
)
def test_the_console_asks_no_more_than_it_shows(
    session: Connection, name: str, arguments: dict[str, Any], index: str
) -> None:
    """Each question of the console is answered from an index, by a number of rows that has a bound."""
    reason = TABLES.query("console", "reason")
    more: dict[str, Any] = {"reason": reason} if name.startswith("dead_") and name != "dead_of_key" else {}
    check(plan_of(session, TABLES.query("console", name, **more).as_string(session), arguments), index)


def test_the_estimate_of_all_rows_reads_two_ids(session: Connection) -> None:
    """`estimate_all_rows` asks the catalog, and is about right, whatever has been analysed and when."""
    statement = TABLES.query("gauges", "estimate_all_rows")
    (estimate,) = session.execute(statement, {"outbox": str(TABLES.outbox)}).fetchone() or (0,)
    # What other tests have left dead in the table counts until it is vacuumed.
    assert ROWS / 2 < estimate < ROWS * 2
    nodes = plan_of(session, statement.as_string(session), {"outbox": str(TABLES.outbox)})
    check(nodes, PRIMARY)
    assert sum(node["Actual Rows"] for node in nodes if node.get("Index Name") == PRIMARY) <= 2


REDRIVEN = {"run": uuid4(), "redriven_by": "test@here", "reason": None, "outbox": str(TABLES.outbox)}
ANY_ROW = {
    "after": -1,
    "through": 1 << 62,
    "ids": None,
    "key": None,
    "biz_type": None,
    "error_like": None,
    "older_than": None,
    "started_at": "2026-01-01",
    "limit": 500,
}


@pytest.mark.parametrize("ids", [None, [3]], ids=["all", "one"])
@pytest.mark.parametrize(("status", "index"), [("dead", DEAD), ("published", PUBLISHED)])
@pytest.mark.parametrize("name", ["count", "reasons", "samples", "redrive_batch"])
def test_redriving_reads_only_rows_of_the_status(
    session: Connection, name: str, status: str, index: str, ids: list[int] | None
) -> None:
    """Whatever the selection, it goes through the index of dead, or of published, rows."""
    since = TABLES.query("redrive", f"since_{status}")
    selected = TABLES.query("redrive", "selected", status=sql.Literal(status), since=since)
    statement = TABLES.query("redrive", name, status=sql.Literal(status), since=since, selected=selected)
    arguments = {**ANY_ROW, **REDRIVEN, "ids": ids}
    nodes = plan_of(session, statement.as_string(session), arguments)
    check(nodes, index, *([PRIMARY] if name == "redrive_batch" else []))


@pytest.mark.parametrize("name", ["remove_window", "count_window"])
@pytest.mark.parametrize("after", [-1, ROWS // 2])
def test_pruning_needs_no_index_but_the_primary_key(session: Connection, name: str, after: int) -> None:
    """A window costs what is in it, at the beginning of the table and in its midst."""
    session.execute(f"update {OUTBOX} set consumed_at = now() - interval '8 days' where id between 90000 and 110000")
    statement = TABLES.query("prune", name, since=TABLES.query("prune", "settled_since")).as_string(session)
    arguments = {
        "after": after,
        "window": 1_000,
        "statuses": ["consumed", "dead"],
        "started_at": datetime.now(UTC),
        "older_than": 7 * 86_400.0,
    }
    nodes = plan_of(session, statement, arguments)
    check(nodes, PRIMARY)
    assert {node["Index Name"] for node in nodes if "Index Name" in node} == {PRIMARY}


def test_comparing_reads_ranges_of_outbox_and_history(session: Connection) -> None:
    """`reconcile` and the sink's proof reach both tables by their ids, whatever lies around the range."""
    session.execute(
        "insert into chat_histories (user_id, chat_id, message_content, outbox_id)"
        f" select 1, 'key', repeat('x', 100), id from {OUTBOX} where status = 'consumed'"
    )
    session.execute("analyze chat_histories")
    session.execute("set local plan_cache_mode = force_custom_plan")
    stretch = {"after": 100_000, "through": 102_000, "since": float("-inf")}
    messages, few = (
        TABLES.query(
            "reconcile",
            "messages",
            which=TABLES.query("reconcile", outbox),
            which_history=TABLES.query("reconcile", history),
        )
        for outbox, history in (("in_range", "in_range_of_history"), ("of_ids", "of_ids_in_history"))
    )
    for statement, arguments in (
        (messages, stretch),
        (few, {"ids": list(range(5, 1_000, 7))}),
        (TABLES.query("reconcile", "places"), stretch | {"mask": 1, "bits": 1}),
        (
            TABLES.query("reconcile", "unproved", untimely=TABLES.query("reconcile", "untimely")),
            stretch | {"limit": 1_000, "again": list(range(100)), "biz_types": ["chat_history_persist"]},
        ),
    ):
        nodes = plan_of(session, statement.as_string(session), arguments)
        check(nodes, PRIMARY, "chat_histories_outbox_id_key")
        assert not [n for n in nodes if n.get("Relation Name") == "chat_histories" and n["Node Type"] == "Seq Scan"]
    session.execute("insert into chat_histories (user_id, chat_id) select 1, 'key' from generate_series(1, 100)")
    within = TABLES.query("reconcile", "in_range_of_history")
    content = TABLES.query("reconcile", "content")
    for statement, given in (
        (TABLES.query("reconcile", "without_a_message", which_history=within), stretch),
        (TABLES.query("reconcile", "end_of_history_range"), stretch | {"limit": 2_000}),
        (TABLES.query("reconcile", "rows_without_id"), {"limit": 1_000, "history": "chat_histories"}),
        (TABLES.query("reconcile", "count_without_id"), {"first": "(0,0)", "end": "(100000,0)"}),
        (TABLES.query("reconcile", "content_of_range", content=content), stretch),
        (TABLES.query("reconcile", "first_stored"), {}),
    ):
        nodes = plan_of(session, statement.as_string(session), given)
        assert not [n for n in nodes if n["Node Type"] == "Seq Scan" and "histories" in n.get("Relation Name", "")]
        assert "chat_histories_outbox_id_key" in {node.get("Index Name") for node in nodes}


def test_plans_hold_when_the_table_was_never_analyzed(database: Database) -> None:
    """Directly after setup, with no statistics at all, the due rows and the catch-up still use their indexes."""
    with database.connect() as owner, connect(database.url, name="test") as session:
        migrate(owner, TABLES)
        owner.execute(
            f"insert into {OUTBOX} (biz_type, topic, message_key, payload, status)"
            " select 'b', 't', 'k', '{}', case when n % 100 = 0 then 'pending' else 'consumed' end"
            "   from generate_series(1, 20000) as n"
        )
        check(plan_of(session, reader_query(session, "due_rows"), {"limit": 1_000}), DUE)
        check(plan_of(session, reader_query(session, "catch_up_rows"), {"through": ROWS}), PENDING)
        check(
            plan_of(session, sink_query(session, "mark_dead"), {"ids": [1], "attempts": [0], "errors": ["no"]}), PRIMARY
        )


def test_plans_hold_that_were_made_for_an_empty_table(database: Database) -> None:
    """Who begins with a new outbox keeps its statements' plans, however large it grows, until it is analysed."""
    ids = [1, 2, 3]
    marks = {"ids": ids, "retry_counts": [0] * 3, "updated_ats": [0] * 3, "next_retry_ats": [None] * 3}
    values = {"user_id": 1, "chat_id": "c", "message_content": "x", "role": "user", "created_at": None}
    batch = {"outbox_ids": ids, "strict": True, **{f"column_{name}": [value] * 3 for name, value in values.items()}}
    with database.connect() as owner, connect(database.url, name="test", by_index=True) as session:
        migrate(owner, TABLES)
        settlement = Settlement(session, TABLES, {"chat_history_persist": ChatHistoryHandler()}, strict=True)
        statements = {
            reader_query(session, "mark_published"): marks,
            settlement._plain_statements["chat_history_persist"].as_string(session): batch,
            settlement._statements["chat_history_persist"].as_string(session): batch,
        }
        for statement, arguments in statements.items():
            nodes = plan_of(session, statement, arguments)
            scans = [node for node in nodes if node.get("Relation Name") == "agent_outbox_messages"]
            assert "Seq Scan" not in {node["Node Type"] for node in scans}, statement
