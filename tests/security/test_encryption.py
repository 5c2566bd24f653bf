"""TLS to PostgreSQL and to Kafka, and the ways to log in: what works, and what is refused with what words."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from psycopg import sql
from psycopg.types.json import Jsonb

from connector.kafka.tokens import TokenFile
from tests.integration.scenario import is_streaming, readiness
from tests.security.certificates import Authority
from tests.security.conftest import KAFKA_PASSWORD
from tests.security.services import HOST, MTLS, OAUTH, SCRAM, USER, SecurePostgres
from tests.services import Process, eventually
from tests.services.kafka import ApacheKafka

KEY_PASSWORD = "key-pa55word"  # noqa: S105
DATABASE_PASSWORD = "db-pa55word"  # noqa: S105
TOKEN_LIVES = 8.0

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture(scope="module")
def plain(broker: ApacheKafka) -> ApacheKafka:
    """The same broker: its unencrypted listener serves the tests about PostgreSQL."""
    return broker


@pytest.fixture
def topic(plain: ApacheKafka) -> Iterator[str]:
    """A fresh topic."""
    with plain.topic(partitions=2) as topic:
        yield topic


@pytest.fixture
def owner(secure_postgres: SecurePostgres) -> Iterator[str]:
    """A role with a password, and a database of its own by the same name."""
    name = f"app_{secrets.token_hex(4)}"
    with secure_postgres.connect() as connection:
        connection.execute(
            sql.SQL("create role {} login superuser password {}").format(sql.Identifier(name), DATABASE_PASSWORD)
        )
        connection.execute(sql.SQL("create database {} owner {}").format(*[sql.Identifier(name)] * 2))
        yield name
        slots = "from pg_replication_slots where database = %s"
        connection.execute(f"select pg_drop_replication_slot(slot_name) {slots} and not active", [name])
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
        connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def env(
    secure_postgres: SecurePostgres, authority: Authority, owner: str, plain: ApacheKafka, topic: str
) -> dict[str, str]:
    """Everything over TLS to PostgreSQL with the strictest check, and in the clear to Kafka."""
    return {
        "CONNECTOR_DATABASE_URL": f"postgresql://{owner}:{DATABASE_PASSWORD}@{HOST}:{secure_postgres.port}/{owner}"
        "?sslmode=verify-full",
        "PGSSLROOTCERT": str(authority.certificate),
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": plain.bootstrap_servers,
        "CONNECTOR_TOPICS": topic,
        "CONNECTOR_DEAD_LETTER_TOPIC": f"{topic}.dead",
        "CONNECTOR_SLOT_NAME": f"slot_{owner}",
        "CONNECTOR_GROUP_ID": topic,
        "CONNECTOR_HTTP_PORT": "0",
    }


def run(command: str, env: Mapping[str, str], **more: str) -> Process:
    """Run a command to its end."""
    process = Process(command, env={**env, **more}).start()
    process.wait()
    return process


def assert_the_pipeline_works(env: Mapping[str, str], secure_postgres: SecurePostgres, owner: str) -> None:
    """Set it up, examine it, run it, and see a message through."""
    setup = run("setup", env)
    assert setup.returncode == 0, setup.stderr
    doctor = run("doctor", env)
    assert doctor.returncode == 0, doctor.stdout
    reader, sink = (Process(name, env=env).start() for name in ("reader", "sink"))
    is_streaming(reader)
    with secure_postgres.connect(dbname=owner) as app:
        store(app, env["CONNECTOR_TOPICS"])
        encrypted = app.execute(
            "select bool_and(s.ssl), count(*) from pg_stat_ssl s join pg_stat_activity a using (pid)"
            " where a.application_name like 'outbox-connector%'"
        ).fetchone()
        assert encrypted is not None
        assert encrypted[0] is True
    assert (reader.stop(), sink.stop()) == (0, 0)


def store(app: Connection, topic: str) -> None:
    """See one message through."""
    payload = {"user_id": 1, "chat_id": "c", "message_content": "hello", "role": "user"}
    before = count(app)
    app.execute("select outbox_enqueue('chat_history_persist', %s, 'c', %s)", [topic, Jsonb(payload)])
    eventually(lambda: count(app) == before + 1, within=60, what="the message in history")


def count(app: Connection) -> int:
    """Count the rows of history."""
    return app.execute("select count(*) from chat_histories").fetchall()[0][0]  # type: ignore[no-any-return]


def test_kafka_over_mutual_tls_and_postgresql_over_verified_tls(
    env: dict[str, str], secure_postgres: SecurePostgres, owner: str, broker: ApacheKafka, authority: Authority
) -> None:
    """The broker asks for a certificate, whose key is encrypted; PostgreSQL's own is verified in full."""
    client = authority.issue("kafka-client", password=KEY_PASSWORD)
    mtls = {
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": broker.servers_of(MTLS),
        "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SSL",
        "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
        "CONNECTOR_KAFKA_SSL_CERTIFICATE_LOCATION": str(client.certificate),
        "CONNECTOR_KAFKA_SSL_KEY_LOCATION": str(client.key),
        "CONNECTOR_KAFKA_SSL_KEY_PASSWORD": KEY_PASSWORD,
    }
    assert_the_pipeline_works(env | mtls, secure_postgres, owner)


def test_kafka_with_a_scram_password_from_a_file(  # noqa: PLR0917 - fixtures
    env: dict[str, str],
    secure_postgres: SecurePostgres,
    owner: str,
    broker: ApacheKafka,
    authority: Authority,
    tmp_path: Path,
) -> None:
    """SASL SCRAM-SHA-512 over TLS, and the password as a mounted secret."""
    password = tmp_path / "password"
    password.write_text(KAFKA_PASSWORD + "\n", encoding="utf-8")
    scram = {
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": broker.servers_of(SCRAM),
        "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
        "CONNECTOR_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "CONNECTOR_KAFKA_SASL_USERNAME": USER,
        "CONNECTOR_KAFKA_SASL_PASSWORD_FILE": str(password),
    }
    assert_the_pipeline_works(env | scram, secure_postgres, owner)


def test_a_kafka_password_that_changes_needs_a_restart(
    env: dict[str, str], secure_postgres: SecurePostgres, owner: str, broker: ApacheKafka, authority: Authority
) -> None:
    """Who is connected goes on; who starts with the old one waits and says why; with the new one it goes on."""
    topic, admin = env["CONNECTOR_TOPICS"], broker.admin()
    user = f"{topic}-user"

    def change_password(password: str) -> None:
        how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(user, how, password.encode())
        for changed in admin.alter_user_scram_credentials([change]).values():
            changed.result(20)

    def scram(password: str) -> dict[str, str]:
        return env | {
            "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": broker.servers_of(SCRAM),
            "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
            "CONNECTOR_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "CONNECTOR_KAFKA_SASL_USERNAME": user,
            "CONNECTOR_KAFKA_SASL_PASSWORD": password,
        }

    def waits_and_says_why(process: Process) -> bool:
        answer = process.http("/readyz")
        return answer.status == 503 and "authentication" in answer.body.lower()

    kinds = (ResourceType.TOPIC, ResourceType.GROUP)
    wholly = [(kind, topic, ResourcePatternType.PREFIXED, f"User:{user}", "*", AclOperation.ALL) for kind in kinds]
    for made in admin.create_acls([AclBinding(*what, AclPermissionType.ALLOW) for what in wholly]).values():
        made.result(20)
    change_password("first-pa55word")
    assert run("setup", env).returncode == 0
    reader, sink = (Process(name, env=scram("first-pa55word")).start() for name in ("reader", "sink"))
    is_streaming(reader)
    with secure_postgres.connect(dbname=owner) as app:
        store(app, topic)
        change_password("second-pa55word")
        store(app, topic)
        assert sink.stop() == 0
        late = Process("sink", env=scram("first-pa55word")).start()
        eventually(lambda: waits_and_says_why(late), within=30, what="word of the password")
        assert late.stop() == 0
        assert "pa55word" not in late.stderr
        sink = Process("sink", env=scram("second-pa55word")).start()
        store(app, topic)
    assert (reader.stop(), sink.stop()) == (0, 0)


@pytest.mark.slow
def test_kafka_with_tokens_from_a_file_that_rotates(  # noqa: PLR0917 - fixtures
    env: dict[str, str],
    secure_postgres: SecurePostgres,
    owner: str,
    broker: ApacheKafka,
    authority: Authority,
    tmp_path: Path,
) -> None:
    """The broker ends a session when its token does; both processes go on with the token that is in the file then."""
    token = tmp_path / "token"
    oauth = {
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": broker.servers_of(OAUTH),
        "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
        "CONNECTOR_KAFKA_SASL_MECHANISM": "OAUTHBEARER",
        "CONNECTOR_KAFKA_OAUTHBEARER_TOKEN_FILE": str(token),
    }
    with rotating(token):
        setup = run("setup", env | oauth)
        assert setup.returncode == 0, setup.stderr
        reader, sink = (Process(name, env=env | oauth).start() for name in ("reader", "sink"))
        is_streaming(reader, within=60)
        with secure_postgres.connect(dbname=owner) as app:
            store(app, env["CONNECTOR_TOPICS"])
            expired = time.time() + TOKEN_LIVES
            eventually(lambda: time.time() > expired, within=60, what="the end of every token that was read so far")
            store(app, env["CONNECTOR_TOPICS"])
        eventually(lambda: readiness(reader) == readiness(sink) == 200, within=60, what="readiness")
        assert (reader.stop(), sink.stop()) == (0, 0)


@contextmanager
def rotating(path: Path) -> Iterator[None]:
    """Keep a fresh token in a file, as whoever issues them does."""
    ended = threading.Event()

    def rotate() -> None:
        while not ended.wait(0.5):
            write_token(path, lives=TOKEN_LIVES)

    thread = threading.Thread(target=rotate)
    write_token(path, lives=TOKEN_LIVES)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write_token(path: Path, *, lives: float) -> float:
    """Put an unsecured token into a file, at one stroke, as a rotation does; return when it expires."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": USER, "iat": now, "exp": now + lives})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    draft = path.with_suffix(".new")
    draft.write_text(".".join([*encoded, ""]), encoding="utf-8")
    draft.replace(path)
    return now + lives


def test_a_token_is_read_anew_whenever_one_is_wanted(tmp_path: Path) -> None:
    """A token tells when it expires; one that does not is used for a minute."""
    path = tmp_path / "token"
    source = TokenFile(str(path))
    expiry = write_token(path, lives=100)
    token, until = source()
    assert token == path.read_text()
    assert until == pytest.approx(expiry)
    path.write_text("opaque\n", encoding="utf-8")
    token, until = source()
    assert token == "opaque"  # noqa: S105
    assert until == pytest.approx(time.time() + 60, abs=5)


def test_a_token_file_without_a_token_is_a_problem_of_its_variable(env: dict[str, str], tmp_path: Path) -> None:
    """It is told at the start, with exit code 78."""
    for path in (tmp_path / "absent", tmp_path / "empty"):
        if path.name == "empty":
            path.touch()
        process = run("reader", env, CONNECTOR_KAFKA_OAUTHBEARER_TOKEN_FILE=str(path))
        assert process.returncode == 78
        assert "CONNECTOR_KAFKA_OAUTHBEARER_TOKEN_FILE: the file it names" in process.stderr


def test_a_token_file_without_the_mechanism_is_a_problem(env: dict[str, str], tmp_path: Path) -> None:
    """Nobody would ask for the token."""
    path = tmp_path / "token"
    write_token(path, lives=100)
    process = run("sink", env, CONNECTOR_KAFKA_OAUTHBEARER_TOKEN_FILE=str(path))
    assert process.returncode == 78
    assert "CONNECTOR_KAFKA_SASL_MECHANISM=OAUTHBEARER" in process.stderr


def test_a_client_certificate_takes_the_place_of_a_password(
    env: dict[str, str], secure_postgres: SecurePostgres, authority: Authority, owner: str
) -> None:
    """PostgreSQL lets a role in by the certificate that libpq's variables name."""
    client = authority.issue("admin")
    url = f"postgresql://admin@{HOST}:{secure_postgres.port}/{owner}?sslmode=verify-full"
    setup = run("setup", env, CONNECTOR_DATABASE_URL=url, PGSSLCERT=str(client.certificate), PGSSLKEY=str(client.key))
    assert setup.returncode == 0, setup.stderr


def test_postgresql_is_refused_with_clear_words(env: dict[str, str], directory: Path) -> None:
    """A server that we do not trust is not spoken to, and one that does not trust us is quoted."""
    url = env["CONNECTOR_DATABASE_URL"]
    stranger = str(Authority(directory / "stranger", "stranger").certificate)
    cases: Mapping[str, dict[str, str]] = {
        "certificate verify failed": {"PGSSLROOTCERT": stranger},
        'does not match host name "127.0.0.1"': {"CONNECTOR_DATABASE_URL": url.replace(f"@{HOST}", "@127.0.0.1")},
        "no encryption": {"CONNECTOR_DATABASE_URL": url.replace("verify-full", "disable")},
        "password authentication failed": {"CONNECTOR_DATABASE_URL": url.replace(DATABASE_PASSWORD, "wrong-pa55word")},
    }
    deadline = {"CONNECTOR_START_DEADLINE_SECONDS": "1"}
    started = {words: Process("sink", env={**env, **deadline, **more}).start() for words, more in cases.items()}
    for words, process in started.items():
        assert process.wait() == 69
        assert words in process.stderr
        assert "pa55word" not in process.stderr


def test_kafka_is_refused_with_clear_words(
    env: dict[str, str], broker: ApacheKafka, authority: Authority, directory: Path
) -> None:
    """`doctor` tells which of the two does not trust the other, in librdkafka's words."""
    servers = broker.servers_of(SCRAM)
    scram = {
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": servers,
        "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
        "CONNECTOR_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "CONNECTOR_KAFKA_SASL_USERNAME": USER,
        "CONNECTOR_KAFKA_SASL_PASSWORD": KAFKA_PASSWORD,
    }
    stranger = str(Authority(directory / "stranger", "stranger").certificate)
    cases = [
        ("certificate verify failed", {"CONNECTOR_KAFKA_SSL_CA_LOCATION": stranger}),
        ("certificate verify failed", {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": servers.replace(HOST, "127.0.0.1")}),
        ("SASL authentication", {"CONNECTOR_KAFKA_SASL_PASSWORD": "wrong-pa55word"}),
    ]
    started = [(words, Process("doctor", env={**env, **scram, **more}).start()) for words, more in cases]
    for words, doctor in started:
        assert doctor.wait() == 1
        kafka = next(line for line in doctor.stdout.splitlines() if "Kafka" in line)
        assert words.lower() in kafka.lower()
        assert "pa55word" not in doctor.stdout + doctor.stderr
