"""The doctor names what is broken: each thing is broken on a real server, and found."""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from connector.cli.composition import doctor_options
from connector.demo.embedded import free_port
from connector.errors import SetupRequired
from connector.ops.doctor import examine
from connector.ops.findings import Finding, Level
from connector.settings import load_settings
from tests.integration.outbox_table import TABLES
from tests.integration.scenario import enqueue, is_streaming, set_up
from tests.services import Database, Kafka, Process, eventually, eventually_none
from tests.services.pgbouncer import pgbouncer

OUTBOX = "public.agent_outbox_messages"
HISTORY = "public.chat_histories"
PROGRESS = "public.outbox_connector_slots"
ENQUEUE = "public.outbox_enqueue"
KEEP = "for each row execute function keep()"
AFTER = f"create trigger t after insert on {HISTORY} {KEEP}"
IDLE = {"slot", "consumer group"}
"""The checks that have something to say where neither reader nor sink runs."""


def findings_of(env: dict[str, str], **variables: str) -> list[Finding]:
    """Run every check in this process."""
    return examine(doctor_options(load_settings(env | variables, needs=frozenset({"database", "kafka"}))))


def not_ok(findings: list[Finding]) -> dict[str, Level]:
    """Return the checks that found something, each with its worst level."""
    bad = {finding.check: Level.WARNING for finding in findings if finding.level is Level.WARNING}
    return bad | {finding.check: Level.FAIL for finding in findings if finding.level is Level.FAIL}


def failing(findings: list[Finding]) -> list[Finding]:
    """Return what failed, for an assertion that names it."""
    return [finding for finding in findings if finding.level is Level.FAIL]


def the(findings: list[Finding], check: str, level: Level = Level.FAIL) -> Finding:
    """Return the one finding of a check at a level."""
    (found,) = [finding for finding in findings if finding.check == check and finding.level is level]
    return found


@pytest.fixture
def env(connector_env: dict[str, str]) -> dict[str, str]:
    """The variables of a pipeline that is set up, and not running."""
    set_up(connector_env)
    return connector_env


# --- in good health --------------------------------------------------------------------------------------------------


def test_after_setup_nothing_fails_and_only_the_absent_processes_are_warned_of(env: dict[str, str]) -> None:
    """A pipeline that is set up, and not running yet, passes."""
    findings = findings_of(env)
    assert not failing(findings)
    assert not_ok(findings) == dict.fromkeys(IDLE, Level.WARNING)
    assert not [finding for finding in findings if finding.check == "consumer lag" and finding.level is Level.SKIPPED]


def test_a_running_pipeline_has_nothing_to_look_at(
    durable_kafka: Kafka, env: dict[str, str], connector: Callable[..., Process]
) -> None:
    """With a reader and a sink at work every check is ok, and the command's exit code is 0."""
    is_streaming(connector("reader"))
    connector("sink").wait_for_log("partitions_assigned")
    eventually_none(lambda: not_ok(findings_of(env)), within=20, what="a clean bill of health")
    doctor = connector("doctor")
    assert doctor.wait() == 0
    assert doctor.stdout.splitlines()[-1].endswith("ok, 0 to look at, 0 failed")
    assert not doctor.stderr


def test_before_setup_everything_that_setup_makes_is_named(
    connector_env: dict[str, str], connector: Callable[..., Process]
) -> None:
    """On an empty database each missing thing fails with `setup` as its remedy, and the exit code is 1."""
    findings = findings_of(connector_env)
    for check in ("migrations", "outbox table", "history table", "slot", "dead-letter topic"):
        assert "setup" in the(findings, check).remedy
    doctor = connector("doctor")
    assert doctor.wait() == 1
    lines = doctor.stdout.splitlines()
    assert any(line.startswith("FAIL ") and OUTBOX.split(".")[1] in line and "setup" in line for line in lines)


def test_json_holds_the_same_findings(env: dict[str, str], connector: Callable[..., Process]) -> None:
    """`--json` prints one object: whether all is well, and each check with level, text and remedy."""
    doctor = connector("doctor", "--json")
    assert doctor.wait() == 0
    document = json.loads(doctor.stdout)
    assert document["ok"] is True
    assert {check["check"] for check in document["checks"]} == {finding.check for finding in findings_of(env)}
    slot = next(check for check in document["checks"] if check["check"] == "slot")
    assert slot["level"] == "warning"
    assert "reader" in slot["remedy"]


# --- the schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("breakage", "check", "named"),
    [
        (f"alter table {OUTBOX} rename column headers to heads", "outbox table", "headers"),
        (f"alter table {OUTBOX} alter column payload type text", "outbox table", "payload"),
        ("drop index agent_outbox_messages_due_idx", "outbox indexes", "agent_outbox_messages_due_idx"),
        (
            "update pg_index set indisvalid = false where indexrelid = 'agent_outbox_messages_pending_idx'::regclass",
            "outbox indexes",
            "agent_outbox_messages_pending_idx",
        ),
        (f"alter table {OUTBOX} drop constraint agent_outbox_messages_pkey", "outbox indexes", "primary key"),
        (f"alter table {HISTORY} drop column role", "history table", "role"),
        (f"alter table {HISTORY} set unlogged", "history table", "not logged"),
        ("drop index chat_histories_outbox_id_key", "history unique index", "outbox-connector setup"),
        (
            "update pg_index set indisvalid = false where indexrelid = 'chat_histories_outbox_id_key'::regclass",
            "history unique index",
            "no valid unique index",
        ),
        ("delete from public.outbox_connector_migrations where version = 3", "migrations", "0003 enqueue"),
        ("drop function public.outbox_enqueue", "enqueue function", "outbox_enqueue"),
        (f"create rule quiet as on insert to {HISTORY} do instead nothing", "triggers and rules", "quiet"),
    ],
)
def test_a_schema_that_cannot_work_fails(
    env: dict[str, str], database: Database, breakage: str, check: str, named: str
) -> None:
    """What is missing, invalid or of the wrong kind in the tables fails by its name, with a remedy."""
    with database.connect() as connection:
        connection.execute(f"drop publication {env['CONNECTOR_PUBLICATION_NAME']}")
        connection.execute(breakage)
    found = the(findings_of(env), check)
    assert named in f"{found.text} {found.remedy}"
    assert found.remedy


@pytest.mark.parametrize(
    ("change", "check", "named"),
    [
        (f"alter table {OUTBOX} replica identity full", "outbox table", "FULL"),
        (f"create trigger t before update on {OUTBOX} {KEEP}", "triggers and rules", "before a write"),
        (f"create trigger t before insert on {HISTORY} {KEEP}", "triggers and rules", "before a write"),
        (f"{AFTER}; alter table {HISTORY} enable always trigger t", "triggers and rules", "always fires"),
        (f"{AFTER}; alter table {HISTORY} enable replica trigger t", "triggers and rules", "never fires"),
    ],
)
def test_what_might_surprise_is_a_warning(
    env: dict[str, str], database: Database, change: str, check: str, named: str
) -> None:
    """Triggers that may change a write, and a costly replica identity, are warned of and fail nothing."""
    with database.connect() as connection:
        connection.execute("create function keep() returns trigger language plpgsql as 'begin return new; end'")
        connection.execute(change)
    findings = findings_of(env)
    assert named in the(findings, check, Level.WARNING).text
    assert not failing(findings)


@pytest.mark.parametrize("another", ["other", '"Other 100%"'])
def test_a_function_that_writes_to_another_table_fails(env: dict[str, str], database: Database, another: str) -> None:
    """The doctor names the table that applications enqueue into; once the function is dropped, `setup` mends it."""
    with database.connect() as connection:
        definition = f"select pg_get_functiondef('{ENQUEUE}'::regproc)"
        elsewhere = connection.execute(definition).fetchall()[0][0].replace('"public"."agent_outbox_messages"', another)
        connection.execute(f"create table {another} (like {OUTBOX} including all)")
        connection.execute(elsewhere)
        found = the(findings_of(env), "enqueue function")
        assert another in found.text
        with pytest.raises(SetupRequired, match=re.escape(another)):
            set_up(env)
        connection.execute(f"drop function {ENQUEUE}")
        set_up(env)
        assert not failing(findings_of(env))
        # What somebody wrote themselves is theirs, as long as it does not name another table.
        connection.execute(elsewhere.replace(another, "Agent_outbox_messages"))
        assert not failing(findings_of(env))
        set_up(env)


def test_a_disabled_trigger_and_a_notification_are_nobodys_business(env: dict[str, str], database: Database) -> None:
    """Triggers that are off, or that run after a write, are fine."""
    with database.connect() as connection:
        connection.execute("create function keep() returns trigger language plpgsql as 'begin return new; end'")
        connection.execute(f"create trigger off before update on {OUTBOX} for each row execute function keep()")
        connection.execute(f"alter table {OUTBOX} disable trigger off")
        connection.execute(f"create trigger tell after insert on {HISTORY} for each row execute function keep()")
    assert not_ok(findings_of(env)).keys() == IDLE


def test_a_partitioned_outbox_fails(connector_env: dict[str, str], database: Database) -> None:
    """A partitioned outbox is refused with its reason: the stream would name the partitions."""
    with database.connect() as connection:
        connection.execute(f"create table {OUTBOX} (id bigint, status text) partition by range (id)")
    findings = [finding for finding in findings_of(connector_env) if finding.check == "outbox table"]
    assert any("is partitioned" in finding.text for finding in findings)


# --- publication and slot --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("breakage", "level", "named"),
    [
        ("drop publication {publication}", Level.FAIL, "there is no publication"),
        ("alter publication {publication} set table {outbox} (id, topic) where (id > 0)", Level.FAIL, "lacks columns"),
        ("alter publication {publication} set table {outbox} where (status = 'dead')", Level.FAIL, "filters rows"),
        ("alter publication {publication} set table {outbox}", Level.WARNING, "no row filter"),
        ("alter publication {publication} set (publish = 'update')", Level.FAIL, "publish inserts"),
        ("alter publication {publication} set (publish = 'insert, update')", Level.FAIL, "publish inserts"),
        ("alter publication {publication} drop table {outbox}", Level.FAIL, "does not hold"),
    ],
)
def test_a_publication_that_is_not_as_setup_makes_it_is_named_and_mended_by_setup(
    env: dict[str, str], database: Database, breakage: str, level: Level, named: str
) -> None:
    """Its absence, columns, row filter, operations and tables are all looked at; `setup` puts them right."""
    publication = env["CONNECTOR_PUBLICATION_NAME"]
    with database.connect() as connection:
        connection.execute(breakage.format(publication=publication, outbox=OUTBOX, history=HISTORY))
    findings = [finding for finding in findings_of(env) if finding.check == "publication" and finding.level is level]
    (found,) = [finding for finding in findings if named in finding.text]
    assert publication in found.text
    assert "setup" in found.remedy
    set_up(env)
    assert "publication" not in not_ok(findings_of(env))


def test_other_tables_in_the_publication_are_worth_a_look(env: dict[str, str], database: Database) -> None:
    """What else the publication sends is told, with the statement that takes it out."""
    publication = env["CONNECTOR_PUBLICATION_NAME"]
    with database.connect() as connection:
        connection.execute(f"alter publication {publication} add table {HISTORY}")
    assert "drop table" in the(findings_of(env), "publication", Level.WARNING).remedy


def test_a_dropped_slot_fails(env: dict[str, str], database: Database) -> None:
    """A slot that is gone is named, with `setup` as the remedy."""
    with database.connect() as connection:
        connection.execute("select pg_drop_replication_slot(%s)", [env["CONNECTOR_SLOT_NAME"]])
    found = the(findings_of(env), "slot")
    assert env["CONNECTOR_SLOT_NAME"] in found.text
    assert "setup" in found.remedy


def test_a_slot_of_another_plugin_fails(env: dict[str, str], database: Database) -> None:
    """A slot that another plugin serves is named with that plugin."""
    slot = env["CONNECTOR_SLOT_NAME"]
    with database.connect() as connection:
        connection.execute("select pg_drop_replication_slot(%s)", [slot])
        try:
            connection.execute("select pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
        except psycopg.errors.UndefinedFile:
            pytest.skip("this server has no test_decoding")
    assert "test_decoding" in the(findings_of(env), "slot").text


def test_a_physical_slot_fails(env: dict[str, str], database: Database) -> None:
    """A physical slot of the same name is no slot for us."""
    slot = env["CONNECTOR_SLOT_NAME"]
    with database.connect() as connection:
        connection.execute("select pg_drop_replication_slot(%s)", [slot])
        connection.execute("select pg_create_physical_replication_slot(%s)", [slot])
        try:
            assert "physical" in the(findings_of(env), "slot").text
        finally:
            connection.execute("select pg_drop_replication_slot(%s)", [slot])


def test_a_slot_of_another_database_fails(env: dict[str, str], database: Database) -> None:
    """A slot that was made in another database is named with that database."""
    slot = env["CONNECTOR_SLOT_NAME"]
    with database.connect() as connection:
        connection.execute("select pg_drop_replication_slot(%s)", [slot])
    with database.server.database() as other, other.connect() as connection:
        connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        assert other.name in the(findings_of(env), "slot").text


def test_a_slot_that_pins_more_than_the_budget_fails(env: dict[str, str], database: Database) -> None:
    """Retained WAL is held against CONNECTOR_WAL_BUDGET."""
    with database.connect() as connection:
        connection.execute("select pg_logical_emit_message(true, 'elsewhere', repeat('x', 100000))")
    assert "WAL" in the(findings_of(env, CONNECTOR_WAL_BUDGET="1kB"), "retained WAL").text


def test_a_catch_up_that_is_owed_is_told_with_its_reason(env: dict[str, str], database: Database) -> None:
    """A catch-up written down, and a slot that somebody else moved, are both told."""
    with database.connect() as connection:
        connection.execute(f"update {PROGRESS} set catch_up_owed = true, catch_up_reason = 'the slot was lost'")
        assert "the slot was lost" in the(findings_of(env), "catch-up", Level.WARNING).text
        connection.execute(f"update {PROGRESS} set catch_up_owed = false, confirmed_lsn = '0/1'")
        assert "further than the reader" in the(findings_of(env), "catch-up", Level.WARNING).text


# --- the role --------------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(env: dict[str, str], database: Database) -> Iterator[dict[str, str]]:
    """URLs of the roles of `sql/roles.sql`, under names of their own."""
    roles = ("outbox_reader", "outbox_sink", "outbox_operator", "outbox_auditor")
    names = {role: f"{role}_{secrets.token_hex(4)}" for role in roles}
    script = TABLES.script("roles.sql").as_string()
    for role, name in names.items():
        script = script.replace(role, name)
    with database.connect() as connection:
        connection.execute(script)
        parts = urlsplit(database.url)
        address = parts.netloc.rpartition("@")[2]
        yield {role: urlunsplit(parts._replace(netloc=f"{name}@{address}")) for role, name in names.items()}
        for name in names.values():
            connection.execute(f"drop owned by {name}; drop role {name}")


def test_the_two_roles_serve_what_they_are_for(env: dict[str, str], roles: dict[str, str]) -> None:
    """Each of the two roles passes with a warning that tells what the other process would need."""
    reader = findings_of(env, CONNECTOR_DATABASE_URL=roles["outbox_reader"])
    assert not_ok(reader) == dict.fromkeys({*IDLE, "privileges"}, Level.WARNING)
    found = the(reader, "privileges", Level.WARNING)
    assert "reader only" in found.text
    assert "grant insert on" in found.remedy

    sink = findings_of(env, CONNECTOR_DATABASE_URL=roles["outbox_sink"])
    assert not failing(sink)
    found = the(sink, "privileges", Level.WARNING)
    assert "sink only" in found.text
    assert "replication" in found.remedy
    assert "replication" in the(sink, "replication connection", Level.WARNING).remedy


@pytest.mark.parametrize(
    ("process", "remedy"), [("reader", "replication"), ("sink", 'grant insert on "public"."chat_histories"')]
)
def test_a_role_that_alone_must_serve_both_fails_for_what_it_lacks(
    env: dict[str, str], database: Database, process: str, remedy: str
) -> None:
    """Without another role for the process that it may not serve, a missing privilege is no matter of taste."""
    role = f"app_{secrets.token_hex(4)}"
    url = urlsplit(database.url)
    variables = {
        "CONNECTOR_DATABASE_URL": urlunsplit(url._replace(netloc=f"{role}@{url.netloc.rpartition('@')[2]}")),
        "CONNECTOR_REPLICATION_URL": database.url,
    }
    with database.connect() as connection:
        connection.execute(f"create role {role} login replication")
        connection.execute(f"grant all on all tables in schema public to {role}")
        try:
            assert "privileges" not in not_ok(findings_of(env, **variables))
            connection.execute(
                f"alter role {role} noreplication" if process == "reader" else f"revoke insert on {HISTORY} from {role}"
            )
            found = the(findings_of(env, **variables), "privileges")
            assert f"may not serve the {process}, and no other role may" in found.text
            assert remedy in found.remedy
        finally:
            connection.execute(f"drop owned by {role}; drop role {role}")


def test_a_missing_privilege_fails_with_the_grant_to_run(
    env: dict[str, str], roles: dict[str, str], database: Database
) -> None:
    """A role that may serve neither process is told the statements, which put it right."""
    url = roles["outbox_sink"]
    role = urlsplit(url).username
    with database.connect() as connection:
        connection.execute(f"revoke update on {OUTBOX} from {role}")
        found = the(findings_of(env, CONNECTOR_DATABASE_URL=url), "privileges")
        for_reader, for_sink = found.remedy.split("; for the sink: ")
        assert f'grant update on "public"."agent_outbox_messages" to "{role}"' in for_sink
        assert "alter role" in for_reader
        connection.execute(for_sink)
        assert not failing(findings_of(env, CONNECTOR_DATABASE_URL=url))


def test_a_serial_key_needs_its_sequence(env: dict[str, str], roles: dict[str, str], database: Database) -> None:
    """A history table with a serial column needs a grant on the sequence too, and the doctor knows it."""
    with database.connect() as connection:
        connection.execute(f"alter table {HISTORY} add column number serial")
    found = the(findings_of(env, CONNECTOR_DATABASE_URL=roles["outbox_sink"]), "privileges")
    assert "grant usage on sequence public.chat_histories_number_seq" in found.remedy


def test_row_level_security_that_hides_every_row_fails(
    env: dict[str, str], roles: dict[str, str], database: Database
) -> None:
    """Row level security fails where it hides everything, is a warning with a policy, and nothing to a superuser."""
    url = roles["outbox_sink"]
    with database.connect() as connection:
        connection.execute(f"alter table {OUTBOX} enable row level security")
        assert "hides every row" in the(findings_of(env, CONNECTOR_DATABASE_URL=url), "row level security").text
        connection.execute(f"create policy all_rows on {OUTBOX} using (true)")
        the(findings_of(env, CONNECTOR_DATABASE_URL=url), "row level security", Level.WARNING)
        assert "row level security" not in not_ok(findings_of(env))


# --- Kafka -----------------------------------------------------------------------------------------------------------


def configure(kafka: Kafka, topic: str, setting: str, value: str) -> None:
    """Set one of a topic's settings."""
    entry = ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
    admin = kafka.admin()
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(10)


def test_missing_topics_fail(env: dict[str, str]) -> None:
    """A topic and a dead-letter topic that are not there are named."""
    findings = findings_of(env, CONNECTOR_TOPICS="not-there", CONNECTOR_DEAD_LETTER_TOPIC="nor-there")
    assert "not-there" in the(findings, "topics").text
    assert "nor-there" in the(findings, "dead-letter topic").text


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("cleanup.policy", "compact", "FAIL compacted"),
        ("cleanup.policy", "compact,delete", "FAIL compacted"),
        ("min.insync.replicas", "2", "FAIL min.insync.replicas is 2"),
        ("max.message.bytes", "5000", "warning 4.9 kB"),
        ("retention.ms", "60000", "warning keeps messages"),
    ],
)
def test_settings_that_lose_or_refuse_messages_are_named(  # noqa: PLR0917 - fixtures
    env: dict[str, str], durable_kafka: Kafka, topic: str, setting: str, value: str, named: str
) -> None:
    """Compaction and an unreachable number of replicas fail; small messages and short retention are warned of."""
    configure(durable_kafka, topic, setting, value)
    level, text = named.split(maxsplit=1)
    assert text in eventually(
        lambda: the(findings_of(env), "topics", Level(level.lower())).text, ignoring=(ValueError,)
    )


def test_partitions_and_replicas_are_compared_with_the_settings(env: dict[str, str]) -> None:
    """A topic of another size than the settings say is worth a look."""
    findings = findings_of(env, CONNECTOR_TOPIC_PARTITIONS="12", CONNECTOR_TOPIC_REPLICATION="3")
    texts = [finding.text for finding in findings if finding.check == "topics"]
    assert any("6 partitions, CONNECTOR_TOPIC_PARTITIONS is 12" in text for text in texts)
    assert any("1 replicas, CONNECTOR_TOPIC_REPLICATION is 3" in text for text in texts)
    assert not failing(findings)


def test_messages_that_wait_without_a_sink_are_counted(env: dict[str, str], durable_kafka: Kafka, topic: str) -> None:
    """The consumer group's lag is told, and that nobody works on it."""
    producer = Producer({"bootstrap.servers": durable_kafka.bootstrap_servers})
    for number in range(7):
        producer.produce(topic, b"{}", key=str(number))
    assert producer.flush(20) == 0
    assert "7 messages" in the(findings_of(env), "consumer lag", Level.WARNING).text


def test_messages_deleted_before_they_were_read_fail(env: dict[str, str], durable_kafka: Kafka, topic: str) -> None:
    """A group whose place lies before the first message that is kept has missed some."""
    producer = Producer({"bootstrap.servers": durable_kafka.bootstrap_servers})
    for _ in range(5):
        producer.produce(topic, b"{}", partition=0)
    assert producer.flush(20) == 0
    consumer = Consumer({"bootstrap.servers": durable_kafka.bootstrap_servers, "group.id": env["CONNECTOR_GROUP_ID"]})
    consumer.commit(offsets=[TopicPartition(topic, 0, 1)], asynchronous=False)
    consumer.close()
    admin = durable_kafka.admin()
    for future in admin.delete_records([TopicPartition(topic, 0, 4)]).values():
        future.result(10)
    assert "deleted 3 messages" in the(findings_of(env), "consumer lag").text


def test_rows_for_topics_that_nobody_reads_are_named(env: dict[str, str], database: Database) -> None:
    """Rows that wait for a topic outside CONNECTOR_TOPICS are worth a look."""
    with database.connect() as connection:
        enqueue(connection, "some.other.topic", "key", 1)
    assert "some.other.topic" in the(findings_of(env), "topics in use", Level.WARNING).text


# --- the way to the services -----------------------------------------------------------------------------------------


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_two_dead_services_are_both_named_within_seconds(connector: Callable[..., Process], silent_port: int) -> None:
    """Services that take connections and never answer cost seconds; what depends on them is skipped."""
    began = time.monotonic()
    doctor = connector(
        "doctor",
        CONNECTOR_DATABASE_URL=f"postgresql://me:tell-nobody@127.0.0.1:{silent_port}/app",
        CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{silent_port}",
    )
    assert doctor.wait() == 1
    assert time.monotonic() - began < 20
    bad = [line.split()[1] for line in doctor.stdout.splitlines() if line.startswith("FAIL")]
    assert bad == ["PostgreSQL", "Kafka"]
    assert doctor.stdout.count("skipped ") > 20
    assert "tell-nobody" not in doctor.stdout + doctor.stderr


def test_one_dead_service_does_not_hide_the_other(env: dict[str, str]) -> None:
    """With Kafka away PostgreSQL is checked all the same, and the other way round."""
    nowhere = f"127.0.0.1:{free_port()}"
    findings = findings_of(env, CONNECTOR_KAFKA_BOOTSTRAP_SERVERS=nowhere)
    assert "refused" in the(findings, "Kafka").text
    the(findings, "topics", Level.SKIPPED)
    the(findings, "publication", Level.OK)

    findings = findings_of(env, CONNECTOR_DATABASE_URL=f"postgresql://{nowhere}/app")
    the(findings, "PostgreSQL")
    the(findings, "publication", Level.SKIPPED)
    the(findings, "Kafka", Level.OK)


def test_a_dead_replication_url_fails_alone(env: dict[str, str]) -> None:
    """The second URL is tried too, and named where it leads nowhere."""
    findings = findings_of(env, CONNECTOR_REPLICATION_URL=f"postgresql://127.0.0.1:{free_port()}/app")
    assert "CONNECTOR_REPLICATION_URL" in the(findings, "replication connection").remedy
    the(findings, "publication", Level.OK)


def test_a_replication_url_to_another_database_fails(env: dict[str, str], database: Database) -> None:
    """Both URLs must lead to one database."""
    found = the(findings_of(env, CONNECTOR_REPLICATION_URL=database.server.url), "replication connection")
    assert "leads to database" in found.text


def test_an_option_that_librdkafka_refuses_is_a_matter_of_configuration(connector: Callable[..., Process]) -> None:
    """A Kafka option that does not exist ends the doctor with 78."""
    doctor = connector("doctor", CONNECTOR_CONSUMER_NO_SUCH_OPTION="1")
    assert doctor.wait() == 78
    assert "no.such.option" in doctor.stderr


@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
def test_a_pooler_is_recognised_and_the_way_past_it_named(
    env: dict[str, str], database: Database, tmp_path: Path, pool_mode: str
) -> None:
    """PgBouncer in the way of replication fails with CONNECTOR_REPLICATION_URL as the remedy, which mends it."""
    with pgbouncer(database, tmp_path, pool_mode) as url:
        findings = findings_of(env, CONNECTOR_DATABASE_URL=url)
        assert "CONNECTOR_REPLICATION_URL" in the(findings, "replication connection").remedy
        level = Level.WARNING if pool_mode == "transaction" else Level.OK
        assert "pooler" in the(findings, "connection", level).text
        assert not failing(findings_of(env, CONNECTOR_DATABASE_URL=url, CONNECTOR_REPLICATION_URL=database.url))
