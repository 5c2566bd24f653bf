"""No secret shows: each command is run with secrets planted wherever one may be, and all it says is searched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from connector.cli import parser
from tests.services import Process
from tests.services.console import Console

PLANTED: Mapping[str, str] = {
    name: f"planted/{number}/{name}@'§"
    for number, name in enumerate(
        (
            "database",
            "replication",
            "libpq",
            "sasl",
            "file",
            "key",
            "client",
            "pem",
            "consumer",
            "token",
            "console",
            "misplaced",
        )
    )
} | {"console": "planted0console0of0plain0characters"}

# Each command with arguments that let it do something and end; processes run until stopped.
COMMANDS: Mapping[str, tuple[list[str], ...]] = {
    "setup": ([], ["--print-sql"]),
    "reader": ([],),
    "sink": ([],),
    "doctor": ([], ["--json"]),
    "status": ([], ["--json"]),
    "redrive": (["--all"],),
    "reconcile": (["--json"],),
    "prune": (["--dry-run"],),
    "console": ([],),
}
PROCESSES = ("reader", "sink", "console")
ELSEWHERE = {
    "demo",  # it asks for no settings; below it is given a URL
}
CONSOLE_PAGES = (
    "/",
    "/api/pipeline",
    "/api/dead",
    "/api/proof",
    "/api/letters",
    "/api/messages?key=k",
    "/api/messages/1/copies",
)


def with_password(url: str, password: str) -> str:
    """Return a URL with another password."""
    parts = urlsplit(url)
    user, _, address = parts.netloc.rpartition("@")
    user = user.partition(":")[0] or "postgres"
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{address}"))


@pytest.fixture
def planted(connector_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A configuration that works, with a secret in everything that may hold one, and every log line switched on."""
    url = connector_env["CONNECTOR_DATABASE_URL"]
    file = tmp_path / "file"
    file.write_text(PLANTED["file"], encoding="utf-8")
    return {
        **connector_env,
        "CONNECTOR_DATABASE_URL": with_password(url, PLANTED["database"]),
        "CONNECTOR_REPLICATION_URL": with_password(url, PLANTED["replication"]),
        "PGPASSWORD": PLANTED["libpq"],
        "PGSSLMODE": "disable",
        "CONNECTOR_KAFKA_SASL_PASSWORD": PLANTED["sasl"],
        "CONNECTOR_PRODUCER_SASL_PASSWORD_FILE": str(file),
        "CONNECTOR_KAFKA_SSL_KEY_PASSWORD": PLANTED["key"],
        "CONNECTOR_KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET": PLANTED["client"],
        "CONNECTOR_CONSUMER_SASL_PASSWORD": PLANTED["consumer"],
        "CONNECTOR_CONSOLE_TOKEN": PLANTED["console"],
        "CONNECTOR_KAFKA_DEBUG": "all",
        "CONNECTOR_LOG_LEVEL": "debug",
    }


def spellings(secret: str) -> Iterable[str]:
    """How a secret might be written."""
    return {secret, quote(secret), quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]}


def assert_told_nothing(*said: tuple[str, str]) -> None:
    """Search what was said, each with its origin, for every secret."""
    for origin, text in said:
        for name, secret in PLANTED.items():
            for spelling in spellings(secret):
                assert spelling not in text, f"{origin} shows the secret {name!r}"
            assert f"/{name}@" not in text, f"{origin} shows a part of the secret {name!r}"


def everything(process: Process) -> list[tuple[str, str]]:
    """Return what a process has printed and logged."""
    return [(f"{stream} of {process.name}", getattr(process, stream)) for stream in ("stdout", "stderr")]


def test_every_command_is_searched() -> None:
    """A command that is new must be named here."""
    choices = next(action.choices for action in parser()._actions if action.choices is not None)
    assert set(choices) - ELSEWHERE == COMMANDS.keys()


@pytest.mark.slow
def test_no_command_shows_a_secret_where_everything_works(planted: dict[str, str]) -> None:
    """Not in what it prints, not in its logs at their most talkative, not on its pages, not to a wrong token."""
    assert Process("setup", env=planted).start().wait() == 0
    loops = [Process(name, env=planted).start() for name in PROCESSES]
    commands = [
        Process(command, *arguments, env=planted).start()
        for command, variants in COMMANDS.items()
        if command not in PROCESSES
        for arguments in variants
    ]
    for command in commands:
        assert command.wait() in {0, 1}
    loops[0].wait_for_log("streaming")
    loops[1].wait_for_log("partitions_assigned")
    console = Console(loops[2])
    console.now()
    answers = {path: console.ask(path) for path in CONSOLE_PAGES}
    answers["redrive"] = console.post("/api/redrive", {"ids": ["1"]}, "wrong")
    assert [answer.status for answer in answers.values()] == [200] * 6 + [404, 401]
    answers["redrive, allowed"] = console.post("/api/redrive", {"ids": ["1"]}, PLANTED["console"])
    said = [
        (f"{path} of {loop.name}", loop.http(path).body)
        for loop in loops
        for path in ("/livez", "/readyz", "/metrics", "/nowhere")
    ]
    for loop in loops:
        assert loop.stop() == 0
    for loop in loops[:2]:
        assert len(loop.events) > 100, "librdkafka's debug output was to be among what is searched"
    said += [(f"{path} of console", f"{answer.headers} {answer.text}") for path, answer in answers.items()]
    assert_told_nothing(*said, *(text for process in (*loops, *commands) for text in everything(process)))


@pytest.mark.slow
def test_no_command_shows_a_secret_where_nothing_answers(planted: dict[str, str]) -> None:
    """Errors of servers and of libraries are passed on without them."""
    away = {
        "CONNECTOR_DATABASE_URL": with_password("postgresql://postgres@127.0.0.1:1/app", PLANTED["database"]),
        "CONNECTOR_REPLICATION_URL": f"host=127.0.0.1 port=1 password='{dsn(PLANTED['replication'])}'",
        "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "CONNECTOR_KAFKA_DEBUG": "",
        "CONNECTOR_START_DEADLINE_SECONDS": "1",
    }
    commands = {
        command: Process(command, *variants[0], env=planted | away).start() for command, variants in COMMANDS.items()
    }
    console = Console(commands.pop("console"))  # it stays, and says what is away
    said = [("/api/pipeline", json.dumps(console.now())), ("/api/dead", console.ask("/api/dead").text)]
    assert console.process.stop() == 0
    for command in commands.values():
        assert command.wait() in {1, 69}
    processes = [console.process, *commands.values()]
    assert_told_nothing(*said, *(text for process in processes for text in everything(process)))


def dsn(value: str) -> str:
    """Write a value as it stands between a DSN's quotes."""
    return value.replace("\\", "\\\\").replace("'", "\\'")


BAD: Mapping[str, Mapping[str, str]] = {
    "a URL that is none": {"CONNECTOR_DATABASE_URL": f"postgresql://u:{PLANTED['database']}@h@i:/x?a=%zz"},
    "a DSN that is none": {"CONNECTOR_DATABASE_URL": f"password='{PLANTED['database']}"},
    "a password that was not quoted": {"CONNECTOR_DATABASE_URL": f"password={PLANTED['database']} x y"},
    "a secret for a file": {"CONNECTOR_KAFKA_SASL_PASSWORD_FILE": PLANTED["misplaced"]},
    "a secret for a table": {"CONNECTOR_OUTBOX_TABLE": PLANTED["misplaced"]},
    "a secret for a topic": {"CONNECTOR_TOPICS": PLANTED["misplaced"]},
    "a secret for a number": {"CONNECTOR_HTTP_PORT": PLANTED["misplaced"]},
    "a secret for a word": {"CONNECTOR_KAFKA_SECURITY_PROTOCOL": PLANTED["misplaced"]},
    "a secret for a broker": {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": PLANTED["misplaced"]},
    "a key that is none": {"CONNECTOR_KAFKA_SSL_KEY_PEM": PLANTED["pem"], "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "ssl"},
    "a token file that is none": {"CONNECTOR_KAFKA_OAUTHBEARER_TOKEN_FILE": PLANTED["token"]},
    "an unknown variable": {"CONNECTOR_PASSWORD": PLANTED["misplaced"]},
}


def test_no_secret_shows_where_the_configuration_is_wrong(planted: dict[str, str]) -> None:
    """It is told by its variable's name, with exit code 78."""
    started = {what: Process("doctor", env={**planted, **changes}).start() for what, changes in BAD.items()}
    for what, process in started.items():
        assert process.wait() == 78, what
        assert "CONNECTOR_" in process.stderr
        assert_told_nothing(*((f"{what}: {origin}", text) for origin, text in everything(process)))


def test_the_demo_shows_no_password_of_a_database_that_it_was_given() -> None:
    """Nor where the database cannot be reached."""
    url = with_password("postgresql://postgres@127.0.0.1:1/app", PLANTED["database"])
    process = Process("demo", "--database", url, "--kafka", "127.0.0.1:1", env={}).start()
    assert process.wait() in {1, 69, 78}
    assert_told_nothing(*everything(process))
