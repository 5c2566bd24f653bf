"""`reader` and `sink`: the two processes, with their probes and metrics, until a signal."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from connector.cli.commands import Commands
from connector.cli.composition import BOTH, in_history, process_settings, reader_options, sink_options, tables
from connector.cli.exits import DONE
from connector.cli.signals import stop_on_signals
from connector.errors import ConnectorError
from connector.observability.logs import get_logger

if TYPE_CHECKING:
    from connector.observability.health import Health
    from connector.observability.metrics import Metrics, SinkMetrics
    from connector.ops.proof import Proof
    from connector.settings import Settings
    from connector.sink import Sink
    from connector.store.gauges import Gauges


_ROUNDS_TO_HOLD = 5
"""For so many rounds what one sink has found stays shown where another one, which began later, finds less."""


class _Beside(Protocol):
    def close(self) -> None: ...


class _Loop(Protocol):
    def run(self) -> None: ...

    def stop(self) -> None: ...


def add(commands: Commands) -> None:
    """Add the two commands."""
    reader = commands.add_parser("reader", help="publish the outbox to Kafka until stopped")
    reader.set_defaults(command=_reader)
    sink = commands.add_parser("sink", help="store Kafka's messages in chat history until stopped")
    sink.set_defaults(command=_sink)


def _reader(_: argparse.Namespace) -> int:
    from connector.observability.health import Health
    from connector.observability.metrics import ReaderMetrics
    from connector.observability.tracing import tracing
    from connector.reader import Reader

    settings = process_settings(BOTH)
    _arm_failpoints(settings)
    metrics, health = ReaderMetrics(), Health()
    reader = Reader(
        reader_options(settings),
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
    from connector.sink import Sink

    settings = process_settings(BOTH)
    _arm_failpoints(settings)
    metrics, health = SinkMetrics(), Health()
    sink = Sink(
        sink_options(settings),
        load_handlers(),
        metrics,
        health,
        tracing=(spans := tracing("sink")),
    )
    gauges = _gauges(settings, metrics)
    metrics.on_scrape(lambda: metrics.held_messages.set(gauges.held()), metrics.held_messages)
    health.ready("sink", "starting")
    return _serve(settings, sink, metrics, health, [_start_proof(settings, metrics, sink), spans])


def _start_proof(settings: Settings, metrics: SinkMetrics, sink: Sink) -> Proof | None:
    from connector.ops.proof import Proof
    from connector.ops.redrive import who
    from connector.store.comparison import Comparison
    from connector.store.connections import connect
    from connector.store.proofs import record_proof

    if not settings.proof_seconds:
        return None
    by = who(settings.group_instance_id)
    proof = Proof(
        lambda: connect(settings.database_url, name="outbox-connector proof", prepare=False),
        lambda connection: Comparison(connection, tables(settings)),
        sorted(in_history()),
        settings.proof_seconds,
        metrics,
        record=lambda connection, verdict: record_proof(
            connection, tables(settings), "sink", by, verdict, holds=_ROUNDS_TO_HOLD * settings.proof_seconds
        ),
        batches=lambda: sink.batches,
    )
    proof.start()
    return proof


def _gauges(settings: Settings, metrics: Metrics) -> Gauges:
    """Let the gauges that need the database be asked for at each scrape."""
    from connector.store.connections import connect
    from connector.store.gauges import Gauges

    gauges = Gauges(
        lambda: connect(settings.database_url, name="outbox-connector metrics", statement_seconds=5, prepare=False),
        tables(settings),
        settings.slot_name,
    )

    def backlog() -> None:
        for status, rows in gauges.rows_by_status().by_status.items():
            metrics.outbox_rows.labels(status=status).set(rows)
        # A row whose `created_at` is ahead of the clock is not older than one that has just come.
        metrics.oldest_unconsumed_age_seconds.set(max(0.0, gauges.oldest_unconsumed_age() or 0.0))

    metrics.on_scrape(backlog, metrics.outbox_rows, metrics.oldest_unconsumed_age_seconds)
    return gauges


def _arm_failpoints(settings: Settings) -> None:
    if not settings.failpoints:
        return
    from connector.failpoints import arm

    log = get_logger("failpoints")
    log.warning("failpoints_armed", points=list(settings.failpoints))
    arm(settings.failpoints, lambda point, action: log.warning("failpoint_reached", point=point, action=action))


def _serve(
    settings: Settings, loop: _Loop, metrics: Metrics, health: Health, beside: Sequence[_Beside | None] = ()
) -> int:
    """Run a loop with its HTTP endpoints until it ends or a signal asks it to; close what works beside it."""
    from connector.observability.http import HttpServer

    log = get_logger("cli")
    http = HttpServer(settings.http_port, health, metrics)
    stop_on_signals(loop.stop, settings.shutdown_seconds)
    # Nearly all that rows are made of is freed by counting: looking for cycles so often takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
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
