"""What `doctor` makes of the facts about PostgreSQL. Every check is a pure decision over facts that were gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from connector.ops.expectations import Expectations
from connector.ops.findings import Finding, Verdict, fail, listed, ok, serving, size, skipped, warning
from connector.ops.slot_debt import catch_up_owed
from connector.outbox import Table
from connector.store.inspection import DatabaseFacts, Relation, Untold
from connector.store.schema import PUBLISHED_COLUMNS, migrations

_OLDEST, _NEWEST = 15, 18
_FAILOVER_SINCE: Final = 17
_WORTH_A_LOOK: Final = 0.5
_CLOCK_TOLERANCE_SECONDS: Final = 1.0
_SETUP: Final = "run `outbox-connector setup`"

# What the stream's decoder and the statements take, the best of each first.
_INTEGERS: Final = ("bigint", "integer", "smallint")
_TEXTS: Final = ("text", "character varying")
_JSON: Final = ("jsonb", "json")
_TIMES: Final = ("timestamp with time zone",)
_ANY_TIMES: Final = (*_TIMES, "timestamp without time zone")
_OUTBOX_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "id": _INTEGERS,
    "biz_type": _TEXTS,
    "topic": _TEXTS,
    "message_key": _TEXTS,
    "payload": _JSON,
    "headers": _JSON,
    "status": _TEXTS,
    "retry_count": _INTEGERS,
    "max_retry": _INTEGERS,
    "next_retry_at": _TIMES,
    "last_error": _TEXTS,
    "published_at": _ANY_TIMES,
    "consumed_at": _ANY_TIMES,
    "created_at": _ANY_TIMES,
    "updated_at": _TIMES,
}
_HISTORY_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "user_id": (*_INTEGERS, "numeric"),
    "chat_id": (*_TEXTS, "character"),
    "message_content": _TEXTS,
    "role": (*_TEXTS, "character"),
    "created_at": _ANY_TIMES,
    "outbox_id": _INTEGERS,
}
_KINDS: Final[Mapping[str, str]] = {
    "p": "a partitioned table",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
}


@dataclass(frozen=True, slots=True)
class Replication:
    """What a replication connection leads to."""

    system_identifier: str
    database: str | None
    in_recovery: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A replication connection that could not be made, in the server's or libpq's words."""

    reason: str


@dataclass(frozen=True, slots=True)
class DatabaseExamination:
    """The facts that the checks decide on. `same_url` tells that one URL serves for queries and for replication."""

    database: DatabaseFacts
    replication: Replication | Refused
    same_url: bool
    expected: Expectations


Check = Callable[[DatabaseExamination], Iterable[Verdict]]


def judge_database(facts: DatabaseExamination) -> Iterator[Finding]:
    """Make every check, in the order in which one would mend things."""
    for name, check in CHECKS.items():
        for verdict in check(facts):
            yield Finding(name, *verdict)


def skip_database(reason: str) -> Iterator[Finding]:
    """Tell of every check that it could not be made."""
    for name in CHECKS:
        yield Finding(name, *skipped(reason))


# --- the server and the way to it ------------------------------------------------------------------------------------


def _version(facts: DatabaseExamination) -> Iterator[Verdict]:
    server = facts.database.server
    major = server.version // 10_000
    if major < _OLDEST:
        yield fail(
            f"PostgreSQL {server.version_text}: publications with columns and row filters need {_OLDEST}",
            f"upgrade the server to {_OLDEST} or newer",
        )
    elif major > _NEWEST:
        yield warning(
            f"PostgreSQL {server.version_text} is newer than this connector was tested with",
            "look for a newer connector",
        )
    else:
        yield ok(f"PostgreSQL {server.version_text}")


def _primary(facts: DatabaseExamination) -> Iterator[Verdict]:
    if facts.database.server.in_recovery:
        yield fail(
            "CONNECTOR_DATABASE_URL leads to a standby, which takes no writes",
            "point it to the primary, or list all servers and add target_session_attrs=read-write",
        )
    else:
        yield ok("the server takes writes")


def _connection(facts: DatabaseExamination) -> Iterator[Verdict]:
    session = facts.database.session
    if session.direct:
        yield ok("direct, no pooler in the way")
    elif not session.shared:
        yield ok("through a pooler that keeps sessions")
    else:
        yield warning(
            "through a pooler that shares server sessions between transactions, so that time limits and prepared"
            " statements do not hold",
            "let the connector use session pooling, or point CONNECTOR_DATABASE_URL to the server itself",
        )


def _replication(facts: DatabaseExamination) -> Iterator[Verdict]:
    replication, database = facts.replication, facts.database
    if isinstance(replication, Refused):
        yield _refusal(facts, replication.reason)
    elif replication.in_recovery:
        yield fail("CONNECTOR_REPLICATION_URL leads to a standby, where a reader only waits", "point it to the primary")
    elif replication.system_identifier != database.server.system_identifier:
        yield fail(
            "CONNECTOR_REPLICATION_URL leads to another database cluster than CONNECTOR_DATABASE_URL",
            "let both lead to the same server",
        )
    elif replication.database != database.server.database:
        yield fail(
            f"CONNECTOR_REPLICATION_URL leads to database {replication.database!r}, not {database.server.database!r}",
            "let both lead to the same database",
        )
    else:
        yield ok("a replication connection can be made")


def _refusal(facts: DatabaseExamination, reason: str) -> Verdict:
    role, text = facts.database.role, f"no replication connection: {reason}"
    if facts.same_url and not facts.database.session.direct:
        return fail(
            f"a pooler is in the way of replication: {reason}",
            "set CONNECTOR_REPLICATION_URL to the server itself, past the pooler",
        )
    if facts.same_url and not role.replication:
        remedy = f"for the reader: alter role {_quoted(role.name)} replication, or set CONNECTOR_REPLICATION_URL"
        return fail(text, remedy) if _lacks_for_sink(facts) else warning(text, remedy)
    return fail(
        text,
        "set CONNECTOR_REPLICATION_URL to the server itself (no pooler), for a role with REPLICATION that pg_hba.conf"
        " lets in",
    )


def _wal_level(facts: DatabaseExamination) -> Iterator[Verdict]:
    level = facts.database.server.wal_level
    if level == "logical":
        yield ok("wal_level is logical")
    else:
        yield fail(
            f"wal_level is {level}, without what logical replication needs",
            "alter system set wal_level = logical, then restart the server",
        )


def _slots(facts: DatabaseExamination) -> Iterator[Verdict]:
    server, there = facts.database.server, facts.database.slot.state is not None
    text = f"{server.slots} of {server.most_slots} replication slots are in use"
    if server.slots < server.most_slots or there:
        yield ok(text)
    else:
        yield fail(f"{text}, and ours is not among them", "raise max_replication_slots, or drop a slot nobody needs")


def _walsenders(facts: DatabaseExamination) -> Iterator[Verdict]:
    server = facts.database.server
    text = f"{server.walsenders} of {server.most_walsenders} walsenders are in use"
    remedy = "raise max_wal_senders: each reader needs one, those that stand by too"
    if server.walsenders < server.most_walsenders:
        yield ok(text)
    elif facts.database.slot.active:
        yield warning(f"{text}: no second reader can stand by", remedy)
    else:
        yield fail(text, remedy)


def _clock(facts: DatabaseExamination) -> Iterator[Verdict]:
    ahead, uncertain = facts.database.clock_ahead_seconds, facts.database.clock_uncertainty_seconds
    if abs(ahead) - uncertain > _CLOCK_TOLERANCE_SECONDS:
        yield warning(
            f"the database's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's:"
            " times in logs and in the database do not match",
            "synchronise both with NTP",
        )
    else:
        yield ok(f"the clocks differ by {abs(ahead):.3f} s")


# --- the schema ------------------------------------------------------------------------------------------------------


def _migrations(facts: DatabaseExamination) -> Iterator[Verdict]:
    tables, applied = facts.expected.tables, facts.database.applied_migrations
    if isinstance(applied, Untold):
        table = Table(tables.outbox.schema, "outbox_connector_migrations")
        yield warning(
            f"the role may not read which migrations are applied: {applied.reason}",
            f"grant select on {table} to {_quoted(facts.database.role.name)}",
        )
        return
    known = {migration.version: migration.name for migration in migrations(tables)}
    missing = [f"{version:04} {known[version]}" for version in sorted(known.keys() - applied)]
    if missing:
        yield fail(f"migrations are not applied: {', '.join(missing)}", _SETUP)
    elif newer := applied - known.keys():
        yield warning(
            f"migrations of a newer connector are applied: {listed(f'{version:04}' for version in newer)}",
            "run the newest connector everywhere",
        )
    else:
        yield ok(f"all {len(known)} migrations are applied")


def _enqueue(facts: DatabaseExamination) -> Iterator[Verdict]:
    tables, found = facts.expected.tables, facts.database.enqueue
    if isinstance(found, Untold):
        yield skipped(found.reason)
    elif found is None:
        yield fail(f"there is no function {tables.enqueue}", _SETUP)
    elif found.is_another:
        yield fail(
            f"function {tables.enqueue} writes to {found.written}, not to {tables.outbox}: what applications"
            " enqueue goes astray",
            f"give each outbox a schema of its own; if {tables.outbox} is the one for this schema: drop function"
            f" {tables.enqueue}, then {_SETUP}",
        )
    elif found.written is None:
        yield ok("there; its source does not tell which table it writes to")
    else:
        yield ok(f"outbox_enqueue writes to {tables.outbox}")


def _outbox(facts: DatabaseExamination) -> Iterator[Verdict]:
    table, outbox = facts.expected.tables.outbox, facts.database.outbox
    if outbox is None:
        yield fail(f"there is no table {table}", f"{_SETUP}, or correct CONNECTOR_OUTBOX_TABLE")
        return
    problems = [*_kind(table, outbox), *_columns(table, outbox, _OUTBOX_COLUMNS)]
    if outbox.replica_identity == "f":
        problems.append(
            warning(
                f"{table} has replica identity FULL: harmless, but every update writes the old row to the WAL",
                f"alter table {table} replica identity default, unless another consumer needs it",
            )
        )
    yield from problems or [ok(f"{table} is as it must be")]


def _history(facts: DatabaseExamination) -> Iterator[Verdict]:
    table, history = facts.expected.tables.history, facts.database.history
    if history is None:
        yield fail(f"there is no table {table}", f"{_SETUP}, or correct CONNECTOR_HISTORY_TABLE")
        return
    problems = [*_kind(table, history, partitions=True), *_columns(table, history, _HISTORY_COLUMNS)]
    yield from problems or [ok(f"{table} is as it must be")]


def _kind(table: Table, relation: Relation, *, partitions: bool = False) -> Iterator[Verdict]:
    if relation.kind == "p" and not partitions:
        yield fail(
            f"{table} is partitioned: the stream names its partitions, which the reader does not take for the outbox",
            "use an ordinary table; `outbox-connector prune` keeps it small",
        )
    elif relation.kind not in {"r", "p"}:
        yield fail(f"{table} is {_KINDS.get(relation.kind, 'no table')}", "name an ordinary table")
    if relation.persistence != "p":
        yield fail(
            f"{table} is not logged: it reaches no stream, and a crash empties it", f"alter table {table} set logged"
        )


def _columns(table: Table, relation: Relation, expected: Mapping[str, tuple[str, ...]]) -> Iterator[Verdict]:
    missing = expected.keys() - relation.columns.keys()
    if missing:
        yield fail(
            f"{table} lacks columns {listed(missing)}",
            f"{_SETUP}; columns that it does not add are in `setup --print-sql`",
        )
    for name, types in expected.items():
        found = relation.columns.get(name)
        if found is not None and found not in types:
            yield fail(
                f"column {name} of {table} is of type {found}, not {types[0]}",
                f"alter table {table} alter column {name} type {types[0]}",
            )


def _outbox_indexes(facts: DatabaseExamination) -> Iterator[Verdict]:
    table, outbox = facts.expected.tables.outbox, facts.database.outbox
    if outbox is None:
        yield skipped("there is no outbox table")
        return
    valid = {index.name for index in outbox.indexes if index.valid}
    missing = [name for name in facts.expected.tables.indexes()[table] if name not in valid]
    if missing:
        yield fail(f"{table} lacks indexes {listed(missing)}: the cost of every batch grows with the table", _SETUP)
    if not any(index.unique and index.valid and index.columns == ("id",) for index in outbox.indexes):
        yield fail(f"no unique index on {table} (id)", f"alter table {table} add primary key (id)")
    elif not missing:
        yield ok("present and valid")


def _history_index(facts: DatabaseExamination) -> Iterator[Verdict]:
    table, history = facts.expected.tables.history, facts.database.history
    if history is None:
        yield skipped("there is no history table")
        return
    if not any(index.unique and index.valid and index.columns == ("outbox_id",) for index in history.indexes):
        yield fail(
            f"no valid unique index on {table} (outbox_id): nothing refuses a second row for one message", _SETUP
        )
    else:
        yield ok(f"{table} refuses a second row for one message")


def _triggers(facts: DatabaseExamination) -> Iterator[Verdict]:
    tables, database = facts.expected.tables, facts.database
    found = [
        verdict
        for table, relation in ((tables.outbox, database.outbox), (tables.history, database.history))
        if relation is not None
        for verdict in (*_triggers_of(table, relation), *_rules_of(table, relation))
    ]
    yield from found or [ok("none that would change what is written")]


def _triggers_of(table: Table, relation: Relation) -> Iterator[Verdict]:
    for trigger in relation.triggers:
        what = f"trigger {trigger.name} on {table}"
        remedy = f"see what it does, or: alter table {table} disable trigger {_quoted(trigger.name)}"
        if trigger.enabled == "D":
            continue
        if trigger.enabled == "R":
            yield warning(f"{what} is enabled for replicas only: it never fires for the connector's writes", remedy)
        elif trigger.enabled == "A":
            yield warning(f"{what} always fires, also where session_replication_role turns triggers off", remedy)
        elif trigger.before and (trigger.on_insert or trigger.on_update):
            yield warning(f"{what} runs before a write and may change or drop it", remedy)


def _rules_of(table: Table, relation: Relation) -> Iterator[Verdict]:
    for rule in relation.rules:
        yield fail(
            f"rule {rule.name} on {table} rewrites every {rule.event}; PostgreSQL refuses most such rules in the"
            " connector's statements",
            f"drop rule {_quoted(rule.name)} on {table}",
        )


def _row_security(facts: DatabaseExamination) -> Iterator[Verdict]:
    tables, database = facts.expected.tables, facts.database
    role = _quoted(database.role.name)
    secured = [
        (table, relation)
        for table, relation in ((tables.outbox, database.outbox), (tables.history, database.history))
        if relation is not None and relation.row_security
    ]
    for table, relation in secured:
        remedy = f"create a policy on {table} that lets {role} see and write every row, or: alter role {role} bypassrls"
        if relation.policies:
            yield warning(f"row level security on {table} applies to the role in use and may hide rows", remedy)
        else:
            yield fail(f"row level security on {table} hides every row from the role in use", remedy)
    if not secured:
        yield ok("none that applies to the role in use")


# --- the role --------------------------------------------------------------------------------------------------------


def _privileges(facts: DatabaseExamination) -> Iterator[Verdict]:
    """Tell which process the role in use may serve; one that alone could serve a process, and may not, fails too."""
    role, tables = facts.database.role, facts.expected.tables
    if facts.database.outbox is None:
        yield skipped(f"there is no table {tables.outbox}")
        return
    reader, sink = _grants("reader", _lacks_for_reader(facts)), _grants("sink", _lacks_for_sink(facts))
    others = facts.database.others
    if reader and not sink and not others.serve_reader:
        yield fail(f"role {role.name} may not serve the reader, and no other role may", reader)
    elif sink and not reader and not others.serve_sink:
        yield fail(f"role {role.name} may not serve the sink, and no other role may", sink)
    else:
        yield serving(f"role {role.name}", reader, sink)


def _grants(process: str, statements: Sequence[str]) -> str:
    return f"for the {process}: {'; '.join(dict.fromkeys(statements))}" if statements else ""


def _lacks_for_reader(facts: DatabaseExamination) -> list[str]:
    database, role = facts.database, _quoted(facts.database.role.name)
    tables = facts.expected.tables
    progress = Table(tables.outbox.schema, "outbox_connector_slots")
    statements = [
        *_lacking(role, tables.outbox, database.outbox, ("select", "update")),
        *_lacking(role, progress, database.slot_progress, ("select", "insert", "update")),
    ]
    if not database.role.replication and not (facts.same_url and isinstance(facts.replication, Replication)):
        # Also where another role reads the stream: it is this one that moves the slot.
        statements.append(f"alter role {role} replication")
    return statements


def _lacks_for_sink(facts: DatabaseExamination) -> list[str]:
    database, role = facts.database, _quoted(facts.database.role.name)
    tables = facts.expected.tables
    offsets = Table(tables.outbox.schema, "outbox_connector_offsets")
    sequences = () if database.history is None else database.history.forbidden_sequences
    return [
        *_lacking(role, tables.outbox, database.outbox, ("select", "update")),
        *_lacking(role, tables.history, database.history, ("insert",)),
        *_lacking(role, offsets, database.sink_offsets, ("select", "insert", "update")),
        *(f"grant usage on sequence {sequence} to {role}" for sequence in sequences),
    ]


def _lacking(role: str, table: Table, relation: Relation | None, wanted: Iterable[str]) -> Iterator[str]:
    if relation is None:
        return  # another check tells
    if not relation.schema_usage:
        yield f"grant usage on schema {_quoted(table.schema)} to {role}"
    missing = [privilege for privilege in wanted if privilege not in relation.privileges]
    if missing:
        yield f"grant {', '.join(missing)} on {table} to {role}"


# --- publication and slot --------------------------------------------------------------------------------------------


def _publication(facts: DatabaseExamination) -> Iterator[Verdict]:
    name, table, found = facts.expected.publication_name, facts.expected.tables.outbox, facts.database.publication
    if isinstance(found, Untold):
        yield skipped(found.reason)
        return
    if found is None:
        yield fail(f"there is no publication {name!r}", _SETUP)
        return
    problems = []
    if not found.inserts_only:
        problems.append(fail(f"publication {name!r} does not publish inserts, and only those", _SETUP))
    if found.columns is None:
        problems.append(fail(f"publication {name!r} does not hold {table}", _SETUP))
    else:
        missing, more = set(PUBLISHED_COLUMNS) - set(found.columns), set(found.columns) - set(PUBLISHED_COLUMNS)
        if missing:
            problems.append(fail(f"publication {name!r} lacks columns {listed(missing)}", _SETUP))
        if more:
            problems.append(warning(f"publication {name!r} also sends columns {listed(more)}", _SETUP))
        if found.row_filter is None:
            problems.append(warning(f"publication {name!r} has no row filter and sends rows of every status", _SETUP))
        elif not found.sends_every_pending_row:
            text = f"publication {name!r} filters rows by {found.row_filter}, not by status = 'pending'"
            problems.append(fail(text, _SETUP))
        if found.tables > 1:
            more_tables = (
                f"publication {name!r} also sends {found.tables - 1} other tables, which the reader throws away"
            )
            problems.append(warning(more_tables, f"alter publication {_quoted(name)} drop table …"))
    yield from problems or [ok(f"{name!r} sends the inserts of pending rows, and only what the reader needs")]


def _slot(facts: DatabaseExamination) -> Iterator[Verdict]:
    name, slot, database = facts.expected.slot_name, facts.database.slot, facts.database.server.database
    state = slot.state
    other = f"choose another CONNECTOR_SLOT_NAME, or: select pg_drop_replication_slot('{name}')"
    if state is None:
        yield fail(
            f"there is no slot {name!r}", f"{_SETUP}, or start a reader; pending rows are published from the table then"
        )
    elif not slot.logical:
        yield fail(f"slot {name!r} is a physical one", other)
    elif state.plugin != "pgoutput":
        yield fail(f"slot {name!r} is of plugin {state.plugin!r}, not pgoutput", other)
    elif state.database != database:
        yield fail(f"slot {name!r} is of database {state.database!r}, not {database!r}", other)
    elif state.wal_status == "lost" or state.confirmed_lsn is None:
        why = f" ({slot.invalidation_reason})" if slot.invalidation_reason else ""
        yield fail(
            f"the server invalidated slot {name!r}{why}",
            "start a reader: it makes the slot anew and publishes pending rows from the table",
        )
    elif not slot.active:
        yield warning(f"slot {name!r} is there, but no reader is connected to it", "start a reader")
    else:
        yield ok(f"slot {name!r} is read by process {state.active_pid}")


def _retained(facts: DatabaseExamination) -> Iterator[Verdict]:
    state, budget = facts.database.slot.state, facts.expected.wal_budget
    if state is None or state.retained_bytes is None:
        yield skipped("there is no slot, or it pins nothing")
        return
    text = f"the slot pins {size(state.retained_bytes)} of WAL; the budget is {size(budget)}"
    remedy = "see that a reader runs, and look for old transactions: select * from pg_stat_activity order by xact_start"
    if state.wal_status == "unreserved":
        yield warning(f"{text}, and the server is about to remove what it needs", remedy)
    elif state.retained_bytes > budget:
        yield fail(text, remedy)
    elif state.retained_bytes > budget * _WORTH_A_LOOK:
        yield warning(text, remedy)
    else:
        yield ok(text)


def _server_limits(facts: DatabaseExamination) -> Iterator[Verdict]:
    server, budget = facts.database.server, facts.expected.wal_budget
    keep, idle = server.slot_keep_bytes, server.slot_idle_seconds
    if keep is not None and keep < budget:
        yield warning(
            f"max_slot_wal_keep_size ({size(keep)}) is smaller than CONNECTOR_WAL_BUDGET ({size(budget)}): the server"
            " would invalidate the slot before the reader lets it go forward",
            "raise max_slot_wal_keep_size, or lower CONNECTOR_WAL_BUDGET",
        )
    if idle is not None:
        yield warning(
            f"idle_replication_slot_timeout is {idle} s: a slot whose reader is away for longer is invalidated",
            "set it to 0, or to more than any outage may last",
        )
    if (keep is None or keep >= budget) and idle is None:
        yield ok("the server lets the slot be" if keep is None else f"max_slot_wal_keep_size is {size(keep)}")


def _failover(facts: DatabaseExamination) -> Iterator[Verdict]:
    slot, major = facts.database.slot, facts.database.server.version // 10_000
    if slot.state is None:
        yield skipped("there is no slot")
    elif major < _FAILOVER_SINCE:
        yield ok(f"PostgreSQL {major} has no failover slots; after a failover pending rows come from the table")
    elif slot.failover:
        yield ok("the slot survives a failover where standbys synchronise slots")
    else:
        yield ok("the slot is no failover slot; after a failover pending rows come from the table")


def _catch_up(facts: DatabaseExamination) -> Iterator[Verdict]:
    if facts.database.slot.state is None:
        yield skipped("there is no slot")
        return
    owed = catch_up_owed(facts.database.slot)
    if isinstance(owed, Untold):
        yield skipped(owed.reason)
    elif owed is not None:
        yield warning(
            f"a catch-up from the table is owed: {owed}",
            "nothing to mend: the reader publishes pending rows from the table first; see that one runs",
        )
    else:
        yield ok("none is owed")


def _waiting_topics(facts: DatabaseExamination) -> Iterator[Verdict]:
    waiting, topics = facts.database.waiting_topics, facts.expected.topics
    if isinstance(waiting, Untold):
        yield skipped(waiting.reason)
    elif others := set(waiting) - set(topics):
        yield warning(
            f"rows wait for topics that the sink does not read: {listed(others)}",
            "add them to CONNECTOR_TOPICS, or see who else marks these rows consumed",
        )
    else:
        yield ok("every row that waits is for a topic that the sink reads")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


CHECKS: Final[Mapping[str, Check]] = {
    "server version": _version,
    "primary": _primary,
    "connection": _connection,
    "replication connection": _replication,
    "wal_level": _wal_level,
    "replication slots": _slots,
    "walsenders": _walsenders,
    "clock": _clock,
    "migrations": _migrations,
    "enqueue function": _enqueue,
    "outbox table": _outbox,
    "outbox indexes": _outbox_indexes,
    "history table": _history,
    "history unique index": _history_index,
    "triggers and rules": _triggers,
    "row level security": _row_security,
    "privileges": _privileges,
    "publication": _publication,
    "slot": _slot,
    "retained WAL": _retained,
    "server's slot limits": _server_limits,
    "failover": _failover,
    "catch-up": _catch_up,
    "topics in use": _waiting_topics,
}
