"""Fixtures: `postgres`, `database`, `kafka`, `topic` and what goes with them; services start once, before the tests.

Every fixture without `own_` shares one server with other tests, which must leave it running; what they make in it has
names of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from connector.demo.embedded import scratch_directory
from tests.services.choice import Choice
from tests.services.kafka import EMBEDDED_IS_FORGETFUL, EMBEDDED_IS_INCOMPLETE, Kafka, LentKafka, kafka_candidates
from tests.services.postgres import Database, Postgres, postgres_candidates
from tests.services.process import Process, environment

_LOG_TAIL = 200


class Services:
    """The servers of one test run."""

    def __init__(self, *, processes: int = 1, lent_kafka: Kafka | None = None) -> None:
        """`processes` are those that share the tests."""
        self._stack = ExitStack()
        directory = self._stack.enter_context(scratch_directory())
        self.postgres: Choice[Postgres] = Choice("PostgreSQL", postgres_candidates(os.environ), directory)
        candidates = kafka_candidates(os.environ, borrowers=processes)
        self.kafka: Choice[Kafka] = Choice("Kafka", candidates, directory, lent=lent_kafka)
        self._stack.callback(self.postgres.close)
        self._stack.callback(self.kafka.close)

    def close(self) -> None:
        """Stop them and remove their data."""
        self._stack.close()


_SERVICES = pytest.StashKey[Services]()


def pytest_configure(config: pytest.Config) -> None:
    """Choose the services; nothing is started yet."""
    lent = getattr(config, "workerinput", {}).get("kafka")
    processes = getattr(config.option, "numprocesses", None) or 1
    config.stash[_SERVICES] = Services(processes=processes, lent_kafka=LentKafka(**lent) if lent else None)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Where several processes share the tests, lend each the same Kafka: it would do little else than be there."""
    with suppress(pytest.fail.Exception):
        kafka = node.config.stash[_SERVICES].kafka.shared()
        node.workerinput["kafka"] = kafka.lend(int(node.gateway.id.removeprefix("gw")))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the services."""
    if _SERVICES in config.stash:
        config.stash[_SERVICES].close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which services are used and why."""
    services = config.stash[_SERVICES]
    return [services.postgres.describe(), services.kafka.describe()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which service was to be used and could not be started."""
    services = config.stash[_SERVICES]
    if failures := [*services.postgres.failures, *services.kafka.failures]:
        terminalreporter.section("services that did not start")
        for failure in failures:
            terminalreporter.line(failure)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with those that take long, so that none is left alone with one."""
    if hasattr(config, "workerinput"):
        items.sort(key=_time_limit, reverse=True)


def _time_limit(item: pytest.Item) -> float:
    slow, limit = item.get_closest_marker("slow"), item.get_closest_marker("timeout")
    return 0.0 if slow is None else float(limit.args[0]) if limit else 1.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the services that tests will ask for, so that no test's time limit pays for it."""
    if session.config.option.collectonly:
        return
    asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    services = session.config.stash[_SERVICES]
    for name, service in (("postgres", services.postgres), ("kafka", services.kafka)):
        if name in asked:
            with suppress(pytest.fail.Exception):
                service.shared()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let processes begin as a user begins them where a test is about them as a whole; elsewhere it is their work."""
    Process.forked = sys.platform == "linux" and "e2e" not in item.path.parts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Attach the logs of the connector's processes to the report of a failed test."""
    report = yield
    if report.failed:
        for process in Process.started:
            for stream in ("stderr", "stdout"):
                if lines := getattr(process, stream).splitlines()[-_LOG_TAIL:]:
                    report.sections.append((f"{stream} of {process.name} (pid {process.pid})", "\n".join(lines)))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Any:
    """End what the test left running, before its database and topic go."""
    Process.end_all()
    return (yield)


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Services:
    """The servers of this test run."""
    return request.config.stash[_SERVICES]


@pytest.fixture(scope="session")
def postgres(services: Services) -> Postgres:
    """The PostgreSQL that tests share."""
    return services.postgres.shared()


@pytest.fixture(scope="session")
def kafka(services: Services) -> Kafka:
    """The Kafka that tests share."""
    return services.kafka.shared()


@pytest.fixture
def durable_kafka(kafka: Kafka) -> Kafka:
    """The Kafka that tests share, if it keeps its messages on disk."""
    return _durable(kafka)


@pytest.fixture
def complete_kafka(kafka: Kafka) -> Kafka:
    """The Kafka that tests share, if it refuses what it should, and answers about groups and logs as Kafka does."""
    if not kafka.complete:
        pytest.skip(EMBEDDED_IS_INCOMPLETE)
    return kafka


@pytest.fixture
def own_postgres(services: Services) -> Postgres:
    """A PostgreSQL that the test may stop, crash and restart."""
    return services.postgres.private()


@pytest.fixture
def own_kafka(services: Services) -> Kafka:
    """A Kafka that the test may stop, kill and restart."""
    return services.kafka.private()


@pytest.fixture
def durable_own_kafka(own_kafka: Kafka) -> Kafka:
    """A Kafka that the test may stop, kill and restart, and that keeps its messages."""
    return _durable(own_kafka)


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    """A fresh, empty database."""
    with postgres.database() as database:
        yield database


@pytest.fixture
def own_database(own_postgres: Postgres) -> Iterator[Database]:
    """A fresh, empty database in a server that the test may crash."""
    with own_postgres.database() as database:
        yield database
        own_postgres.start()


@pytest.fixture
def topic(kafka: Kafka) -> Iterator[str]:
    """A fresh topic of six partitions."""
    with kafka.topic() as topic:
        yield topic


@pytest.fixture
def own_topic(own_kafka: Kafka) -> Iterator[str]:
    """A fresh topic of six partitions in a Kafka that the test may kill."""
    with own_kafka.topic() as topic:
        yield topic
        own_kafka.start()


@pytest.fixture
def connector_env(database: Database, kafka: Kafka, topic: str) -> dict[str, str]:
    """The CONNECTOR_ variables for a pipeline of its own through `database` and `topic`."""
    return environment(database, kafka, topic)


@pytest.fixture
def connector(connector_env: dict[str, str]) -> Callable[..., Process]:
    """Start `python -m connector <command>` in `connector_env`; keyword arguments are further CONNECTOR_ variables."""

    def start(*command: str, **variables: str) -> Process:
        return Process(*command, env=connector_env | variables).start()

    return start


def _durable(kafka: Kafka) -> Kafka:
    if not kafka.durable:
        pytest.skip(EMBEDDED_IS_FORGETFUL)
    return kafka
