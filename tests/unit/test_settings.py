"""Every setting is read, checked and documented in one place, and none of it gives a secret away."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo  # noqa: TID251 - libpq's own list of what is secret

from connector import settings as module
from connector.errors import ConfigurationError
from connector.kafka.clients import Kafka
from connector.outbox import Table
from connector.settings import Settings, describe, load_settings, parse_size, parse_table, with_table

BOTH = frozenset({"database", "kafka"})
NONE: frozenset[str] = frozenset()
README = Path(__file__).parents[2] / "README.md"


def load(needs: frozenset[str] = NONE, /, **variables: str) -> Settings:
    """Load settings from variables that are named without their prefix."""
    return load_settings({f"CONNECTOR_{name}": value for name, value in variables.items()}, needs=needs)


def judged(**variables: str) -> tuple[str, ...]:
    """Give the problems of variables where Kafka is needed, and known."""
    return problems(frozenset({"kafka"}), **{"KAFKA_BOOTSTRAP_SERVERS": "a:9092", **variables})


def problems(needs: frozenset[str] = NONE, /, **variables: str) -> tuple[str, ...]:
    """Give the problems of variables that are named without their prefix."""
    with pytest.raises(ConfigurationError) as caught:
        load(needs, **variables)
    return caught.value.problems


def test_without_any_variable_the_defaults_are_those_of_the_documentation() -> None:
    """An empty environment gives the documented defaults to a command that needs no service."""
    settings = load()
    assert settings.outbox_table == Table("public", "agent_outbox_messages")
    assert settings.history_table == Table("public", "chat_histories")
    assert settings.slot_name == settings.publication_name == "outbox_connector"
    assert settings.topics == ("smartflow.agent.outbox",)
    assert settings.group_id == "smartflow-agent-outbox-consumer"
    assert settings.dead_letter_topic == "smartflow.agent.outbox.dead"
    assert (settings.topic_partitions, settings.topic_replication) == (6, 1)
    assert settings.key_ordering == "strict"
    assert settings.wal_budget == 4 * 1024**3
    assert settings.http_port == 8080
    assert (settings.shutdown_seconds, settings.start_deadline_seconds) == (25, 120)
    assert (settings.log_level, settings.log_format) == ("info", "json")
    assert settings.group_instance_id is None
    assert settings.kafka_options == settings.producer_options == settings.consumer_options == {}


def test_settings_cannot_be_changed() -> None:
    """What was checked at the start stays as it was checked."""
    with pytest.raises(FrozenInstanceError):
        load().http_port = 1  # type: ignore[misc]


def test_an_empty_variable_is_an_unset_one() -> None:
    """Templates that leave a variable empty mean its default."""
    assert load(HTTP_PORT="", LOG_LEVEL="  ").http_port == 8080


def test_every_problem_is_listed_at_once_by_its_variable() -> None:
    """One run shows all that is wrong, one line for each variable, in the order of the documentation."""
    found = problems(BOTH, HTTP_PORT="eighty", WAL_BUDGET="4 gigs", KEY_ORDERING="loose", LOG_LEVEL="loud")
    assert [line.partition(":")[0] for line in found] == [
        "CONNECTOR_DATABASE_URL",
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS",
        "CONNECTOR_KEY_ORDERING",
        "CONNECTOR_WAL_BUDGET",
        "CONNECTOR_HTTP_PORT",
        "CONNECTOR_LOG_LEVEL",
    ]
    assert all("set it to" in line for line in found)


@pytest.mark.parametrize("name", ["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"])
def test_libpqs_own_variables_stand_in_for_the_database_url(name: str) -> None:
    """Where libpq would find a server without a URL, none is asked for."""
    assert load_settings({name: "x"}, needs=frozenset({"database"})).database_url == ""


def test_options_of_kafka_are_judged_only_where_kafka_is_needed() -> None:
    """A command that needs the database alone does not ask for an account of Kafka."""
    half = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512"}
    assert load(frozenset({"database"}), DATABASE_URL="postgresql://h/d", **half).kafka_options
    assert "sasl.username" in " ".join(judged(**half))


def test_a_service_that_a_command_does_not_need_may_be_unset() -> None:
    """Only the addresses that are needed are required."""
    assert load(frozenset({"kafka"}), KAFKA_BOOTSTRAP_SERVERS="a:9092").database_url == ""
    assert load(frozenset({"database"}), DATABASE_URL="postgresql://h/d").kafka_bootstrap_servers == ""


def test_the_replication_url_is_the_database_url_unless_set() -> None:
    """One URL is enough; a second one is for poolers."""
    assert load(DATABASE_URL="host=a").replication_url == "host=a"
    assert load(DATABASE_URL="host=a", REPLICATION_URL="host=b").replication_url == "host=b"


def test_a_wrong_database_url_is_one_problem_not_two() -> None:
    """The replication URL that it would have been is not complained about as well."""
    assert len(problems(DATABASE_URL="nonsense")) == 1


def test_kafka_options_take_librdkafkas_names() -> None:
    """Variables become options in lower case with dots, for both sides or for one."""
    settings = load(KAFKA_SECURITY_PROTOCOL="SSL", PRODUCER_LINGER_MS="5", CONSUMER_FETCH_MIN_BYTES="1")
    assert settings.kafka_options == {"security.protocol": "SSL"}
    assert settings.producer_options == {"linger.ms": "5"}
    assert settings.consumer_options == {"fetch.min.bytes": "1"}


def test_the_bootstrap_servers_are_no_option() -> None:
    """They have a setting of their own, and one side alone cannot have other brokers."""
    settings = load(KAFKA_BOOTSTRAP_SERVERS="a:9092, [::1]:9093,SSL://b:9094")
    assert settings.kafka_bootstrap_servers == "a:9092,[::1]:9093,SSL://b:9094"
    assert settings.kafka_options == {}
    assert "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS?" in problems(PRODUCER_BOOTSTRAP_SERVERS="a:1")[0]


def test_options_that_miss_each_other_are_told_in_librdkafkas_words_without_their_values() -> None:
    """Each may be fine alone; together they cannot work, and the passwords among them stay unsaid."""
    (line,) = judged(
        KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        KAFKA_SASL_MECHANISM="hunter2",
        KAFKA_SASL_PASSWORD="hunter3",  # noqa: S106 - no one's
    )
    assert line.startswith("CONNECTOR_KAFKA_*: librdkafka says: ")
    assert "SASL mechanism" in line
    assert "hunter" not in line


def test_a_value_may_come_from_a_file(tmp_path: Path) -> None:
    """Mounted secrets work for settings and for Kafka options, without the newline that editors add."""
    secret = tmp_path / "secret"
    secret.write_text("wo rd\n")
    url = tmp_path / "url"
    url.write_text("postgresql://h/d\r\n")
    settings = load(
        KAFKA_SASL_PASSWORD_FILE=str(secret), DATABASE_URL_FILE=str(url), PRODUCER_CLIENT_ID_FILE=str(secret)
    )
    assert settings.kafka_options == {"sasl.password": "wo rd"}
    assert settings.producer_options == {"client.id": "wo rd"}
    assert settings.database_url == "postgresql://h/d"


def test_an_option_whose_own_name_ends_in_file_is_taken_as_it_is() -> None:
    """Kafka's library reads these files itself."""
    settings = load(KAFKA_SASL_OAUTHBEARER_ASSERTION_FILE="/no/such")
    assert settings.kafka_options == {"sasl.oauthbearer.assertion.file": "/no/such"}


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe", b"a\0b", b"x" * (1024 * 1024 + 1)])
def test_a_file_that_gives_no_value_is_a_problem_of_its_variable(tmp_path: Path, content: bytes | None) -> None:
    """Missing, empty, binary and endless files are named by variable, and nothing else is made of them."""
    path = tmp_path / "value"
    if content is not None:
        path.write_bytes(content)
    (line,) = problems(frozenset({"database"}), DATABASE_URL_FILE=str(path))
    assert line.startswith("CONNECTOR_DATABASE_URL_FILE: the file it names ")


def test_a_variable_and_its_file_together_are_a_problem(tmp_path: Path) -> None:
    """Which of the two is meant is not guessed."""
    (line,) = problems(GROUP_ID="a", GROUP_ID_FILE=str(tmp_path))
    assert line.startswith("CONNECTOR_GROUP_ID: set twice")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("TOPIC", "did you mean CONNECTOR_TOPICS?"),
        ("SHUTDOWN_SECOND_FILE", "did you mean CONNECTOR_SHUTDOWN_SECONDS_FILE?"),
        ("SASL_PASSWORD", "call it CONNECTOR_KAFKA_SASL_PASSWORD"),
        ("KAFKA_", "remove it"),
    ],
)
def test_an_unknown_variable_is_a_problem_with_a_suggestion(name: str, suggestion: str) -> None:
    """A typing error never goes unnoticed."""
    (line,) = problems(**{name: "x"})
    assert line.startswith(f"CONNECTOR_{name}: unknown variable")
    assert suggestion in line


def test_the_variables_kubernetes_adds_for_a_service_are_no_settings() -> None:
    """A Service called connector, connector-http or connector-kafka changes nothing."""
    links = {"PORT": "tcp://10.0.0.1:80"}
    for service in ("", "KAFKA_", "HTTP_"):
        links[f"{service}SERVICE_HOST"] = "10.0.0.1"
        links[f"{service}SERVICE_PORT"] = links[f"{service}SERVICE_PORT_WEB"] = "80"
        links[f"{service}PORT"] = links[f"{service}PORT_80_TCP"] = "tcp://10.0.0.1:80"
        links[f"{service}PORT_80_TCP_ADDR"] = "10.0.0.1"
    assert load(**links) == load()


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("messages", Table("public", "messages")),
        ("App.Messages", Table("app", "messages")),
        ('"My schema"."a ""b"".c"', Table("My schema", 'a "b".c')),
        (" ünï.t$1 ", Table("ünï", "t$1")),
    ],
)
def test_table_names_are_read_as_sql_reads_them(text: str, table: Table) -> None:
    """Unquoted names fold to lower case, quoted ones stay; what is written is read back as the same."""
    assert parse_table(text) == table
    assert parse_table(str(table)) == table


@pytest.mark.parametrize("text", ["", ".", "a.", "a.b.c", "1a", "a b", '"a', '""', 'a"b"', "x" * 64, "a;drop table b"])
def test_what_is_no_table_name_is_refused(text: str) -> None:
    """Nothing that PostgreSQL would read differently, or cut short, gets through."""
    with pytest.raises(ValueError, match=r"is not a table name|longer than 63 bytes"):
        parse_table(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("1B", 1), ("16kB", 16 << 10), ("512MB", 512 << 20), ("4 GB", 4 << 30), ("1.5TB", 3 << 39)],
)
def test_sizes_are_read_as_postgresql_reads_them(text: str, size: int) -> None:
    """Units are powers of 1024."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4gb", "4 GiB", "GB", "1e9", "9" * 30 + "TB", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A size that PostgreSQL would not read, or of nothing, is no budget."""
    with pytest.raises(ValueError, match=r"is not a size|is out of range"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLOT_NAME", "Outbox"),
        ("SLOT_NAME", "a" * 64),
        ("PUBLICATION_NAME", "ü" * 32),
        ("TOPICS", ", ,"),
        ("TOPICS", "a,b c"),
        ("DEAD_LETTER_TOPIC", ".."),
        ("DEAD_LETTER_TOPIC", "smartflow.agent.outbox"),
        ("HISTORY_TABLE", "agent_outbox_messages"),
        ("TOPIC_PARTITIONS", "0"),
        ("TOPIC_REPLICATION", "1.5"),
        ("HTTP_PORT", "65536"),
        ("SHUTDOWN_SECONDS", "0"),
        ("SHUTDOWN_SECONDS", "inf"),
        ("START_DEADLINE_SECONDS", "nan"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:9092,b:port"),
        ("KAFKA_BOOTSTRAP_SERVERS", "nohostport"),
        ("KAFKA_BOOTSTRAP_SERVERS", ", ,"),
        ("PROOF_SECONDS", "-1"),
        ("TOPIC_PARTITIONS", "٦"),
        ("KAFKA_NO_SUCH_OPTION", "1"),
        ("PRODUCER_COMPRESSION_TYPE", "brotli"),
        ("CONSUMER_FETCH_MIN_BYTES", "few"),
        ("KAFKA_ENABLE_IDEMPOTENCE", "false"),
        ("PRODUCER_REQUEST_REQUIRED_ACKS", "0"),
        ("PRODUCER_MESSAGE_SEND_MAX_RETRIES", "3"),
        ("PRODUCER_DELIVERY_TIMEOUT_MS", "120000"),
        ("PRODUCER_QUEUE_BUFFERING_MAX_MESSAGES", "99999"),
        ("PRODUCER_TRANSACTIONAL_ID", "x"),
        ("PRODUCER_GROUP_ID", "another"),
        ("CONSUMER_ENABLE_AUTO_OFFSET_STORE", "true"),
        ("CONSUMER_ENABLE_AUTO_COMMIT", "maybe"),
        ("CONSUMER_PARTITION_ASSIGNMENT_STRATEGY", "range"),
        ("CONSUMER_ISOLATION_LEVEL", "read_uncommitted"),
        ("KAFKA_LOG_LEVEL", "loud"),
        ("POD_NAME", "x" * 250),
        ("GROUP_ID", "\udcff"),
        ("KAFKA_CLIENT_ID", "\udcff"),
    ],
)
def test_a_value_that_would_fail_later_is_refused_now(name: str, value: str) -> None:
    """PostgreSQL's and Kafka's own rules are known before either is asked."""
    (line,) = judged(**{name: value})
    assert line.startswith(f"CONNECTOR_{name}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_ENABLE_IDEMPOTENCE", "True"),
        ("PRODUCER_ACKS", "all"),
        ("PRODUCER_REQUEST_REQUIRED_ACKS", "-1"),
        ("PRODUCER_RETRIES", "2147483647"),
        ("PRODUCER_DELIVERY_TIMEOUT_MS", "0"),
        ("PRODUCER_QUEUE_BUFFERING_MAX_MESSAGES", "1000000"),
        ("CONSUMER_ENABLE_AUTO_COMMIT", "false"),
        ("CONSUMER_ENABLE_AUTO_OFFSET_STORE", "false"),
        ("CONSUMER_PARTITION_ASSIGNMENT_STRATEGY", "cooperative-sticky"),
        ("KAFKA_LOG_LEVEL", "7"),
    ],
)
def test_an_option_that_says_what_holds_anyway_is_taken(name: str, value: str) -> None:
    """What a guarantee stands on may be set to what it is; and names with an underscore can be reached."""
    settings = load(frozenset({"kafka"}), KAFKA_BOOTSTRAP_SERVERS="a:9092", **{name: value})
    kafka = Kafka("127.0.0.1:1", settings.kafka_options, settings.producer_options, settings.consumer_options)
    kafka.producer(lambda _: None)
    kafka.consumer("group", None, lambda _: None, lambda *_: None).close()


def test_librdkafkas_names_for_what_has_a_variable_of_its_own_are_understood(tmp_path: Path) -> None:
    """Group, membership and brokers, each by value or by file; set by both names they are a problem."""
    path = tmp_path / "group"
    path.write_text("mine\n")
    settings = load(
        CONSUMER_GROUP_INSTANCE_ID="sink-0", CONSUMER_GROUP_ID_FILE=str(path), KAFKA_METADATA_BROKER_LIST="a:9092"
    )
    assert (settings.group_instance_id, settings.group_id) == ("sink-0", "mine")
    assert settings.kafka_bootstrap_servers == "a:9092"
    assert settings.kafka_options == settings.consumer_options == {}
    (line,) = problems(CONSUMER_GROUP_INSTANCE_ID="sink-0", POD_NAME="sink-1")
    assert line.startswith("CONNECTOR_POD_NAME: set twice, here and in CONNECTOR_CONSUMER_GROUP_INSTANCE_ID")


def test_words_are_read_in_any_case_and_lists_without_their_blanks() -> None:
    """What a person writes is understood."""
    settings = load(KEY_ORDERING="Relaxed", LOG_LEVEL="DEBUG", LOG_FORMAT="Console", TOPICS=" a , b,,a")
    assert (settings.key_ordering, settings.log_level, settings.log_format) == ("relaxed", "debug", "console")
    assert settings.topics == ("a", "b")


@pytest.mark.parametrize(
    "url",
    [
        "host=h password=my hunter2",
        "postgresql://u:hunter2%zz@h/d",
        "postgresql://u:x@hunter2@h/d",
        "postgresql://u:hunter2/x@h/d",
        "postgresql://u:12/hunter2@h/d",
        "postgresql://h/d?hunter2",
        "postgresql+psycopg://u:hunter2@h/d",
        "password='hunter2",
        "hunter2=x",
        "mysql://u:hunter2@h/d",
    ],
)
def test_a_wrong_database_url_shows_nothing_of_itself(url: str) -> None:
    """Whatever libpq stumbles over, its piece of a password appears nowhere, not even in a traceback."""
    with pytest.raises(ConfigurationError) as caught:
        load(DATABASE_URL=url)
    assert "CONNECTOR_DATABASE_URL: " in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert caught.value.__context__ is None


def test_no_value_of_any_variable_is_in_the_problems() -> None:
    """A secret that was put into the wrong variable is not shown either."""
    names = [variable.removeprefix("CONNECTOR_") for variable, _, _ in describe() if "<" not in variable]
    wrong = dict.fromkeys(names, "=hunter2 hunter2@" * 30)
    wrong |= {"KAFKA_SASL_PASSWORD_FILE": "hunter2", "NO_SUCH_THING": "hunter2"}
    text = "\n".join(problems(BOTH, **wrong))
    assert "hunter2" not in text
    assert text.count("\n") + 1 >= len(names)


def test_the_repr_of_settings_holds_no_secret() -> None:
    """Printing the settings, as a debugger or a log does, gives nothing away."""
    settings = load_settings(
        {
            "CONNECTOR_DATABASE_URL": "postgresql://u:hunter2@h/d",
            "CONNECTOR_KAFKA_SASL_PASSWORD": "hunter3",
            "CONNECTOR_CONSUMER_SSL_KEY_PASSWORD": "hunter4",
            "PGPASSWORD": "hunter5",
        },
        needs=NONE,
    )
    assert "hunter" not in repr(settings) + str(settings)
    assert set(settings.secrets()) == {"hunter2", "hunter3", "hunter4", "hunter5"}


def test_secrets_are_found_as_written_and_as_meant() -> None:
    """Encoded passwords, those in parameters, in other URLs and each line of a key are all secrets."""
    variables = {
        "DATABASE_URL": "postgresql://u:p%40ss@h/d?sslpassword=q%21q",
        "REPLICATION_URL": r"host=h password='it\'s'",
        "KAFKA_SSL_KEY_PEM": "-----BEGIN-----\nMIIE\n-----END-----",
        "KAFKA_SASL_USERNAME": "me",
        "KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET": "s",
        "KAFKA_SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL": "https://me:tok@idp/token",
    }
    settings = load(**variables)
    expected = {"p%40ss", "p@ss", "q%21q", "q!q", "it's", "-----BEGIN-----\nMIIE\n-----END-----", "MIIE", "s", "tok"}
    assert set(settings.secrets()) == expected


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@example("://@")
def test_any_password_in_a_dsn_is_a_known_secret(password: str) -> None:
    """What libpq would take for the password is what is hidden."""
    settings = load(DATABASE_URL=make_conninfo(host="h", password=password))
    assert settings.secrets()[-1:] == (password,) or password in settings.secrets()
    assert settings.database_url not in repr(settings)


def test_every_parameter_that_libpq_calls_secret_is_one() -> None:
    """A newer libpq with a new kind of password fails here, before it leaks one."""
    secret = {option.keyword.decode() for option in Conninfo.get_defaults() if option.dispchar == b"*"}
    assert secret <= module._SECRET_PARAMETERS


def test_the_readme_shows_the_settings_as_they_are() -> None:
    """The table between the markers is what `python -m connector.settings README.md` would write."""
    page = README.read_text("utf-8")
    assert with_table(page) == page


def test_a_page_without_markers_is_refused() -> None:
    """A table that has no place is not silently left out."""
    with pytest.raises(ValueError, match="no <!-- settings -->"):
        with_table("# Page\n")


def test_the_documentation_names_every_setting() -> None:
    """Each documented variable is accepted, with a meaning and without a pipe that would break the table."""
    for variable, default, meaning in describe():
        assert meaning
        assert "|" not in default + meaning
        if default and "<" not in variable and not default.startswith("CONNECTOR_"):
            assert load_settings({variable: default}, needs=NONE) == load()


def test_reading_settings_leaves_the_heavy_libraries_alone() -> None:
    """A command that needs neither Kafka nor metrics does not wait for their libraries."""
    code = "import sys, connector.settings; print({'confluent_kafka', 'prometheus_client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "set()"
