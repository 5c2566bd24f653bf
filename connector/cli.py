"""The command line: reads the settings, puts the parts together, handles signals, and picks the exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from connector.errors import ConfigurationError, ConnectorError, ServiceUnavailable, SetupRequired
from connector.observability.logs import configure_logging, get_logger
from connector.ops.durations import seconds
from connector.settings import Settings, load_settings

if TYPE_CHECKING:
    from connector.handlers.chat_history import ChatHistoryHandler
    from connector.kafka import Kafka
    from connector.observability.health import Health
    from connector.observability.metrics import Metrics, SinkMetrics
    from connector.ops.doctor import DoctorOptions
    from connector.ops.proof import Proof
    from connector.ops.setup import SetupOptions
    from connector.ops.status import StatusOptions
    from connector.store.gauges import Gauges
    from connector.store.queries import Tables

DONE, FAILED, USAGE, UNAVAILABLE, CONFIGURATION = 0, 1, 2, 69, 78

_BOTH = frozenset({"database", "kafka"})
_DATABASE = frozenset({"database"})


class _Beside(Protocol):
    def close(self) -> None: ...


class _Loop(Protocol):
    def run(self) -> None: ...

    def stop(self) -> None: ...


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    options = _parser().parse_args(arguments)
    if os.getpid() == 1:
        # For a container's first process SIGTERM does nothing until a command has a handler of its own.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = options.command(options)
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"outbox-connector: {problem}\n")
        code = CONFIGURATION
    except SetupRequired as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = CONFIGURATION
    except ServiceUnavailable as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = UNAVAILABLE
    except ConnectorError as error:
        sys.stderr.write(f"outbox-connector: {error}\n")
        code = FAILED
    except KeyboardInterrupt:
        code = FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="outbox-connector",
        description="Carries a PostgreSQL outbox to Kafka and from there into chat history.",
        epilog="Every setting is an environment variable CONNECTOR_…; the README lists them.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    setup = commands.add_parser("setup", help="make schema, publication, slot and topics; safe to run again")
    setup.add_argument("--print-sql", action="store_true", help="print the SQL instead of running it")
    setup.set_defaults(command=_setup)

    reader = commands.add_parser("reader", help="publish the outbox to Kafka until stopped")
    reader.set_defaults(command=_reader)

    sink = commands.add_parser("sink", help="store Kafka's messages in chat history until stopped")
    sink.set_defaults(command=_sink)

    doctor = commands.add_parser("doctor", help="check everything that can be wrong; exits 1 if any check fails")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.set_defaults(command=_doctor)

    status = commands.add_parser("status", help="show backlog, slot and consumer lag")
    status.add_argument("--json", action="store_true", help="print JSON, one object a line")
    status.add_argument("--watch", action="store_true", help="show it again and again until Ctrl-C")
    status.add_argument("--interval", type=_interval, default=2.0, metavar="SECONDS", help="between two looks (2)")
    status.set_defaults(command=_status)

    _add_redrive(commands)
    _add_prune(commands)
    _add_reconcile(commands)
    _add_console(commands)
    _add_demo(commands)

    return parser


def _settings(needs: frozenset[str]) -> Settings:
    settings = load_settings(needs=needs)
    configure_logging(settings.log_level, settings.log_format, settings.secrets())
    return settings


def _arm_failpoints(settings: Settings) -> None:
    if not settings.failpoints:
        return
    from connector.failpoints import arm

    log = get_logger("failpoints")
    log.warning("failpoints_armed", points=list(settings.failpoints))
    arm(settings.failpoints, lambda point, action: log.warning("failpoint_reached", point=point, action=action))


def _tables(settings: Settings) -> Tables:
    from connector.store.queries import Tables

    return Tables(settings.outbox_table, settings.history_table)


def _kafka(settings: Settings) -> Kafka:
    from connector.kafka import Kafka

    return Kafka(
        settings.kafka_bootstrap_servers, settings.kafka_options, settings.producer_options, settings.consumer_options
    )


# --- setup -----------------------------------------------------------------------------------------------------------


def _setup_options(settings: Settings) -> SetupOptions:
    from connector.ops.setup import SetupOptions

    return SetupOptions(
        database_url=settings.database_url,
        replication_url=settings.replication_url,
        kafka=_kafka(settings),
        tables=_tables(settings),
        publication_name=settings.publication_name,
        slot_name=settings.slot_name,
        topics=settings.topics,
        dead_letter_topic=settings.dead_letter_topic,
        topic_partitions=settings.topic_partitions,
        topic_replication=settings.topic_replication,
        start_deadline_seconds=settings.start_deadline_seconds,
    )


def _setup(arguments: argparse.Namespace) -> int:
    from connector.ops.setup import print_sql, setup

    if arguments.print_sql:
        sys.stdout.write(print_sql(_setup_options(_settings(frozenset()))) + "\n")
        return DONE
    setup(_setup_options(_settings(_BOTH)), lambda line: print(line, flush=True))
    return DONE


# --- doctor and status -----------------------------------------------------------------------------------------------


def _quiet_settings(needs: frozenset[str] = _BOTH) -> Settings:
    """Read the settings for a command whose output tells everything that librdkafka would log."""
    settings = load_settings(needs=needs)
    level = settings.log_level if settings.log_level == "debug" else "critical"
    configure_logging(level, settings.log_format, settings.secrets())
    return settings


def _doctor_options(settings: Settings) -> DoctorOptions:
    from connector.ops.doctor import DoctorOptions
    from connector.ops.expectations import Expectations

    return DoctorOptions(
        database_url=settings.database_url,
        replication_url=settings.replication_url,
        kafka=_kafka(settings),
        group_instance_id=settings.group_instance_id,
        expected=Expectations(
            tables=_tables(settings),
            publication_name=settings.publication_name,
            slot_name=settings.slot_name,
            wal_budget=settings.wal_budget,
            topics=settings.topics,
            dead_letter_topic=settings.dead_letter_topic,
            topic_partitions=settings.topic_partitions,
            topic_replication=settings.topic_replication,
            group_id=settings.group_id,
        ),
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from connector.ops.doctor import examine
    from connector.ops.findings import as_json, as_lines, failed

    findings = examine(_doctor_options(_quiet_settings()))
    _say(as_json(findings) if arguments.json else "\n".join(as_lines(findings)))
    return FAILED if failed(findings) else DONE


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:  # noqa: PLR2004 - a refresh that people can follow; a day
        raise argparse.ArgumentTypeError("expected seconds, from 0.1 to 86400")
    return seconds


def _status_options(settings: Settings) -> StatusOptions:
    from connector.ops.status import StatusOptions

    return StatusOptions(
        database_url=settings.database_url,
        kafka=_kafka(settings),
        tables=_tables(settings),
        slot_name=settings.slot_name,
        topics=settings.topics,
        group_id=settings.group_id,
    )


def _status(arguments: argparse.Namespace) -> int:
    from connector.ops.status import Status, as_json, as_lines

    options = _status_options(_quiet_settings())
    if arguments.watch:
        return _watch(options, arguments.interval, as_objects=arguments.json)
    snapshot = Status(options).look()
    _say(as_json(snapshot) if arguments.json else "\n".join(as_lines(snapshot)))
    if arguments.json:
        sys.stderr.writelines(f"outbox-connector: {problem}\n" for problem in snapshot.problems)
    if snapshot.service_away:
        return UNAVAILABLE
    return FAILED if snapshot.problems else DONE


def _watch(options: StatusOptions, interval: float, *, as_objects: bool) -> int:
    from connector.ops.flow import Flow, Look
    from connector.ops.status import as_json
    from connector.ops.terminal import as_picture, as_text, can_be_drawn_on, watch

    flow = Flow(options)
    drawn = not as_objects and can_be_drawn_on(sys.stdout)

    def text_of(look: Look) -> str:
        if as_objects:
            return as_json(look.snapshot)
        return as_picture(look, flow, interval) if drawn else as_text(look)

    for number in (signal.SIGTERM, signal.SIGINT):
        # Also where it was started in the background, with SIGINT ignored.
        signal.signal(number, signal.default_int_handler)
    try:
        watch(flow.look, text_of, sys.stdout, interval, drawn=drawn)
    except KeyboardInterrupt:
        return DONE


# --- reconcile -------------------------------------------------------------------------------------------------------


def _add_reconcile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reconcile = commands.add_parser(
        "reconcile",
        help="prove that outbox, Kafka and history agree; exits 1 and names the messages if they do not",
        description="Compares outbox, Kafka and history, message by message, beside a running pipeline. It only reads,"
        " and takes part in no consumer group.",
    )
    reconcile.add_argument("--since", type=seconds, metavar="2h", help="only what was enqueued since (all)")
    reconcile.add_argument(
        "--stuck-after", type=seconds, default=600.0, metavar="10m", help="how long a message may take (10m)"
    )
    reconcile.add_argument("--json", action="store_true", help="print one JSON object; notes go to stderr")
    reconcile.add_argument(
        "--samples", type=int, default=10, metavar="N", help="damaged messages of a kind to name (10)"
    )
    reconcile.add_argument("--rate", type=_positive(float), metavar="N", help="rows a second at most")
    reconcile.add_argument(
        "--state", type=Path, metavar="FILE", help="keep the place in a file: an interrupted run goes on from there"
    )
    reconcile.set_defaults(command=_reconcile)


def _in_history() -> dict[str, ChatHistoryHandler]:
    """Return the handlers that store in the history table, by `biz_type`; where others store is not known."""
    from connector.handlers import load_handlers
    from connector.handlers.chat_history import ChatHistoryHandler

    return {
        biz_type: handler for biz_type, handler in load_handlers().items() if isinstance(handler, ChatHistoryHandler)
    }


def _reconcile(arguments: argparse.Namespace) -> int:
    from connector.ops.reconcile import ReconcileOptions, Reconciliation, as_json, as_lines

    settings = _quiet_settings()
    options = ReconcileOptions(
        database_url=settings.database_url,
        kafka=_kafka(settings),
        tables=_tables(settings),
        topics=settings.topics,
        group_id=settings.group_id,
        parsers={biz_type: handler.parse for biz_type, handler in _in_history().items()},
        strict=settings.key_ordering == "strict",
        since=arguments.since,
        stuck_after=arguments.stuck_after,
        rate=arguments.rate,
        most_samples=max(0, arguments.samples),
        state=arguments.state,
        start_deadline_seconds=settings.start_deadline_seconds,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # The place is kept whichever of the two comes.
        signal.signal(number, signal.default_int_handler)
    watched = sys.stderr.isatty()

    def tell(what: str) -> None:
        if watched:
            sys.stderr.write(f"\r\x1b[K{what} …")
            sys.stderr.flush()

    try:
        report = Reconciliation(options, tell).run()
    finally:
        if watched:
            sys.stderr.write("\r\x1b[K")
    _say(as_json(report) if arguments.json else "\n".join(as_lines(report)))
    if arguments.json:
        sys.stderr.writelines(f"outbox-connector: {note}\n" for note in report.notes)
    return DONE if report.ok else FAILED


# --- the two processes -----------------------------------------------------------------------------------------------


def _reader(_: argparse.Namespace) -> int:
    from connector.observability.health import Health
    from connector.observability.metrics import ReaderMetrics
    from connector.observability.tracing import tracing
    from connector.reader import Reader, ReaderOptions

    settings = _settings(_BOTH)
    _arm_failpoints(settings)
    metrics, health = ReaderMetrics(), Health()
    reader = Reader(
        ReaderOptions(
            database_url=settings.database_url,
            replication_url=settings.replication_url,
            kafka=_kafka(settings),
            tables=_tables(settings),
            slot_name=settings.slot_name,
            publication_name=settings.publication_name,
            topics=settings.topics,
            wal_budget=settings.wal_budget,
            shutdown_seconds=settings.shutdown_seconds,
            start_deadline_seconds=settings.start_deadline_seconds,
        ),
        metrics,
        health,
        tracing=(spans := tracing("reader")),
    )
    gauges = _gauges(settings, metrics)

    metrics.wal_budget_bytes.set(settings.wal_budget)
    metrics.on_scrape(
        lambda: metrics.show_slot(*(gauges.slot() or (None, None, None))),
        metrics.replication_lag_bytes,
        metrics.slot_retained_wal_bytes,
        metrics.slot_wal_status,
    )
    health.ready("reader", "starting")
    return _serve(settings, reader, metrics, health, [spans])


def _sink(_: argparse.Namespace) -> int:
    from connector.handlers import load_handlers
    from connector.observability.health import Health
    from connector.observability.metrics import SinkMetrics
    from connector.observability.tracing import tracing
    from connector.sink import Sink, SinkOptions

    settings = _settings(_BOTH)
    _arm_failpoints(settings)
    metrics, health = SinkMetrics(), Health()
    sink = Sink(
        SinkOptions(
            database_url=settings.database_url,
            kafka=_kafka(settings),
            tables=_tables(settings),
            topics=settings.topics,
            group_id=settings.group_id,
            group_instance_id=settings.group_instance_id,
            dead_letter_topic=settings.dead_letter_topic,
            strict=settings.key_ordering == "strict",
            shutdown_seconds=settings.shutdown_seconds,
            start_deadline_seconds=settings.start_deadline_seconds,
        ),
        load_handlers(),
        metrics,
        health,
        tracing=(spans := tracing("sink")),
    )
    gauges = _gauges(settings, metrics)
    metrics.on_scrape(lambda: metrics.held_messages.set(gauges.held()), metrics.held_messages)
    health.ready("sink", "starting")
    return _serve(settings, sink, metrics, health, [_start_proof(settings, metrics), spans])


def _start_proof(settings: Settings, metrics: SinkMetrics) -> Proof | None:
    from connector.ops.proof import Proof
    from connector.store.comparison import Comparison
    from connector.store.connections import connect

    if not settings.proof_seconds:
        return None
    proof = Proof(
        lambda: connect(settings.database_url, name="outbox-connector proof", prepare=False),
        lambda connection: Comparison(connection, _tables(settings)),
        sorted(_in_history()),
        settings.proof_seconds,
        metrics,
    )
    proof.start()
    return proof


def _gauges(settings: Settings, metrics: Metrics) -> Gauges:
    """Let the gauges that need the database be asked for at each scrape."""
    from connector.store.connections import connect
    from connector.store.gauges import Gauges

    gauges = Gauges(
        lambda: connect(settings.database_url, name="outbox-connector metrics", statement_seconds=5, prepare=False),
        _tables(settings),
        settings.slot_name,
    )

    def backlog() -> None:
        counts, _ = gauges.rows_by_status()
        for status, rows in counts.items():
            metrics.outbox_rows.labels(status=status).set(rows)
        # A row whose `created_at` is ahead of the clock is not older than one that has just come.
        metrics.oldest_unconsumed_age_seconds.set(max(0.0, gauges.oldest_unconsumed_age() or 0.0))

    metrics.on_scrape(backlog, metrics.outbox_rows, metrics.oldest_unconsumed_age_seconds)
    return gauges


def _serve(
    settings: Settings, loop: _Loop, metrics: Metrics, health: Health, beside: Sequence[_Beside | None] = ()
) -> int:
    """Run a loop with its HTTP endpoints until it ends or a signal asks it to; close what works beside it."""
    from connector.observability.http import HttpServer

    log = get_logger("cli")
    http = HttpServer(settings.http_port, health, metrics)
    on_signal = _stopper(loop.stop, settings.shutdown_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        loop.run()
    except ConnectorError as error:
        log.critical("stopped_by_error", kind=type(error).__name__, error=str(error))
        raise
    finally:
        for part in beside:
            if part is not None:
                part.close()
        http.close()
    log.info("stopped")
    return DONE


def _stopper(stop: Callable[[], None], within: float) -> Callable[[int, object], None]:
    """Return a signal handler: the first signal asks to drain, the second one, or the end of the time, does not ask."""

    def give_up() -> None:
        get_logger("cli").error("shutdown_overran", seconds=within)
        os._exit(FAILED)

    asked = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if asked.is_set():
            os._exit(FAILED)
        asked.set()
        timer = threading.Timer(within + 2.0, give_up)
        timer.daemon = True
        timer.start()
        stop()

    return on_signal


# --- redrive and prune -----------------------------------------------------------------------------------------------


def _add_redrive(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    redrive = commands.add_parser(
        "redrive",
        help="put dead or stuck messages back; shows what it would move unless --yes",
        description="Puts dead rows back to pending, with fresh attempts; the reader publishes them at once. Without"
        " --yes it only shows what it would move. Conditions narrow the selection together.",
        epilog="Durations are written like 90s, 10m, 2h or 7d. Each redrive is recorded in outbox_connector_redrives.",
    )
    which = redrive.add_argument_group("which messages (one at least)")
    which.add_argument("--id", type=_id, action="append", metavar="N", help="this outbox id; may be repeated")
    which.add_argument("--key", type=_utf8, metavar="KEY", help="messages of this key")
    which.add_argument("--biz-type", type=_utf8, metavar="TYPE", help="messages of this biz_type")
    which.add_argument(
        "--error-like",
        type=_utf8,
        metavar="TEXT",
        help="messages with this in their last error, in upper or lower case; %% stands for anything",
    )
    which.add_argument(
        "--older-than",
        type=seconds,
        metavar="DURATION",
        help="messages that are dead, or published, for longer than this (10m with --stuck, unless --id or --all)",
    )
    which.add_argument("--all", action="store_true", help="every dead message, or every published one with --stuck")
    which.add_argument(
        "--stuck", action="store_true", help="rows that are published and were never consumed, instead of dead ones"
    )
    which.add_argument(
        "--dead-letters",
        action="store_true",
        help="values in the dead-letter topic that named no row, back to their own topics; with --key, --error-like and"
        " --older-than",
    )
    how = redrive.add_argument_group("how")
    how.add_argument("--yes", action="store_true", help="do it")
    how.add_argument("--reason", type=_utf8, metavar="TEXT", help="why, for the record")
    how.add_argument("--rate", type=_positive(float), metavar="N", help="messages a second, at most (1000)")
    redrive.set_defaults(command=_redrive, usage_error=redrive.error)


def _redrive(arguments: argparse.Namespace) -> int:
    from connector.ops.redrive import RATE, STUCK_SECONDS, RedriveOptions, redrive, who
    from connector.outbox import Status
    from connector.store.redrives import Selection

    if arguments.dead_letters:
        return _redrive_letters(arguments)
    conditions = (arguments.id, arguments.key, arguments.biz_type, arguments.error_like, arguments.older_than)
    if not (arguments.all or arguments.stuck or any(condition is not None for condition in conditions)):
        arguments.usage_error(
            "say which messages: --id, --key, --biz-type, --error-like, --older-than, --stuck or --all"
        )
    older_than = arguments.older_than
    if arguments.stuck and older_than is None and not (arguments.id or arguments.all):
        # What was published a moment ago is on its way, not stuck.
        older_than = STUCK_SECONDS
    settings = _operator_settings(_DATABASE)
    redrive(
        RedriveOptions(
            database_url=settings.database_url,
            tables=_tables(settings),
            start_deadline_seconds=settings.start_deadline_seconds,
            selection=Selection(
                status=Status.PUBLISHED if arguments.stuck else Status.DEAD,
                ids=None if arguments.id is None else tuple(dict.fromkeys(arguments.id)),
                key=arguments.key,
                biz_type=arguments.biz_type,
                error_like=arguments.error_like,
                older_than=older_than,
            ),
            redriven_by=who(settings.group_instance_id),
            reason=arguments.reason,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        really=arguments.yes,
    )
    return DONE


def _redrive_letters(arguments: argparse.Namespace) -> int:
    from connector.ops.redrive import RATE, who
    from connector.ops.redrive_letters import LetterOptions, redrive_letters

    if arguments.id or arguments.biz_type is not None or arguments.stuck:
        arguments.usage_error("dead letters name no row: --id, --biz-type and --stuck do not go with --dead-letters")
    settings = _operator_settings(_BOTH)
    redrive_letters(
        LetterOptions(
            database_url=settings.database_url,
            kafka=_kafka(settings),
            tables=_tables(settings),
            topics=settings.topics,
            dead_letter_topic=settings.dead_letter_topic,
            start_deadline_seconds=settings.start_deadline_seconds,
            key=arguments.key,
            error_like=arguments.error_like,
            older_than=arguments.older_than,
            redriven_by=who(settings.group_instance_id),
            reason=arguments.reason,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        really=arguments.yes,
    )
    return DONE


def _add_prune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prune = commands.add_parser(
        "prune",
        help="remove rows that were consumed long ago",
        description="Removes consumed rows in small batches, beside a running pipeline. History is not touched.",
        epilog="Durations are written like 90s, 10m, 2h or 7d.",
    )
    prune.add_argument(
        "--older-than",
        type=seconds,
        default=seconds("7d"),
        metavar="DURATION",
        help="consumed for longer than this (7d)",
    )
    prune.add_argument("--dead", action="store_true", help="also rows that are dead for longer than that")
    prune.add_argument("--dry-run", action="store_true", help="only count them")
    prune.add_argument("--rate", type=_positive(float), metavar="N", help="rows a second, at most (5000)")
    prune.set_defaults(command=_prune)


def _prune(arguments: argparse.Namespace) -> int:
    from connector.ops.prune import RATE, PruneOptions, prune

    settings = _operator_settings(_DATABASE)
    prune(
        PruneOptions(
            database_url=settings.database_url,
            tables=_tables(settings),
            start_deadline_seconds=settings.start_deadline_seconds,
            older_than=arguments.older_than,
            dead=arguments.dead,
            rate=arguments.rate or RATE,
        ),
        sys.stdout,
        dry_run=arguments.dry_run,
    )
    return DONE


def _operator_settings(needs: frozenset[str]) -> Settings:
    """Read the settings for a command that changes things a batch at a time and may be interrupted between them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Also where it was started in the background, with SIGINT ignored.
        signal.signal(number, signal.default_int_handler)
    return _quiet_settings(needs)


def _id(text: str) -> int:
    value = int(text)
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no outbox id")
    return value


_id.__name__ = "outbox id"


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text


# --- the console -----------------------------------------------------------------------------------------------------


def _add_console(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    console = commands.add_parser(
        "console",
        help="serve a web page that shows the pipeline, finds messages and, with a token, redrives dead ones",
        description="Serves a web page on CONNECTOR_CONSOLE_HOST (127.0.0.1) and CONNECTOR_HTTP_PORT (8080) until"
        " stopped. It is read-only unless CONNECTOR_CONSOLE_TOKEN is set.",
    )
    console.set_defaults(command=_console)


def _console(_: argparse.Namespace) -> int:
    settings = _settings(_BOTH)
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ConfigurationError(
            [f"the console needs {' and '.join(missing)}, not installed here: pip install 'outbox-connector[console]'"]
        )
    from connector.console.server import Console, ConsoleOptions
    from connector.ops.redrive import who

    console = Console(
        ConsoleOptions(
            status=_status_options(settings),
            stored_types=tuple(_in_history()),
            operator=who(settings.group_instance_id),
            host=settings.console_host,
            port=settings.http_port,
            token=settings.console_token,
            shutdown_seconds=settings.shutdown_seconds,
        )
    )
    on_signal = _stopper(console.stop, settings.shutdown_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    console.run()
    get_logger("cli").info("stopped")
    return DONE


# --- the demo --------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the whole pipeline on this machine, watch it live, and have it proven",
        description="Starts PostgreSQL and a broker from Python packages, the reader and the sink, and an application"
        " that talks; shows it live, and proves at the end that every message is stored exactly once and in order."
        " Nothing is left behind.",
        epilog="Exit codes: 0 proven, 1 not proven or failed, 130 stopped by Ctrl-C, 69 a service does not answer,"
        " 78 something is not installed or not configured.",
    )
    demo.add_argument("--messages", type=_positive(int), default=3000, metavar="N", help="how many (default: 3000)")
    demo.add_argument(
        "--rate", type=_positive(float), default=250.0, metavar="N", help="messages a second, at most (default: 250)"
    )
    demo.add_argument(
        "--database",
        metavar="URL",
        help="a real PostgreSQL instead, in a database of its own that is dropped at the end",
    )
    demo.add_argument(
        "--kafka", metavar="HOST:PORT", help="a real Kafka instead, with topics of its own that are deleted at the end"
    )
    demo.set_defaults(command=_demo)


def _positive(number: type[int | float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value"
    return parse


def _demo(arguments: argparse.Namespace) -> int:
    from connector.demo.run import DemoOptions, run

    return run(DemoOptions(arguments.messages, arguments.rate, arguments.database, arguments.kafka))
